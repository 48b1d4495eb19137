"""Losses in bins of position, and early half against late half: of members and of merges.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jax_ordermerge.analysis import regression, resample
from jax_ordermerge.analysis.resample import Band, Job
from jax_ordermerge.analysis.result import Estimate, Missing, Undetermined
from jax_ordermerge.rng import stream_key_bits


@dataclass(frozen=True)
class EpochGap(Estimate):
    """Loss of the half of the samples that a member saw early less the late half."""

    epoch: int


@dataclass(frozen=True)
class MergedGap:
    """The gap between early and late half before and after merging, and its difference."""

    epoch: int
    members: Estimate
    merged: Estimate
    difference: Estimate


@dataclass(frozen=True)
class Pooled:
    """Curves of all members together, one per epoch: raw, and with difficulty taken out."""

    raw: list[Band | Missing]
    within: list[Band | Missing]
    early_late: list[EpochGap | Missing]


@dataclass(frozen=True)
class MergedCurves:
    """Curves of one merge by the members' positions, one per epoch."""

    curves: list[Band | Missing]
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
    members, epochs = positions.shape[:2]
    at = [positions[:, e] for e in range(epochs)]
    within = [within_sample(losses, at[e]) for e in range(epochs)]
    jobs: dict[tuple[str | int, ...], Job] = {}
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
    for name, values in merged.items():
        for e in range(epochs):
            repeated = np.broadcast_to(values, losses.shape)  # one model, at M positions
            jobs["merge", name, e] = Job(repeated, at[e], bins)
            jobs["merge halves", name, e] = Job(repeated, at[e], 2)
    try:
        generator = np.random.default_rng(stream_key_bits(seed, "analysis", "bootstrap"))
        resampled = resample.curves(list(jobs.values()), resamples=resamples, generator=generator)
    except Undetermined as error:
        missing = [Missing(str(error))] * epochs
        return Curves(
            [[*missing] for _ in range(members)],
            Pooled([*missing], [*missing], [*missing]),
            {name: MergedCurves([*missing], [*missing]) for name in merged},
        )
    by_key = dict(zip(jobs, resampled, strict=True))

    def band(*key: str | int) -> Band | Missing:
        return resample.summarize(by_key[key]) if key in by_key else _no_variation(members)

    def member_halves(e: int) -> resample.Curve:
        # the sharper curve, where there is one
        return by_key.get(("within halves", e), by_key["raw halves", e])

    def merged_gap(name: str, e: int) -> MergedGap:
        # Merge less members has no difficulty in it: added to the members' sharp estimate it
        # stays sharp, where the merge's own curve would bring the difficulty back.
        before = member_halves(e)
        after = resample.shifted(before, by_key["merge halves", name, e], by_key["raw halves", e])
        return MergedGap(
            epoch=e + 1,
            members=resample.gap(before),
            merged=resample.gap(after),
            difference=resample.gap(after, before),
        )

    return Curves(
        members=[[band("member", m, e) for e in range(epochs)] for m in range(members)],
        pooled=Pooled(
            raw=[band("raw", e) for e in range(epochs)],
            within=[band("within", e) for e in range(epochs)],
            early_late=[
                EpochGap(**vars(resample.gap(member_halves(e))), epoch=e + 1) for e in range(epochs)
            ],
        ),
        merged={
            name: MergedCurves(
                curves=[band("merge", name, e) for e in range(epochs)],
                early_late=[merged_gap(name, e) for e in range(epochs)],
            )
            for name in merged
        },
    )


def within_sample(losses: np.ndarray, position: np.ndarray) -> np.ndarray | None:
    """Return losses [M, n] without the levels of samples and members, on the scale of the effect.

    The mean of a sample's losses takes part of the effect of position away: 1 / M of it with
    independent orders, none with reversed pairs. The slope of the within-sample position on the
    position is the part that is left, and the losses are divided by it. With reversed pairs only
    the part of the effect that is odd about the middle is visible: the even part is the same in
    both members.

    Returns:
        None where the position does not vary within samples.
    """
    residual = regression.within(position)
    centred = position - position.mean(axis=1, keepdims=True)
    spread = float((centred**2).sum())
    share = float((residual**2).sum()) / spread if spread > 1e-9 else 0.0
    return regression.within(losses) / share + losses.mean() if share > 1e-6 else None


def _no_variation(members: int) -> Missing:
    if members == 1:
        return Missing("one member only: the difficulty of samples cannot be taken out")
    return Missing(
        "every sample has the same positions in all members: nothing varies within a sample"
    )
