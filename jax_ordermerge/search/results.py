"""The results of a search: what was tried, what was chosen, and what guards the choice."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from jax_ordermerge import layout as layouts
from jax_ordermerge.json_types import Json
from jax_ordermerge.search.candidates import MEMBER, SCALED_MEMBER, Candidate
from jax_ordermerge.search.measures import GuardedMeasure
from jax_ordermerge.search.successive_halving import Gap


@dataclasses.dataclass(frozen=True)
class CandidateResult:
    """Result of one candidate.

    Attributes:
        number: position in the order of proposals.
        name, kind: of the candidate.
        candidate: the candidate.
        loss: what the search minimizes, on the examples seen; None where it is not finite.
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
class Guard:
    """Whether the candidate with the lowest criterion may be shipped.

    Attributes:
        leader: its number.
        measures: it and the best member, by measure; empty where they are the same model.
        unmeasured: why a task cannot be measured on validation examples, by its name.
    """

    leader: int
    measures: Mapping[str, GuardedMeasure]
    unmeasured: Mapping[str, str]

    @property
    def worse(self) -> list[str]:
        """The measures that the candidate makes worse by more than the margin."""
        return [name for name, row in self.measures.items() if row.is_worse]


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        version: of the results, see `layout.read_search`.
        seed: of draws and subsets.
        settings: everything that decides the result, as JSON.
        examples: number of validation examples.
        tried: number of candidates.
        measured_fully: number of candidates that were measured on all examples.
        stopped_early: whether the last rounds were skipped because the leader could not change.
        winner: number of the candidate with the lowest criterion on all examples, or of the best
            member, where the guard refuses that.
        best_member: number of the member with the lowest criterion.
        scaled_member: of the best among the members at all lambdas.
        scaled_average: of the best among the average at all lambdas.
        guard: see `Guard`.
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
    scaled_member: int
    scaled_average: int
    guard: Guard
    edges: Sequence[str]
    candidates: Sequence[CandidateResult]
    seconds: float
    cache_hits: int
    claim: Json | None = None
    version: int = layouts.SEARCH_VERSION

    @property
    def winning_candidate(self) -> Candidate:
        """The winner."""
        return self.candidates[self.winner].candidate

    def to_dict(self) -> Json:
        """Return the result as JSON."""
        result = dataclasses.asdict(self)
        result["guard"]["worse"] = self.guard.worse
        for row in result["guard"]["measures"].values():
            # JSON has no infinities: a loss that diverged is no number
            row |= {key: value if math.isfinite(value) else None for key, value in row.items()}
        return result


def range_edges(winner: Candidate, candidates: Sequence[Candidate]) -> list[str]:
    """Return the numbers of a winner that are the lowest or highest tried: the best may lie beyond.

    Example:
        >>> tried = [Candidate("task_arithmetic", {"scale": x}) for x in (1.0, 1.5, 2.0)]
        >>> range_edges(tried[2], tried), range_edges(tried[1], tried)
        (['scale = 2'], [])
    """
    # base and members have no number that could be at an edge
    if winner.kind not in ("merge", SCALED_MEMBER):
        return []
    # of other methods a parameter of the same name may mean something else
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
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        # which member it is, is no place in a range
        and candidate.method != MEMBER
    }
    groups = {f"lambda({group})": scale for group, scale in candidate.groups.items()}
    return parameters | {"lambda": candidate.scale} | groups
