"""Tensors of one shape that are divided differently are reshaped for the optimizer only."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config import OPTIMIZERS, Training
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import optimizer
from jax_ordermerge.train import step as steps
from tests.train.test_step import cut, regression, rows

SQUARES = [
    TensorSpec("a/q", (2, 4, 4), ("layer", "heads", "embed"), "normal", "q{}", "attention"),
    TensorSpec("a/k", (2, 4, 4), ("layer", "heads", "embed"), "normal", "k{}", "attention"),
    TensorSpec("a/o", (2, 4, 4), ("layer", "embed", "heads"), "normal", "o{}", "attention"),
]


@pytest.mark.parametrize("kind", ["adamw", "lion", "sgd"])
def test_distinct_shapes_change_no_update(kind):
    moments = {"kind": "bfloat16", "rounding": "stochastic"}
    settings = Training(optimizer={"kind": kind}, warmup=0, ema=0.9, moments=moments)
    tx = optimizer.make_optimizer(settings, 10, SQUARES)
    shapes = optimizer.distinct_shapes(SQUARES, make_mesh(1, 2))
    assert shapes.widened == {"a/o"}
    random = np.random.default_rng(0)
    params, grads = (
        {"a": {n: jnp.asarray(random.normal(size=(2, 4, 4)), jnp.float32) for n in "qko"}}
        for _ in range(2)
    )
    state = tx.init(params)
    wide = tx.update(*(shapes.widen(values) for values in (grads, state, params)))
    assert wide[0]["a"]["o"].shape == (1, 2, 4, 4)
    for actual, expected in zip(
        jax.tree.leaves(shapes.narrow(wide)),
        jax.tree.leaves(tx.update(grads, state, params)),
        strict=True,
    ):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_only_updates_by_element_are_reshaped():
    elementwise = {kind for kind in OPTIMIZERS if OPTIMIZERS[kind].elementwise}
    assert elementwise == {"adamw", "lion", "sgd"}


def test_a_step_in_distinct_shapes():
    tx, params = optax.adamw(0.01), {"w": jnp.float32(0.5)}
    state = steps.TrainState(params, tx.init(params), jnp.int32(0))
    batch = cut(rows(8, 8), 4)
    plain, wide = (
        jax.jit(steps.train_step(regression, tx, lambda _: 0.01, lengths=(8,), shapes=shapes))
        for shapes in (optimizer.DistinctShapes(), optimizer.DistinctShapes(frozenset({"w"})))
    )
    for actual, expected in zip(
        jax.tree.leaves(wide(state, batch, {})),
        jax.tree.leaves(plain(state, batch, {})),
        strict=True,
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
        assert actual.shape == expected.shape
