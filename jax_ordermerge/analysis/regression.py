"""Least squares with cluster-robust errors, for losses that depend on positions in the order.

Axis letters here: `M` member, `n` sample, `R` regressor.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jax_ordermerge.analysis.result import CONFIDENCE, Undetermined


@dataclass(frozen=True)
class Effect:
    """A regression coefficient: t statistic, two-sided p value and 95 % interval."""

    estimate: float
    se: float
    z: float  # estimate / se
    p: float  # by Student's t
    low: float
    high: float


class Fit(NamedTuple):
    """Coefficients of a regression.

    Attributes:
        estimate: float64[R].
        covariance: float64[R, R], cluster-robust by sample.
        influence: float64[n, R], contribution of each sample to the error of the estimate. A sum
            of estimates has the sum of their influences, which keeps their dependence.
        residual_sd: standard deviation of the residuals, corrected for degrees of freedom.
        correction: small-sample factor within `covariance`.
    """

    estimate: np.ndarray
    covariance: np.ndarray
    influence: np.ndarray
    residual_sd: float
    correction: float

    def effects(self) -> list[Effect]:
        """Return each coefficient with its inference; see `summarize`."""
        variances = np.diag(self.covariance)
        clusters = self.influence.shape[0]
        return [summarize(b, v, clusters) for b, v in zip(self.estimate, variances, strict=True)]


def fixed_effects(losses: ArrayLike, regressors: ArrayLike) -> Fit:
    """Fit `losses[i, s] = a_s + c_i + sum_r b_r x[r, i, s] + e`, with errors clustered by sample.

    The difficulty `a_s` of a sample and the level `c_i` of a member cancel in the two-way within
    transformation.

    Args:
        losses: [M, n].
        regressors: [R, M, n].

    Raises:
        Undetermined: fewer than two members, no variation within samples, collinear regressors,
            too few samples.

    Example:
        >>> positions = [[0.0, 0.5, 1.0, 0.2], [1.0, 0.0, 0.5, 0.7]]
        >>> losses = [[3.0, 2.0, 1.0, 4.0], [2.0, 3.0, 2.0, 3.5]]
        >>> fixed_effects(losses, [positions]).estimate.round(6).tolist()
        [-1.37037]

    Source: Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015,
        sections II and III.B.
    """
    y, x = np.asarray(losses, np.float64), np.asarray(regressors, np.float64)
    members = y.shape[0]
    if members < 2:
        raise Undetermined(
            "one member only: the difficulty of a sample cannot be separated from the effect of "
            "its position"
        )
    if not (np.ptp(x, axis=1) > 1e-9).any():
        raise Undetermined(
            "every sample has the same positions in all members: nothing varies within a sample"
        )
    if (np.abs(within(x)).max(axis=(1, 2)) < 1e-9).any():
        raise Undetermined(
            "a regressor does not vary once the means of samples and members are taken out"
        )
    # Two-way demeaning equals a fit with dummies, without a matrix of n + M columns. It needs
    # every member to have every sample, which holds here: all train on the same data.
    # The sample effects are nested in the clusters. The small-sample factor
    # n / (n - 1) * (N - 1) / (N - K) therefore does not count them among its K parameters.
    return _sandwich(within(y), within(x), parameters=x.shape[0] + members)


def ols(values: ArrayLike, regressors: ArrayLike) -> Fit:
    """Fit `values[s] = a + sum_r b_r x[r, s] + e` with heteroscedasticity-robust (HC1) errors.

    Args:
        values: [n].
        regressors: [R, n].

    Raises:
        Undetermined: a constant or collinear regressor, constant values, too few samples.

    Example:
        >>> ols([0.0, 1.1, 1.9, 3.0], [[0, 1, 2, 3]]).estimate.round(6).tolist()
        [0.98]

    Source: MacKinnon and White, "Some heteroskedasticity-consistent covariance matrix
        estimators", 1985.
    """
    y, x = np.asarray(values, np.float64)[None], np.asarray(regressors, np.float64)[:, None]
    # no samples at all: a warm-up of one step may hold the whole first epoch
    if not x.size or (np.ptp(x, axis=(1, 2)) < 1e-9).any():
        raise Undetermined("the positions do not vary between samples")
    return _sandwich(y - y.mean(), x - x.mean(axis=2, keepdims=True), parameters=x.shape[0] + 1)


def within(values: np.ndarray) -> np.ndarray:
    """Subtract the means of samples and members from `[..., M, n]`.

    Example:
        >>> within(np.array([[1.0, 2.0], [3.0, 6.0]])).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
    """
    by_sample = values.mean(axis=-2, keepdims=True)
    by_member = values.mean(axis=-1, keepdims=True)
    return values - by_sample - by_member + values.mean(axis=(-2, -1), keepdims=True)


def summarize(estimate: float, variance: float, clusters: int) -> Effect:
    """Return the inference on one coefficient, by Student's t with `clusters - 1` degrees.

    Raises:
        Undetermined: the variance is zero.

    Example:
        >>> effect = summarize(2.0, 1.0, 1000)
        >>> effect.z, round(effect.p, 3), round(effect.low, 3), round(effect.high, 3)
        (2.0, 0.046, 0.038, 3.962)
    """
    if not variance > 0:
        raise Undetermined("no residual variation: a standard error cannot be estimated")
    # Student's t with the number of clusters, not the normal distribution: with few samples
    # the cluster-robust variance is itself uncertain.
    se = float(np.sqrt(variance))
    z, half_width = estimate / se, stats.t.ppf((1 + CONFIDENCE) / 2, clusters - 1) * se
    return Effect(
        estimate=float(estimate),
        se=se,
        z=float(z),
        p=float(2 * stats.t.sf(abs(z), clusters - 1)),
        low=float(estimate - half_width),
        high=float(estimate + half_width),
    )


def _sandwich(y: np.ndarray, x: np.ndarray, *, parameters: int) -> Fit:
    """Regress y[M, n] on x[R, M, n], both without their means, with errors clustered by sample."""
    count, clusters = y.size, y.shape[1]
    freedom = count - parameters - (clusters - 1 if y.shape[0] > 1 else 0)
    if freedom < 1 or clusters <= x.shape[0] + 1:
        raise Undetermined(f"{clusters} samples are too few for {x.shape[0]} coefficients")
    # without variation the residuals are rounding errors, and so would be every z value
    if np.abs(y).max() < 1e-12:
        raise Undetermined("the losses do not vary")
    gram = np.einsum("rmn,qmn->rq", x, x)
    # eigenvalues of the correlation matrix: the test must not depend on the regressors' scales
    scale = np.sqrt(np.diag(gram))
    if np.linalg.eigvalsh(gram / np.outer(scale, scale))[0] < 1e-8:
        raise Undetermined(
            "the positions of different epochs cannot be separated (they are linearly dependent)"
        )
    inverse = np.linalg.inv(gram)
    estimate = inverse @ np.einsum("rmn,mn->r", x, y)
    residuals = y - np.einsum("r,rmn->mn", estimate, x)
    # Scores are summed over the members of a sample before they are squared: errors of one
    # sample depend on each other, errors of different samples do not.
    influence = np.einsum("rmn,mn->nr", x, residuals) @ inverse
    correction = clusters / (clusters - 1) * (count - 1) / (count - parameters)
    residual_sd = float(np.sqrt((residuals**2).sum() / freedom))
    return Fit(estimate, correction * influence.T @ influence, influence, residual_sd, correction)
