"""The search for a merge: successive halving over a space of candidates, on validation examples."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_ordermerge import console
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config.merge import Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.order import permutation
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import SearchLayout
from jax_ordermerge.search import measures, sampling
from jax_ordermerge.search.candidates import (
    MEMBER,
    Candidate,
    Population,
    baselines,
    check,
    members_at,
)
from jax_ordermerge.search.loss_cache import LossCache
from jax_ordermerge.search.measures import Measure
from jax_ordermerge.search.results import CandidateResult, Guard, SearchResult, range_edges
from jax_ordermerge.search.successive_halving import Gap, SuccessiveHalving, subset_sizes

MIN_EXAMPLES = 8  # with fewer validation examples a paired difference says nothing
_ALL = -1  # in the cache, in place of the number of a subset


def check_space(space: Search, members: int, model: ModelConfig, seed: int) -> None:
    """Refuse a space that no search can start with, before any training is spent on it.

    Raises:
        UserError: a method, parameter, group of tensors, the grid or the sampler is wrong.
    """
    # Also what a sampler proposes first: on a grid, values may not go together.
    proposed = sampling.make_sampler(space, members, seed).ask()
    for candidate in [*sampling.extreme_candidates(space, members, seed), *proposed]:
        check(candidate, members, model)


def _make_guard(
    loop: "SearchLoop",
    best: "BestCandidates",
    space: Search,
    measured: Mapping[str, Measure],
    sums: "_Sums",
    validation: Examples,
    unmeasured: Mapping[str, str],
) -> Guard:
    """Compare the best candidate with the best member in every measure, on all examples."""
    if best.leader == best.member:
        return Guard(best.leader, {}, unmeasured)
    unchosen = [name for name in measured if name not in space.measure]

    def values(number: int) -> dict[str, float]:
        candidate, rest = loop.candidates[number], dict[str, float]()
        if unchosen:
            totals = sums(candidate, unchosen, validation, _ALL).sum(axis=1)
            counts = [measured[name].counts(validation).sum() for name in unchosen]
            rest = dict(zip(unchosen, (totals / counts).tolist(), strict=True))
        return loop.measures(space.measure, number) | rest

    guarded = measures.guard_measures(values(best.leader), values(best.member), space)
    return Guard(best.leader, guarded, unmeasured)


class _Sums:
    """The sums of measures of candidates, read from the cache or measured.

    Args:
        population: the members and their base.
        measured: all measures by name.
        cache: sums that were measured before.
    """

    def __init__(
        self, population: Population, measured: Mapping[str, Measure], cache: LossCache
    ) -> None:
        self._population, self._measured, self._cache = population, measured, cache

    def __call__(
        self, candidate: Candidate, names: Sequence[str], examples: Examples, subset: int
    ) -> np.ndarray:
        """Return the sums of the measures `names`, float64[J, n]; `subset` names the examples."""
        # Not built at all where the cache has the sums.
        return self._cache.get_or_measure(
            candidate.key, subset, lambda: self._measure(candidate, names, examples)
        )

    def on_subsets(
        self, names: Sequence[str], examples: Examples, sizes: Sequence[int]
    ) -> Callable[[Candidate, int], np.ndarray]:
        """Return the function from a candidate and a subset to the sums on what the subset adds.

        Args:
            names: of the measures.
            examples: in the order of the subsets.
            sizes: of the nested subsets.
        """
        # the smallest batch: a pass of every measure has to hold what is measured together
        passes = subsets_by_pass(sizes, min(self._measured[name].batch for name in names))
        starts = [0, *sizes]
        by_pass = {
            part: examples.take(np.arange(starts[part.start], starts[part.stop]))
            for part in {*passes}
        }
        ahead: dict[tuple[str, int], np.ndarray] = {}

        def measure(candidate: Candidate, subset: int) -> np.ndarray:
            key, part = candidate.key, passes[subset]
            if (key, subset) not in ahead:
                # Always all subsets of the pass: a search that continues has the same bits.
                sums = self._measure(candidate, names, by_pass[part])
                ends = [starts[number] - starts[part.start] for number in part[1:]]
                for number, split in zip(part, np.split(sums, ends, axis=1), strict=True):
                    ahead[key, number] = split
            return ahead.pop((key, subset))

        return lambda candidate, subset: self._cache.get_or_measure(
            candidate.key, subset, lambda: measure(candidate, subset)
        )

    def _measure(
        self, candidate: Candidate, names: Sequence[str], examples: Examples
    ) -> np.ndarray:
        with self._population.build_temporarily(candidate) as params:
            return np.stack([self._measured[name].sums(params, examples) for name in names])


def subsets_by_pass(sizes: Sequence[int], batch: int) -> list[range]:
    """Return with which subsets each of the nested subsets is measured: those of one forward pass.

    Most candidates see the first subset alone, which fills a part of a pass. The next ones fill the
    rest of it at no cost.

    Args:
        sizes: of the subsets, ascending.
        batch: examples of one pass.

    Example:
        >>> subsets_by_pass([16, 32, 64, 128], 64)
        [range(0, 3), range(0, 3), range(0, 3), range(3, 4)]
    """
    passes, first = list[range](), 0
    while first < len(sizes):
        start = sizes[first - 1] if first else 0
        end = first + 1
        while end < len(sizes) and sizes[end] - start <= batch:
            end += 1
        passes += [range(first, end)] * (end - first)
        first = end
    return passes


def run_search(
    population: Population,
    space: Search,
    validation: Examples,
    measured: Mapping[str, Measure],
    unmeasured: Mapping[str, str],
    *,
    seed: int,
    layout: SearchLayout,
    provenance: Json,
    log: Callable[[str], None],
) -> SearchResult:
    """Choose among the base, the members, their average and the candidates of a space.

    All candidates are measured on the same examples, so differences are paired. The base, the
    members and the average see all examples. The others run on growing subsets and at most half of
    them go on each time, so most see few examples. The same settings give the same result, also
    where a search was interrupted and continues.

    Args:
        population: the members and their base.
        space: what to try, and how.
        validation: examples that are in no other split.
        measured: all measures by name: those of `space.measure`, and what the winner must not make
            worse.
        unmeasured: why a task is not among them, by its name.
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
    validation = validation.take(permutation(len(validation), seed, "search", "items"))
    sizes = subset_sizes(len(validation), space.smallest)
    # A cache of other settings would give losses of other models or examples.
    settings = {
        **provenance,
        "seed": seed,
        "space": space.model_dump(mode="json"),
        "validation": validation.digest,
    }
    with LossCache(layout.cache, settings) as cache:
        sums = _Sums(population, measured, cache)
        loop = SearchLoop(
            population.count,
            np.stack([measured[name].counts(validation) for name in space.measure]),
            sizes,
            sums.on_subsets(space.measure, validation, sizes),
            functools.partial(check, members=population.count, model=population.model),
            log,
        )
        stopped_early = loop.run(sampler, space, seed)
        best = loop.best()
        guard = _make_guard(loop, best, space, measured, sums, validation, unmeasured)
    # the lowest criterion is not enough: a merge that spoils another measure is not shipped
    winner = best.member if guard.worse else best.leader
    results = [loop.result(number, winner, best.member) for number in range(len(loop.candidates))]
    return SearchResult(
        seed=seed,
        settings={**settings, "sizes": sizes},
        examples=len(validation),
        tried=len(results),
        measured_fully=sum(result.examples == len(validation) for result in results),
        stopped_early=stopped_early,
        winner=winner,
        best_member=best.member,
        scaled_member=best.scaled_member,
        scaled_average=best.scaled_average,
        guard=guard,
        edges=range_edges(loop.candidates[winner], loop.candidates),
        candidates=results,
        seconds=time.perf_counter() - start,
        cache_hits=cache.hits,
    )


def _track(numbers: Sequence[int], round_number: int) -> Iterable[int]:
    """Show on a terminal how many candidates of a round are measured."""
    stage = f"search, round {round_number}"
    return console.track(numbers, len(numbers), stage, "candidates", transient=True)


class BestCandidates(NamedTuple):
    """Numbers of the best candidate of all, and of those that it has to beat."""

    leader: int
    member: int
    scaled_member: int
    scaled_average: int


class SearchLoop:
    """The candidates in the order of their proposal, and their successive halving.

    Models are known to it by their measures alone.

    Args:
        members: number of members.
        counts: float64[J, n], what the sums of each of J measures are divided by.
        sizes: of the nested subsets of items.
        sums: of a candidate on what a subset adds to the one before, float64[J, r].
        check: refuses a candidate that cannot be built.
        log: takes messages of one line.
    """

    def __init__(
        self,
        members: int,
        counts: np.ndarray,
        sizes: Sequence[int],
        sums: Callable[[Candidate, int], np.ndarray],
        check: Callable[[Candidate], None],
        log: Callable[[str], None],
    ) -> None:
        self._members, self._counts, self._sizes = members, counts, sizes
        self._check, self._log = check, log
        self._measure, self._measured = sums, dict[tuple[str, int], np.ndarray]()
        self.candidates: list[Candidate] = []
        self._criterion = measures.make_criterion(counts, self._member_sums)
        self.halving = SuccessiveHalving(self._criterion.weights, sizes, self._values, _track)

    def run(self, sampler: sampling.Sampler, space: Search, seed: int) -> bool:
        """Run the baselines, members and average at every lambda, and all batches of a sampler.

        Returns:
            Whether the last batch ended early because the leader could no longer change.
        """
        self._measure_baselines(baselines(self._members, seed))
        lambdas = [x for x in space.lambdas.values() if x != 1]
        # Each line by itself: of a kind that loses the best is needed as well, as a rival.
        self._run_line([x for scale in lambdas for x in members_at(self._members, scale)])
        self._run_line(
            [Candidate("task_arithmetic", {"scale": scale}, seed=seed) for scale in lambdas]
        )
        stopped_early = False
        while batch := sampler.ask():
            numbers, fresh = self._add(batch)
            stopped_early = bool(fresh) and self.halving.run(fresh, self._log_round)
            self._log_leader()
            # Estimates on all examples, not means over those seen: an optimizer compares candidates
            # that were dropped after different rounds.
            sampler.tell([self.halving.value(number) for number in numbers])
        # Members at the lambdas of the leader, too, by groups of tensors where it has such: its
        # lambdas are then no advantage of merging.
        leader = self.candidates[self.halving.leader()]
        if leader.kind == "merge" and (leader.is_scaled or leader.length != 1):
            self._run_line(members_at(self._members, leader.length, leader.groups))
            self._log_leader()
        return stopped_early

    def best(self) -> BestCandidates:
        """Return the best candidate, and the best of those that are no merge or the average."""
        plain = [i for i, candidate in enumerate(self.candidates) if candidate.kind == MEMBER]
        return BestCandidates(
            self.halving.leader(),
            self.halving.leader(plain),
            self.halving.leader(self._line(self.candidates[plain[0]])),
            self.halving.leader(self._line(Candidate("average"))),
        )

    def measures(self, names: Sequence[str], number: int) -> dict[str, float]:
        """Return the measures of a candidate on all items."""
        candidate = self.candidates[number]
        sums = [self._sums(candidate, subset) for subset in range(len(self._sizes))]
        means = np.concatenate(sums, axis=1).sum(axis=1) / self._counts.sum(axis=1)
        return dict(zip(names, means.tolist(), strict=True))

    def _measure_baselines(self, candidates: Sequence[Candidate]) -> None:
        """Measure the candidates of every search on all examples."""
        numbers, _ = self._add(candidates)
        # The winner is then never worse on validation than the best member.
        for number in console.track(
            numbers, len(numbers), "search, base and members", "models", transient=True
        ):
            self.halving.measure_fully(number)
        rounds = ", ".join(map(str, self._sizes))
        self._log(f"  {self._sizes[-1]} validation examples, rounds of {rounds}")
        for number, candidate in zip(numbers, candidates, strict=True):
            self._log(f"  {candidate.name}: {self.halving.loss(number):.4f}")

    def _run_line(self, candidates: Sequence[Candidate]) -> None:
        """Run one kind of models at several lambdas among themselves, to find the best of them."""
        _, fresh = self._add(candidates)
        if fresh:
            self.halving.run(fresh, lambda *_: None, among=self._line(candidates[0]))

    def _line(self, candidate: Candidate) -> list[int]:
        """Return the numbers of members at all lambdas, or of the average at all lambdas."""

        def is_in(rival: Candidate) -> bool:
            if candidate.method == MEMBER:
                return rival.method == MEMBER
            plain = rival.weights is None and not rival.groups and rival.checkpoints is None
            return plain and (
                (rival.method == "average" and not rival.parameters)
                or (rival.method == "task_arithmetic" and rival.parameters.keys() == {"scale"})
            )

        return [number for number, rival in enumerate(self.candidates) if is_in(rival)]

    def _add(self, batch: Sequence[Candidate]) -> tuple[list[int], list[int]]:
        """Return the numbers of a batch of candidates, and those of them that are new."""
        for candidate in batch:
            self._check(candidate)
        numbers = {candidate.key: number for number, candidate in enumerate(self.candidates)}
        first = len(self.candidates)
        for candidate in batch:
            # A sampler may propose a candidate again, and a batch may hold it twice.
            if candidate.key not in numbers:
                numbers[candidate.key] = len(self.candidates)
                self.candidates.append(candidate)
        return (
            [numbers[candidate.key] for candidate in batch],
            list(range(first, len(self.candidates))),
        )

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

    def _log_leader(self) -> None:
        leader = self.halving.leader()
        self._log(
            f"  best of {len(self.candidates)}: {self.candidates[leader].name}, "
            f"{self.halving.loss(leader):.4f}"
        )

    def _values(self, number: int, subset: int) -> np.ndarray:
        return self._criterion.values(self._sums(self.candidates[number], subset))

    def _sums(self, candidate: Candidate, subset: int) -> np.ndarray:
        if (candidate.key, subset) not in self._measured:
            sums = self._measure(candidate, subset)
            # NaN compares false with everything; infinity ranks last
            sums = np.where(np.isnan(sums), np.inf, sums)
            self._measured[candidate.key, subset] = sums
        return self._measured[candidate.key, subset]

    def _member_sums(self) -> list[np.ndarray]:
        return [
            np.concatenate(
                [self._sums(member, subset) for subset in range(len(self._sizes))], axis=1
            )
            for member in members_at(self._members, 1.0)
        ]
