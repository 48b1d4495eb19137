"""Losses in bins of position, and early half against late half: of members and of merges.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from jax_ordermerge.analysis import regression, resample
from jax_ordermerge.analysis.resample import Band, Curve, Job
from jax_ordermerge.analysis.result import Estimate, Missing, Undetermined
from jax_ordermerge.rng import stream_key_bits


@dataclass(frozen=True)
class EpochGap(Estimate):
    """Loss of the half of the samples that a member saw early less the late half."""

    epoch: int
    kept: float  # the part of a gap that a plain average of these orders keeps
    expected: Estimate  # the gap that is left in a plain average


@dataclass(frozen=True)
class Excess(Estimate):
    """What a merge's gap is above that of a plain average; p by Student's t over the samples."""

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
class Pooled:
    """Curves of all members together, one per epoch: raw, and with difficulty taken out."""

    raw: list[Band | Missing]
    within: list[Band | Missing]
    early_late: list[EpochGap | Missing]


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
) -> Curves:
    """Return all curves, on shared resamples of the samples.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        merged: losses [n] of each merge.
        bins: number of bins of position.
        resamples: of the bootstrap.
        seed: of the run.
    """
    members, epochs, _ = positions.shape
    jobs = _jobs(losses, positions, merged, bins)
    reason = "every sample has the same positions in all members: nothing varies within a sample"
    if members == 1:
        reason = "one member only: the difficulty of samples cannot be taken out"
    generator = np.random.default_rng(stream_key_bits(seed, "analysis", "bootstrap"))
    try:
        results = resample.curves(list(jobs.values()), resamples=resamples, generator=generator)
        by_key = dict(zip(jobs, results, strict=True))
    except Undetermined as error:
        # one reason for all of them, also for the halves: fewer bins would determine the rest
        by_key, reason = {}, str(error)

    def band(*key: str | int) -> Band | Missing:
        return resample.summarize(by_key[key]) if key in by_key else Missing(reason)

    def member_halves(e: int) -> Curve:
        # the sharper curve, where there is one
        return by_key.get(("within halves", e), by_key["raw halves", e])

    # With orders that do not vary within samples an average keeps the gap, as the share of 0 says.
    kept = [1 - within_share(positions[:, e]) for e in range(epochs)]

    def member_gap(e: int) -> EpochGap | Missing:
        if not by_key:
            return Missing(reason)
        gap = resample.gap(member_halves(e))
        return EpochGap(**vars(gap), epoch=e + 1, kept=kept[e], expected=gap.scaled(kept[e]))

    def merged_gap(name: str, e: int) -> MergedGap | Missing:
        if not by_key:
            return Missing(reason)
        # The difference of merge and members, both raw, has no difficulty in it. Added to the
        # members' sharp curve it stays sharp. The merge's own curve would be as noisy as a raw
        # one: of one model, the difficulty of samples cannot be taken out.
        before = member_halves(e)
        after = resample.shifted(before, by_key["merge halves", name, e], by_key["raw halves", e])
        gap = resample.gap(before)
        # Not gap / M: for the plain average of the losses, `after` is exactly `before` times
        # (1 - share), in any design. Balanced and reversed orders cancel far more than 1 / M.
        excess = resample.gap(after, before, factor=kept[e])
        return MergedGap(
            epoch=e + 1,
            members=gap,
            merged=resample.gap(after),
            difference=resample.gap(after, before),
            expected=gap.scaled(kept[e]),
            excess=Excess(**vars(excess), p=_p(excess, gap, losses.shape[1])),
        )

    return Curves(
        members=[[band("member", m, e) for e in range(epochs)] for m in range(members)],
        pooled=Pooled(
            raw=[band("raw", e) for e in range(epochs)],
            within=[band("within", e) for e in range(epochs)],
            early_late=[member_gap(e) for e in range(epochs)],
        ),
        merged={
            name: MergedCurves(
                curves=[band("merge", name, e) for e in range(epochs)],
                early_late=[merged_gap(name, e) for e in range(epochs)],
            )
            for name in merged
        },
    )


def _jobs(
    losses: np.ndarray, positions: np.ndarray, merged: Mapping[str, np.ndarray], bins: int
) -> dict[tuple[str | int, ...], Job]:
    """Return every curve to compute, by kind and epoch (and member or merge)."""
    # The order of the jobs is part of the result: it is the order of columns in one matrix
    # product with the resampling weights, and so decides the last bits of the sums.
    jobs: dict[tuple[str | int, ...], Job] = {}
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
    for e, values in enumerate(within):
        jobs["raw halves", e] = Job(losses, at[e], 2)
        if values is not None:
            jobs["within halves", e] = Job(values, at[e], 2)
    for name, row in merged.items():
        repeated = np.broadcast_to(row, losses.shape)  # one model, at the positions of M members
        for e in range(epochs):
            jobs["merge", name, e] = Job(repeated, at[e], bins)
            jobs["merge halves", name, e] = Job(repeated, at[e], 2)
    return jobs


def _p(excess: Estimate, gap: Estimate, samples: int) -> float:
    # the plain average itself differs by rounding errors only, which are no evidence
    if abs(excess.estimate) <= 1e-9 * abs(gap.estimate) or not excess.se > 0:
        return 1.0
    return float(2 * stats.t.sf(abs(excess.estimate / excess.se), samples - 1))


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
