"""The position effect within each source, and its errors where rows are repeated."""

import numpy as np
import pytest

from jax_ordermerge.analysis import imbalance, position_effects
from jax_ordermerge.analysis.result import asdict


def two_sources(seed=0):
    """A source whose samples have an effect of position, and a more difficult one without."""
    rng = np.random.default_rng(seed)
    x = np.stack([[rng.permutation(400) / 399] for _ in range(3)])
    rows = {"a": np.arange(0, 400, 4), "b": np.setdiff1d(np.arange(400), np.arange(0, 400, 4))}
    slope, level = np.zeros(400), np.full(400, 3.0)
    slope[rows["a"]], level[rows["a"]] = -0.5, 1.0
    losses = level + rng.normal(0, 0.3, 400) + slope * x[:, 0] + rng.normal(0, 0.05, (3, 400))
    return losses, x, rows


def test_each_source_has_its_own_slope_and_level():
    losses, x, rows = two_sources()
    merged, base = {"average": losses.mean(0)}, losses[0] + 2
    document = asdict(
        imbalance.analyze(
            losses, x, merged, base_losses=base, sources=rows, bootstrap=10, permutations=9
        )
    )
    a, b = document["sources"]
    assert (a["name"], a["samples"], b["name"], b["samples"]) == ("a", 100, "b", 300)
    for source, expected in ((a, -0.5), (b, 0.0)):
        (slope,) = source["fixed_effects"]["coefficients"]
        assert slope["low"] < expected < slope["high"]
        assert slope["high"] - slope["low"] < 0.06
        part = rows[source["name"]]
        assert source["members"]["mean_loss"] == pytest.approx(losses[:, part].mean())
        assert source["base"]["mean_loss"] == pytest.approx(base[part].mean())
        assert source["merged"]["average"]["mean_loss"] == pytest.approx(losses[:, part].mean())
        # dummies for samples and members, by least squares
        y, position = losses[:, part], x[:, 0, part]
        design = np.concatenate(
            [
                position.reshape(-1, 1),
                np.kron(np.eye(3), np.ones((len(part), 1))),
                np.tile(np.eye(len(part)), (3, 1)),
            ],
            axis=1,
        )
        fitted = np.linalg.lstsq(design, y.reshape(-1), rcond=None)[0]
        assert slope["estimate"] == pytest.approx(fitted[0])


def test_one_source_is_not_split():
    losses, x, _ = two_sources()
    settings = {"bootstrap": 10, "permutations": 9}
    plain = asdict(imbalance.analyze(losses, x, **settings))
    assert asdict(imbalance.analyze(losses, x, sources={"a": np.arange(400)}, **settings)) == plain
    assert "sources" not in plain


def test_errors_hold_where_rows_are_repeated():
    """Copies of a row share their loss, but not their positions, which orders draw apart."""
    rng = np.random.default_rng(5)
    z = []
    for _ in range(400):
        x = np.stack([[rng.permutation(120) / 119] for _ in range(2)])
        # 40 rows, three times each
        losses = np.tile(rng.normal(2, 0.5, 40) + rng.normal(0, 0.2, (2, 40)), 3)
        (slope,) = position_effects.joint_effect(losses, x).coefficients
        z.append(slope.z)
    # 0.05 of |z| > 1.98 and a deviation of 1; errors of clustering by row would be no better
    assert 0.025 < np.mean(np.abs(z) > 1.98) < 0.085
    assert 0.9 < np.std(z) < 1.1
