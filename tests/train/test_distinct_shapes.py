"""Tensors of one shape that are divided differently are reshaped for the optimizer only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config import OPTIMIZERS, Training
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import optimizer

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
    distinct = optimizer.with_distinct_shapes(tx, SQUARES, make_mesh(1, 2))
    random = np.random.default_rng(0)
    params, grads = (
        {"a": {n: jnp.asarray(random.normal(size=(2, 4, 4)), jnp.float32) for n in "qko"}}
        for _ in range(2)
    )
    state = tx.init(params)
    for actual, expected in zip(
        jax.tree.leaves(distinct.update(grads, state, params)),
        jax.tree.leaves(tx.update(grads, state, params)),
        strict=True,
    ):
        assert actual.shape == expected.shape
        np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert OPTIMIZERS[kind].elementwise
    assert not OPTIMIZERS["muon"].elementwise
    assert not OPTIMIZERS["adafactor"].elementwise
