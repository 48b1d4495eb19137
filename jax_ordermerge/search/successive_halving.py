"""A race on the same items: losses of candidates on growing subsets, who goes on, and who may still win. Numpy alone."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

LEVEL = 0.05  # the chance, over all candidates of a round together, that the true leader is dropped for a difference of chance
# losses of candidate i on the items of subset r, float64[items]
Measure = Callable[[int, int], np.ndarray]


def subsets(items: int, smallest: int) -> list[int]:
    """Return the sizes of growing subsets, each about twice the one before, the last of them all items.

    Example:
        >>> subsets(100, 16), subsets(10, 16)
        ([25, 50, 100], [10])
    """
    sizes = [items]
    while sizes[0] // 2 >= smallest:
        sizes.insert(0, -(-sizes[0] // 2))
    return sizes


def gap(first: np.ndarray, second: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Return the weighted mean of `first - second` over items, and its standard error (of a ratio of means).

    Args:
        first, second: [n], losses a token (or an item) of the same items.
        weights: [n], tokens an item.

    Example:
        >>> estimate, error = gap(np.array([1.0, 2.0]), np.array([0.0, 2.0]), np.array([1.0, 1.0]))
        >>> estimate, error
        (0.5, 0.5)
    """
    share = weights / weights.mean()
    broken = not np.isfinite(first).all(), not np.isfinite(second).all()
    if any(broken):  # a model whose losses are no numbers is worse than any other
        return float("inf") * (broken[0] - broken[1]) if broken[0] != broken[1] else 0.0, 0.0
    gaps = first - second
    estimate = float((share * gaps).mean())
    if len(gaps) < 2:
        return estimate, float("inf")
    return estimate, float((share * (gaps - estimate)).std(ddof=1) / np.sqrt(len(gaps)))


@dataclasses.dataclass
class Standing:
    """How far a candidate came.

    Attributes:
        losses: losses a token of the items seen, in the order of the race.
        dropped: number of the round after which it went no further, None while it runs.
    """

    losses: np.ndarray
    dropped: int | None = None


class Race:
    """Candidates by number, with their losses on the items that they have seen, which are the same for all that saw as many."""

    def __init__(self, tokens: np.ndarray, sizes: Sequence[int], measure: Measure) -> None:
        """Begin without candidates.

        Args:
            tokens: [n], what the losses of an item are divided by, in the order of the race.
            sizes: from `subsets`.
            measure: gives the summed losses of a candidate on the items between two sizes.
        """
        self._tokens, self._sizes, self._measure = tokens, list(sizes), measure
        self.standings: dict[int, Standing] = {}

    def whole(self, number: int) -> None:
        """Measure a candidate on all items."""
        for round_ in range(len(self._sizes)):
            self._extend(number, round_)

    def loss(self, number: int) -> float:
        """Return the mean loss on the items seen."""
        return self._mean(number, len(self.standings[number].losses))

    def leader(self) -> int:
        """Return the number with the lowest loss on all items; of equal ones the first that was measured."""
        return min(self._whole(), key=self.loss)

    def heat(
        self, numbers: Sequence[int], tell: Callable[[int, list[int], list[int]], None]
    ) -> bool:
        """Run candidates against each other and the leader: half of them go on after each round, and none that is told from the best.

        Args:
            numbers: of candidates that have seen nothing yet.
            tell: is told after each round its number, who ran, and who goes on.

        Returns:
            Whether it ended before the last round, because the leader could no longer change.
        """
        standing = self.leader()
        running = list(numbers)
        last = len(self._sizes) - 1
        for round_, size in enumerate(self._sizes):
            for number in running:
                self._extend(number, round_)
            if round_ == last:
                break
            ranked = sorted(running, key=lambda number: self._mean(number, size))
            best = min([standing, *ranked[:1]], key=lambda number: self._mean(number, size))
            half = ranked[: -(-len(ranked) // 2)]
            onward = [
                number for number in half if not self._told(number, best, size, len(numbers) + 1)
            ]
            for number in set(running) - set(onward):
                self.standings[number].dropped = round_ + 1
            tell(round_ + 1, running, onward)
            running = onward
            if not running:
                return True
            if len(running) == 1 and self._told(standing, running[0], size, len(numbers) + 1):
                self.whole(
                    running[0]
                )  # nobody else is left; what remains is to know its loss on all items
                return True
        return False

    def value(self, number: int) -> float:
        """Return an estimate of the loss on all items: the leader's, and the difference to it on the items seen by both."""
        leader, seen = self.leader(), len(self.standings[number].losses)
        return self.loss(leader) + self._mean(number, seen) - self._mean(leader, seen)

    def gap(self, number: int, other: int) -> tuple[float, float, int]:
        """Return the mean difference to another candidate on the items seen by both, its standard error, and their number."""
        seen = min(len(self.standings[one].losses) for one in (number, other))
        first, second = (self.standings[one].losses[:seen] for one in (number, other))
        return *gap(first, second, self._tokens[:seen]), seen

    def _whole(self) -> list[int]:
        return [
            number for number, one in self.standings.items() if len(one.losses) == self._sizes[-1]
        ]

    def _told(self, worse: int, better: int, size: int, among: int) -> bool:
        """Say whether a candidate is told to be worse than another, by a one-sided paired test corrected for the number of tests."""
        if worse == better:
            return False
        first, second = (self.standings[one].losses[:size] for one in (worse, better))
        estimate, error = gap(first, second, self._tokens[:size])
        return estimate > 0 and (
            error == 0 or stats.t.sf(estimate / error, size - 1) < LEVEL / among
        )

    def _extend(self, number: int, round_: int) -> None:
        start = 0 if round_ == 0 else self._sizes[round_ - 1]
        own = self.standings.setdefault(number, Standing(np.empty(0)))
        if len(own.losses) == start:
            sums = self._measure(number, round_)
            own.losses = np.concatenate(
                [own.losses, sums / self._tokens[start : self._sizes[round_]]]
            )

    def _mean(self, number: int, size: int) -> float:
        tokens = self._tokens[:size]
        return float((self.standings[number].losses[:size] * tokens).sum() / tokens.sum())
