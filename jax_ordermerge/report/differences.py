"""Paired comparisons of the merges of a run with its members and with the average."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.paired import Difference, McNemar
from jax_ordermerge.analysis.populations import PopulationContrast, population_contrast
from jax_ordermerge.analysis.result import Missing, or_missing
from jax_ordermerge.json_types import Json

# `average` is also the name of the merge that the others are compared with.
MEAN_MEMBER, BEST_MEMBER, AVERAGE = "mean_member", "best_member", "average"
SCALED_MEMBER = "scaled_member"
RIVALS = {
    MEAN_MEMBER: "the mean member",
    BEST_MEMBER: "the best member by loss",
    SCALED_MEMBER: "the best member at its own lambda",
    AVERAGE: "the average",
}


@dataclass(frozen=True)
class Measure:
    """Differences of one merge to its rivals, in its loss or in the answers of one task.

    Attributes:
        gaps: merge less rival, by rival.
        mcnemar: mid-p tests of correct answers, by rival; of single models only.
        holm: p values corrected over all comparisons of the run, by rival.
    """

    gaps: dict[str, Difference] = field(default_factory=dict)
    mcnemar: dict[str, McNemar] = field(default_factory=dict)
    holm: dict[str, float] = field(default_factory=dict)

    def p(self, rival: str) -> float:
        """Return the p value that counts: McNemar's where there is one, else the t-test's."""
        return (self.mcnemar.get(rival) or self.gaps[rival]).p


@dataclass(frozen=True)
class MergeComparison:
    """One merge, or all seeds of one.

    Attributes:
        names: of the merges.
        measures: by task; None stands for the loss. A task is absent where the models were
            evaluated on different items.
    """

    names: list[str]
    measures: dict[str | None, Measure]

    @property
    def loss(self) -> Measure | None:
        """Differences in loss, None where it was measured on different items."""
        return self.measures.get(None)


@dataclass(frozen=True)
class BestMember:
    """The member of the lowest loss on the "validation" examples, else on the "test" examples."""

    name: str
    chosen_on: str


@dataclass(frozen=True)
class Comparison:
    """All merges of a run against their rivals."""

    best: BestMember | None = None
    merges: dict[str, MergeComparison] = field(default_factory=dict)


def compare(
    models: Sequence[Json],
    items: Mapping[str, Json],
    *,
    resamples: int,
    seed: int,
    merge: Json | None = None,
    scaled_member: Json | None = None,
) -> Comparison:
    """Compare every merge with the mean member, the best one and the average, item by item.

    Merges that differ only in their seed are compared as one, by their mean on each item, with
    their spread in the error.

    Args:
        models: of evaluations.json.
        items: for each model its evaluations/{name}.json: `losses`, `ids`, `tasks`; with
            `tokens`, one number per item, loss differences are means over tokens.
        resamples: bootstrap resamples of the items.
        seed: of the run.
        merge: merge.json, which names the seeds; None compares every merge by itself.
        scaled_member: `losses`, `ids` and `tokens` of the member at the lambda that validation
            prefers, which is among the controls; None where it was not measured.
    """
    members = [model for model in models if model["kind"] == "member"]
    if not members:
        return Comparison()
    best = best_member(members)
    merges = [
        model["name"] for model in models if model["kind"] == "merge" and model["name"] in items
    ]
    comparisons: dict[str, MergeComparison] = {}
    # the mean member is a mean over all of them, or none
    if all(model["name"] in items for model in members):
        for name, seeds in seed_groups(merges, merge).items():
            rivals = {
                MEAN_MEMBER: [items[model["name"]] for model in members],
                BEST_MEMBER: [items[best.name]],
            }
            # the plain average is the merge that every other one has to beat
            if name != AVERAGE and AVERAGE in merges:
                rivals[AVERAGE] = [items[AVERAGE]]
            # a merge has to gain more than one member gains by another length
            if scaled_member is not None:
                rivals[SCALED_MEMBER] = [scaled_member]
            of_seeds = [items[seed_name] for seed_name in seeds]
            comparisons[name] = MergeComparison(seeds, {})
            for task in (None, *of_seeds[0].get("tasks", ())):
                if measure := _measure(task, of_seeds, rivals, resamples, seed):
                    comparisons[name].measures[task] = measure
    _correct(comparisons)
    return Comparison(best, comparisons)


def over_populations(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the means of the differences of several populations, with t intervals over them.

    Args:
        comparisons: of two populations or more. A difference that one of them lacks, or that has
            no error over populations, is left out; the best member is that of the first.
    """
    merges: dict[str, MergeComparison] = {}
    for name, merge in comparisons[0].merges.items():
        same = [part.merges[name] for part in comparisons if name in part.merges]
        merges[name] = MergeComparison(merge.names, {})
        for task in merge.measures:
            measures = [part.measures[task] for part in same if task in part.measures]
            pooled = Measure()
            for rival in merge.measures[task].gaps:
                gaps = [measure.gaps[rival] for measure in measures if rival in measure.gaps]
                if len(gaps) == len(comparisons):
                    over = or_missing(population_contrast, [gap.estimate for gap in gaps])
                    if not isinstance(over, Missing):
                        pooled.gaps[rival] = of_populations(over)
            if pooled.gaps:
                merges[name].measures[task] = pooled
    _correct(merges)
    return Comparison(comparisons[0].best, merges)


def of_populations(over: PopulationContrast) -> Difference:
    """Return a contrast over populations as a difference whose `n` counts populations."""
    return Difference(over.estimate, over.se, over.low, over.high, over.p, over.populations)


def seed_groups(names: Collection[str], merge: Json | None) -> dict[str, list[str]]:
    """Group merges that differ only in their seed.

    Args:
        names: of the merges to group.
        merge: merge.json. Names that end in `-seedS` form a group where method, weights,
            parameters and checkpoints are the same. None groups nothing.

    Returns:
        Names of merges by group; a merge without a group keeps its name.

    Example:
        >>> rows = [
        ...     {"name": f"drawn-seed{seed}", "method": "selection", "seed": seed}
        ...     for seed in (0, 1)
        ... ]
        >>> seed_groups(["average", "drawn-seed0", "drawn-seed1"], {"merges": rows})
        {'average': ['average'], 'drawn': ['drawn-seed0', 'drawn-seed1']}
    """
    rows = {row["name"]: row for row in (merge or {}).get("merges", ())}
    by_settings: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        row = rows.get(name, {})
        stem = name.removesuffix(f"-seed{row.get('seed')}")
        # as text: weights and parameters are lists and dicts, which cannot be keys
        settings = (str(row.get(key)) for key in ("method", "weights", "parameters", "checkpoints"))
        by_settings.setdefault((stem, *settings), []).append(name)
    groups, used = {}, set(names)
    for (stem, *_), members in by_settings.items():
        # another merge may have the name of the stem
        group = members[0] if len(members) == 1 else ", ".join(members) if stem in used else stem
        groups[group] = members
        used.add(group)
    return groups


def best_member(members: Sequence[Json]) -> BestMember:
    """Return the best of the summaries of members, by validation loss where all have one."""
    # A member chosen on the test split looks better on it than it is; the pages then say so.
    validated = all(model.get("validation_loss") is not None for model in members)
    key = "validation_loss" if validated else "loss"
    with_loss = [model for model in members if model.get(key) is not None]
    best = min(with_loss, key=lambda model: float(model[key])) if with_loss else members[0]
    return BestMember(best["name"], "validation" if validated else "test")


def _measure(
    task: str | None,
    seeds: Sequence[Json],
    rivals: Mapping[str, Sequence[Json]],
    resamples: int,
    seed: int,
) -> Measure | None:
    """Compare the mean over the seeds of a merge with the mean over the models of each rival.

    Returns:
        None where the models have no results, or results on different items. An average on other
        items, and a member at its own lambda, which has no answers to tasks, are only left out.
    """
    ids, _ = _items(seeds[0], task)
    rivals = {
        name: models
        for name, models in rivals.items()
        if name not in (AVERAGE, SCALED_MEMBER) or _items(models[0], task)[0] == ids
    }
    # Item by item means by position: another order of the same items is refused, too.
    for model in (model for models in (seeds, *rivals.values()) for model in models):
        model_ids, results = _items(model, task)
        if model_ids != ids or len(results) < 2:
            return None

    def stack(models: Sequence[Json]) -> np.ndarray:
        return np.array([_items(model, task)[1] for model in models])

    # Weighted by tokens the difference is that of the losses in the tables, which are means over
    # all tokens of a split.
    weights = seeds[0].get("tokens") if task is None else None
    values, measure = stack(seeds), Measure()
    for name, models in rivals.items():
        reference = stack(models).mean(axis=0)
        gap = paired.difference(
            values.mean(axis=0), reference, weights=weights, resamples=resamples, seed=seed
        )
        if len(seeds) > 1:
            # the mean over seeds is as uncertain as the seeds differ, however many the items
            by_seed = np.average(values - reference, axis=1, weights=weights)
            gap = paired.over_seeds(gap, by_seed)
        elif task is not None and name != MEAN_MEMBER:
            # Only the answer of one model is correct or not: means keep the t-test.
            measure.mcnemar[name] = paired.mcnemar(values[0] > 0.5, reference > 0.5)
        measure.gaps[name] = gap
    return measure


def _items(model: Json, task: str | None) -> tuple[Sequence[object], Sequence[float]]:
    """Return ids and values of a model: its losses, or 1 for each correct answer of a task."""
    if task is None:
        return model.get("ids", ()), model.get("losses") or ()
    rows = model.get("tasks", {}).get(task, ())
    return [row["id"] for row in rows], [float(row["correct"]) for row in rows]


def _correct(merges: Mapping[str, MergeComparison]) -> None:
    """Correct p values over all merges, measures and rivals: fill `Measure.holm`."""
    # One family: a reader looks for the best verdict of the page, in whichever column it stands.
    tests = [
        (measure, rival)
        for comparison in merges.values()
        for measure in comparison.measures.values()
        for rival in measure.gaps
    ]
    corrected = paired.holm([measure.p(rival) for measure, rival in tests])
    for (measure, rival), p in zip(tests, corrected, strict=True):
        measure.holm[rival] = p
