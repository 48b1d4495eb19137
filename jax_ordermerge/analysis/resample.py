"""Binned curves with bootstrap bands, and permutation tests, vectorized over resamples.

Axis letters here: `M` member, `n` sample, `U` bin, `P` resample or permutation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

from jax_ordermerge.analysis.result import TAILS, Estimate, Undetermined

# Elements of a block of resamples: 32 MB of float64, whatever the number of samples.
BLOCK = 4_000_000


class Job(NamedTuple):
    """One curve to compute.

    Attributes:
        values, positions: [M, n].
        bins: number of bins of position.
    """

    values: np.ndarray
    positions: np.ndarray
    bins: int


class Curve(NamedTuple):
    """Mean values in bins of position.

    Attributes:
        position, mean: float64[U].
        samples: int[U], number of samples in each bin.
        replicates: float64[P, U], bootstrap means; NaN where a resample left a bin empty.
    """

    position: np.ndarray
    mean: np.ndarray
    samples: np.ndarray
    replicates: np.ndarray


@dataclass(frozen=True)
class Band:
    """A curve with the bounds of its 95 % bootstrap band, [U] each, and the gap of its ends."""

    position: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    samples: np.ndarray
    gap: Estimate


def bin_numbers(position: np.ndarray, bins: int) -> np.ndarray:
    """Return the quantile bin of each sample of each row [..., n], int[..., n] from 0.

    Samples of one optimizer step stay in one bin. Bins without samples do not exist: with fewer
    distinct positions than bins, each position is a bin.

    Raises:
        Undetermined: fewer than two samples per bin.

    Example:
        >>> bin_numbers(np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), 3).tolist()
        [0, 0, 1, 1, 2, 2]
        >>> bin_numbers(np.array([[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]]), 3).tolist()
        [[0, 0, 0, 1, 1, 1]]
    """
    samples = position.shape[-1]
    if samples < 2 * bins:
        raise Undetermined(f"{samples} samples are too few for {bins} bins")
    # Samples of one step have one average rank, and so one bin. The half centres ranks on
    # [0, n]: the bins then have equal sizes where all positions differ.
    rank = stats.rankdata(position, "average", axis=-1) - 0.5
    quantiles = np.minimum((rank * bins / samples).astype(np.int64), bins - 1)
    # numbered without the empty bins
    filled = (quantiles[..., None, :] == np.arange(bins)[:, None]).any(axis=-1)
    return np.take_along_axis(np.cumsum(filled, axis=-1) - 1, quantiles, axis=-1)


def curves(
    jobs: Sequence[Job],
    *,
    resamples: int,
    generator: np.random.Generator,
    units: np.ndarray | None = None,
) -> list[Curve]:
    """Bin the values of every job by position and bootstrap the bin means.

    Samples are resampled, not rows: a job with several members keeps the members of a sample
    together. All jobs share the resamples, so differences of two curves may be taken replicate
    by replicate. The weights of samples are Poisson(1) instead of multinomial.

    Args:
        jobs: with the same number of samples n.
        units: int[n], from 0: batches or packs that are resampled in place of samples.

    Raises:
        Undetermined: fewer than two samples per bin.

    Source: Hanley and MacGibbon, "Creating non-parametric bootstrap samples using Poisson
        frequencies", 2006.
    """
    # Kinds of curves share their positions, which are ranked once. By identity, which is that of an
    # array as long as the jobs hold it.
    ranked = {(id(job.positions), job.bins): job for job in jobs}
    numbers_of = {key: bin_numbers(job.positions, job.bins) for key, job in ranked.items()}
    binned = [numbers_of[id(job.positions), job.bins] for job in jobs]
    # Fewer distinct positions than bins leave a job with fewer bins than it asked for.
    widths = [int(numbers.max()) + 1 for numbers in binned]
    edges = np.cumsum(np.repeat(widths, 2))  # of sums and counts of each job, among all columns
    samples = jobs[0].values.shape[1]
    totals = np.zeros((resamples, edges[-1]))
    step = max(1, BLOCK // max(resamples, 1))
    of_units = None if units is None else generator.poisson(1.0, (resamples, units.max() + 1))
    for start in range(0, samples, step):
        block = slice(start, min(start + step, samples))
        # Multinomial weights (the plain bootstrap) would depend on each other over all samples.
        # Poisson weights are independent, so a block of samples can be drawn and forgotten.
        weights = (
            generator.poisson(1.0, (resamples, block.stop - block.start))
            if units is None or of_units is None
            else of_units[:, units[block]]
        )
        totals += weights.astype(np.float64) @ _columns(jobs, binned, edges, block)
    results = []
    parts = np.split(totals, edges[:-1], axis=1)
    for job, numbers, sums, counts in zip(jobs, binned, parts[::2], parts[1::2], strict=True):
        # a resample may miss a thin bin altogether
        replicates = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
        bins, width = numbers.ravel(), sums.shape[1]
        size = np.bincount(bins, minlength=width)
        mean = np.bincount(bins, job.values.ravel(), minlength=width) / size
        position = np.bincount(bins, job.positions.ravel(), minlength=width) / size
        results.append(Curve(position, mean, size, replicates))
    return results


def _columns(
    jobs: Sequence[Job], binned: Sequence[np.ndarray], edges: np.ndarray, block: slice
) -> np.ndarray:
    """Return values and counts of each job spread over its bins, float64[block, 2 U of all jobs].

    One matrix product with the resampling weights then gives the sums of all jobs.
    """
    rows = np.arange(block.stop - block.start)
    columns = np.zeros((rows.size, edges[-1]))
    parts = np.split(columns, edges[:-1], axis=1)  # views
    for job, numbers, sums, counts in zip(jobs, binned, parts[::2], parts[1::2], strict=True):
        # Members one after another: two of them may fall into one bin of a sample, and an
        # indexed `+=` adds to an element only once.
        for value, number in zip(job.values[:, block], numbers[:, block], strict=True):
            sums[rows, number] += value
            counts[rows, number] += 1
    return columns


def band(replicates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % percentile bounds of bootstrap replicates [P, ...]; NaN are left out."""
    # `nanquantile` sorts column by column in Python; few curves have an empty bin in any resample
    quantile = np.nanquantile if np.isnan(replicates).any() else np.quantile
    # percentiles, not a normal interval: bin means of losses are skewed
    low, high = quantile(replicates, TAILS, axis=0)
    return low, high


def summarize(curve: Curve) -> Band:
    """Return a curve with its band and its gap."""
    low, high = band(curve.replicates)
    return Band(curve.position, curve.mean, low, high, curve.samples, gap(curve))


def shifted(curve: Curve, plus: Curve, minus: Curve) -> Curve:
    """Return `curve + plus - minus`, replicate by replicate."""
    # the resamples are shared: their covariance stays in the result
    replicates = curve.replicates + plus.replicates - minus.replicates
    return curve._replace(mean=curve.mean + plus.mean - minus.mean, replicates=replicates)


def widened(curve: Curve, factor: float) -> Curve:
    """Return a curve whose replicates lie `factor` times as far from its means."""
    if factor == 1:
        return curve
    return curve._replace(replicates=curve.mean + factor * (curve.replicates - curve.mean))


def gap(curve: Curve, reference: Curve | None = None, factor: float = 1.0) -> Estimate:
    """Return the first bin's mean less the last bin's, less `factor` times that of `reference`."""
    estimate = curve.mean[0] - curve.mean[-1]
    replicates = curve.replicates[:, 0] - curve.replicates[:, -1]
    if reference is not None:
        estimate = estimate - factor * (reference.mean[0] - reference.mean[-1])
        of_reference = reference.replicates[:, 0] - reference.replicates[:, -1]
        replicates = replicates - factor * of_reference
    low, high = band(replicates)
    return Estimate(float(estimate), float(np.nanstd(replicates)), float(low), float(high))


def permutation_p(
    values: np.ndarray, positions: np.ndarray, *, permutations: int, generator: np.random.Generator
) -> np.ndarray:
    """Test whether values depend on position: two-sided p of the correlation under permutation.

    Args:
        values: [Q, n], each row tested against each row of positions.
        positions: [C, n].

    Returns:
        float64[Q, C], `(1 + number as extreme) / (1 + permutations)`; 1 where a row is constant.

    Source: Phipson and Smyth, "Permutation P-values should never be zero", 2010.

    Example:
        >>> line = np.arange(20.0)[None]
        >>> permutation_p(line, line, permutations=99, generator=np.random.default_rng(0)).tolist()
        [[0.01]]
    """
    samples = values.shape[1]
    y, x = _standardize(values), _standardize(positions)
    observed = np.abs(y @ x.T)
    extreme = np.zeros(observed.shape)
    step = max(1, BLOCK // samples)
    # One permutation serves all rows and columns: it keeps the dependence between the tests, and
    # a row costs a matrix product instead of a correlation per pair.
    for start in range(0, permutations, step):
        indices = np.tile(np.arange(samples), (min(step, permutations - start), 1))
        generator.permuted(indices, axis=1, out=indices)
        for row, target in enumerate(y):
            # the margin counts ties, which rounding would otherwise decide
            extreme[row] += (np.abs(target[indices] @ x.T) >= observed[row] - 1e-12).sum(axis=0)
    # the identity is one of the permutations, so p is never 0
    return (1 + extreme) / (1 + permutations)


def _standardize(values: np.ndarray) -> np.ndarray:
    centred = values - values.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    # A constant row becomes zeros. All its correlations tie then, and p is 1.
    return np.divide(centred, norm, out=np.zeros_like(centred), where=norm > 1e-12)
