"""Merges of the config, built from the population in device memory."""

from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import AUTO, MergeSpec, Trajectory, merge_name
from jax_ordermerge.experiment import data_dependent, losses, waves
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import read_json
from jax_ordermerge.merge import trajectory
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


def averaged_checkpoints(ctx: RunContext, settings: Trajectory | None) -> Json:
    """Return which checkpoints a merge averages, as merge.json and recipes have them; or nothing.

    Steps and weights, the oldest first: with them the merge can be made again.
    """
    if settings is None:
        return {}
    # not only their kind: the formula may change with a version, the numbers that were used do not
    shares = trajectory.weights(settings.weights, settings.last)
    steps = waves.merged_steps(ctx, settings)
    return {"checkpoints": {"steps": steps, "weights": shares.tolist()}}


def of_checkpoints(population: Population, spec: MergeSpec) -> Population:
    """Return the population that a merge is made of: the members, or averages of checkpoints."""
    # as plain data, which candidates of a search have too: they are written and compared as JSON
    plain = None if spec.checkpoints is None else spec.checkpoints.model_dump()
    return population.of_checkpoints(plain)


def build(ctx: RunContext, population: Population, spec: MergeSpec) -> data_dependent.Result:
    """Return a merge and its parameters for the record; see `data_dependent.merge_with_data`."""
    ingredients = of_checkpoints(population, spec)
    return data_dependent.merge_with_data(
        ctx,
        settings(ctx, spec),
        ingredients,
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
        # JSON has no tuples, and candidates are compared by value
        if winner["weights"] is not None:
            winner["weights"] = tuple(winner["weights"])
        return population.build(Candidate(**winner))
    spec = next(spec for spec in ctx.config.merge.methods if merge_name(spec) == name)
    return build(ctx, population, spec)[0]
