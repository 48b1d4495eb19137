"""The search: candidates of a space raced against each other and the members, on validation examples, and what came of it."""

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config.merge import Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import permutation
from jax_ordermerge.errors import UserError
from jax_ordermerge.search import sampling
from jax_ordermerge.search.candidates import (
    MEMBER,
    Candidate,
    Measure,
    Population,
    anchors,
    check,
    unique,
)
from jax_ordermerge.search.loss_cache import Journal
from jax_ordermerge.search.successive_halving import Race, subsets

SMALLEST_SPLIT = 8  # validation examples, below which a paired difference says nothing


class Found(NamedTuple):
    """What a search found.

    Attributes:
        winner: the candidate with the lowest loss on all validation examples.
        results: all of it, as plain data for JSON.
    """

    winner: Candidate
    results: dict[str, Any]


def check_apart(validation: Examples, others: dict[str, Examples]) -> None:
    """Refuse validation examples that are also examples of another split.

    Args:
        validation: the examples that a merge is chosen on.
        others: by the name of the split.

    Raises:
        UserError: some are, or they are too few.
    """
    if len(validation) < SMALLEST_SPLIT:
        raise UserError(
            f"{len(validation)} validation examples are too few to choose a merge on; set data.validation_examples to {SMALLEST_SPLIT} or more"
        )
    own = [tuple(row.tolist()) for row in validation.tokens]
    for name, examples in others.items():
        taken = {tuple(row.tolist()) for row in examples.tokens}
        shared = [validation.ids[place] for place, row in enumerate(own) if row in taken]
        if shared:
            raise UserError(
                f"{len(shared)} of {len(own)} validation examples are {name} examples too (the first is row {shared[0]}); a merge is"
                f" chosen on examples that are in no other split: remove them"
            )


def check_space(space: Search, members: int, model: ModelConfig, seed: int) -> None:
    """Refuse a space that no search could begin with, before anything is trained for it.

    Raises:
        UserError: a method, a parameter, a group of tensors, the grid or the sampler.
    """
    for one in sampling.firsts(space, members, seed):
        check(one, members, model)
    sampling.sampler(space, members, seed)


def find(
    stock: Population,
    space: Search,
    validation: Examples,
    measure: Measure,
    *,
    seed: int,
    directory: Path,
    of: dict[str, Any],
    log: Callable[[str], None],
) -> Found:
    """Choose among base, members, their average and the candidates of a space.

    All are measured on the same examples; the difference to the best is paired. Candidates run on growing subsets and half of them go
    on, so most see few examples; the winner, the members and the base have seen all. The same settings give the same result, also
    where a search was interrupted and continues.

    Args:
        stock: the population.
        space: what to try, and how.
        validation: examples that are in no other split (`check_apart`).
        measure: gives the losses of a model on examples.
        seed: of draws and subsets.
        directory: for journal.jsonl, the only file that is written.
        of: what else decides the losses (run, dtype), plain data.
        say: where one-line messages go.

    Raises:
        UserError: a candidate cannot be made, or the directory holds another search.
    """
    begun = time.perf_counter()
    source = sampling.sampler(space, stock.count, seed)
    rows = permutation(len(validation), seed, "search", "items")
    sizes = subsets(len(rows), space.smallest)
    parts = [
        validation.take(rows[start:end]) for start, end in zip([0, *sizes], sizes, strict=False)
    ]
    settings = {
        **of,
        "seed": seed,
        "space": space.model_dump(mode="json"),
        "validation": validation.digest,
    }
    with Journal(directory / "journal.jsonl", settings) as journal:
        hunt = _Hunt(stock, parts, measure, journal, log)
        hunt.begin(anchors(stock.count, seed), sizes)
        stopped = hunt.run(source)
    race, candidates = hunt.race, hunt.candidates
    winner = race.leader()
    members = [number for number, one in enumerate(candidates) if one.method == MEMBER]
    best = min(members, key=race.loss)
    whole = sum(len(one.losses) == sizes[-1] for one in race.standings.values())
    results = {
        "seed": seed,
        "settings": {**settings, "sizes": sizes},
        "examples": len(validation),
        "tried": len(candidates),
        "measured_whole": whole,
        "stopped_early": stopped,
        "winner": winner,
        "best_member": best,
        "edges": edges(candidates[winner], candidates),
        "candidates": [
            _row(race, number, one, winner, best) for number, one in enumerate(candidates)
        ],
        "seconds": time.perf_counter() - begun,
        "recalled": journal.taken,
    }
    return Found(candidates[winner], results)


def edges(winner: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return which numbers of a winner are the lowest or highest that were tried of its method: the best may lie beyond.

    Example:
        >>> tried = [Candidate("task_arithmetic", {"scale": x}) for x in (1.0, 1.5, 2.0)]
        >>> edges(tried[2], tried), edges(tried[1], tried)
        (['scale = 2'], [])
    """
    if winner.kind != "merge":
        return []
    own, found = _numbers(winner), []
    for name, value in own.items():
        tried = {
            numbers[name]
            for one in candidates
            if one.method == winner.method and name in (numbers := _numbers(one))
        }
        if len(tried) > 2 and value in (min(tried), max(tried)):
            found.append(f"{name} = {value:.4g}")
    return found


def _numbers(one: Candidate) -> dict[str, float]:
    own = {
        name: float(x)
        for name, x in one.parameters.items()
        if isinstance(x, (int, float)) and not isinstance(x, bool)
    }
    return own | {"lambda": one.scale} | {f"lambda({group})": x for group, x in one.groups.items()}


class _Hunt:
    """The candidates in the order that they came, and the race between them."""

    def __init__(
        self,
        stock: Population,
        parts: Sequence[Examples],
        measure: Measure,
        journal: Journal,
        log: Callable[[str], None],
    ) -> None:
        self._stock, self._parts, self._measure, self._journal, self._say = (
            stock,
            parts,
            measure,
            journal,
            log,
        )
        self.candidates: list[Candidate] = []
        self._tokens: list[np.ndarray] = []

    def begin(self, anchored: Sequence[Candidate], sizes: Sequence[int]) -> None:
        """Measure the candidates that are always there, on all examples."""
        self.candidates = list(anchored)
        # what losses are divided by is the same for all models: the base says it, which costs no merge
        tokens = [self._measure(self._stock.base, part)[1] for part in self._parts]
        self.race = Race(np.concatenate(tokens).astype(np.float64), sizes, self._sums)
        for number in range(len(anchored)):
            self.race.whole(number)
        self._say(f"  {sizes[-1]} validation examples, rounds of {', '.join(map(str, sizes))}")
        for number, one in enumerate(anchored):
            self._say(f"  {one.name}: {self.race.loss(number):.4f}")

    def run(self, source: sampling.Sampler) -> bool:
        """Race what a sampler gives until it gives no more; say whether the last heat ended because nothing could change."""
        stopped = False
        while asked := source.ask():
            for one in asked:
                check(one, self._stock.count, self._stock.model)
            known = {one.key: number for number, one in enumerate(self.candidates)}
            fresh = [one for one in unique(asked) if one.key not in known]
            numbers = list(range(len(self.candidates), len(self.candidates) + len(fresh)))
            self.candidates += fresh
            known |= {one.key: number for one, number in zip(fresh, numbers, strict=True)}
            stopped = self.race.heat(numbers, self._tell) if numbers else False
            leader = self.race.leader()
            self._say(
                f"  best of {len(self.candidates)}: {self.candidates[leader].name}, {self.race.loss(leader):.4f}"
            )
            source.tell([_finite(self.race.value(known[one.key])) for one in asked])
        return stopped

    def _tell(self, round_: int, ran: Sequence[int], onward: Sequence[int]) -> None:
        self._say(f"  round {round_}: {len(ran)} candidates, {len(onward)} go on")

    def _sums(self, number: int, round_: int) -> np.ndarray:
        one = self.candidates[number]

        def measured() -> np.ndarray:
            params = self._stock.build(one)
            sums, _ = self._measure(params, self._parts[round_])
            if one.kind != "base":
                jax.tree.map(
                    lambda leaf: leaf.delete(), params
                )  # at once, so that no two candidates are ever in memory
            return np.where(np.isnan(sums), np.inf, sums)

        return self._journal.recall(one.key, round_, measured)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 1e30


def _row(race: Race, number: int, one: Candidate, winner: int, best: int) -> dict[str, Any]:
    loss, standing = race.loss(number), race.standings[number]
    row: dict[str, Any] = {
        "number": number,
        "name": one.name,
        "kind": one.kind,
        "candidate": one.to_dict(),
        "loss": loss if math.isfinite(loss) else None,
        "examples": len(standing.losses),
        "dropped": standing.dropped,
    }
    for name, other in (("to_winner", winner), ("to_best_member", best)):
        estimate, error, seen = race.gap(number, other)
        known = math.isfinite(estimate) and math.isfinite(error)
        row[name] = {"estimate": estimate, "se": error, "examples": seen} if known else None
    return row
