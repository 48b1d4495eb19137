"""Training imbalance: how the final loss of a sample depends on its positions in the orders.

A statistic that the data cannot determine is a `Missing` with a reason, never a NaN. Axis
letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from jax_ordermerge.analysis import clusters, position_curves, position_effects, resample, shape
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
from jax_ordermerge.analysis.shape import Explained, QuartileEffect, ShapeTest
from jax_ordermerge.analysis.spread import Spread, spread
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
    unit: str  # that was put in order: "sample", "batch" or "pack"
    units: int  # their number
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class EpochEffect:
    """One model's losses by the positions of one member in one epoch."""

    epoch: int
    # of Pearson's r; assumes nothing about the distribution of losses, which are skewed. Units are
    # permuted, and beside it all samples of a step together, where samples are the units.
    permutation_p: float
    permutation_p_steps: float | None
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
    omnibus: list[ShapeTest] | Missing  # of any shape, by epoch
    explained: Explained | Missing
    merged: dict[str, MergeEffect]
    spread: Spread | Missing  # of the members' losses
    by_base_loss: list[QuartileEffect] | None = None  # where the base was measured
    sources: list[SourceEffect] | None = None  # where there are several


def analyze(
    member_losses: ArrayLike,
    positions: ArrayLike,
    merged_losses: Mapping[str, ArrayLike] | None = None,
    *,
    base_losses: ArrayLike | None = None,
    sources: Mapping[str, np.ndarray] | None = None,
    unit: Literal["sample", "batch", "pack"] = "sample",
    units: np.ndarray | None = None,
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
        unit, units: what the orders moved, and the number of each sample's, int[n] from 0: fixed
            batches at level `batch`, packs. Errors, resamples and permutations are of these.
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
    joint_effect = position_effects.joint_effect
    joint = or_missing(joint_effect, losses, places, units=units)
    correlations = [] if isinstance(joint, Missing) else joint.step_correlation
    curves = position_curves.curves(
        losses,
        places,
        merged,
        bins=bins,
        resamples=bootstrap,
        seed=seed,
        units=units,
        correlations=correlations,
    )
    p_values = _permutation_tests(losses, places, merged, permutations, seed, units)
    return Imbalance(
        design=Design(
            *(samples, members, epochs, warmup_fraction, window, bins, bootstrap, permutations),
            seed=seed,
            unit=unit,
            units=samples if units is None else int(units.max()) + 1,
        ),
        members=[
            _member_effect(losses, places, m, p_values[m, m], curves.members[m], window, units)
            for m in range(members)
        ],
        pooled=curves.pooled,
        fixed_effects=joint,
        fixed_effects_warmup=or_missing(joint_effect, losses, places, window, units),
        omnibus=or_missing(shape.omnibus, losses, places, bins, permutations, seed),
        explained=or_missing(shape.explained, losses, places, bins=bins),
        by_base_loss=None if base is None else shape.by_base_loss(losses, places, base, units),
        merged={
            name: _merge_effect(values, losses, places, base, units, p, curves.merged[name])
            for (name, values), p in zip(merged.items(), p_values[members:], strict=True)
        },
        spread=or_missing(spread, losses),
        sources=effects_by_source(losses, places, merged, base, sources or {}, units) or None,
    )


def _merge_effect(
    values: np.ndarray,
    losses: np.ndarray,
    positions: np.ndarray,
    base: np.ndarray | None,
    units: np.ndarray | None,
    p_values: np.ndarray,
    curves: MergedCurves,
) -> MergeEffect:
    """Return the statistics of a merge with losses [n]; p_values [M, E, 2]."""
    return MergeEffect(
        level=Level.of(values),
        by_member=[
            _epoch_effects(values, x, row, units)
            for x, row in zip(positions, p_values, strict=True)
        ],
        effect=position_effects.merged_effect(values, losses, positions, base, units),
        curves=curves,
    )


def _permutation_tests(
    losses: np.ndarray,
    positions: np.ndarray,
    merged: Mapping[str, np.ndarray],
    permutations: int,
    seed: int,
    units: np.ndarray | None,
) -> np.ndarray:
    """Return p by permutation of units and of steps, [models, M, E, 2]; NaN where not tested."""
    # every model is tested against the positions of every member
    values = np.concatenate([losses, *(row[None] for row in merged.values())])
    members, epochs, samples = positions.shape
    rows = positions.reshape(members * epochs, samples)

    def generator(*names: str) -> np.random.Generator:
        return np.random.default_rng(stream_key_bits(seed, "analysis", "permutation", *names))

    def by_group(groups: np.ndarray, name: str) -> np.ndarray:
        return clusters.permutation_p(
            values, rows, groups, permutations=permutations, generator=generator(name)
        )

    of_steps = np.full((len(values), len(rows)), np.nan)
    if units is not None:
        of_units = by_group(np.broadcast_to(units, rows.shape), "units")
    else:
        of_units = resample.permutation_p(
            values, rows, permutations=permutations, generator=generator()
        )
        steps = clusters.step_numbers(rows)
        if steps.max() + 1 < samples:  # steps of one sample are samples
            of_steps = by_group(steps, "steps")
    return np.stack([of_units, of_steps], axis=-1).reshape(-1, members, epochs, 2)


def _member_effect(
    losses: np.ndarray,
    positions: np.ndarray,
    member: int,
    p_values: np.ndarray,
    curves: Sequence[Band | Missing],
    window: float,
    units: np.ndarray | None,
) -> MemberEffect:
    """Return the statistics of one member of losses [M, n] and positions [M, E, n]."""
    values, places = losses[member], positions[member]
    return MemberEffect(
        member=member,
        level=Level.of(values),
        epochs=[
            MemberEpoch(
                **vars(effect),
                curve=curve,
                decile_gap=curve if isinstance(curve, Missing) else curve.gap,
            )
            for effect, curve in zip(
                _epoch_effects(values, places, p_values, units), curves, strict=True
            )
        ],
        warmup=or_missing(position_effects.split_at, values, places[0], window, units),
    )


def _epoch_effects(
    losses: np.ndarray, positions: np.ndarray, p_values: np.ndarray, units: np.ndarray | None
) -> list[EpochEffect]:
    """Return the effect of positions [E, n] on the losses [n] of one model; p_values [E, 2]."""
    return [
        EpochEffect(
            e,
            float(of_units),
            None if np.isnan(of_steps) else float(of_steps),
            or_missing(position_effects.marginal, losses, position, units),
        )
        for e, (position, (of_units, of_steps)) in enumerate(
            zip(positions, p_values, strict=True), start=1
        )
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
