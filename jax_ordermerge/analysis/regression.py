"""Least squares with cluster-robust errors, for losses that depend on where a sample stood in the order.

Axis letters here: `M` member, `n` sample, `R` regressor.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95


class Undetermined(ValueError):
    """A statistic that these data cannot determine; the message is the reason that a reader is shown."""


class Fit(NamedTuple):
    """Coefficients of a regression.

    Attributes:
        estimate: float64[R].
        covariance: float64[R, R], cluster-robust by sample.
        influence: float64[n, R], what each sample contributes to the error of the estimate; sums of estimates have as
            influence the sum of influences, which keeps their dependence.
        residual_sd: standard deviation of what is left, degrees of freedom counted.
        correction: the small-sample factor within `covariance`.
    """

    estimate: np.ndarray
    covariance: np.ndarray
    influence: np.ndarray
    residual_sd: float
    correction: float


def fixed_effects(losses: ArrayLike, regressors: ArrayLike) -> Fit:
    """Fit `losses[i, s] = a_s + c_i + sum_r b_r x[r, i, s] + e`, with errors robust to dependence within a sample.

    The difficulty `a_s` of a sample and the level `c_i` of a member cancel in the two-way within transformation, which for a
    complete panel equals a regression with a dummy for each sample and member. The sample effects are nested in the clusters
    and so not counted as parameters in the small-sample factor `n / (n - 1) * (N - 1) / (N - K)`.

    Args:
        losses: [M, n].
        regressors: [R, M, n].

    Raises:
        Undetermined: fewer than two members, no variation within samples, collinear regressors, too few samples.

    Example:
        >>> positions = [[0.0, 0.5, 1.0, 0.2], [1.0, 0.0, 0.5, 0.7]]
        >>> losses = [[3.0, 2.0, 1.0, 4.0], [2.0, 3.0, 2.0, 3.5]]
        >>> fixed_effects(losses, [positions]).estimate.round(6).tolist()
        [-1.37037]

    Source: Cameron and Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, sections II and III.B.
    """
    y, x = np.asarray(losses, np.float64), np.asarray(regressors, np.float64)
    members = y.shape[0]
    if members < 2:
        raise Undetermined(
            "one member only: the difficulty of a sample cannot be told from the effect of its position"
        )
    moved = np.abs(within(x)).max(axis=(1, 2))
    if not (np.ptp(x, axis=1) > 1e-9).any():
        raise Undetermined(
            "every sample has the same positions in all members: nothing varies within a sample"
        )
    if (moved < 1e-9).any():
        raise Undetermined(
            "a regressor does not vary once the means of samples and members are taken out"
        )
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

    Source: MacKinnon and White, "Some heteroskedasticity-consistent covariance matrix estimators", 1985.
    """
    y, x = np.asarray(values, np.float64)[None], np.asarray(regressors, np.float64)[:, None]
    if (np.ptp(x, axis=(1, 2)) < 1e-9).any():
        raise Undetermined("the positions do not vary between samples")
    return _sandwich(y - y.mean(), x - x.mean(axis=2, keepdims=True), parameters=x.shape[0] + 1)


def within(values: np.ndarray) -> np.ndarray:
    """Take the means of samples and members out of `[..., M, n]`.

    Example:
        >>> within(np.array([[1.0, 2.0], [3.0, 6.0]])).tolist()
        [[0.5, -0.5], [-0.5, 0.5]]
    """
    by_sample = values.mean(axis=-2, keepdims=True)
    by_member = values.mean(axis=-1, keepdims=True)
    return values - by_sample - by_member + values.mean(axis=(-2, -1), keepdims=True)


def summarize(estimate: float, variance: float, clusters: int) -> dict[str, float]:
    """Return estimate, standard error, z, p and the 95 % interval; p and interval by Student's t with `clusters - 1` degrees.

    Raises:
        Undetermined: the variance is zero.

    Example:
        >>> {name: round(value, 3) for name, value in summarize(2.0, 1.0, 1000).items()}
        {'estimate': 2.0, 'se': 1.0, 'z': 2.0, 'p': 0.046, 'low': 0.038, 'high': 3.962}
    """
    if not variance > 0:
        raise Undetermined("no residual variation: a standard error cannot be estimated")
    error = float(np.sqrt(variance))
    z, half = estimate / error, stats.t.ppf((1 + CONFIDENCE) / 2, clusters - 1) * error
    p = 2 * stats.t.sf(abs(z), clusters - 1)
    return {
        "estimate": float(estimate),
        "se": error,
        "z": float(z),
        "p": float(p),
        "low": float(estimate - half),
        "high": float(estimate + half),
    }


def coefficients(fit: Fit, labels: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return one dict a coefficient: its label and `summarize`."""
    variances = np.diag(fit.covariance)
    clusters = fit.influence.shape[0]
    return [
        {**label, **summarize(b, v, clusters)}
        for label, b, v in zip(labels, fit.estimate, variances, strict=True)
    ]


def _sandwich(y: np.ndarray, x: np.ndarray, *, parameters: int) -> Fit:
    """Least squares of y[M, n] on x[R, M, n], both with the means taken out, clustered by sample."""
    count, clusters = y.size, y.shape[1]
    freedom = count - parameters - (clusters - 1 if y.shape[0] > 1 else 0)
    if freedom < 1 or clusters <= x.shape[0] + 1:
        raise Undetermined(f"{clusters} samples are too few for {x.shape[0]} coefficients")
    if np.abs(y).max() < 1e-12:
        raise Undetermined("the losses do not vary")
    gram = np.einsum("rmn,qmn->rq", x, x)
    scale = np.sqrt(np.diag(gram))
    if np.linalg.eigvalsh(gram / np.outer(scale, scale))[0] < 1e-8:
        raise Undetermined(
            "the positions of different epochs cannot be told apart (they are linearly dependent)"
        )
    inverse = np.linalg.inv(gram)
    estimate = inverse @ np.einsum("rmn,mn->r", x, y)
    residuals = y - np.einsum("r,rmn->mn", estimate, x)
    influence = np.einsum("rmn,mn->nr", x, residuals) @ inverse
    correction = clusters / (clusters - 1) * (count - 1) / (count - parameters)
    residual_sd = float(np.sqrt((residuals**2).sum() / freedom))
    return Fit(estimate, correction * influence.T @ influence, influence, residual_sd, correction)
