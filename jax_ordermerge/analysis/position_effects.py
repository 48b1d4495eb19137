"""Regressions of losses on positions: of one model, of all members jointly, and of a merge.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

from jax_ordermerge.analysis import clusters, regression
from jax_ordermerge.analysis.clusters import StepCorrelation
from jax_ordermerge.analysis.regression import Effect, Fit
from jax_ordermerge.analysis.result import INLINE, Missing, Undetermined, or_missing


@dataclass(frozen=True)
class Level:
    """Mean and standard deviation of losses; of fewer than two samples only their number."""

    mean_loss: float | None = None
    sd_loss: float | None = None  # between samples
    samples: int | None = None

    @classmethod
    def of(cls, values: np.ndarray) -> "Level":
        """Return the level of losses [n]."""
        if values.size < 2:
            return cls(samples=int(values.size))
        return cls(float(values.mean()), float(values.std(ddof=1)))


@dataclass(frozen=True)
class Marginal:
    """Dependence of one model's losses on one position, without any control."""

    samples: int
    spearman: dict[str, float]  # rho, p
    pearson: dict[str, float]  # r, p
    slope: Effect  # errors of type HC1, or by unit and by step


@dataclass(frozen=True)
class Part:
    """Samples on one side of the end of the warm-up."""

    # two objects, so that a part of too few samples still shows its level
    level: Level = field(metadata=INLINE)
    marginal: Marginal | Missing = field(metadata=INLINE)


@dataclass(frozen=True)
class WarmupSplit:
    """Samples inside the warm-up of epoch 1, and those after it."""

    window: float  # a position in epoch 1
    inside: Part
    after: Part


@dataclass(frozen=True)
class Coefficient(Effect):
    """Slope of the loss by position. Epochs with equal positions share one."""

    epochs: list[int]
    part: str | None = None  # of epoch 1, where the warm-up has a slope of its own
    percent: float | None = None  # of the mean loss of the members


@dataclass(frozen=True)
class JointEffect:
    """The fixed-effects estimate over all members and epochs."""

    coefficients: list[Coefficient]
    observations: int  # members times samples
    clusters: int  # units that were put in order: samples, batches or packs
    residual_sd: float
    member_effects: list[float]  # [M], levels of the members about their mean
    step_correlation: list[StepCorrelation]  # of the residuals, by epoch


@dataclass(frozen=True)
class Coefficients:
    """Slopes, and the names of the covariates of their regression."""

    coefficients: list[Coefficient]
    covariates: list[str] | None = None


@dataclass(frozen=True)
class MergedEffect:
    """Dependence of a merge on the mean position of a sample; see `merged_effect`."""

    mean_position: Coefficients | Missing
    change: Coefficients | Missing
    after: Coefficients | Missing


class Regressor(NamedTuple):
    """A position, and the epochs that have it."""

    position: np.ndarray  # [M, n]
    epochs: list[int]
    steps: np.ndarray | None  # int[M, n]; None where the steps are the units
    part: str | None = None


def marginal(values: np.ndarray, position: np.ndarray, units: np.ndarray | None = None) -> Marginal:
    """Return Spearman's rho, Pearson's r and the slope of values [n] by position [n].

    Args:
        values, position: [n].
        units: int[n], the batches or packs that were put in order. Without them errors are of type
            HC1, or by optimizer step where those are larger.

    Raises:
        Undetermined: constant values or positions, fewer than four samples.

    Example:
        >>> marginal(np.array([4.0, 3.1, 2.0, 1.5, 0.0]), np.linspace(0, 1, 5)).spearman["rho"]
        -1.0
    """
    (regressor,) = distinct_positions(position[None, None], units)
    # first: it refuses constant values, for which scipy only warns and returns NaN
    (slope,) = regression.ols(values, position[None], units).effects([regressor.steps])
    rho, r = stats.spearmanr(position, values), stats.pearsonr(position, values)
    p_values = float(rho.pvalue), float(r.pvalue)
    if units is not None:
        # scipy counts samples, and these came in batches
        ranks = stats.rankdata(values), stats.rankdata(position)
        (by_rank,) = regression.ols(ranks[0], ranks[1][None], units).effects()
        p_values = by_rank.p, slope.p
    return Marginal(
        samples=int(values.size),
        # rounded: a perfect rank correlation is 1, not 0.9999999999999999
        spearman={"rho": round(float(rho.statistic), 12), "p": p_values[0]},
        pearson={"r": float(r.statistic), "p": p_values[1]},
        slope=slope,
    )


def split_at(
    values: np.ndarray, position: np.ndarray, window: float, units: np.ndarray | None = None
) -> WarmupSplit:
    """Return `marginal` of the samples inside the warm-up window of epoch 1 and of the others.

    Raises:
        Undetermined: there is no warm-up, or it fills the whole epoch.
    """
    _check_window(window)
    inside, after = (
        Part(
            Level.of(values[rows]),
            or_missing(marginal, values[rows], position[rows], clusters.renumber(units, rows)),
        )
        for rows in (position < window, position >= window)
    )
    return WarmupSplit(window, inside, after)


def joint_effect(
    losses: np.ndarray,
    positions: np.ndarray,
    window: float | None = None,
    units: np.ndarray | None = None,
) -> JointEffect:
    """Return the fixed-effects estimate: one coefficient per epoch, all epochs jointly.

    The estimate that counts. Each sample is compared with itself in the other members, so the
    difficulty of samples, far larger than any effect of position, cancels.

    Epochs in which every member keeps its positions (`reshuffle: never`) share one coefficient.
    With a window, epoch 1 gets two: the slope inside the warm-up and the slope after it, of a
    continuous line.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        window: end of the warm-up as a position in epoch 1.
        units: int[n], from 0, the batches or packs that were put in order; None: the samples.

    Raises:
        Undetermined: one member, no variation within samples, no warm-up, too few samples.
    """
    regressors = distinct_positions(positions, units)
    if window is not None:
        _check_window(window)
        first, epochs, steps, _ = regressors[0]
        # A linear spline with its knot at the end of the warm-up. Two separate lines would have
        # a jump there, which nothing in the training explains.
        regressors[:1] = [
            Regressor(np.minimum(first, window), epochs, steps, "warm-up"),
            Regressor(np.maximum(first - window, 0), epochs, steps, "after warm-up"),
        ]
    columns = np.stack([regressor.position for regressor in regressors])
    fit = regression.fixed_effects(losses, columns, units)
    # the within transformation removed the levels c_i of the members; here they come back
    levels = losses.mean(axis=1) - np.einsum("r,rm->m", fit.estimate, columns.mean(axis=2))
    return JointEffect(
        coefficients=[
            dataclasses.replace(row, percent=100 * row.estimate / float(losses.mean()))
            for row in _coefficients(fit, regressors)
        ],
        observations=int(losses.size),
        clusters=len(fit.influence),
        residual_sd=fit.residual_sd,
        member_effects=(levels - levels.mean()).tolist(),
        step_correlation=step_correlations(fit, positions),
    )


def step_correlations(fit: Fit, positions: np.ndarray) -> list[StepCorrelation]:
    """Return the intra-class correlation of steps in each epoch; empty where steps share nothing.

    Args:
        fit: of the members' losses.
        positions: [M, E, n].
    """
    correlations = []
    for epoch in range(positions.shape[1]):
        steps = clusters.step_numbers(positions[:, epoch])
        row = or_missing(clusters.step_correlation, fit.residuals, steps, len(fit.estimate))
        if not isinstance(row, Missing):
            correlations.append(StepCorrelation(epoch + 1, *row))
    return correlations


def merged_effect(
    values: np.ndarray,
    losses: np.ndarray,
    positions: np.ndarray,
    base: np.ndarray | None,
    units: np.ndarray | None = None,
) -> MergedEffect:
    """Return how a merge's losses depend on a sample's mean position over the members.

    The unit of all three slopes is a sample at position 1 instead of 0 in *all* members.

    Args:
        values: [n], of the merge.
        losses: [M, n], of the members.
        positions: [M, E, n].
        base: [n] or None, losses of the base model.
        units: int[n], the batches or packs that were put in order; None: the samples.

    Returns:
        `mean_position`: regression of the merge's losses. Difficulty stays in the error; the
            base's losses, where given, take part of it out.
        `change`: regression of merge less mean member, in which difficulty cancels.
        `after`: the members' fixed-effects coefficient plus that change, the sharpest estimate of
            the effect that remains. Its error is that of the summed influences.
    """
    regressors = distinct_positions(positions, units)
    members = np.stack([regressor.position for regressor in regressors])
    # A merge has one loss per sample, and M positions. A linear effect in each member gives a
    # merge that averages them the same slope by the mean position.
    means = np.stack([regressor.position.mean(axis=0) for regressor in regressors])

    def change_fit() -> Fit:
        return regression.ols(values - losses.mean(axis=0), means, units)

    def mean_position() -> Coefficients:
        columns = means if base is None else np.concatenate([means, base[None]])
        fit = regression.ols(values, columns, units)
        return Coefficients(_coefficients(fit, regressors), [] if base is None else ["base loss"])

    def change() -> Coefficients:
        return Coefficients(_coefficients(change_fit(), regressors))

    def after() -> Coefficients:
        before, moved = regression.fixed_effects(losses, members, units), change_fit()
        # Both fits use the same samples. Adding influences, not variances, keeps their covariance.
        influence = before.influence + moved.influence
        factor = max(before.correction, moved.correction)  # the two differ little: be conservative
        fit = before._replace(
            estimate=before.estimate + moved.estimate,
            covariance=factor * influence.T @ influence,
            by_step=before.by_step + moved.by_step,
        )
        return Coefficients(_coefficients(fit, regressors))

    return MergedEffect(or_missing(mean_position), or_missing(change), or_missing(after))


def _coefficients(fit: Fit, regressors: Sequence[Regressor]) -> list[Coefficient]:
    steps = [regressor.steps for regressor in regressors]
    # not strict: covariates follow the positions in a fit, and are not reported
    return [
        Coefficient(**vars(effect), epochs=regressor.epochs, part=regressor.part)
        for effect, regressor in zip(fit.effects(steps), regressors, strict=False)
    ]


def distinct_positions(positions: np.ndarray, units: np.ndarray | None = None) -> list[Regressor]:
    """Return the different positions of epochs; two equal columns would be collinear."""
    regressors: list[Regressor] = []
    for epoch in range(positions.shape[1]):
        for regressor in regressors:
            # exactly equal: `reshuffle: never` repeats an order, it does not resemble it
            if np.array_equal(regressor.position, positions[:, epoch]):
                regressor.epochs.append(epoch + 1)
                break
        else:
            steps = clusters.step_numbers(positions[:, epoch])
            # batches that never change are the clusters already
            fixed = units is not None and clusters.same_partition(units, steps[0])
            regressors.append(Regressor(positions[:, epoch], [epoch + 1], None if fixed else steps))
    return regressors


def _check_window(window: float) -> None:
    if window <= 0:
        raise Undetermined("no warm-up")
    if window >= 1:
        raise Undetermined("the warm-up fills the whole first epoch")
