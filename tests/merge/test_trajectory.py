"""Weights of checkpoints, which checkpoints they are, and their mean."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import trajectory


@pytest.mark.parametrize("count", [2, 3, 7])
def test_weights_are_those_of_a_decaying_learning_rate(count):
    """The update between checkpoints i - 1 and i counts with the sum of the weights from i on."""

    def decay(kind):
        weights = trajectory.weights(kind, count)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert (weights > 0).all()
        return [weights[i:].sum() for i in range(1, count)]

    x = [i / count for i in range(1, count)]
    assert decay("equal") == pytest.approx([1 - part for part in x])
    assert decay("wsm") == pytest.approx([1 - part**0.5 for part in x])


def test_linear_weights():
    assert trajectory.weights("linear", 3).tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_planned_steps():
    assert trajectory.planned_steps(steps=40, every=10, last=3) == [20, 30, 40]
    assert trajectory.planned_steps(steps=45, every=20, last=3) == [20, 40, 45]
    with pytest.raises(UserError, match=r"checkpoints.last = 4: .*45 steps.*every 20 has 3"):
        trajectory.planned_steps(steps=45, every=20, last=4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_mean_is_summed_in_float32_in_order_and_rounded_once(dtype):
    rng = np.random.default_rng(0)
    models = [{"a": {"w": rng.normal(size=(3, 50)).astype(np.float32)}} for _ in range(3)]
    shares = trajectory.weights("wsm", 3)
    total = np.zeros((3, 50), np.float32)
    for model, share in zip(models, shares, strict=True):
        total = total + model["a"]["w"] * np.float32(share)
    result = trajectory.average(
        ({"a": {"w": jnp.array(m["a"]["w"])}} for m in models), shares, dtype
    )
    expected = np.asarray(jnp.array(total).astype(dtype))
    assert np.array_equal(np.asarray(result["a"]["w"]), expected)
    assert result["a"]["w"].dtype == dtype
