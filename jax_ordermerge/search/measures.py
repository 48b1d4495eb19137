"""What a search minimizes, and what its winner must not make worse. Numpy alone."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_ordermerge.config.merge import LOSS, Search
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.tree import Tree


class Measure(NamedTuple):
    """A quantity of a model on examples, the lower the better: a ratio of two sums over examples.

    Attributes:
        sums: of a model on examples, float64[n]: the summed loss of each, or 1 for a wrong answer.
        counts: what they are divided by, float64[n]: tokens, or 1.
        batch: examples of one forward pass; fewer take as long, since it is padded.
    """

    sums: Callable[[Tree, Examples], np.ndarray]
    counts: Callable[[Examples], np.ndarray]
    batch: int = 1


@dataclasses.dataclass(frozen=True)
class Criterion:
    """One number by item from the measures of a search, of which it minimizes the mean.

    Attributes:
        counts: float64[J, n], of J measures on n items.
        references: float64[J], the mean member's value of each; None where there is one measure.

    Example:
        >>> several = Criterion(np.array([[2.0, 4.0], [1.0, 1.0]]), np.array([0.5, 0.25]))
        >>> several.values(np.array([[1.0, 2.0], [1.0, 0.0]])).tolist()
        [2.3333333333333335, 0.6666666666666666]
    """

    counts: np.ndarray
    references: np.ndarray | None

    @property
    def weights(self) -> np.ndarray:
        """The weight of each item, float64[n]."""
        return self.counts[0] if self.references is None else np.ones(self.counts.shape[1])

    def values(self, sums: np.ndarray) -> np.ndarray:
        """Return the value of each item, float64[r], before it is divided by the weight.

        Args:
            sums: float64[J, r], of some of the items.
        """
        if self.references is None:
            return sums[0]
        # Over all items these sum to the mean of the ratios: tokens weigh in the loss as always.
        shares = sums / self.counts.mean(axis=1, keepdims=True)
        return (shares / self.references[:, None]).mean(axis=0)


def make_criterion(
    counts: np.ndarray, member_sums: Callable[[], Sequence[np.ndarray]]
) -> Criterion:
    """Return the criterion of one or several measures.

    Args:
        counts: float64[J, n].
        member_sums: returns float64[J, n] of every member; called for several measures alone.
    """
    if len(counts) == 1:
        return Criterion(counts, None)
    totals = np.mean([sums.sum(axis=1) for sums in member_sums()], axis=0)
    # half an item: members that are right everywhere would make any mistake infinitely bad
    return Criterion(counts, np.maximum(totals, 0.5) / counts.sum(axis=1))


@dataclasses.dataclass(frozen=True)
class GuardedMeasure:
    """One measure of the candidate with the lowest criterion, and of the best member.

    Attributes:
        candidate, best_member: the measure on all validation examples.
        margin: by which the candidate may be worse.
    """

    candidate: float
    best_member: float
    margin: float

    @property
    def is_worse(self) -> bool:
        """Whether the candidate is worse by more than the margin; a value that is NaN is."""
        return not self.candidate - self.best_member <= self.margin


def guard_measures(
    candidate: Mapping[str, float], best_member: Mapping[str, float], space: Search
) -> dict[str, GuardedMeasure]:
    """Compare a candidate with the best member on every measure.

    Args:
        candidate, best_member: measures by name.
        space: has the margins.

    Example:
        >>> rows = guard_measures({"loss": 0.9, "sums": 0.96}, {"loss": 1.2, "sums": 0.9}, Search())
        >>> [name for name, row in rows.items() if row.is_worse]
        ['sums']
    """
    return {
        name: GuardedMeasure(
            value, best_member[name], space.loss_margin if name == LOSS else space.task_margin
        )
        for name, value in candidate.items()
    }
