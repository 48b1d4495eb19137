"""The largest values of a tensor, ranked on the host and found by counting, against naive numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.hash_rng import mix
from jax_ordermerge.merge.methods import parts, top_k

BOTH = pytest.mark.parametrize("on_host", [top_k._ON_HOST, 0], ids=["host", "devices"])


def naive_largest(magnitudes, keep):
    """Sort by magnitude, then by the hash of the block, then by position."""
    number = np.arange(magnitudes.size)
    rank = mix((number // 256).astype(np.uint32))
    order = np.lexsort((number % 256, rank, -magnitudes.astype(np.float64)))
    mask = np.zeros(magnitudes.size, bool)
    mask[order[:keep]] = True
    return mask


def largest(deltas, keep):
    zeros = jnp.zeros_like(jnp.asarray(deltas[0]))
    tensor = parts.InMemoryTensor([jnp.asarray(delta) for delta in deltas], zeros)
    cut = top_k.find_largest(tensor, np.array(keep), top_k.magnitudes)

    @jax.jit
    def masks(part, cut):
        place = top_k.places(part)
        return [
            top_k.is_largest(bits, place, cut, i) for i, bits in enumerate(top_k.magnitudes(part))
        ]

    return masks(tensor.part, cut)


@pytest.mark.parametrize("start", [0, 256, 100, 2**32 - 300, 7 * 2**32 + 5])
def test_places_of_rows_of_a_block_are_those_of_the_flat_part(start):
    """Also where blocks cross rows, and where the upper half of the index changes."""
    index = start + np.arange(1024, dtype=np.uint64)
    offset = np.array([start & 0xFFFFFFFF, start >> 32], np.uint32)
    for shape in ((4, 256), (1024,)):
        part = parts.Part((jnp.zeros(shape),), None, np.zeros(2, np.uint32), offset)
        block, within = top_k.places(part)
        assert np.array_equal(block.ravel(), mix((index >> np.uint64(8)).astype(np.uint32)))
        assert np.array_equal(within.ravel(), index & np.uint64(255))


@BOTH
@pytest.mark.parametrize("shape", [(1,), (255,), (256,), (3, 7, 41), (40, 64)])
@pytest.mark.parametrize("levels", [1, 3, None])
def test_exactly_so_many_are_the_largest(monkeypatch, on_host, shape, levels):
    """From none to all; all values equal, few distinct ones, and as many as elements."""
    monkeypatch.setattr(top_k, "_ON_HOST", on_host)
    generator, size = np.random.default_rng(0), int(np.prod(shape))
    keep = [0, 1, size // 3, size - 1, size]
    deltas = generator.normal(size=(len(keep), *shape)).astype(np.float32)
    if levels is not None:
        deltas = (np.abs(deltas) * levels).astype(int).clip(max=levels - 1) * np.sign(deltas)
        deltas = deltas.astype(np.float32)
    for mask, delta, count in zip(largest(deltas, keep), deltas, keep, strict=True):
        expected = naive_largest(np.abs(delta).ravel(), count)
        assert np.array_equal(np.asarray(mask).ravel(), expected), count
        assert np.asarray(mask).sum() == count


@BOTH
def test_infinities_and_nan_are_the_largest(monkeypatch, on_host):
    monkeypatch.setattr(top_k, "_ON_HOST", on_host)
    delta = np.array([1.0, np.nan, -np.inf, 1e-40, 3e38], np.float32)
    assert [np.asarray(largest([delta], [k])[0]).tolist() for k in (1, 2, 3)] == [
        [False, True, False, False, False],
        [False, True, True, False, False],
        [False, True, True, False, True],
    ]
