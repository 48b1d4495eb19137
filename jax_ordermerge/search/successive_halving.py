"""Successive halving of candidates on growing subsets of the same items. Numpy alone."""

import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from scipy import stats

# Of the paired tests of one round together: the probability that they drop the candidate of the
# lowest true loss although it belongs to the better half. It bounds neither the halving itself,
# which ranks means on few items and may well drop that candidate, nor all rounds together. What is
# guaranteed is that the winner is not worse than base, members and average on the validation items,
# because these are always measured on all of them.
LEVEL = 0.05
# Summed losses of candidate i on the items of subset r, float64[items of r].
SubsetLossFn = Callable[[int, int], np.ndarray]
# Called after each round with its number, the candidates that ran, and those that go on.
OnRound = Callable[[int, Sequence[int], Sequence[int]], None]
# Passes on the candidates of a round while it shows how many of them are measured.
Track = Callable[[Sequence[int], int], Iterable[int]]


def subset_sizes(items: int, smallest: int) -> list[int]:
    """Return the sizes of nested subsets, each about twice the one before, the last of all items.

    Example:
        >>> subset_sizes(100, 16), subset_sizes(10, 16)
        ([25, 50, 100], [10])
    """
    sizes = [items]
    # From the end, so that the last is exact and rounding falls on the small ones.
    while sizes[0] // 2 >= smallest:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def paired_gap(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return the weighted mean of `first - second` over items and its standard error.

    Args:
        first, second: [n], losses per token of the same items.
        weights: [n], tokens per item.

    Example:
        >>> weights = np.array([1.0, 1.0])
        >>> paired_gap(np.array([1.0, 2.0]), np.array([0.0, 2.0]), weights)
        (0.5, 0.5)
    """
    # A mean per token: items with more tokens weigh more, as in the training loss.
    share = weights / weights.mean()
    diverged = not np.isfinite(first).all(), not np.isfinite(second).all()
    # A model with a loss that is not finite is worse than any model without one.
    if any(diverged):
        return float("inf") * (diverged[0] - diverged[1]) if diverged[0] != diverged[
            1
        ] else 0.0, 0.0
    gaps = first - second
    estimate = float((share * gaps).mean())
    if len(gaps) < 2:
        return estimate, float("inf")
    # The mean is a ratio of two sums, so its error is that of the residuals of the ratio.
    return estimate, float((share * (gaps - estimate)).std(ddof=1) / np.sqrt(len(gaps)))


@dataclasses.dataclass(frozen=True)
class Gap:
    """Mean paired difference of losses.

    Attributes:
        estimate: mean difference per token.
        se: its standard error.
        examples: number of items that both candidates have seen.
    """

    estimate: float
    se: float
    examples: int


@dataclasses.dataclass
class Standing:
    """Progress of one candidate.

    Attributes:
        losses: losses per token of the items seen, in the order of the subsets.
        dropped: number of the round that it was dropped after, None while it runs.
    """

    losses: np.ndarray
    dropped: int | None = None


class SuccessiveHalving:
    """Losses of numbered candidates on growing subsets of the items.

    The subsets are nested and the same for all candidates: two candidates are always compared on
    the items that both have seen.

    Args:
        tokens: [n], the token count of each item, in the order of the subsets.
        sizes: see `subset_sizes`.
        measure: losses of a candidate on the items that a subset adds to the one before.
        track: called with the candidates of a round and its number; see `Track`.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        sizes: Sequence[int],
        measure: SubsetLossFn,
        track: Track = lambda numbers, round_number: numbers,
    ) -> None:
        self._tokens, self._sizes, self._measure = tokens, list(sizes), measure
        self._track = track
        self.standings: dict[int, Standing] = {}

    def measure_fully(self, number: int) -> None:
        """Measure a candidate on all items."""
        for subset in range(len(self._sizes)):
            self._extend(number, subset)

    def loss(self, number: int) -> float:
        """Return the mean loss on the items seen."""
        return self._mean(number, len(self.standings[number].losses))

    def leader(self, among: Collection[int] | None = None) -> int:
        """Return the candidate with the lowest loss on all items, of equal ones the first.

        Args:
            among: candidates to choose from, all by default.
        """
        complete = [
            number
            for number, standing in self.standings.items()
            if len(standing.losses) == self._sizes[-1] and (among is None or number in among)
        ]
        return min(complete, key=self.loss)

    def run(
        self, numbers: Sequence[int], on_round: OnRound, among: Collection[int] | None = None
    ) -> bool:
        """Run new candidates against each other and against the leader.

        After each round the better half goes on, less those that are significantly worse than the
        best.

        Args:
            numbers: candidates that have seen no item yet.
            on_round: called after each round but the last.
            among: candidates of which the leader is one, all by default. Those outside of it give
                nobody up: the best of a kind is then found also where another kind is better.

        Returns:
            Whether it ended before the last round because the leader could no longer change.
        """
        leader = self.leader(among)
        running = list(numbers)
        tests = len(numbers) + 1  # per round: each candidate, and the leader
        for subset, size in enumerate(self._sizes):
            for number in self._track(running, subset + 1):
                self._extend(number, subset)
            if size == self._sizes[-1]:
                break
            # The leader has seen all items, so it is compared on those of this round.
            ranked = sorted(running, key=lambda number: self._mean(number, size))
            best = min([leader, *ranked[:1]], key=lambda number: self._mean(number, size))
            half = ranked[: -(-len(ranked) // 2)]
            onward = [number for number in half if not self._is_worse(number, best, size, tests)]
            for number in set(running) - set(onward):
                self.standings[number].dropped = subset + 1
            on_round(subset + 1, running, onward)
            running = onward
            if not running:
                return True
            if len(running) == 1 and self._is_worse(leader, running[0], size, tests):
                # The only rival left is better than the leader: further rounds cannot change the
                # order, but the loss on all items is still needed.
                self.measure_fully(running[0])
                return True
        return False

    def value(self, number: int) -> float:
        """Return an estimate of the loss on all items.

        It is the loss of the leader, plus the paired difference on the items seen by both: subsets
        differ in difficulty, so means over different subsets cannot be compared.
        """
        leader, seen = self.leader(), len(self.standings[number].losses)
        return self.loss(leader) + self._mean(number, seen) - self._mean(leader, seen)

    def gap(self, number: int, rival: int) -> Gap:
        """Return the difference of the losses on the items that both have seen."""
        first, second = self.standings[number].losses, self.standings[rival].losses
        seen = min(len(first), len(second))
        return Gap(*paired_gap(first[:seen], second[:seen], self._tokens[:seen]), seen)

    def _is_worse(self, worse: int, better: int, size: int, tests: int) -> bool:
        """Test whether a candidate is worse than another: paired, one-sided, Bonferroni."""
        if worse == better:
            return False
        first, second = (self.standings[number].losses[:size] for number in (worse, better))
        estimate, error = paired_gap(first, second, self._tokens[:size])
        # Candidates that differ by a constant have no error at all.
        return estimate > 0 and (
            error == 0 or stats.t.sf(estimate / error, size - 1) < LEVEL / tests
        )

    def _extend(self, number: int, subset: int) -> None:
        start = 0 if subset == 0 else self._sizes[subset - 1]
        standing = self.standings.setdefault(number, Standing(np.empty(0)))
        # A candidate that was measured fully has seen this subset already.
        if len(standing.losses) == start:
            losses = self._measure(number, subset) / self._tokens[start : self._sizes[subset]]
            standing.losses = np.concatenate([standing.losses, losses])

    def _mean(self, number: int, size: int) -> float:
        tokens = self._tokens[:size]
        return float((self.standings[number].losses[:size] * tokens).sum() / tokens.sum())
