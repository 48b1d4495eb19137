"""Which merge to ship: the search of a run, and the test of its winner on other examples."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config.merge import AUTO, Search
from jax_ordermerge.data import source
from jax_ordermerge.experiment import export, losses, models
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.experiment.splits import find_overlaps
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import SearchLayout, write_json
from jax_ordermerge.report import findings
from jax_ordermerge.search import search
from jax_ordermerge.search.candidates import MEMBER, Candidate, Population
from jax_ordermerge.tree import Tree


class ChosenMerge(NamedTuple):
    """The winner of a search.

    Attributes:
        settings: method, seed, weights and parameters, as merge.json records them.
        params: its parameters.
    """

    settings: Json
    params: Tree


def choose_merge(
    ctx: RunContext,
    space: Search,
    layout: SearchLayout,
    population: Population | None = None,
    target: Path | None = None,
) -> ChosenMerge:
    """Choose a merge on the validation examples, compare it on the test examples, and export it.

    Args:
        ctx: of a run with trained members.
        space: what to choose among, and how.
        layout: for the loss cache and the results.
        population: read from the checkpoints by default.
        target: directory of the exported model; None exports nothing.
    """
    population = population or models.load_population(ctx)
    result = search.run_search(
        population,
        space,
        ctx.splits["validation"],
        functools.partial(losses.example_losses, ctx),
        seed=ctx.config.seed if space.seed is None else space.seed,
        layout=layout,
        provenance={
            "dtype": str(population.dtype),
            "train": ctx.splits["train"].digest,
            "run": ctx.config.name,
            "run_seed": ctx.config.seed,
        },
        log=ctx.log,
    )
    # Only now, for one winner and few rivals: a test split that took part in the choice among many
    # candidates would make the winner look better than it is.
    if len(ctx.splits.get("test") or ()) > 1:
        result = dataclasses.replace(result, claim=_compare_on_test(ctx, population, result))
    # written before the export: the export reads nothing from it, and a reader can see the choice
    # while a large model is still being written
    write_json(layout.results, result.to_dict())
    ctx.log(f"  {findings.search_sentence(result.to_dict())}")
    # built again: the search frees each candidate after its measurement
    merged = population.build(result.winning_candidate)
    if target is not None:
        export.export(ctx, AUTO, merged, _recipe(result), _origin(result), target)
    return ChosenMerge(_settings(result.winning_candidate), merged)


def with_validation_file(ctx: RunContext, path: Path) -> RunContext:
    """Return the context with validation examples read from a file, by the rules of the config."""
    # the rules for a file of held-out examples are those of the test split
    data = ctx.config.data.model_copy(update={"test": str(path), "test_limit": None})
    examples = source.load_examples(data, ctx.tokenizer, "test", seed=ctx.config.seed)
    assert examples is not None
    splits = ctx.splits | {"validation": examples}
    return dataclasses.replace(ctx, splits=splits, overlaps=find_overlaps(splits))


def _compare_on_test(ctx: RunContext, population: Population, result: search.SearchResult) -> Json:
    """Compare the winner with its rivals on the test examples, which had no part in the choice."""
    test = ctx.splits["test"]

    def measure(candidate: Candidate) -> losses.Losses:
        return losses.example_losses(ctx, population.build(candidate), test)

    # one model at a time in memory beside the population: the losses are kept, not the parameters
    members = [measure(Candidate(MEMBER, {"number": m})) for m in range(population.count)]
    tokens = members[0].counts
    winner = measure(result.winning_candidate).means
    rivals = {
        "best_member": members[result.best_member_number].means,
        # by example, so that the difference to the winner is paired as the others are
        "mean_member": np.mean([member.means for member in members], axis=0),
        "average": measure(Candidate("average")).means,
    }
    evaluation = ctx.config.evaluation
    against = paired.claim(
        winner, rivals, tokens, resamples=evaluation.bootstrap, seed=ctx.config.seed
    )
    loss = {
        name: float((means * tokens).sum() / tokens.sum())
        for name, means in {"winner": winner, **rivals}.items()
    }
    return {"examples": len(test), "loss": loss, "against": asdict(against)}


def _origin(result: search.SearchResult) -> str:
    """Return what the model card says about the choice."""
    kinds = {"base": "It is the base itself.", "member": "It is one of the members itself."}
    kind = kinds.get(result.winning_candidate.kind, "")
    return f"{findings.search_sentence(result.to_dict())} {kind}".strip()


def _settings(winner: Candidate) -> Json:
    """Return the settings of merge.json; factors of task vectors stand among the parameters."""
    lambdas = {} if winner.scale == 1 else {"lambda": winner.scale}
    lambdas |= {f"lambda({group})": factor for group, factor in winner.groups.items()}
    return {
        "method": winner.method,
        "seed": winner.seed,
        "weights": winner.weights,
        "parameters": {**winner.parameters, **lambdas},
    }


def _recipe(result: search.SearchResult) -> Json:
    winner = result.winning_candidate
    plain = winner.to_dict()
    return {
        "merge_method": winner.method,
        **{key: plain[key] for key in ("parameters", "weights", "seed")},
        "scale": winner.scale,
        "groups": dict(winner.groups),
        "chosen": {
            "among": len(result.candidates),
            "validation_examples": result.examples,
            "seed": result.seed,
        },
    }
