"""Weighted sums against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.merge.average import average, combine, task_arithmetic

generator = np.random.default_rng(0)
MEMBERS = generator.normal(size=(3, 6, 5)).astype(np.float32)
BASE = generator.normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("weights", [None, (1, 2, 5), (0.2, 0.0, 0.3), (-1, 2, 1)])
def test_average(weights):
    w = np.array((1, 1, 1) if weights is None else weights, float)
    expected = np.tensordot(w, MEMBERS.astype(float), 1) / w.sum()
    got = average(jnp.asarray(MEMBERS), weights=None if weights is None else jnp.array(weights, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (0.5, -0.2, 0.7)])
@pytest.mark.parametrize("scale", [1.0, 0.9, -0.5])
def test_task_arithmetic(weights, scale):
    """Weights are used as they are, which is what mergekit does (normalize: false); by default 1/M."""
    w = np.array((1 / 3, 1 / 3, 1 / 3) if weights is None else weights, float)
    expected = BASE + scale * sum(wi * (m.astype(float) - BASE) for wi, m in zip(w, MEMBERS, strict=True))
    given = None if weights is None else jnp.array(weights, jnp.float32)
    got = task_arithmetic(jnp.asarray(MEMBERS), base=jnp.asarray(BASE), weights=given, scale=scale)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    members = jnp.asarray(MEMBERS, jnp.bfloat16)
    got = average(members)
    assert got.dtype == jnp.float32
    expected = np.asarray(members, np.float64).mean(axis=0)
    assert np.array_equal(got.astype(jnp.bfloat16), jnp.asarray(expected, jnp.bfloat16))


def test_members_are_added_in_order():
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1: the order is that of the list."""
    terms = jnp.array([[1e8], [1.0], [-1e8]])
    assert combine(terms, jnp.ones(3)).tolist() == [0.0]
    assert combine(terms[jnp.array([0, 2, 1])], jnp.ones(3)).tolist() == [1.0]
