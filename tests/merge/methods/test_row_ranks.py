"""Ranks of the values of a row, by which DELLA drops elements, against naive numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.merge.methods import row_ranks


def naive_row_ranks(values):
    ranks = np.argsort(np.argsort(np.asarray(values), axis=-1, kind="stable"), axis=-1)
    return np.where(np.asarray(values) == 0, 0, ranks)


@pytest.mark.parametrize("shape", [(7, 300), (1000,), (5, 1), (40, 6, 5), ()])
def test_row_ranks_are_the_same_on_the_host_and_on_the_device(shape):
    """Few distinct values, so that many are equal; the largest and the smallest bits among them."""
    generator = np.random.default_rng(0)
    for values in (
        generator.integers(0, 20, shape),
        generator.integers(0, 2**32, shape),
        generator.choice([0, 1, 2**32 - 1], shape),
    ):
        array = jnp.asarray(values, jnp.uint32)
        rows = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
        expected = naive_row_ranks(rows)
        assert np.array_equal(jax.jit(row_ranks.row_ranks)(array).reshape(rows.shape), expected)
        assert np.array_equal(jax.jit(row_ranks._rank_on_host)(rows), expected)
        assert np.array_equal(jax.jit(row_ranks._rank_on_device)(rows), expected)


def test_row_ranks_of_many_rows_and_under_vmap():
    values = jnp.asarray(np.random.default_rng(0).integers(0, 1000, (3, 150, 700)), jnp.uint32)
    assert np.array_equal(jax.jit(jax.vmap(row_ranks.row_ranks))(values), naive_row_ranks(values))


def test_row_ranks_of_values_that_fit_into_narrow_and_into_wide_keys():
    """Values of task vectors in bfloat16 and in float32: sorted as 32-bit and as 64-bit integers."""
    generator = np.random.default_rng(0)
    base = 0.02 * generator.normal(size=(70, 1000)).astype(np.float32)
    member = base + generator.normal(scale=4e-5, size=base.shape).astype(np.float32)
    widths = set()
    for dtype in (jnp.bfloat16, jnp.float32):
        delta = jnp.asarray(member, dtype).astype(jnp.float32) - jnp.asarray(base, dtype)
        values = np.asarray(jnp.abs(delta)).view(np.uint32)
        positions = np.flatnonzero(values)
        keys, _ = row_ranks._sorting_keys(values.reshape(-1)[positions], positions, 1000)
        widths.add(keys.dtype.itemsize)
        assert np.array_equal(row_ranks.row_ranks(values), naive_row_ranks(values))
    assert widths == {4, 8}
