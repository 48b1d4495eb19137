"""TIES, DARE, Breadcrumbs and DELLA against naive numpy, as mergekit defines them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import element_index, mix, random_bits
from jax_ordermerge.merge.methods import (
    breadcrumbs,
    dare,
    della,
    parts,
    sparse_task_arithmetic,
    ties,
)
from jax_ordermerge.merge.methods.table import merge_tensor
from jax_ordermerge.mesh import make_mesh, sharding

KEY_BITS = rng.stream_key_bits(3, "drop", "t")


def hashes(shape, key, round_=0):
    return np.asarray(random_bits(jnp.array(key, jnp.uint32), element_index(shape), round_))


def thin(arrays, function, delta, member=0):
    """Return what a thinning leaves of one task vector, of `member + 1` equal ones."""
    tensor = tensor_of(delta, member + 1)
    arrays = arrays(tensor)
    if not arrays:  # everything is kept
        return delta
    return jax.jit(function)(tensor.part, **arrays)[member]


def tensor_of(delta, members=1):
    return parts.InMemoryTensor([delta] * members, jnp.zeros_like(delta), key_bits=KEY_BITS)


def trim(delta, density):
    return thin(lambda tensor: ties.trim(tensor, density), ties.apply_trim, delta)


def drop(delta, density, member=0):
    return thin(lambda tensor: dare.drop(tensor, density), dare.apply_drop, delta, member)


def band(delta, *settings):
    return thin(lambda tensor: breadcrumbs.band(tensor, *settings), breadcrumbs.apply_band, delta)


def sample(delta, density, epsilon, unbiased, member=0):
    function = della.apply_sample_unbiased if unbiased else della.apply_sample
    return thin(lambda tensor: della.sample(tensor, density, epsilon), function, delta, member)


def naive_order(delta):
    """Sort elements by magnitude, descending, then by hash of the block of 256, then by index."""
    number = np.arange(delta.size)
    return np.lexsort(
        (number, np.asarray(mix(jnp.asarray(number // 256, jnp.uint32))), -np.abs(delta.ravel()))
    )


def naive_trim(delta, density):
    flat, keep = delta.ravel(), max(1, int(density * delta.size))
    order = naive_order(delta)
    out = np.zeros_like(flat)
    out[order[:keep]] = flat[order[:keep]]
    return out.reshape(delta.shape)


def naive_band(delta, density, gamma, at_least=1):
    """Ascending ranks bot .. bot + target - 1 of a sort, as mergekit has it."""
    flat, n = delta.ravel(), delta.size
    target, top = min(max(int(density * n), at_least), n), int(gamma * n)
    bot = max(0, n - target - top)
    mask = naive_order(delta)[::-1][bot : bot + target]
    out = np.zeros_like(flat)
    out[mask] = flat[mask]
    return out.reshape(delta.shape)


def naive_probabilities(delta, density, epsilon):
    """One row after the other, ranks by a stable sort."""
    rows = np.abs(delta).reshape(delta.shape[0] if delta.ndim > 1 else 1, -1)
    n = rows.shape[1]
    out = np.full(rows.shape, density)
    if density < 1 and n > 1:
        for row, p in zip(rows, out, strict=True):
            for rank, column in enumerate(np.argsort(row, kind="stable")):
                p[column] = density - epsilon + 2 * epsilon * rank / (n - 1)
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
    task_vectors = generator.normal(size=(members, *shape)) * (
        generator.random((members, *shape)) > 0.3
    )
    return (base.astype(jnp.float32)[None] + jnp.asarray(task_vectors, jnp.float32)).astype(
        dtype
    ), base


# --------------------------------------------------------------------------------------------- trim


@pytest.mark.parametrize(
    ("shape", "density"),
    [
        ((), 0.2),
        ((1, 1), 0.2),
        ((7,), 0.5),
        ((8, 16), 1e-9),
        ((8, 16), 0.999),
        ((8, 16), 1.0),
        ((3, 4, 5), 0.2),
    ],
)
def test_trim(shape, density):
    delta = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    assert np.array_equal(trim(jnp.asarray(delta), density), naive_trim(delta, density))


@pytest.mark.parametrize("values", [1, 2, 5])
@pytest.mark.parametrize("density", [0.1, 0.8])
def test_trim_breaks_ties_by_block_and_keeps_the_exact_number(values, density):
    """Few distinct magnitudes, as in bfloat16 deltas; -0.0 and subnormals among them."""
    generator = np.random.default_rng(values)
    levels = np.array([1.0, 1e-3, 0.0, 2.0, 3.0], np.float32)[:values]
    delta = generator.choice(levels, (400, 25)) * generator.choice(
        np.array([-1, 1], np.float32), (400, 25)
    )
    got = np.asarray(trim(jnp.asarray(delta), density))
    assert np.array_equal(got, naive_trim(delta, density))
    if values == 1:
        mask = got != 0
        assert mask.sum() == int(density * 10000)
        assert abs(mask[:200].sum() - mask[200:].sum()) < 4 * 256 * np.sqrt(
            10000 / 256 * density * (1 - density)
        )


def test_trim_keeps_the_same_elements_when_the_tensor_is_sharded():
    delta = np.random.default_rng(0).choice(np.array([1.0, -1.0, 2.0, 0.25], np.float32), (16, 24))
    sharded = jax.device_put(
        jnp.asarray(delta), sharding(("embed", "mlp"), delta.shape, make_mesh(1, 4, 2))
    )
    assert np.array_equal(trim(sharded, 0.3), naive_trim(delta, 0.3))


# --------------------------------------------------------------------------------------------- drop


def test_drop_masks_are_bernoulli_and_independent():
    mask = np.stack([np.asarray(drop(jnp.ones((200, 300)), 0.3, member=i)) != 0 for i in range(3)])
    n = mask[0].size
    assert (np.abs(mask.reshape(3, -1).sum(axis=1) - 0.3 * n) < 4 * np.sqrt(n * 0.21)).all()
    assert abs((mask[0] & mask[1]).sum() - 0.09 * n) < 4 * np.sqrt(n * 0.09 * 0.91)
    for i in range(3):
        assert np.array_equal(
            mask[i], hashes((200, 300), KEY_BITS.tolist(), i) < round(0.3 * 2**32)
        )


@pytest.mark.parametrize("start", [1, 8])
def test_drop_of_a_slab_is_the_slab_of_the_drop(start):
    tensor = tensor_of(jnp.ones((9, 4)), 2)
    arrays = dare.drop(tensor, 0.5)
    expected = dare.apply_drop(tensor.part, **arrays)[1]
    slab = parts.Part(
        tuple(x[start:] for x in tensor.part.members),
        jnp.zeros((9 - start, 4)),
        tensor.part.key_bits,
        jnp.array([4 * start, 0], jnp.uint32),
    )
    assert np.array_equal(dare.apply_drop(slab, **arrays)[1], expected[start:])


def test_rescaling_keeps_the_expectation_or_the_norm():
    delta = jnp.asarray(np.random.default_rng(0).normal(size=(300, 300)), jnp.float32)

    def factor(delta, rule):
        return dare.prepare(tensor_of(delta), elect=False, density=0.2, rescale=rule)["factors"][0]

    sparse = np.asarray(drop(delta, 0.2))
    by_density, by_norm = (sparse * factor(delta, rule) for rule in ("density", "norm"))
    np.testing.assert_allclose(by_density, sparse / 0.2, rtol=1e-6)
    np.testing.assert_allclose(np.abs(by_norm).sum(), np.abs(delta).sum(), rtol=1e-5)
    assert factor(delta, "none") == 1
    assert factor(jnp.zeros_like(delta), "norm") == 1


# --------------------------------------------------------------------------------------------- band


@pytest.mark.parametrize(
    ("shape", "density", "gamma"),
    [
        ((), 0.5, 0.3),
        ((1, 1), 0.9, 0.01),
        ((3,), 0.2, 0.5),
        ((3, 4, 5), 0.5, 0.25),
        *(
            ((20, 10), *both)
            for both in ((0.6, 0.1), (0.9, 0.3), (1.0, 0.1), (0.3, 0.0), (0.004, 0.99))
        ),
    ],
)
@pytest.mark.parametrize("at_least", [0, 1])
def test_band(shape, density, gamma, at_least):
    """Also where fewer than gamma are left to drop; with at_least 0 a tiny tensor loses all."""
    delta = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    got = np.asarray(band(jnp.asarray(delta), density, gamma, at_least))
    assert np.array_equal(got, naive_band(delta, density, gamma, at_least))
    assert (got != 0).sum() == max(at_least, int(density * delta.size))


def test_band_with_ties_at_both_cuts():
    delta = np.random.default_rng(0).choice(
        np.array([1.0, -1.0, 2.0, -2.0, 0.0], np.float32), (30, 20)
    )
    got = np.asarray(band(jnp.asarray(delta), 0.3, 0.2, 1))
    assert np.array_equal(got, naive_band(delta, 0.3, 0.2))


# ------------------------------------------------------------------------------------------- sample


@pytest.mark.parametrize(
    ("density", "epsilon"), [(0.5, 0.15), (0.3, 0.29), (0.8, 0.2), (1.0, 0.15), (0.6, 0.0)]
)
@pytest.mark.parametrize("shape", [(12, 40), (200,), (6, 1), ()])
def test_sample(shape, density, epsilon):
    delta = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    p = naive_probabilities(delta, density, epsilon)
    mask = hashes(shape, KEY_BITS.tolist(), 1) < np.round(p * 2.0**32)
    for unbiased in (False, True):
        got = sample(jnp.asarray(delta), density, epsilon, unbiased, member=1)
        np.testing.assert_allclose(
            got, np.where(mask, delta / p if unbiased else delta, 0), rtol=1e-6
        )


def test_sample_keeps_large_elements_more_often():
    """400 rows of the same 50 magnitudes in another order each: 400 draws of every probability."""
    generator = np.random.default_rng(0)
    delta = generator.permuted(np.tile(np.arange(1, 51, dtype=np.float32), (400, 1)), axis=1)
    got = np.asarray(sample(jnp.asarray(delta), 0.5, 0.4, False))
    share = np.bincount(got[got != 0].astype(int) - 1, minlength=50) / 400
    p = 0.1 + 0.8 * np.arange(50) / 49
    assert (np.abs(share - p) < 4 * np.sqrt(p * (1 - p) / 400)).all()


@pytest.mark.parametrize(
    ("density", "epsilon", "message"),
    [(0.9, 0.15, "0.75 to 1.05; choose epsilon below 0.1"), (0.1, 0.1, "0 to 0.2")],
)
def test_probabilities_outside_of_0_to_1_are_refused(density, epsilon, message):
    members, base = population((3, 4))
    with pytest.raises(UserError, match=message) as caught:
        merge_tensor("della", members, base=base, density=density, epsilon=epsilon)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ methods


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
    # members in bfloat16 are merged in float32
    got = merge_tensor(
        "ties", members, base=base, weights=weights, density=0.4, scale=0.8, normalize=normalize
    )
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rule", ["density", "norm", "none"])
@pytest.mark.parametrize(("method", "consensus"), [("dare_linear", False), ("dare_ties", True)])
def test_dare(rule, method, consensus):
    weights = None if rule == "none" else (1.0, 0.5, 2.0)
    members, base = population((12, 10))
    m, b = np.asarray(members), np.asarray(base)
    masks = np.stack(
        [hashes((12, 10), KEY_BITS.tolist(), i) < round(0.4 * 2**32) for i in range(3)]
    )
    sparse = (m - b) * masks
    if rule == "density":
        sparse = sparse / 0.4
    elif rule == "norm":
        sparse = (
            sparse
            * (np.abs(m - b).sum(axis=(1, 2)) / np.abs(sparse).sum(axis=(1, 2)))[:, None, None]
        )
    expected = naive_generalized(m, b, weights or [1 / 3] * 3, sparse, 0.7, consensus, False)
    got = merge_tensor(
        method,
        members,
        base=base,
        key_bits=KEY_BITS,
        weights=weights,
        density=0.4,
        scale=0.7,
        rescale=rule,
    )
    np.testing.assert_allclose(got, expected, rtol=5e-6, atol=5e-6)


def test_dare_has_the_members_mean_in_expectation():
    members, base = population((6, 6))
    tensor = parts.InMemoryTensor(list(members), base)
    prepared, static = parts.split_static(dare.prepare(tensor, elect=False, density=0.5))

    def one(key_bits):
        return sparse_task_arithmetic.apply(
            tensor.part._replace(key_bits=key_bits), **prepared, **dict(static)
        )

    key_bits = np.stack([rng.stream_key_bits(0, "drop", i) for i in range(400)])
    results = np.asarray(jax.jit(jax.vmap(one))(key_bits))
    sigma = results.std(axis=0) / np.sqrt(len(key_bits))
    assert (
        np.abs(results.mean(axis=0) - np.asarray(members).mean(axis=0)) <= 4.5 * sigma + 1e-6
    ).all()


@pytest.mark.parametrize(
    ("method", "consensus", "normalize"),
    [("breadcrumbs", False, True), ("breadcrumbs_ties", True, False)],
)
@pytest.mark.parametrize("rule", ["density", "norm", "none"])
def test_breadcrumbs(method, consensus, normalize, rule):
    members, base = population((12, 10))
    m, b, densities, gammas = (
        np.asarray(members),
        np.asarray(base),
        [0.6, 0.3, 1.0],
        [0.1, 0.0, 0.2],
    )
    sparse = np.stack(
        [naive_band(x - b, *own) for x, *own in zip(m, densities, gammas, strict=True)]
    )
    if rule == "density":
        sparse = sparse / np.array(densities)[:, None, None]
    elif rule == "norm":
        sparse = (
            sparse
            * (np.abs(m - b).sum(axis=(1, 2)) / np.abs(sparse).sum(axis=(1, 2)))[:, None, None]
        )
    weights = (1.0, 0.5, 2.0)
    expected = naive_generalized(m, b, weights, sparse, 0.7, consensus, normalize)
    own = {
        "density": densities,
        "gamma": gammas,
        "scale": 0.7,
        "normalize": normalize,
        "rescale": rule,
    }
    got = merge_tensor(method, members, base=base, weights=weights, **own)
    np.testing.assert_allclose(got, expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize(
    ("method", "consensus", "normalize"), [("della", True, True), ("della_linear", False, False)]
)
@pytest.mark.parametrize("rule", ["probability", "norm", "none"])
def test_della(method, consensus, normalize, rule):
    members, base = population((12, 10))
    m, b, densities, epsilons = (
        np.asarray(members),
        np.asarray(base),
        [0.6, 0.3, 1.0],
        [0.3, 0.1, 0.2],
    )
    p = np.stack(
        [naive_probabilities(x - b, *own) for x, *own in zip(m, densities, epsilons, strict=True)]
    )
    masks = np.stack(
        [hashes((12, 10), KEY_BITS.tolist(), i) < np.round(p[i] * 2.0**32) for i in range(3)]
    )
    sparse = (m - b) * masks
    if rule == "probability":
        sparse = sparse / p
    elif rule == "norm":
        sparse = (
            sparse
            * (np.abs(m - b).sum(axis=(1, 2)) / np.abs(sparse).sum(axis=(1, 2)))[:, None, None]
        )
    weights = (1.0, 0.5, 2.0)
    expected = naive_generalized(m, b, weights, sparse, 0.7, consensus, normalize)
    own = {
        "density": densities,
        "epsilon": epsilons,
        "scale": 0.7,
        "normalize": normalize,
        "rescale": rule,
    }
    got = merge_tensor(method, members, base=base, key_bits=KEY_BITS, weights=weights, **own)
    np.testing.assert_allclose(got, expected, rtol=5e-6, atol=5e-6)


def test_della_has_the_members_mean_in_expectation():
    members, base = population((6, 6))
    tensor = parts.InMemoryTensor(list(members), base)
    prepared, static = parts.split_static(della.prepare_linear(tensor, density=0.5, epsilon=0.4))
    merge = jax.jit(functools.partial(sparse_task_arithmetic.apply, **prepared, **dict(static)))
    results = np.stack(
        [
            merge(tensor.part._replace(key_bits=jnp.asarray(rng.stream_key_bits(0, "drop", i))))
            for i in range(400)
        ]
    )
    sigma = results.std(axis=0) / np.sqrt(len(results))
    assert (
        np.abs(results.mean(axis=0) - np.asarray(members).mean(axis=0)) <= 4.5 * sigma + 1e-6
    ).all()


def test_a_list_has_one_number_a_member():
    members, base = population((4, 3))
    one, each = (
        merge_tensor("ties", members, base=base, density=density)
        for density in (0.5, [0.5, 0.5, 0.5])
    )
    assert np.array_equal(one, each)
    with pytest.raises(
        UserError,
        match=r"density = \[0.5, 0.2\]: give one number for all of the 3 members, "
        "or one per member",
    ):
        merge_tensor("ties", members, base=base, density=[0.5, 0.2])
