"""Regressions of losses on positions: of one model, of all members jointly, and of a merge.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy import stats

from jax_ordermerge.analysis import regression
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
    slope: Effect  # errors of type HC1: one model has one loss per sample, no clusters


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


@dataclass(frozen=True)
class JointEffect:
    """The fixed-effects estimate over all members and epochs."""

    coefficients: list[Coefficient]
    observations: int  # members times samples
    clusters: int  # samples
    residual_sd: float
    member_effects: list[float]  # [M], levels of the members about their mean


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


class _Regressor(NamedTuple):
    position: np.ndarray  # [M, n]
    epochs: list[int]
    part: str | None = None


def marginal(values: np.ndarray, position: np.ndarray) -> Marginal:
    """Return Spearman's rho, Pearson's r and the slope (HC1 errors) of values [n] by position [n].

    Raises:
        Undetermined: constant values or positions, fewer than four samples.

    Example:
        >>> marginal(np.array([4.0, 3.1, 2.0, 1.5, 0.0]), np.linspace(0, 1, 5)).spearman["rho"]
        -1.0
    """
    # first: it refuses constant values, for which scipy only warns and returns NaN
    (slope,) = regression.ols(values, position[None]).effects()
    rho, r = stats.spearmanr(position, values), stats.pearsonr(position, values)
    return Marginal(
        samples=int(values.size),
        # rounded: a perfect rank correlation is 1, not 0.9999999999999999
        spearman={"rho": round(float(rho.statistic), 12), "p": float(rho.pvalue)},
        pearson={"r": float(r.statistic), "p": float(r.pvalue)},
        slope=slope,
    )


def split_at(values: np.ndarray, position: np.ndarray, window: float) -> WarmupSplit:
    """Return `marginal` of the samples inside the warm-up window of epoch 1 and of the others.

    Raises:
        Undetermined: there is no warm-up, or it fills the whole epoch.
    """
    _check_window(window)
    inside, after = (
        Part(Level.of(values[rows]), or_missing(marginal, values[rows], position[rows]))
        for rows in (position < window, position >= window)
    )
    return WarmupSplit(window, inside, after)


def joint_effect(
    losses: np.ndarray, positions: np.ndarray, window: float | None = None
) -> JointEffect:
    """Return the fixed-effects estimate: one coefficient per epoch, all epochs jointly.

    Epochs in which every member keeps its positions (`reshuffle: never`) share one coefficient.
    With a window, epoch 1 gets two: the slope inside the warm-up and the slope after it, of a
    continuous line.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        window: end of the warm-up as a position in epoch 1.

    Raises:
        Undetermined: one member, no variation within samples, no warm-up, too few samples.
    """
    regressors = _regressors(positions)
    if window is not None:
        _check_window(window)
        first, epochs, _ = regressors[0]
        # A linear spline with its knot at the end of the warm-up. Two separate lines would have
        # a jump there, which nothing in the training explains.
        regressors[:1] = [
            _Regressor(np.minimum(first, window), epochs, "warm-up"),
            _Regressor(np.maximum(first - window, 0), epochs, "after warm-up"),
        ]
    columns = np.stack([regressor.position for regressor in regressors])
    fit = regression.fixed_effects(losses, columns)
    # the within transformation removed the levels c_i of the members; here they come back
    levels = losses.mean(axis=1) - np.einsum("r,rm->m", fit.estimate, columns.mean(axis=2))
    return JointEffect(
        coefficients=_coefficients(fit, regressors),
        observations=int(losses.size),
        clusters=int(losses.shape[1]),
        residual_sd=fit.residual_sd,
        member_effects=(levels - levels.mean()).tolist(),
    )


def merged_effect(
    values: np.ndarray, losses: np.ndarray, positions: np.ndarray, base: np.ndarray | None
) -> MergedEffect:
    """Return how a merge's losses depend on a sample's mean position over the members.

    The unit of all three slopes is a sample at position 1 instead of 0 in *all* members.

    Args:
        values: [n], of the merge.
        losses: [M, n], of the members.
        positions: [M, E, n].
        base: [n] or None, losses of the base model.

    Returns:
        `mean_position`: regression of the merge's losses. Difficulty stays in the error; the
            base's losses, where given, take part of it out.
        `change`: regression of merge less mean member, in which difficulty cancels.
        `after`: the members' fixed-effects coefficient plus that change, the sharpest estimate of
            the effect that remains. Its error is that of the summed influences.
    """
    regressors = _regressors(positions)
    members = np.stack([regressor.position for regressor in regressors])
    # A merge has one loss per sample, and M positions. A linear effect in each member gives a
    # merge that averages them the same slope by the mean position.
    means = np.stack([regressor.position.mean(axis=0) for regressor in regressors])

    def change_fit() -> Fit:
        return regression.ols(values - losses.mean(axis=0), means)

    def mean_position() -> Coefficients:
        columns = means if base is None else np.concatenate([means, base[None]])
        fit = regression.ols(values, columns)
        return Coefficients(_coefficients(fit, regressors), [] if base is None else ["base loss"])

    def change() -> Coefficients:
        return Coefficients(_coefficients(change_fit(), regressors))

    def after() -> Coefficients:
        before, moved = regression.fixed_effects(losses, members), change_fit()
        # Both fits use the same samples. Adding influences, not variances, keeps their covariance.
        influence = before.influence + moved.influence
        factor = max(before.correction, moved.correction)  # the two differ little: be conservative
        fit = before._replace(
            estimate=before.estimate + moved.estimate, covariance=factor * influence.T @ influence
        )
        return Coefficients(_coefficients(fit, regressors))

    return MergedEffect(or_missing(mean_position), or_missing(change), or_missing(after))


def _coefficients(fit: Fit, regressors: Sequence[_Regressor]) -> list[Coefficient]:
    # not strict: covariates follow the positions in a fit, and are not reported
    return [
        Coefficient(**vars(effect), epochs=regressor.epochs, part=regressor.part)
        for effect, regressor in zip(fit.effects(), regressors, strict=False)
    ]


def _regressors(positions: np.ndarray) -> list[_Regressor]:
    """Return the distinct positions of epochs; two equal columns would be collinear."""
    regressors: list[_Regressor] = []
    for epoch in range(positions.shape[1]):
        for regressor in regressors:
            # exactly equal: `reshuffle: never` repeats an order, it does not resemble it
            if np.array_equal(regressor.position, positions[:, epoch]):
                regressor.epochs.append(epoch + 1)
                break
        else:
            regressors.append(_Regressor(positions[:, epoch], [epoch + 1]))
    return regressors


def _check_window(window: float) -> None:
    if window <= 0:
        raise Undetermined("no warm-up")
    if window >= 1:
        raise Undetermined("the warm-up fills the whole first epoch")
