"""Trim, drop, elect and combine against naive numpy; generalized task arithmetic as mergekit defines it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.merge.counter import element_index, random_words
from jax_ordermerge.merge.sparsify import dare_linear, dare_ties, drop, rescale, ties, trim
from jax_ordermerge.mesh import make_mesh, sharding

KEY = rng.stream(3, "drop", "t")


def hashes(shape, key=(0, 0), round_=0):
    return np.asarray(random_words(jnp.array(key, jnp.uint32), element_index(shape), round_))


def naive_trim(delta, density):
    """Rank by magnitude, then by hash of the index, with a sort."""
    flat, keep = delta.ravel(), max(1, int(density * delta.size))
    order = np.lexsort((hashes(delta.shape).ravel(), -np.abs(flat)))
    out = np.zeros_like(flat)
    out[order[:keep]] = flat[order[:keep]]
    return out.reshape(delta.shape)


def naive_generalized(members, base, weights, sparse, scale, consensus, normalize):
    w = np.asarray(weights, float).reshape(-1, *(1,) * base.ndim)
    terms = w * sparse.astype(float)
    keep = np.ones(terms.shape, bool)
    if consensus:
        keep = np.sign(terms) == np.where(terms.sum(axis=0) >= 0, 1.0, -1.0)[None]
    total = (terms * keep).sum(axis=0)
    divisor = (w * keep).sum(axis=0)
    if normalize:
        total = total / np.where(divisor == 0, 1, divisor)
    return base + scale * total


def population(shape, members=3, dtype=np.float32, seed=0):
    generator = np.random.default_rng(seed)
    base = jnp.asarray(generator.normal(size=shape), dtype)
    taus = generator.normal(size=(members, *shape)) * (generator.random((members, *shape)) > 0.3)
    return (base.astype(jnp.float32)[None] + jnp.asarray(taus, jnp.float32)).astype(dtype), base


@pytest.mark.parametrize(
    ("shape", "density"),
    [((), 0.2), ((1, 1), 0.2), ((7,), 0.5), ((8, 16), 1e-9), ((8, 16), 0.999), ((8, 16), 1.0), ((3, 4, 5), 0.2)],
)
def test_trim(shape, density):
    delta = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert np.array_equal(jax.jit(trim, static_argnums=1)(jnp.asarray(delta), density), naive_trim(delta, density))


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("density", [0.1, 0.8])
def test_trim_breaks_ties_by_hash_and_keeps_the_exact_number(values, density):
    """Few distinct magnitudes, as in bfloat16 deltas; -0.0 and subnormals among them."""
    generator = np.random.default_rng(values)
    levels = np.array([1.0, 1e-3, 0.0, 2.0, 3.0], np.float32)[:values]
    delta = generator.choice(levels, (40, 25)) * generator.choice(np.array([-1, 1], np.float32), (40, 25))
    got = np.asarray(jax.jit(trim, static_argnums=1)(jnp.asarray(delta), density))
    assert np.array_equal(got, naive_trim(delta, density))
    if values == 1:
        kept = got != 0
        assert kept.sum() == int(density * 1000)
        assert abs(kept[:20].sum() - kept[20:].sum()) < 5 * np.sqrt(1000 * density * (1 - density))


def test_trim_keeps_the_same_elements_when_the_tensor_is_sharded():
    delta = np.random.default_rng(0).choice(np.array([1.0, -1.0, 2.0, 0.25], np.float32), (16, 24))
    sharded = jax.device_put(jnp.asarray(delta), sharding(("embed", "mlp"), delta.shape, make_mesh(1, 4, 2)))
    got = jax.jit(trim, static_argnums=1)(sharded, 0.3)
    assert np.array_equal(got, naive_trim(delta, 0.3))


def test_drop_masks_are_bernoulli_and_independent():
    kept = np.stack([np.asarray(drop(jnp.ones((200, 300)), 0.3, KEY, i)) != 0 for i in range(3)])
    n = kept[0].size
    assert (np.abs(kept.reshape(3, -1).sum(axis=1) - 0.3 * n) < 4 * np.sqrt(n * 0.21)).all()
    assert abs((kept[0] & kept[1]).sum() - 0.09 * n) < 4 * np.sqrt(n * 0.09 * 0.91)
    words = np.asarray(jax.random.key_data(KEY)).tolist()
    for i in range(3):
        assert np.array_equal(kept[i], hashes((200, 300), words, i) < round(0.3 * 2**32))


@pytest.mark.parametrize("start", [1, 8])
def test_drop_of_a_slab_is_the_slab_of_the_drop(start):
    delta = jnp.ones((9, 4))
    whole = drop(delta, 0.5, KEY, 1)
    part = drop(delta[start:], 0.5, KEY, 1, jnp.array([4 * start, 0], jnp.uint32))
    assert np.array_equal(part, whole[start:])


def test_rescaling_keeps_the_expectation_or_the_norm():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)
    sparse = drop(delta, 0.2, KEY, 0)
    by_density, by_norm = (np.asarray(rescale(sparse, delta, 0.2, rule)) for rule in ("density", "norm"))
    np.testing.assert_allclose(by_density, np.asarray(sparse) / 0.2, rtol=1e-6)
    np.testing.assert_allclose(np.abs(by_norm).sum(), np.abs(delta).sum(), rtol=1e-5)
    assert np.array_equal(rescale(sparse, delta, 0.2, "none"), sparse)
    assert np.array_equal(rescale(jnp.zeros_like(delta), delta, 0.2, "norm"), jnp.zeros_like(delta))


@pytest.mark.parametrize(
    ("dtype", "normalize", "weights", "shape"),
    [
        ("float32", True, None, (5,)),
        ("float32", True, (1.0, 0.5, 2.0), (12, 10)),
        ("bfloat16", True, (1.0, -1.0, 1.0), (12, 10)),
        ("bfloat16", False, None, (12, 10)),
    ],
)
def test_ties(dtype, normalize, weights, shape):
    members, base = population(shape, dtype=dtype)
    m, b = np.asarray(members, np.float32), np.asarray(base, np.float32)
    sparse = np.stack([naive_trim(x - b, 0.4) for x in m])
    expected = naive_generalized(m, b, weights or [1 / 3] * 3, sparse, 0.8, True, normalize)
    given = None if weights is None else jnp.array(weights)
    merge = jax.jit(functools.partial(ties, density=0.4, scale=0.8, normalize=normalize))
    got = merge(members, base=base, weights=given)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", ["density", "norm", "none"])
@pytest.mark.parametrize(("method", "consensus"), [(dare_linear, False), (dare_ties, True)])
def test_dare(rule, method, consensus):
    weights = None if rule == "none" else (1.0, 0.5, 2.0)
    members, base = population((12, 10))
    m, b = np.asarray(members), np.asarray(base)
    words = np.asarray(jax.random.key_data(KEY)).tolist()
    masks = np.stack([hashes((12, 10), words, i) < round(0.4 * 2**32) for i in range(3)])
    sparse = (m - b) * masks
    if rule == "density":
        sparse = sparse / 0.4
    elif rule == "norm":
        sparse = sparse * (np.abs(m - b).sum(axis=(1, 2)) / np.abs(sparse).sum(axis=(1, 2)))[:, None, None]
    expected = naive_generalized(m, b, weights or [1 / 3] * 3, sparse, 0.7, consensus, False)
    given = None if weights is None else jnp.array(weights)
    merge = jax.jit(functools.partial(method, density=0.4, scale=0.7, rescale=rule))
    got = merge(members, base=base, key=KEY, weights=given)
    np.testing.assert_allclose(got, expected, rtol=5e-6, atol=5e-6)


def test_dare_has_the_members_mean_in_expectation():
    members, base = population((6, 6))
    keys = jax.random.split(rng.stream(0, "drop"), 400)
    found = np.asarray(jax.jit(jax.vmap(lambda key: dare_linear(members, base=base, key=key, density=0.5)))(keys))
    sigma = found.std(axis=0) / np.sqrt(len(keys))
    assert (np.abs(found.mean(axis=0) - np.asarray(members).mean(axis=0)) <= 4.5 * sigma + 1e-6).all()
