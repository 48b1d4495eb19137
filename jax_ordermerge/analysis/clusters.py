"""Which losses share an error: the unit that was put in order, and the optimizer step.

Samples of one step see the same update, so what the step did by chance is common to them. Axis
letters here: `M` member, `E` epoch, `n` sample, `G` group, `P` permutation, `Q` model.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jax_ordermerge.analysis.resample import BLOCK
from jax_ordermerge.analysis.result import Undetermined


@dataclass(frozen=True)
class StepCorrelation:
    """Intra-class correlation of the residuals of one member in one optimizer step."""

    epoch: int
    icc: float  # below 0 by chance only
    p: float  # of no correlation, by the F test


def step_numbers(positions: np.ndarray) -> np.ndarray:
    """Return the number of the step of each sample, int[..., n], from positions [..., n].

    Example:
        >>> step_numbers(np.array([[0.0, 1.0, 0.5, 0.0]])).tolist()
        [[0, 2, 1, 0]]
    """
    # by its length: of no samples -1 would have no value
    rows = positions.reshape(math.prod(positions.shape[:-1]), positions.shape[-1])
    return np.stack([np.unique(row, return_inverse=True)[1] for row in rows]).reshape(
        positions.shape
    )


def renumber(units: np.ndarray | None, rows: np.ndarray | slice) -> np.ndarray | None:
    """Return the units of some samples, numbered from 0 without gaps; None stays None."""
    return None if units is None else np.unique(units[rows], return_inverse=True)[1]


def group_sums(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return the sums of values [n, ...] over each group, [G, ...], from group numbers int[n].

    Example:
        >>> group_sums(np.array([1.0, 2.0, 4.0]), np.array([1, 0, 1])).tolist()
        [2.0, 5.0]
    """
    # column by column: `np.add.at` makes the same additions, several times slower on two axes
    columns = values.reshape(len(values), -1).T
    sums = np.stack([np.bincount(groups, column) for column in columns], axis=-1)
    return sums.reshape(-1, *values.shape[1:])


def step_correlation(
    residuals: np.ndarray, steps: np.ndarray, fitted: int = 0
) -> tuple[float, float]:
    """Return the intra-class correlation of residuals of one step, and the p of none.

    Args:
        residuals: [M, n], without the levels of samples and members (`regression.within`).
        steps: int[M, n], from 0.
        fitted: number of slopes that were taken out of the residuals.

    Raises:
        Undetermined: steps of one sample, one step, or one member.

    Source: Donner, "A review of inference procedures for the intraclass correlation coefficient
        in the one-way random effects model", 1986.
    """
    members, samples = residuals.shape
    if members < 2:
        raise Undetermined("one member only: a step cannot be separated from its samples")
    sizes = [np.bincount(row) for row in steps]
    groups = sizes[0].size
    if groups < 2 or groups >= samples:
        raise Undetermined("steps of one sample, or one step: nothing is shared")
    pairs = list(zip(residuals, steps, sizes, strict=True))
    between = sum(float((group_sums(row, step) ** 2 / size).sum()) for row, step, size in pairs)
    total = float((residuals**2).sum())
    # Taking out the means of samples and members leaves (M - 1) (n - 1) dimensions, of which the
    # means of steps hold (M - 1) (G - 1) in expectation.
    # Of batches that never change, every slope takes one of these; else only that of this epoch.
    fixed = all(same_partition(steps[0], row) for row in steps[1:])
    free = (members - 1) * (groups - 1) - (fitted if fixed else min(fitted, 1))
    freedom = free, (members - 1) * (samples - groups)
    if free < 1:
        raise Undetermined("too few steps for the slopes")
    mean_between, mean_within = between / freedom[0], (total - between) / freedom[1]
    if not mean_within > 0:
        raise Undetermined("the losses do not vary within steps")
    size = (samples - (sizes[0] ** 2).sum() / samples) / (groups - 1)  # the mean one, corrected
    # Where batches are composed anew, the mean of a sample takes 1 / M of what its step did away,
    # and that part is left within the steps of the other members.
    part = 1.0 if fixed else 1 - 1 / members
    of_step = (mean_between - mean_within) / (size * part)
    of_sample = mean_within - (0 if fixed else of_step / members)
    icc = of_step / (of_step + of_sample) if of_step + of_sample > 0 else 0.0
    return icc, float(stats.f.sf(mean_between / mean_within, *freedom))


def same_partition(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two numberings int[n] put the same samples together.

    Example:
        >>> same_partition(np.array([0, 0, 1]), np.array([5, 5, 2]))
        True
    """
    return count_pairs(first, second) == np.unique(first).size == np.unique(second).size


def count_pairs(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many pairs of numbers two numberings int[n], from 0, have among the samples.

    Example:
        >>> count_pairs(np.array([0, 0, 1]), np.array([0, 2, 2]))
        3
    """
    # one number per pair: sorting rows of two, as `unique` does by axis, takes seven times as long
    return np.unique(first * (int(second.max(initial=0)) + 1) + second).size


def permute_groups(
    groups: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Return random deals of the places of groups, int[count, G], and the size of each group.

    The short last step of an epoch keeps its place, as in the orders themselves: only groups of
    the usual size are dealt, where most groups have it.
    """
    sizes = np.bincount(groups)
    usual = np.flatnonzero(sizes == sizes.max())
    if 2 * usual.size <= sizes.size:
        usual = np.arange(sizes.size)  # packed rows: sizes vary by nature
    deals = np.tile(np.arange(sizes.size), (count, 1))
    deals[:, usual] = generator.permuted(deals[:, usual], axis=1)
    return deals, sizes


def permutation_p(
    values: np.ndarray,
    positions: np.ndarray,
    groups: np.ndarray,
    *,
    permutations: int,
    generator: np.random.Generator,
) -> np.ndarray:
    """Test whether values depend on position by permuting whole groups of samples.

    Unlike the permutation of samples it keeps its size where the samples of a group share errors.

    Args:
        values: [Q, n].
        positions: [C, n], constant in each group.
        groups: int[C, n], numbers from 0: the steps of this order, or the units that it moves.

    Returns:
        float64[Q, C], two-sided; 1 where a row is constant.
    """
    centred = values - values.mean(axis=1, keepdims=True)
    p_values = np.ones((len(values), len(positions)))
    for column, (position, group) in enumerate(zip(positions, groups, strict=True)):
        sums = group_sums(centred.T, group)  # [G, Q]
        place = group_sums(position, group) / np.bincount(group)
        observed = np.abs(place @ sums)
        scale = np.abs(centred).sum(axis=1) + 1e-300
        extreme, done = np.zeros(len(values)), 0
        while done < permutations:
            block = min(permutations - done, max(1, BLOCK // place.size))
            deals, _ = permute_groups(group, block, generator)
            # the margin counts ties, which rounding would otherwise decide
            extreme += (np.abs(place[deals] @ sums) >= observed - 1e-12 * scale).sum(axis=0)
            done += block
        p_values[:, column] = (1 + extreme) / (1 + permutations)
    return p_values
