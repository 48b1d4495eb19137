"""Position effects of any shape: a test per epoch, shares of variance, and sizes by base loss.

A straight line misses what falls and rises again. Axis letters here: `M` member, `E` epoch, `n`
sample, `U` bin, `G` group of samples that a permutation moves together, `P` permutation.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from jax_ordermerge.analysis import clusters, position_effects, regression, resample
from jax_ordermerge.analysis.paired import holm
from jax_ordermerge.analysis.position_effects import Coefficient
from jax_ordermerge.analysis.result import Missing, Undetermined, or_missing
from jax_ordermerge.rng import stream_key_bits

_COUNTED = 10  # permutations as extreme, from which on p is their share


@dataclass(frozen=True)
class ShapeTest:
    """Omnibus test of the bins of one epoch; `holm` is p corrected for the number of epochs."""

    epochs: list[int]
    statistic: float  # as chi-squared with `freedom`
    freedom: float
    p: float
    holm: float


@dataclass(frozen=True)
class Explained:
    """Shares of the order-caused variance that position explains, adjusted for their parameters.

    Order-caused is what differs between the members in the losses of one sample, less the levels
    of the members.
    """

    sd: float  # of a sample's loss between members
    lines: float  # by a slope per epoch
    bins: float  # by the means of the bins of all epochs


@dataclass(frozen=True)
class QuartileEffect:
    """The fixed-effects slopes on a quarter of the samples, by their loss under the base."""

    quartile: int  # 1: the lowest base losses
    samples: int
    base_loss: float
    mean_loss: float  # of the members
    coefficients: list[Coefficient]


def omnibus(
    losses: np.ndarray,
    positions: np.ndarray,
    bins: int,
    permutations: int,
    seed: int,
) -> list[ShapeTest]:
    """Test in each epoch whether losses depend on position in any way.

    The statistic is the sum over the bins of their squared summed losses over their sizes, with
    the levels of samples and members taken out. Its distribution comes from permuting whole steps
    as they were assigned, so errors that a step shares do not make it reject. Beyond the number
    of permutations p is the tail of the chi-squared distribution with their mean and variance.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        bins: of position.
        permutations: of the steps.
        seed: of the run.

    Raises:
        Undetermined: one member, no variation within samples, too few samples or steps.
    """
    if len(losses) < 2:
        raise Undetermined("one member only: the difficulty of samples cannot be taken out")
    values, tests = regression.within(losses), []
    for regressor in position_effects.distinct_positions(positions):
        if np.abs(regression.within(regressor.position)).max() < 1e-9:
            raise Undetermined("every sample has the same positions in all members")
        numbers = resample.bin_numbers(regressor.position, bins)
        # a stream by name for each epoch: its test does not depend on which others there are
        generator = np.random.default_rng(
            stream_key_bits(seed, "analysis", "omnibus", regressor.epochs[0])
        )
        families = _families(values, regressor.position, numbers)
        sizes = sum(np.bincount(f.groups) @ f.places.sum(axis=0) for f in families)
        sums = sum(np.einsum("kg,kgu->u", f.totals, f.places) for f in families)
        observed = float((sums**2 / sizes).sum())
        simulated = np.concatenate(list(_permuted(families, sizes, permutations, generator)))
        mean, variance = float(simulated.mean()), float(simulated.var())
        if not variance > 0:
            raise Undetermined("the losses do not vary, or one step has all samples")
        # c X with X chi-squared on f has mean c f and variance 2 c^2 f: solved for c and f
        scale = variance / (2 * mean)
        statistic, freedom = observed / scale, mean / scale
        # equal up to rounding is as extreme: sums in another order differ in the last bits
        extreme = int((simulated >= observed * (1 - 1e-9)).sum())
        p = float(stats.chi2.sf(statistic, freedom))
        if extreme >= _COUNTED:
            # the observed order is one of them, so that p is never 0
            p = (1 + extreme) / (1 + permutations)
        tests.append((regressor.epochs, statistic, freedom, p))
    corrected = holm([p for *_, p in tests])
    return [ShapeTest(*test, holm=p) for test, p in zip(tests, corrected, strict=True)]


class _Family(NamedTuple):
    """Members whose orders move the same samples together: they are dealt together.

    Attributes:
        groups: int[n], the steps of the first of them.
        totals: float64[K, G], summed losses of each group in each of K members.
        places: float64[K, G, U], 1 in the bin of the group in that member.
    """

    groups: np.ndarray
    totals: np.ndarray
    places: np.ndarray


def _families(values: np.ndarray, position: np.ndarray, numbers: np.ndarray) -> list[_Family]:
    """Return the members by what their orders share; arrays are [M, n].

    A reversed order has the steps of its partner, balanced and fixed batches those of all members.
    To deal such orders apart would break their dependence, and give the statistic another
    distribution than it has.
    """
    steps = clusters.step_numbers(position)
    families: list[list[int]] = []
    for m, row in enumerate(steps):
        family = next((f for f in families if _share_steps(steps[f[0]], row)), None)
        if family is None:
            families.append([m])
        else:
            family.append(m)
    results = []
    for family in families:
        groups = steps[family[0]]
        count = np.bincount(groups)
        totals = np.stack([clusters.group_sums(values[m], groups) for m in family])
        # Where batches do not divide the samples, a group lies in two steps of the reversed order.
        bins = [np.rint(clusters.group_sums(numbers[m] * 1.0, groups) / count) for m in family]
        places = np.stack(bins)[:, :, None] == np.arange(numbers.max() + 1)
        results.append(_Family(groups, totals, places.astype(np.float64)))
    return results


def _share_steps(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two orders move the same samples together, except at the borders of steps."""
    pairs, steps = clusters.count_pairs(first, second), int(first.max()) + 1
    # independent orders have nearly as many pairs as there are samples, or as are possible
    return pairs == steps or (pairs <= 2.2 * steps and pairs < 0.8 * min(first.size, steps**2))


def _permuted(
    families: list[_Family], sizes: np.ndarray, permutations: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    """Yield the statistic under permutations, blocks of [P]."""
    # in blocks, so that memory does not grow with the number of permutations
    block = max(1, resample.BLOCK // families[0].totals.shape[1])
    for start in range(0, permutations, block):
        count = min(block, permutations - start)
        sums = np.zeros((count, sizes.size))
        for family in families:
            deals, _ = clusters.permute_groups(family.groups, count, generator)
            # the sums are dealt and the bins stay: one matrix product instead of one per bin
            for total, place in zip(family.totals, family.places, strict=True):
                sums += total[deals] @ place
        yield (sums**2 / sizes).sum(axis=1)


def explained(losses: np.ndarray, positions: np.ndarray, *, bins: int) -> Explained:
    """Return the shares of the order-caused variance that position explains.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        bins: of position.

    Raises:
        Undetermined: one member, no variation, too few samples.
    """
    if len(losses) < 2:
        raise Undetermined("one member only: nothing is known of what the order causes")
    members, samples = losses.shape
    values, freedom = regression.within(losses), (members - 1) * (samples - 1)
    lines, dummies = [], []
    for regressor in position_effects.distinct_positions(positions):
        if np.abs(regression.within(regressor.position)).max() < 1e-9:
            raise Undetermined("every sample has the same positions in all members")
        lines.append(regressor.position)
        numbers = resample.bin_numbers(regressor.position, bins)
        # without the first bin, which the others determine together with the level of a member
        dummies += [(numbers == u).astype(np.float64) for u in range(1, int(numbers.max()) + 1)]
    total = float((values**2).sum())
    if not total > 1e-20:
        raise Undetermined("the losses do not vary between members")

    def share(columns: list[np.ndarray]) -> float:
        design = np.stack([regression.within(column) for column in columns]).reshape(
            len(columns), -1
        )
        gram = design @ design.T
        # columns that the design makes dependent explain nothing twice
        rank = int(np.linalg.matrix_rank(gram, hermitian=True))
        score = design @ values.ravel()
        fitted = float(score @ np.linalg.pinv(gram, hermitian=True) @ score)
        if freedom - rank < 1:
            raise Undetermined(f"{samples} samples are too few for {rank} parameters")
        # adjusted: bins have more parameters than lines, and would explain more by these alone
        return 1 - (total - fitted) / (freedom - rank) / (total / freedom)

    return Explained(float(np.sqrt(total / freedom)), share(lines), share(dummies))


def by_base_loss(
    losses: np.ndarray, positions: np.ndarray, base: np.ndarray, units: np.ndarray | None = None
) -> list[QuartileEffect]:
    """Return the slopes on each quarter of the samples by their loss under the base.

    By the base and not by the members: the members' losses contain the effect itself.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        base: [n].
        units: int[n], the batches or packs that were put in order; None: the samples.

    Returns:
        Quarters on which the slopes are undetermined are left out.
    """
    # by rank: quantiles would put all equal losses into one quarter
    rank = np.argsort(np.argsort(base, kind="stable"), kind="stable")
    effects = []
    for quartile in range(4):
        rows = rank * 4 // base.size == quartile
        if np.count_nonzero(rows) < 2:
            continue
        joint = or_missing(
            position_effects.joint_effect,
            losses[:, rows],
            positions[:, :, rows],
            units=clusters.renumber(units, rows),
        )
        if not isinstance(joint, Missing):
            means = float(base[rows].mean()), float(losses[:, rows].mean())
            effects.append(
                QuartileEffect(quartile + 1, int(rows.sum()), *means, joint.coefficients)
            )
    return effects
