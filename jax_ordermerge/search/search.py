"""The search for a merge: successive halving over a space of candidates, on validation examples."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config.merge import Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import permutation
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import SearchLayout
from jax_ordermerge.search import sampling
from jax_ordermerge.search.candidates import (
    MEMBER,
    Candidate,
    LossFn,
    Population,
    baselines,
    check,
)
from jax_ordermerge.search.loss_cache import LossCache
from jax_ordermerge.search.successive_halving import Gap, SuccessiveHalving, subset_sizes

MIN_EXAMPLES = 8  # with fewer validation examples a paired difference says nothing


@dataclasses.dataclass(frozen=True)
class CandidateResult:
    """Result of one candidate.

    Attributes:
        number: position in the order of proposals.
        name, kind: of the candidate.
        candidate: the candidate.
        loss: mean loss on the examples seen, None where it is not finite.
        examples: number of examples seen.
        dropped: round that it was dropped after, None where it reached the last.
        to_winner: its loss less that of the winner, None where it is not finite.
        to_best_member: its loss less that of the best member.
    """

    number: int
    name: str
    kind: str
    candidate: Candidate
    loss: float | None
    examples: int
    dropped: int | None
    to_winner: Gap | None
    to_best_member: Gap | None


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        seed: of draws and subsets.
        settings: everything that decides the result, as JSON.
        examples: number of validation examples.
        tried: number of candidates.
        measured_fully: number of candidates that were measured on all examples.
        stopped_early: whether the last rounds were skipped because the leader could not change.
        winner: number of the candidate with the lowest loss on all examples.
        best_member: number of the member with the lowest loss.
        edges: see `range_edges`.
        candidates: all candidates, by number.
        seconds: wall time.
        cache_hits: number of measurements that were read from the cache.
        claim: comparison of the winner with its rivals on examples that had no part in the choice,
            as JSON; None until it is made.
    """

    seed: int
    settings: Json
    examples: int
    tried: int
    measured_fully: int
    stopped_early: bool
    winner: int
    best_member: int
    edges: Sequence[str]
    candidates: Sequence[CandidateResult]
    seconds: float
    cache_hits: int
    claim: Json | None = None

    @property
    def winning_candidate(self) -> Candidate:
        """The winner."""
        return self.candidates[self.winner].candidate

    @property
    def best_member_number(self) -> int:
        """Number of the best member in the population."""
        return int(self.candidates[self.best_member].candidate.parameters["number"])

    def to_dict(self) -> Json:
        """Return the result as JSON."""
        return dataclasses.asdict(self)


def check_space(space: Search, members: int, model: ModelConfig, seed: int) -> None:
    """Refuse a space that no search can start with, before any training is spent on it.

    Raises:
        UserError: a method, parameter, group of tensors, the grid or the sampler is wrong.
    """
    # Methods check types and names, so one candidate per entry is enough.
    for candidate in sampling.first_candidates(space, members, seed):
        check(candidate, members, model)
    sampling.make_sampler(space, members, seed)


def run_search(
    population: Population,
    space: Search,
    validation: Examples,
    measure: LossFn,
    *,
    seed: int,
    layout: SearchLayout,
    provenance: Json,
    log: Callable[[str], None],
) -> SearchResult:
    """Choose among the base, the members, their average and the candidates of a space.

    All losses are measured on the same examples, so differences are paired. The base, the members
    and the average see all examples. The candidates run on growing subsets and at most half of
    them go on each time, so most see few examples. The same settings give the same result, also
    where a search was interrupted and continues.

    Args:
        population: the members and their base.
        space: what to try, and how.
        validation: examples that are in no other split.
        measure: losses of a model on examples.
        seed: of draws and subsets.
        layout: directory of the search. Only the cache in it is written.
        provenance: what else decides the losses (run, dtype), as JSON.
        log: takes messages of one line.

    Raises:
        UserError: a candidate cannot be built, or the directory holds another search.
    """
    start = time.perf_counter()
    sampler = sampling.make_sampler(space, population.count, seed)
    # Shuffled, because files are often sorted: the first subset would not be like all of it. By
    # seed, so that a search that continues has the same subsets.
    rows = permutation(len(validation), seed, "search", "items")
    sizes = subset_sizes(len(rows), space.smallest)
    subsets = [
        validation.take(rows[first:end]) for first, end in zip([0, *sizes], sizes, strict=False)
    ]
    # A cache of other settings would give losses of other models or examples.
    settings = {
        **provenance,
        "seed": seed,
        "space": space.model_dump(mode="json"),
        "validation": validation.digest,
    }
    with LossCache(layout.cache, settings) as cache:
        loop = SearchLoop(population, subsets, measure, cache, log)
        loop.measure_baselines(baselines(population.count, seed))
        stopped_early = loop.run(sampler)
    winner = loop.halving.leader()
    # Members have seen all examples, so their losses can be compared directly.
    members = [i for i, candidate in enumerate(loop.candidates) if candidate.method == MEMBER]
    best_member = min(members, key=loop.halving.loss)
    results = [loop.result(number, winner, best_member) for number in range(len(loop.candidates))]
    return SearchResult(
        seed=seed,
        settings={**settings, "sizes": sizes},
        examples=len(validation),
        tried=len(results),
        measured_fully=sum(result.examples == len(validation) for result in results),
        stopped_early=stopped_early,
        winner=winner,
        best_member=best_member,
        edges=range_edges(loop.candidates[winner], loop.candidates),
        candidates=results,
        seconds=time.perf_counter() - start,
        cache_hits=cache.hits,
    )


def range_edges(winner: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return the numbers of a winner that are the lowest or highest tried: the best may lie beyond.

    Example:
        >>> tried = [Candidate("task_arithmetic", {"scale": x}) for x in (1.0, 1.5, 2.0)]
        >>> range_edges(tried[2], tried), range_edges(tried[1], tried)
        (['scale = 2'], [])
    """
    if winner.kind != "merge":
        return []
    edges = []
    same_method = [_numbers(x) for x in candidates if x.method == winner.method]
    for name, value in _numbers(winner).items():
        tried = {numbers[name] for numbers in same_method if name in numbers}
        # Of two values each is an edge: that says nothing about the range.
        if len(tried) > 2 and value in (min(tried), max(tried)):
            edges.append(f"{name} = {value:.4g}")
    return edges


def _numbers(candidate: Candidate) -> dict[str, float]:
    parameters = {
        name: float(value)
        for name, value in candidate.parameters.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    groups = {f"lambda({group})": scale for group, scale in candidate.groups.items()}
    return parameters | {"lambda": candidate.scale} | groups


class SearchLoop:
    """The candidates in the order of their proposal, and their successive halving.

    Args:
        population: the members and their base.
        subsets: examples that each subset adds to the one before.
        measure: losses of a model on examples.
        cache: losses that were measured before.
        log: takes messages of one line.
    """

    def __init__(
        self,
        population: Population,
        subsets: Sequence[Examples],
        measure: LossFn,
        cache: LossCache,
        log: Callable[[str], None],
    ) -> None:
        self._population, self._subsets = population, subsets
        self._measure, self._cache, self._log = measure, cache, log
        self.candidates: list[Candidate] = []
        # the same for all models, so none has to run for them
        counts = np.concatenate([subset.loss_counts for subset in subsets])
        self._sizes = [int(size) for size in np.cumsum([len(subset) for subset in subsets])]
        self.halving = SuccessiveHalving(counts, self._sizes, self._sum_losses)

    def measure_baselines(self, candidates: Sequence[Candidate]) -> None:
        """Measure the candidates of every search on all examples."""
        self.candidates = list(candidates)
        # The winner is then never worse on validation than the best member.
        for number in range(len(candidates)):
            self.halving.measure_fully(number)
        rounds = ", ".join(map(str, self._sizes))
        self._log(f"  {self._sizes[-1]} validation examples, rounds of {rounds}")
        for number, candidate in enumerate(candidates):
            self._log(f"  {candidate.name}: {self.halving.loss(number):.4f}")

    def run(self, sampler: sampling.Sampler) -> bool:
        """Run all batches of a sampler.

        Returns:
            Whether the last batch ended early because the leader could no longer change.
        """
        stopped_early = False
        while batch := sampler.ask():
            for candidate in batch:
                check(candidate, self._population.count, self._population.model)
            numbers = {candidate.key: number for number, candidate in enumerate(self.candidates)}
            # A sampler may propose a candidate again, and a batch may hold it twice.
            fresh = list({x.key: x for x in batch if x.key not in numbers}.values())
            first = len(self.candidates)
            self.candidates += fresh
            numbers |= {candidate.key: first + i for i, candidate in enumerate(fresh)}
            stopped_early = bool(fresh) and self.halving.run(
                range(first, len(self.candidates)), self._log_round
            )
            leader = self.halving.leader()
            self._log(
                f"  best of {len(self.candidates)}: {self.candidates[leader].name}, "
                f"{self.halving.loss(leader):.4f}"
            )
            # Estimates on all examples, not means over those seen: an optimizer compares candidates
            # that were dropped after different rounds.
            sampler.tell([self.halving.value(numbers[candidate.key]) for candidate in batch])
        return stopped_early

    def result(self, number: int, winner: int, best_member: int) -> CandidateResult:
        """Return the result of a candidate, with its gaps to the winner and the best member."""
        loss, standing = self.halving.loss(number), self.halving.standings[number]
        candidate = self.candidates[number]
        return CandidateResult(
            number=number,
            name=candidate.name,
            kind=candidate.kind,
            candidate=candidate,
            loss=loss if math.isfinite(loss) else None,
            examples=len(standing.losses),
            dropped=standing.dropped,
            to_winner=self._gap(number, winner),
            to_best_member=self._gap(number, best_member),
        )

    def _gap(self, number: int, rival: int) -> Gap | None:
        gap = self.halving.gap(number, rival)
        # JSON has no infinities: a loss that diverged has no gap.
        return gap if math.isfinite(gap.estimate) and math.isfinite(gap.se) else None

    def _log_round(self, number: int, ran: Sequence[int], onward: Sequence[int]) -> None:
        self._log(f"  round {number}: {len(ran)} candidates, {len(onward)} go on")

    def _sum_losses(self, number: int, subset: int) -> np.ndarray:
        candidate = self.candidates[number]

        # Not built at all where the cache has the losses.
        def measure() -> np.ndarray:
            with self._population.build_temporarily(candidate) as params:
                sums, _ = self._measure(params, self._subsets[subset])
            # NaN compares false with everything; infinity ranks last.
            return np.where(np.isnan(sums), np.inf, sums)

        return self._cache.get_or_measure(candidate.key, subset, measure)
