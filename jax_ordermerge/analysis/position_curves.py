"""Losses in bins of position, and early half against late half: of members and of merges.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from jax_ordermerge.analysis import regression, resample
from jax_ordermerge.analysis.clusters import StepCorrelation
from jax_ordermerge.analysis.resample import Band, Curve, Job
from jax_ordermerge.analysis.result import CONFIDENCE, TAILS, Estimate, Missing, Undetermined
from jax_ordermerge.rng import stream_key_bits

Key = tuple[str | int, ...]  # kind of curve, then member or merge, then epoch


@dataclass(frozen=True)
class EpochGap(Estimate):
    """Loss of the half of the samples that a member saw early less the late half."""

    epoch: int
    share_left: float  # the part of a gap that a plain average of these orders keeps
    expected: Estimate  # the gap that is left in a plain average


@dataclass(frozen=True)
class Excess(Estimate):
    """What a merge's gap is above that of a plain average; p by a normal test, as the interval."""

    p: float


@dataclass(frozen=True)
class MergedGap:
    """The gap between early and late half before and after merging.

    Attributes:
        difference: merged less members. Every average closes a part of the gap, so this is no
            evidence for a method.
        expected: of the plain average of the members' losses.
        excess: merged less expected: what the method did beyond averaging.
    """

    epoch: int
    members: Estimate
    merged: Estimate
    difference: Estimate
    expected: Estimate
    excess: Excess


@dataclass(frozen=True)
class Trajectory:
    """What the step in which a sample was seen changes in its final loss, over all epochs, [E U].

    `low` and `high` hold for all points together: a curve that leaves the band somewhere does so
    by chance in one of twenty analyses.
    """

    epochs: np.ndarray  # 0 to E: epochs before it plus the position
    effect: np.ndarray  # loss less the mean loss
    low: np.ndarray
    high: np.ndarray


@dataclass(frozen=True)
class Pooled:
    """Curves of all members together, one per epoch: raw, and with difficulty taken out."""

    raw: list[Band | Missing]
    within: list[Band | Missing]
    early_late: list[EpochGap | Missing]
    trajectory: Trajectory | Missing


@dataclass(frozen=True)
class MergedCurves:
    """Curves of one merge by the members' positions, one per epoch."""

    curves: list[Band | Missing]  # raw: one model has no other to compare a sample with
    early_late: list[MergedGap | Missing]


@dataclass(frozen=True)
class Curves:
    """All curves of an analysis; `members` is a list [M][E]."""

    members: list[list[Band | Missing]]
    pooled: Pooled
    merged: dict[str, MergedCurves]


def curves(
    losses: np.ndarray,
    positions: np.ndarray,
    merged: Mapping[str, np.ndarray],
    *,
    bins: int,
    resamples: int,
    seed: int,
    units: np.ndarray | None = None,
    correlations: Sequence[StepCorrelation] = (),
) -> Curves:
    """Return all curves, on shared resamples of the samples (gaps: of the units).

    Args:
        losses: [M, n].
        positions: [M, E, n].
        merged: losses [n] of each merge.
        bins: number of bins of position.
        resamples: of the bootstrap.
        seed: of the run.
        units: int[n], the batches or packs that were put in order; None: the samples.
        correlations: of the errors of one step, by epoch; the bands are widened by them.
    """
    members, epochs, _ = positions.shape
    jobs = _jobs(losses, positions, merged, bins)
    reason = "every sample has the same positions in all members: nothing varies within a sample"
    if members == 1:
        reason = "one member only: the difficulty of samples cannot be taken out"
    try:
        by_key = _resampled(jobs, resamples, seed, units)
        factors = _spread_factors(positions, correlations, units)
        for key, curve in by_key.items():
            if of_epochs := factors.get(str(key[0])):
                by_key[key] = resample.widened(curve, of_epochs[int(key[-1])])
    except Undetermined as error:
        # one reason for all of them, also for the halves: fewer bins would determine the rest
        by_key, reason = {}, str(error)

    # With orders that do not vary within samples an average keeps the gap, as the share of 0 says.
    share_left = [1 - within_share(positions[:, e]) for e in range(epochs)]
    table = _Resampled(by_key, reason, share_left)
    return Curves(
        members=[[table.band("member", m, e) for e in range(epochs)] for m in range(members)],
        pooled=Pooled(
            raw=[table.band("raw", e) for e in range(epochs)],
            within=[table.band("within", e) for e in range(epochs)],
            early_late=[table.member_gap(e) for e in range(epochs)],
            trajectory=_trajectory([by_key.get(("within", e)) for e in range(epochs)], reason),
        ),
        merged={
            name: MergedCurves(
                curves=[table.band("merge", name, e) for e in range(epochs)],
                early_late=[table.merged_gap(name, e) for e in range(epochs)],
            )
            for name in merged
        },
    )


class _Resampled(NamedTuple):
    """Curves by kind and epoch, and what their summaries need.

    Attributes:
        by_key: empty where the data determine none.
        reason: why a curve is absent.
        share_left: by epoch, the part of a gap that a plain average keeps.
    """

    by_key: dict[Key, Curve]
    reason: str
    share_left: list[float]

    def band(self, *key: str | int) -> Band | Missing:
        curve = self.by_key.get(key)
        return Missing(self.reason) if curve is None else resample.summarize(curve)

    def member_halves(self, e: int) -> Curve:
        # the sharper curve, where there is one
        return self.by_key.get(("within halves", e), self.by_key["raw halves", e])

    def member_gap(self, e: int) -> EpochGap | Missing:
        if not self.by_key:
            return Missing(self.reason)
        gap, share_left = resample.gap(self.member_halves(e)), self.share_left[e]
        return EpochGap(
            **vars(gap), epoch=e + 1, share_left=share_left, expected=gap.scaled(share_left)
        )

    def merged_gap(self, name: str, e: int) -> MergedGap | Missing:
        if not self.by_key:
            return Missing(self.reason)
        # The difference of merge and members, both raw, has no difficulty in it. Added to the
        # members' sharp curve it stays sharp. The merge's own curve would be as noisy as a raw
        # one: of one model, the difficulty of samples cannot be taken out.
        before = self.member_halves(e)
        merge, raw = self.by_key["merge halves", name, e], self.by_key["raw halves", e]
        after = resample.shifted(before, merge, raw)
        gap = resample.gap(before)
        # Not gap / M: for the plain average of the losses, `after` is exactly `before` times
        # (1 - share), in any design. Balanced and reversed orders cancel far more than 1 / M.
        excess = resample.gap(after, before, factor=self.share_left[e])
        return MergedGap(
            epoch=e + 1,
            members=gap,
            merged=resample.gap(after),
            difference=resample.gap(after, before),
            expected=gap.scaled(self.share_left[e]),
            excess=Excess(**vars(excess), p=excess_p(excess.estimate, excess.se, gap.estimate)),
        )


def _trajectory(curves: Sequence[Curve | None], reason: str) -> Trajectory | Missing:
    """Join the curves of the epochs; the band is simultaneous over all of their points."""
    present = [curve for curve in curves if curve is not None]
    if len(present) < len(curves):
        return Missing(reason)
    # the levels are the same in every epoch: only differences within an epoch are known
    effect = np.concatenate(
        [curve.mean - np.average(curve.mean, weights=curve.samples) for curve in present]
    )
    spread = np.concatenate([curve.replicates - curve.mean for curve in present], axis=1)
    se = np.nanstd(spread, axis=0)
    if not (se > 0).all():
        return Missing("no residual variation: a band cannot be estimated")
    # sup-t: the quantile of the largest deviation, in errors of its own point
    factor = float(np.nanquantile(np.nanmax(np.abs(spread) / se, axis=1), CONFIDENCE))
    positions = [e + curve.position for e, curve in enumerate(present)]
    return Trajectory(np.concatenate(positions), effect, effect - factor * se, effect + factor * se)


_HALVES = ("raw halves", "within halves", "merge halves")


def _resampled(
    jobs: Mapping[Key, Job], resamples: int, seed: int, units: np.ndarray | None
) -> dict[Key, Curve]:
    def run(keys: Sequence[Key], units: np.ndarray | None, *names: str) -> Any:
        generator = np.random.default_rng(stream_key_bits(seed, "analysis", "bootstrap", *names))
        of_keys = [jobs[key] for key in keys]
        results = resample.curves(of_keys, resamples=resamples, generator=generator, units=units)
        return dict(zip(keys, results, strict=True))

    if units is None:
        return run(list(jobs), None)
    # A decile may hold a single batch of a member, and resampling one batch shows no spread: the
    # curves resample samples, and `_spread_factors` adds what a step has in common. Halves hold
    # many batches.
    halves = [key for key in jobs if key[0] in _HALVES]
    return run([key for key in jobs if key not in halves], None) | run(halves, units, "units")


def _spread_factors(
    positions: np.ndarray, correlations: Sequence[StepCorrelation], units: np.ndarray | None
) -> dict[str, list[float]]:
    """Return by how much the replicates of each kind of curve are widened, in each epoch."""
    epochs, samples = positions.shape[1:]
    # the design effect of Kish: samples of one step share a part of their errors
    effects = [1.0] * epochs
    for row in correlations:
        size = samples / len(np.unique(positions[0, row.epoch - 1]))
        effects[row.epoch - 1] = float(np.sqrt(1 + (size - 1) * max(row.icc, 0.0)))
    if units is None:
        return dict.fromkeys(("within", *_HALVES), effects)
    # resampled units carry their steps' errors already; few of them are as uncertain as t is
    count = int(units.max()) + 1
    of_few = float(stats.t.ppf(TAILS[1], count - 1) / stats.norm.ppf(TAILS[1]))
    few = [of_few * float(np.sqrt(count / (count - 1)))] * epochs if count > 1 else effects
    return {"within": effects} | dict.fromkeys(_HALVES, few)


def _jobs(
    losses: np.ndarray, positions: np.ndarray, merged: Mapping[str, np.ndarray], bins: int
) -> dict[Key, Job]:
    """Return every curve to compute, by kind and epoch (and member or merge)."""
    # The order of the jobs is part of the result: it is the order of columns in one matrix
    # product with the resampling weights, and so decides the last bits of the sums.
    jobs: dict[Key, Job] = {}
    members, epochs, _ = positions.shape
    at = [positions[:, e] for e in range(epochs)]
    within = [within_sample(losses, position) for position in at]
    for m in range(members):
        for e in range(epochs):
            jobs["member", m, e] = Job(losses[m : m + 1], positions[m : m + 1, e], bins)
    for e in range(epochs):
        jobs["raw", e] = Job(losses, at[e], bins)
    for e, values in enumerate(within):
        if values is not None:
            jobs["within", e] = Job(values, at[e], bins)
    # The levels of the members do not matter to a gap, and a resample would mix them into it.
    level = losses - losses.mean(axis=1, keepdims=True) + losses.mean()
    for e, values in enumerate(within):
        jobs["raw halves", e] = Job(level, at[e], 2)
        if values is not None:
            jobs["within halves", e] = Job(values, at[e], 2)
    for name, row in merged.items():
        repeated = np.broadcast_to(row, losses.shape)  # one model, at the positions of M members
        for e in range(epochs):
            jobs["merge", name, e] = Job(repeated, at[e], bins)
            jobs["merge halves", name, e] = Job(repeated, at[e], 2)
    return jobs


def excess_p(excess: float, se: float, gap: float) -> float:
    """Return the p value of a merge's gap less that of a plain average.

    Args:
        excess, se: estimate and standard error.
        gap: of the members.

    Example:
        >>> round(excess_p(0.002, 0.001, 0.02), 4), excess_p(1e-12, 1e-13, 0.02)
        (0.0455, 1.0)
    """
    # the plain average itself differs by rounding errors only, which are no evidence
    if abs(excess) <= 1e-9 * abs(gap) or not se > 0:
        return 1.0
    # normal, as the interval: `_spread_factors` widened the error where few batches were resampled
    return float(2 * stats.norm.sf(abs(excess / se)))


def within_share(position: np.ndarray) -> float:
    """Return the share of the variance of positions [M, n] that lies within samples.

    An average over the members takes this share of a position effect away. It is 1 - 1 / M in
    expectation for M independent orders, 1 for reversed pairs, 1 - 1 / M**2 for balanced orders,
    and 0 where all members have one order.

    Example:
        >>> round(within_share(np.array([[0.0, 0.5, 1.0], [1.0, 0.5, 0.0]])), 6)
        1.0
    """
    residual = regression.within(position)
    spread = float(((position - position.mean(axis=1, keepdims=True)) ** 2).sum())
    share = float((residual**2).sum()) / spread if spread > 1e-9 else 0.0
    return share if share > 1e-6 else 0.0


def within_sample(losses: np.ndarray, position: np.ndarray) -> np.ndarray | None:
    """Return losses [M, n] without the levels of samples and members, on the scale of the effect.

    The mean of a sample's losses takes part of the effect of position away. The slope of the
    within-sample position on the position is the share that is left, and the losses are divided
    by it. With reversed pairs only the part of the effect that is odd about the middle is visible:
    the even part is the same in both members.

    Returns:
        None where the position does not vary within samples.
    """
    # Dividing by the share puts all designs on the scale of the effect.
    share = within_share(position)
    return regression.within(losses) / share + losses.mean() if share else None
