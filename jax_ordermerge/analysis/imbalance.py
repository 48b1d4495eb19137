"""Training imbalance: how the final loss of a training sample depends on where it stood in the order.

Losses and positions in, statistics out as plain data for analysis.json. A statistic that the data cannot determine is a dict
`{"reason": ...}` in its place, never a NaN. Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from jax_ordermerge.analysis import regression, resample
from jax_ordermerge.analysis.regression import Undetermined
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits

Statistics = dict[str, Any]


def analyze(
    member_losses: ArrayLike,
    positions: ArrayLike,
    merged_losses: Mapping[str, ArrayLike] | None = None,
    *,
    base_losses: ArrayLike | None = None,
    warmup_fraction: float = 0.0,
    bins: int = 10,
    bootstrap: int = 1000,
    permutations: int = 1000,
    seed: int = 0,
) -> Statistics:
    """Return every statistic of the position effect, before and after merging.

    Args:
        member_losses: [M, n], loss of each training sample under each member after training, nats a token.
        positions: [M, E, n] in [0, 1], optimizer step within the epoch in which member m saw the sample.
        merged_losses: for each merge, [n].
        base_losses: [n] under the base; a covariate that no position can have touched, it sharpens the merges' regressions.
        warmup_fraction: warm-up steps over all steps.
        bins: bins of the position curves (10: deciles).
        bootstrap: resamples of the samples.
        permutations: of the permutation tests.
        seed: of the run; resamples and permutations have streams of their own.

    Returns:
        `design`, `members` (a list, each with `epochs` and `warmup`), `pooled` (curves an epoch, raw and with the difficulty
        of samples taken out), `fixed_effects`, `fixed_effects_warmup` (epoch 1 split where the warm-up ends), `merged`
        (for each name `by_member`, `mean_position`, `change`, `early_late`, `curves`).

    Raises:
        UserError: arrays of shapes that do not belong together, positions outside [0, 1], losses that are not finite.
    """
    losses, places, merged, base = _checked(
        member_losses, positions, merged_losses or {}, base_losses
    )
    members, epochs, samples = places.shape
    window = min(1.0, warmup_fraction * epochs)
    settings = {"bins": bins, "bootstrap": bootstrap, "permutations": permutations, "seed": seed}
    p_values = resample.permutation_p(
        np.concatenate([losses, *(m[None] for m in merged.values())]),
        places.reshape(members * epochs, samples),
        permutations=permutations,
        generator=np.random.default_rng(stream_key_bits(seed, "analysis", "permutation")),
    ).reshape(-1, members, epochs)
    binned = _binned(losses, places, merged, bins=bins, resamples=bootstrap, seed=seed)

    def alone(values: np.ndarray, row: int, member: int) -> list[Statistics]:
        return [
            {
                "epoch": e + 1,
                "permutation_p": float(p_values[row, member, e]),
                **_or_reason(marginal, values, places[member, e]),
            }
            for e in range(epochs)
        ]

    def with_curves(rows: list[Statistics], curves: list[Statistics]) -> list[Statistics]:
        return [
            row | {"curve": curve, "decile_gap": curve.get("gap", curve)}
            for row, curve in zip(rows, curves, strict=True)
        ]

    return {
        "design": {
            "samples": samples,
            "members": members,
            "epochs": epochs,
            "warmup_fraction": warmup_fraction,
            "warmup_window": window,
            "confidence": regression.CONFIDENCE,
            **settings,
        },
        "members": [
            {
                "member": m,
                **_level(losses[m]),
                "epochs": with_curves(alone(losses[m], m, m), binned["members"][m]),
                "warmup": _or_reason(split_at, losses[m], places[m, 0], window),
            }
            for m in range(members)
        ],
        "pooled": binned["pooled"],
        "fixed_effects": _or_reason(joint_effect, losses, places),
        "fixed_effects_warmup": _or_reason(joint_effect, losses, places, window),
        "merged": {
            name: {
                **_level(values),
                "by_member": [alone(values, members + row, m) for m in range(members)],
                **_or_reason(merged_effect, values, losses, places, base),
                **binned["merged"][name],
            }
            for row, (name, values) in enumerate(merged.items())
        },
    }


def marginal(values: np.ndarray, position: np.ndarray) -> Statistics:
    """Return Spearman's rho, Pearson's r and the slope (with HC1 error) of values [n] against one position [n].

    Raises:
        Undetermined: constant values or positions, fewer than four samples.

    Example:
        >>> marginal(np.array([4.0, 3.1, 2.0, 1.5, 0.0]), np.linspace(0, 1, 5))["spearman"]["rho"]
        -1.0
    """
    slope = regression.summarize(
        *_only(regression.ols(values, position[None])), clusters=values.size
    )
    rho, r = stats.spearmanr(position, values), stats.pearsonr(position, values)
    return {
        "samples": int(values.size),
        "spearman": {"rho": round(float(rho.statistic), 12), "p": float(rho.pvalue)},
        "pearson": {"r": float(r.statistic), "p": float(r.pvalue)},
        "slope": slope,
    }


def split_at(values: np.ndarray, position: np.ndarray, window: float) -> Statistics:
    """Return `marginal` of the samples inside the warm-up window of epoch 1 and of those after it.

    Raises:
        Undetermined: there is no warm-up, or it fills the whole epoch.
    """
    _check_window(window)
    inside = position < window
    return {
        "window": window,
        "inside": {
            **_level(values[inside]),
            **_or_reason(marginal, values[inside], position[inside]),
        },
        "after": {
            **_level(values[~inside]),
            **_or_reason(marginal, values[~inside], position[~inside]),
        },
    }


def joint_effect(
    losses: np.ndarray, positions: np.ndarray, window: float | None = None
) -> Statistics:
    """Return the fixed-effects estimate, one coefficient an epoch, all epochs jointly.

    Epochs in which every member keeps its positions (`reshuffle: never`) share one coefficient. With a window, epoch 1 gets
    two: the slope inside the warm-up and the slope after it, the line unbroken.

    Args:
        losses: [M, n].
        positions: [M, E, n].
        window: end of the warm-up as a position in epoch 1.

    Raises:
        Undetermined: one member, no variation within samples, no warm-up, too few samples.
    """
    labels, columns = _epoch_columns(positions)
    if window is not None:
        _check_window(window)
        first = columns.pop(0)
        columns[:0] = [np.minimum(first, window), np.maximum(first - window, 0)]
        labels[:1] = [{**labels[0], "part": "warm-up"}, {**labels[0], "part": "after warm-up"}]
    fit = regression.fixed_effects(losses, np.stack(columns))
    levels = losses.mean(axis=1) - np.einsum(
        "r,rm->m", fit.estimate, np.stack(columns).mean(axis=2)
    )
    return {
        "coefficients": regression.coefficients(fit, labels),
        "observations": int(losses.size),
        "clusters": int(losses.shape[1]),
        "residual_sd": fit.residual_sd,
        "member_effects": (levels - levels.mean()).tolist(),
    }


def merged_effect(
    values: np.ndarray, losses: np.ndarray, positions: np.ndarray, base: np.ndarray | None
) -> Statistics:
    """Return how a merged model's losses depend on the mean over the members of a sample's position.

    `mean_position` is the plain regression (difficulty stays in the error, the base's loss is taken out when given).
    `change` regresses merged loss less mean member loss, in which difficulty cancels: by how much merging changed the effect.
    `after` is the members' fixed-effects coefficient plus that change, the sharpest estimate of what is left; its error is
    that of the summed influences. A sample that stood at 1 instead of 0 in *all* members is the unit of all three.

    Args:
        values: [n], of the merged model.
        losses: [M, n].
        positions: [M, E, n].
        base: [n] or None.
    """
    labels, columns = _epoch_columns(positions)
    mean_columns = np.stack([column.mean(axis=0) for column in columns])
    covariates = mean_columns if base is None else np.concatenate([mean_columns, base[None]])
    covariate_labels = labels if base is None else [*labels, {"covariate": "base loss"}]

    def plain() -> Statistics:
        found = regression.coefficients(regression.ols(values, covariates), covariate_labels)
        return {
            "coefficients": found[: len(labels)],
            "covariates": [] if base is None else ["base loss"],
        }

    def change() -> Statistics:
        return {
            "coefficients": regression.coefficients(
                regression.ols(values - losses.mean(axis=0), mean_columns), labels
            )
        }

    def after() -> Statistics:
        before = regression.fixed_effects(losses, np.stack(columns))
        moved = regression.ols(values - losses.mean(axis=0), mean_columns)
        factor = max(before.correction, moved.correction)
        influence = before.influence + moved.influence
        fit = before._replace(
            estimate=before.estimate + moved.estimate, covariance=factor * influence.T @ influence
        )
        return {"coefficients": regression.coefficients(fit, labels)}

    return {
        "mean_position": _or_reason(plain),
        "change": _or_reason(change),
        "after": _or_reason(after),
    }


def _binned(
    losses: np.ndarray,
    places: np.ndarray,
    merged: Mapping[str, np.ndarray],
    *,
    bins: int,
    resamples: int,
    seed: int,
) -> Statistics:
    """Return all curves: of each member, pooled, with sample effects taken out, and of each merge, on shared resamples."""
    members, epochs = places.shape[:2]
    jobs, counts = [], []

    def add(values: np.ndarray, position: np.ndarray, number: int) -> int:
        jobs.append((values, position))
        counts.append(number)
        return len(jobs) - 1

    of_member = [
        [add(losses[m : m + 1], places[m : m + 1, e], bins) for e in range(epochs)]
        for m in range(members)
    ]
    spread = {name: np.broadcast_to(values, losses.shape) for name, values in merged.items()}
    at = [places[:, e] for e in range(epochs)]
    raw = [add(losses, at[e], bins) for e in range(epochs)]
    own = [_own_effect(losses, at[e]) for e in range(epochs)]
    clean = [None if values is None else add(values, at[e], bins) for e, values in enumerate(own)]
    halves = [
        (add(losses, at[e], 2), None if v is None else add(v, at[e], 2)) for e, v in enumerate(own)
    ]
    of_merge = {
        name: [(add(v, at[e], bins), add(v, at[e], 2)) for e in range(epochs)]
        for name, v in spread.items()
    }
    try:
        generator = np.random.default_rng(stream_key_bits(seed, "analysis", "bootstrap"))
        found = resample.curves(jobs, bins=counts, resamples=resamples, generator=generator)
    except Undetermined as error:
        missing: Statistics = {"reason": str(error)}
        empty = [dict(missing) for _ in range(epochs)]
        return {
            "members": [[dict(missing) for _ in range(epochs)] for _ in range(members)],
            "pooled": {"raw": empty, "within": empty, "early_late": empty},
            "merged": {name: {"curves": empty, "early_late": empty} for name in merged},
        }

    def shown(index: int) -> Statistics:
        return resample.curve_dict(found[index]) | {"gap": resample.gap(found[index])}

    def early_late(epoch: int, index: int | None = None) -> Statistics:
        raw_half, own_half = halves[epoch]
        before = found[raw_half if own_half is None else own_half]
        if index is None:
            return {"epoch": epoch + 1, **resample.gap(before)}
        # merged less member losses of the same samples hold no difficulty; added to the members' own effect they stay sharp
        after = resample.shifted(before, found[index], found[raw_half])
        return {
            "epoch": epoch + 1,
            "members": resample.gap(before),
            "merged": resample.gap(after),
            "difference": resample.gap(after, before),
        }

    reason = "one member only: the difficulty of samples cannot be taken out"
    if members > 1:
        reason = (
            "every sample has the same positions in all members: nothing varies within a sample"
        )
    return {
        "members": [[shown(index) for index in row] for row in of_member],
        "pooled": {
            "raw": [shown(index) for index in raw],
            "within": [{"reason": reason} if index is None else shown(index) for index in clean],
            "early_late": [early_late(e) for e in range(epochs)],
        },
        "merged": {
            name: {
                "curves": [shown(ten) for ten, _ in rows],
                "early_late": [early_late(e, two) for e, (_, two) in enumerate(rows)],
            }
            for name, rows in of_merge.items()
        },
    }


def _own_effect(losses: np.ndarray, position: np.ndarray) -> np.ndarray | None:
    """Return losses [M, n] with the levels of samples and members taken out, on the scale of the effect of a position.

    The mean of a sample's losses carries part of its own position's effect away, 1 / M of it with independent orders and
    none with reversed pairs: the slope of the within-sample position on the position is what is left, and is divided out.
    With reversed pairs only the part of the effect that is odd about the middle can be seen: the rest is in both members alike.
    """
    left = regression.within(position)
    centred = position - position.mean(axis=1, keepdims=True)
    spread = float((centred**2).sum())
    share = float((left**2).sum()) / spread if spread > 1e-9 else 0.0
    return regression.within(losses) / share + losses.mean() if share > 1e-6 else None


def _epoch_columns(positions: np.ndarray) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Return labels and [M, n] positions of the distinct epochs, epochs with equal positions under one label."""
    labels: list[dict[str, Any]] = []
    columns: list[np.ndarray] = []
    for epoch in range(positions.shape[1]):
        for label, column in zip(labels, columns, strict=True):
            if np.array_equal(column, positions[:, epoch]):
                label["epochs"].append(epoch + 1)
                break
        else:
            labels.append({"epochs": [epoch + 1]})
            columns.append(positions[:, epoch])
    return labels, columns


def _checked(
    member_losses: ArrayLike,
    positions: ArrayLike,
    merged: Mapping[str, ArrayLike],
    base: ArrayLike | None,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray | None]:
    losses, places = np.asarray(member_losses, np.float64), np.asarray(positions, np.float64)
    if losses.ndim != 2 or places.ndim != 3 or places.shape[::2] != losses.shape:
        raise UserError(
            f"analysis: losses {list(losses.shape)} and positions {list(places.shape)} do not belong together; "
            "expected [members, samples] and [members, epochs, samples]"
        )
    if not (np.isfinite(places).all() and places.min() >= 0 and places.max() <= 1):
        raise UserError(
            "analysis: positions must lie in [0, 1]; give the step within the epoch over its number of steps"
        )
    rest = {name: np.asarray(values, np.float64) for name, values in merged.items()}
    control = None if base is None else np.asarray(base, np.float64)
    rows = (
        {f"member {m}": row for m, row in enumerate(losses)}
        | rest
        | ({} if control is None else {"the base": control})
    )
    for name, row in rows.items():
        if row.shape != losses.shape[1:]:
            raise UserError(
                f"analysis: {name} has losses of shape {list(row.shape)}, expected [{losses.shape[1]}]"
            )
        if not np.isfinite(row).all():
            raise UserError(
                f"analysis: {np.count_nonzero(~np.isfinite(row))} losses of {name} are not finite; the training diverged, "
                "lower training.learning_rate"
            )
    return losses, places, rest, control


def _or_reason(statistic: Callable[..., Statistics], *args: Any) -> Statistics:
    try:
        return statistic(*args)
    except Undetermined as reason:
        return {"reason": str(reason)}


def _only(fit: regression.Fit) -> tuple[float, float]:
    return float(fit.estimate[0]), float(fit.covariance[0, 0])


def _level(values: np.ndarray) -> Statistics:
    if values.size < 2:
        return {"samples": int(values.size)}
    return {"mean_loss": float(values.mean()), "sd_loss": float(values.std(ddof=1))}


def _check_window(window: float) -> None:
    if window <= 0:
        raise Undetermined("no warm-up")
    if window >= 1:
        raise Undetermined("the warm-up fills the whole first epoch")
