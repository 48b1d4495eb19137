"""Merges of the config, built from the population in device memory."""

from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import AUTO, MergeSpec, merge_name
from jax_ordermerge.experiment import data_dependent, losses
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import read_json
from jax_ordermerge.search.candidates import Candidate, Population
from jax_ordermerge.tree import Tree


def exports(config: Config, population: int) -> bool:
    """Whether the merges of a population are written as models."""
    return population == 0 or config.merge.export == "all"


def settings(ctx: RunContext, spec: MergeSpec) -> Json:
    """Return method, seed, weights and parameters of a merge, as merge.json has them."""
    # The seed is the same in all populations: the member of which an element is drawn says nothing
    # about a member, so the merges of two populations are as independent as their members are.
    return {
        "method": spec.method,
        "seed": ctx.config.seed if spec.seed is None else spec.seed,
        "weights": spec.weights,
        "parameters": spec.parameters,
    }


def build(ctx: RunContext, population: Population, spec: MergeSpec) -> data_dependent.Result:
    """Return a merge and its parameters for the record; see `data_dependent.merge_with_data`."""
    return data_dependent.merge_with_data(
        ctx,
        settings(ctx, spec),
        population.members,
        population.base,
        lambda params: losses.example_losses(ctx, params, ctx.splits["validation"]).mean,
    )


def rebuild(ctx: RunContext, population: Population, name: str) -> Tree:
    """Return a merge that was recorded and not exported, with the bits that its files would have.

    Args:
        ctx: of the run and population.
        population: in device memory.
        name: of the merge.
    """
    if name == AUTO:
        results = read_json(ctx.layout.search.results)
        winner = results["candidates"][results["winner"]]["candidate"]
        if winner["weights"] is not None:
            winner["weights"] = tuple(winner["weights"])
        return population.build(Candidate(**winner))
    spec = next(spec for spec in ctx.config.merge.methods if merge_name(spec) == name)
    return build(ctx, population, spec)[0]
