"""Which merge to ship: the search of a run, and the test of its winner on other examples."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ordermerge import layout as layouts
from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config.merge import AUTO, LOSS, Search, Trajectory
from jax_ordermerge.data import source
from jax_ordermerge.experiment import build_merges, export, models, search_measures
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.experiment.splits import find_overlaps
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import SearchLayout, write_json
from jax_ordermerge.report import search_findings
from jax_ordermerge.search import claim, search
from jax_ordermerge.search.candidates import SCALED_MEMBER, Candidate, Population, members_at
from jax_ordermerge.search.measures import Measure
from jax_ordermerge.tree import Tree


class ChosenMerge(NamedTuple):
    """The winner of a search.

    Attributes:
        settings: method, seed, weights and parameters, as merge.json records them.
        params: its parameters.
        checkpoints: see `build_merges.averaged_checkpoints`.
        ingredients: what it was made of: the members, or averages of their checkpoints.
    """

    settings: Json
    params: Tree
    checkpoints: Json
    ingredients: Population


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
    layouts.read_search(layout)  # refuses what another version has written
    population = population or models.load_population(ctx)
    measured, unmeasured = search_measures.make_measures(ctx)
    for name, reason in unmeasured.items():
        ctx.log(f"  {name} guards nothing: {reason}")
    result = search.run_search(
        population,
        space,
        ctx.splits["validation"],
        measured,
        unmeasured,
        seed=ctx.config.seed if space.seed is None else space.seed,
        layout=layout,
        provenance={
            "dtype": str(population.dtype),
            "train": ctx.splits["train"].digest,
            "run": ctx.config.name,
            "run_seed": ctx.config.seed,
            "tasks": search_measures.task_settings(ctx, measured),
        },
        log=ctx.log,
    )
    # Only now, for one winner and few rivals: a test split that took part in the choice among many
    # candidates would make the winner look better than it is.
    if len(ctx.splits.get("test") or ()) > 1:
        claim = _compare_on_test(ctx, population, result, measured)
        result = dataclasses.replace(result, claim=claim)
    # written before the export: the export reads nothing from it, and a reader can see the choice
    # while a large model is still being written
    write_json(layout.results, result.to_dict())
    for sentence in search_findings.sentences(result.to_dict()):
        ctx.log(f"  {sentence}")
    # built again: the search frees each candidate after its measurement
    winner = result.winning_candidate
    merged = population.build(winner)
    averaged = None if winner.checkpoints is None else Trajectory(**winner.checkpoints)
    checkpoints = build_merges.averaged_checkpoints(ctx, averaged)
    if target is not None:
        recipe = _recipe(result) | checkpoints
        export.export(ctx, AUTO, merged, recipe, _origin(result), target)
    ingredients = population.of_checkpoints(winner.checkpoints)
    return ChosenMerge(_settings(winner), merged, checkpoints, ingredients)


def with_validation_file(ctx: RunContext, path: Path) -> RunContext:
    """Return the context with validation examples read from a file, by the rules of the config."""
    # the rules for a file of held-out examples are those of the test split
    data = ctx.config.data.model_copy(update={"test": str(path), "test_limit": None})
    examples = source.load_examples(data, ctx.tokenizer, "test", seed=ctx.config.seed)
    assert examples is not None
    splits = ctx.splits | {"validation": examples}
    return dataclasses.replace(ctx, splits=splits, overlaps=find_overlaps(splits))


def _compare_on_test(
    ctx: RunContext,
    population: Population,
    result: search.SearchResult,
    measured: Mapping[str, Measure],
) -> Json:
    """Compare the winner with its rivals on the test examples, which had no part in the choice."""
    test = ctx.splits["test"]

    # By candidate, since the winner may be one of its rivals; one model at a time in memory beside
    # the population: the losses are kept, not the parameters.
    @functools.cache
    def sums(key: str, name: str) -> np.ndarray:
        with population.build_temporarily(candidates[key]) as params:
            return measured[name].sums(params, test)

    chosen = {
        claim.WINNER: result.winning_candidate,
        claim.WINNER_AT_ONE: result.winning_candidate.at_one(),
        claim.BEST_MEMBER: result.candidates[result.best_member].candidate,
        claim.SCALED_MEMBER: result.candidates[result.scaled_member].candidate,
        claim.AVERAGE: Candidate("average", seed=result.seed),
        claim.SCALED_AVERAGE: result.candidates[result.scaled_average].candidate,
    }
    members = members_at(population.count, 1.0)
    candidates = {candidate.key: candidate for candidate in (*chosen.values(), *members)}
    tokens = measured[LOSS].counts(test)
    means = {part: sums(candidate.key, LOSS) / tokens for part, candidate in chosen.items()}
    # by example, so that the difference to the winner is paired as the others are
    means[claim.MEAN_MEMBER] = np.mean([sums(x.key, LOSS) / tokens for x in members], axis=0)
    bootstrap = {"resamples": ctx.config.evaluation.bootstrap, "seed": ctx.config.seed}
    claimed = claim.make_claim(
        means, tokens, is_merge=result.winning_candidate.kind == "merge", **bootstrap
    )
    tasks = {}
    for name in [name for name in measured if name != LOSS]:
        winner, best = (
            1 - sums(chosen[part].key, name) for part in (claim.WINNER, claim.BEST_MEMBER)
        )
        tasks[name] = {
            "accuracy": [float(winner.mean()), float(best.mean())],
            # None where they are the same model: a test of zero differences has no meaning
            "difference": None
            if result.winner == result.best_member
            else asdict(paired.difference(winner, best, **bootstrap)),
            "mcnemar": asdict(paired.mcnemar(winner > 0.5, best > 0.5)),
        }
    return {"examples": len(test), **asdict(claimed), "tasks": tasks}


def _origin(result: search.SearchResult) -> str:
    """Return what the model card says about the choice."""
    winner = result.winning_candidate
    kinds = {
        "base": "It is the base itself.",
        "member": "It is one of the members itself.",
        SCALED_MEMBER: "It is one member with a longer or shorter task vector, no merge: base +"
        " lambda (member - base).",
    }
    return " ".join(
        [*search_findings.sentences(result.to_dict()), kinds.get(winner.kind, "")]
    ).strip()


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
