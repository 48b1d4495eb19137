"""Checksums and diagnostics of slabs: of any size, at any place of a tensor."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.hash_rng import mix
from jax_ordermerge.merge import diagnostics, slab_moments
from jax_ordermerge.merge.methods import parts, table


def words(number):
    return np.array([number & 0xFFFFFFFF, number >> 32], np.uint32)


@pytest.mark.parametrize("start", [0, 100, 2**32 - 300, 5 * 2**32 - 256, 3 * 2**32])
@pytest.mark.parametrize("shape", [(700,), (3, 256)])
def test_scan_is_the_naive_sum(start, shape):
    """Also where the upper half of the index changes within the slab."""
    bits = np.random.default_rng(0).integers(0, 2**16, shape).astype(np.uint16)
    index = start + np.arange(bits.size, dtype=np.uint64)
    lo, hi = index.astype(np.uint32), (index >> np.uint64(32)).astype(np.uint32)
    factor = mix(lo ^ mix(hi)) | np.uint32(1)
    expected = int((bits.reshape(-1).astype(np.uint64) * factor).sum()) % 2**32
    model = jnp.asarray(bits).view(jnp.bfloat16)
    scan = diagnostics.scan([model], words(start))
    assert scan.checksums.tolist() == [expected]
    assert scan.not_finite.tolist() == [int(((bits & 0x7F80) == 0x7F80).sum())]


@pytest.mark.parametrize("size", [300, 512, 2**16, 2**16 + 256, 2**18])
def test_moments_do_not_depend_on_the_pieces(size):
    """A sample that is filled up, that is cut into pieces, or that is neither."""
    generator = np.random.default_rng(size)
    base = generator.normal(size=size).astype(jnp.bfloat16)
    changed = generator.random((2, size)) < 0.5
    members = [np.where(c, base + np.float32(0.1), base).astype(jnp.bfloat16) for c in changed]
    start, key = 2**32 - 512, np.array([1, 2], np.uint32)
    part = parts.Part(tuple(members), base, key, words(start))
    checked = table.check_parameters("selection", {"resample": 2})
    tensor = parts.InMemoryTensor(members, base, key_bits=key)
    arrays, static = parts.split_static(table.METHODS["selection"].prepare(tensor, **checked))
    program = {"method": "selection", "static": static}
    merged = np.asarray(table.merge_part(part, arrays, **program, dtype=base.dtype))
    moments = slab_moments.measure(part, base, merged, arrays, start, **program, out=base.dtype)
    taus = [np.float64(x) - np.float64(base) for x in (*members, merged)]
    pairs = [(i, j) for i in range(3) for j in range(i, 3)]
    np.testing.assert_allclose(
        moments.products, [(taus[i] * taus[j]).sum() for i, j in pairs], rtol=1e-5
    )
    unchanged = [x.view(np.uint16) == base.view(np.uint16) for x in (*members, merged)]
    expected = [*(x.sum() for x in unchanged), (unchanged[0] & unchanged[1]).sum()]
    assert moments.unchanged.tolist() == expected
    redrawn = table.METHODS["selection"].count_redrawn(dict(static))
    assert np.array_equal(moments.redrawn, redrawn(part, arrays["weights"], **dict(static)))
