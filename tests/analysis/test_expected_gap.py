"""The gap that is expected of a plain average, against simulated averages of all five levels."""

import numpy as np
import pytest

from jax_ordermerge.analysis import imbalance
from jax_ordermerge.analysis.position_curves import within_share
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.data import order


def draw(level, members, samples, seed=0, batch=8):
    """Return positions [M, E, n] of two epochs."""
    settings = {"examples": samples, "batch": batch, "seed": seed, "members": members}
    return np.array(
        [
            [
                order.positions(
                    order.order_indices(level=level, member=m, epoch=e, **settings), samples
                )
                for e in range(2)
            ]
            for m in range(members)
        ]
    )


def halves(values, position):
    """Return the mean of the early less that of the late half; in the plainest way."""
    middle = np.argsort(position, kind="stable")
    half = len(middle) // 2
    return values[middle[:half]].mean() - values[middle[half:]].mean()


@pytest.mark.parametrize("samples", [256, 203])
@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("level", order.LEVELS)
def test_a_plain_average_has_the_expected_gap_at_every_level(level, members, samples):
    x = draw(level, members, samples)
    rng = np.random.default_rng(1)
    # no straight line, and noise: the identity holds for the numbers, whatever made them
    losses = rng.normal(2, 0.5, samples) - 0.2 * x[:, 0] ** 2 + 0.1 * np.sqrt(x[:, 1])
    losses += rng.normal(0, 0.02, losses.shape)
    shifted = losses.mean(axis=0) + 0.03 * (x[:, 0].mean(axis=0) if level != "reverse" else 0)
    merged = {"average": losses.mean(axis=0), "other": shifted + rng.normal(0, 0.01, samples)}
    document = asdict(imbalance.analyze(losses, x, merged, bootstrap=60, permutations=9))
    for epoch in range(2):
        average = document["merged"]["average"]["early_late"][epoch]
        for key in ("estimate", "se", "low", "high"):
            assert average["merged"][key] == pytest.approx(average["expected"][key], abs=1e-12)
        assert average["excess"]["estimate"] == pytest.approx(0, abs=1e-12)
        assert average["excess"]["p"] == 1
        # the excess of another merge is the gap of its losses less the mean member's
        other = document["merged"]["other"]["early_late"][epoch]
        if samples == 256:
            gaps = [
                halves(merged["other"] - losses.mean(axis=0), x[m, epoch]) for m in range(members)
            ]
            assert other["excess"]["estimate"] == pytest.approx(np.mean(gaps))
        pooled = document["pooled"]["early_late"][epoch]
        assert pooled["expected"] == average["expected"]
        assert pooled["expected"]["estimate"] == pytest.approx(
            pooled["share_left"] * pooled["estimate"]
        )


@pytest.mark.parametrize(
    ("level", "members", "kept"),
    [
        ("sample", 2, 1 / 2),
        ("sample", 4, 1 / 4),
        ("batch", 4, 1 / 4),
        ("balanced", 2, 1 / 4),
        ("balanced", 4, 1 / 16),
        ("reverse", 2, 0),
        ("reverse", 4, 0),
        ("reverse", 3, 1 / 9),
        ("same", 4, 1),
    ],
)
def test_the_part_that_an_average_keeps_is_that_of_simulated_averages(level, members, kept):
    """A line of slope -0.2 without noise, 40 draws of 512 samples.

    The loss of the average by the position in one member: its slope over that of the member. The
    spread between draws is 0.02 at level `sample`, so the mean of 40 has an error of 0.003.
    """
    by_regression, by_share = [], []
    for seed in range(40):
        x = draw(level, members, 512, seed)[:, 0]
        average = (-0.2 * x).mean(axis=0)
        slopes = [np.polyfit(row, average, 1)[0] for row in x]
        by_regression.append(np.mean(slopes) / -0.2)
        by_share.append(1 - within_share(x))
    assert np.mean(by_share) == pytest.approx(np.mean(by_regression), abs=1e-9)
    assert np.mean(by_share) == pytest.approx(kept, abs=0.02)
