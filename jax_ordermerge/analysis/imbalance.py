"""Training imbalance: how the final loss of a sample depends on its positions in the orders.

A statistic that the data cannot determine is a `Missing` with a reason, never a NaN. Axis
letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike

from jax_ordermerge.analysis import position_curves, position_effects, resample
from jax_ordermerge.analysis.by_source import SourceEffect, effects_by_source
from jax_ordermerge.analysis.position_curves import MergedCurves, Pooled
from jax_ordermerge.analysis.position_effects import (
    JointEffect,
    Level,
    Marginal,
    MergedEffect,
    WarmupSplit,
)
from jax_ordermerge.analysis.resample import Band
from jax_ordermerge.analysis.result import CONFIDENCE, INLINE, Estimate, Missing, or_missing
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits


@dataclass(frozen=True)
class Design:
    """Sizes and settings of an analysis."""

    samples: int
    members: int
    epochs: int
    warmup_fraction: float  # of all steps
    warmup_window: float  # of epoch 1: the position where the warm-up ends, at most 1
    bins: int
    bootstrap: int  # number of resamples
    permutations: int
    seed: int
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class EpochEffect:
    """One model's losses by the positions of one member in one epoch."""

    epoch: int
    # of Pearson's r; assumes nothing about the distribution of losses, which are skewed
    permutation_p: float
    marginal: Marginal | Missing = field(metadata=INLINE)


@dataclass(frozen=True)
class MemberEpoch(EpochEffect):
    """The same of a member and its positions, with its curve."""

    curve: Band | Missing
    decile_gap: Estimate | Missing  # that of the curve, whatever the number of bins


@dataclass(frozen=True)
class MemberEffect:
    """One member by itself: the difficulty of samples is noise in all of it."""

    member: int
    level: Level = field(metadata=INLINE)
    epochs: list[MemberEpoch]
    warmup: WarmupSplit | Missing


@dataclass(frozen=True)
class MergeEffect:
    """One merge; `by_member` [M][E] is by the positions of each member."""

    level: Level = field(metadata=INLINE)
    by_member: list[list[EpochEffect]]
    effect: MergedEffect = field(metadata=INLINE)
    curves: MergedCurves = field(metadata=INLINE)


@dataclass(frozen=True)
class Imbalance:
    """Every statistic of the position effect: the contents of analysis.json."""

    design: Design
    members: list[MemberEffect]
    pooled: Pooled
    fixed_effects: JointEffect | Missing
    fixed_effects_warmup: JointEffect | Missing  # epoch 1 with a slope of its own for the warm-up
    merged: dict[str, MergeEffect]
    sources: list[SourceEffect] | None = None  # where there are several


def analyze(
    member_losses: ArrayLike,
    positions: ArrayLike,
    merged_losses: Mapping[str, ArrayLike] | None = None,
    *,
    base_losses: ArrayLike | None = None,
    sources: Mapping[str, np.ndarray] | None = None,
    warmup_fraction: float = 0.0,
    bins: int = 10,
    bootstrap: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
) -> Imbalance:
    """Return every statistic of the position effect, before and after merging.

    Args:
        member_losses: [M, n], final loss of each training sample under each member, nats per token.
        positions: [M, E, n] in [0, 1], optimizer step within the epoch in which member m saw the
            sample.
        merged_losses: for each merge, [n].
        base_losses: [n] under the base. No position can have affected them, so as a covariate
            they sharpen the regressions of the merges.
        sources: for each source, the numbers of its samples.
        warmup_fraction: warm-up steps over all steps.
        bins: bins of the position curves (10: deciles).
        bootstrap: resamples of the samples.
        permutations: of the permutation tests.
        seed: of the run; resamples and permutations have streams of their own.

    Raises:
        UserError: arrays of inconsistent shapes, positions outside [0, 1], losses that are not
            finite.
    """
    losses, places, merged, base = _checked(
        member_losses, positions, merged_losses or {}, base_losses
    )
    members, epochs, samples = places.shape
    window = min(1.0, warmup_fraction * epochs)  # as a position in epoch 1
    curves = position_curves.curves(
        losses, places, merged, bins=bins, resamples=bootstrap, seed=seed
    )
    # [models, M, E]: every model is tested against the positions of every member
    p_values = resample.permutation_p(
        np.concatenate([losses, *(values[None] for values in merged.values())]),
        places.reshape(members * epochs, samples),
        permutations=permutations,
        generator=np.random.default_rng(stream_key_bits(seed, "analysis", "permutation")),
    ).reshape(-1, members, epochs)
    return Imbalance(
        design=Design(
            samples=samples,
            members=members,
            epochs=epochs,
            warmup_fraction=warmup_fraction,
            warmup_window=window,
            bins=bins,
            bootstrap=bootstrap,
            permutations=permutations,
            seed=seed,
        ),
        members=[
            _member_effect(m, losses[m], places[m], p_values[m, m], curves.members[m], window)
            for m in range(members)
        ],
        pooled=curves.pooled,
        # The estimate that counts. Each sample is compared with itself in the other members, so
        # the difficulty of samples, far larger than any effect of position, cancels.
        fixed_effects=or_missing(position_effects.joint_effect, losses, places),
        fixed_effects_warmup=or_missing(position_effects.joint_effect, losses, places, window),
        merged={
            name: MergeEffect(
                level=Level.of(values),
                by_member=list(map(_epoch_effects, [values] * members, places, p)),
                effect=position_effects.merged_effect(values, losses, places, base),
                curves=curves.merged[name],
            )
            for (name, values), p in zip(merged.items(), p_values[members:], strict=True)
        },
        sources=effects_by_source(losses, places, merged, base, sources or {}) or None,
    )


def _member_effect(
    member: int,
    losses: np.ndarray,
    positions: np.ndarray,
    p_values: np.ndarray,
    curves: Sequence[Band | Missing],
    window: float,
) -> MemberEffect:
    """Return the statistics of one member, from losses [n] and positions [E, n]."""
    return MemberEffect(
        member=member,
        level=Level.of(losses),
        epochs=[
            MemberEpoch(
                **vars(effect),
                curve=curve,
                decile_gap=curve if isinstance(curve, Missing) else curve.gap,
            )
            for effect, curve in zip(
                _epoch_effects(losses, positions, p_values), curves, strict=True
            )
        ],
        warmup=or_missing(position_effects.split_at, losses, positions[0], window),
    )


def _epoch_effects(
    losses: np.ndarray, positions: np.ndarray, p_values: np.ndarray
) -> list[EpochEffect]:
    """Return the effect of positions [E, n] on the losses [n] of one model."""
    return [
        EpochEffect(e, float(p), or_missing(position_effects.marginal, losses, position))
        for e, (position, p) in enumerate(zip(positions, p_values, strict=True), start=1)
    ]


def _checked(
    member_losses: ArrayLike,
    positions: ArrayLike,
    merged_losses: Mapping[str, ArrayLike],
    base_losses: ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    # losses are stored in float32, whose rounding would add up in sums over samples
    losses, places = np.asarray(member_losses, np.float64), np.asarray(positions, np.float64)
    if losses.ndim != 2 or places.ndim != 3 or places.shape[::2] != losses.shape:
        raise UserError(
            f"analysis: losses {list(losses.shape)} and positions {list(places.shape)} do not "
            "match; expected [members, samples] and [members, epochs, samples]"
        )
    # step numbers instead of fractions are the likely mistake
    if not (np.isfinite(places).all() and places.min() >= 0 and places.max() <= 1):
        raise UserError(
            "analysis: positions must lie in [0, 1]; "
            "give the step within the epoch over its number of steps"
        )
    merged = {name: np.asarray(values, np.float64) for name, values in merged_losses.items()}
    base = None if base_losses is None else np.asarray(base_losses, np.float64)
    rows = {f"member {m}": row for m, row in enumerate(losses)} | merged
    if base is not None:
        rows["the base"] = base
    for name, row in rows.items():
        if row.shape != losses.shape[1:]:
            raise UserError(
                f"analysis: {name} has losses of shape {list(row.shape)}, "
                f"expected [{losses.shape[1]}]"
            )
        # one NaN would make every statistic a NaN, and JSON has no sign for it
        if not np.isfinite(row).all():
            raise UserError(
                f"analysis: {np.count_nonzero(~np.isfinite(row))} losses of {name} are not "
                "finite; the training diverged, lower training.learning_rate"
            )
    return losses, places, merged, base
