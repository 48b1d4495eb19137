"""SCE, RAM, consensus and methods of one member against naive references in numpy float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import mix
from jax_ordermerge.merge.methods import arcee_fusion, parts, top_k
from jax_ordermerge.merge.methods.table import merge_tensor


def population(shape, members=3, dtype="float32", seed=0, size=1.0):
    """Members with a sparse change of the base."""
    generator = np.random.default_rng(seed)
    base = jnp.asarray(generator.normal(size=shape), dtype)
    task_vectors = (
        size
        * generator.normal(size=(members, *shape))
        * (generator.random((members, *shape)) > 0.4)
    )
    return (base.astype(jnp.float32)[None] + jnp.asarray(task_vectors, jnp.float32)).astype(
        dtype
    ), base


def as_float64(*models):
    return [np.asarray(x, np.float64) for x in models]


# ---------------------------------------------------------------------------------------------- SCE


def place(j):
    """Blocks of 256 in the order of their hashes, elements of a block as they stand."""
    return int(mix(jnp.uint32(j // 256))), j % 256


def naive_sce(members, base, topk, at_least=1, floor=0.0):
    """Select by sorted variance, ties by `place`; calculate the weights; erase the minority."""
    count, shape = len(members), base.shape
    task_vectors = (members - base).reshape(count, -1)
    if topk < 1:
        variance = np.array(
            [0.0 if len(set(column)) == 1 else column.var() for column in task_vectors.T]
        )
        varied = (variance > 0).sum()
        keep = min(max(int(np.float32(varied) * np.float32(topk)), at_least), varied)
        chosen = np.zeros(base.size, bool)
        chosen[sorted(range(base.size), key=lambda j: (-variance[j], *place(j)))[:keep]] = True
        task_vectors = task_vectors * chosen
    energy = (task_vectors**2).mean(axis=1)
    usable = energy.sum() > 0 and energy.sum() >= floor
    eta = energy / energy.sum() if usable else np.full(count, 1 / count)
    out = base.ravel().copy()
    for j in range(base.size):
        sign = 1 if task_vectors[:, j].sum() >= 0 else -1
        agree = np.sign(task_vectors[:, j]) == sign
        if agree.any():
            out[j] += (eta * task_vectors[:, j])[agree].sum() / max(eta[agree].sum(), floor)
    return out.reshape(shape)


@pytest.mark.parametrize("topk", [1.0, 0.5, 0.1, 1e-6])
@pytest.mark.parametrize(("floor", "size"), [(0.0, 1.0), (1e-6, 1.0), (1e-6, 1e-4), (0.0, 1e-4)])
def test_sce(topk, floor, size):
    """mergekit's floor makes all weights equal for task vectors of realistic size."""
    members, base = population((12, 10), size=size)
    got = merge_tensor("sce", members, base=base, select_topk=topk, floor=floor)
    m, b = as_float64(members, base)
    np.testing.assert_allclose(
        got - base, naive_sce(m, b, topk, floor=floor) - b, rtol=1e-5, atol=2e-7
    )


@pytest.mark.parametrize("at_least", [0, 1])
def test_sce_of_tiny_tensors(at_least):
    members, base = population((1, 3))
    got = merge_tensor("sce", members, base=base, select_topk=0.1, at_least=at_least)
    m, b = as_float64(members, base)
    np.testing.assert_allclose(got, naive_sce(m, b, 0.1, at_least), rtol=1e-6)
    assert (np.asarray(got) != np.asarray(base)).sum() == at_least


def test_sce_selects_among_elements_that_vary_alone_and_breaks_ties_by_block():
    """Of two magnitudes, many variances are equal.

    Where all members agree, the variance is 0 and not the rounding of a mean.
    """
    generator = np.random.default_rng(0)
    base = jnp.zeros((30, 20))
    members = jnp.asarray(generator.choice(np.array([1.0, 1.0, 3.0], np.float32), (4, 30, 20)))
    for topk in (0.3, 0.9):
        got = merge_tensor("sce", members, base=base, select_topk=topk)
        m, b = as_float64(members, base)
        np.testing.assert_allclose(got, naive_sce(m, b, topk), rtol=1e-6)
    same = merge_tensor("sce", [0.1 * members[0]] * 3, base=base, select_topk=0.5)
    assert np.array_equal(same, base)


# ---------------------------------------------------------------------------------------------- RAM


def naive_ram(members, base, epsilon, factors=None):
    task_vectors, out = members - base, base.copy()
    for position in np.ndindex(base.shape):
        changed = [i for i, tau in enumerate(task_vectors) if abs(tau[position]) > epsilon]
        if len(changed) == 1:
            out[position] += task_vectors[changed[0]][position] * (
                1 if factors is None else factors[changed[0]]
            )
        elif changed:
            out[position] += np.mean([task_vectors[i][position] for i in changed])
    return out


@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.5])
def test_ram(epsilon):
    members, base = population((12, 10))
    got = merge_tensor("ram", members, base=base, epsilon=epsilon)
    np.testing.assert_allclose(
        got, naive_ram(*as_float64(members, base), epsilon), rtol=2e-6, atol=1e-6
    )


def test_a_change_of_epsilon_is_none():
    got = merge_tensor("ram", [jnp.array([0.5, -0.5, 0.75])], base=jnp.zeros(3), epsilon=0.5)
    assert got.tolist() == [0.0, 0.0, 0.75]


@pytest.mark.parametrize(
    ("r", "alpha", "epsilon"), [(0.1, 0.2, 1e-5), (0.5, 10.0, 0.05), (-0.3, 1.0, 0.0)]
)
def test_ramplus_tl(r, alpha, epsilon):
    members, base = population((12, 10))
    m, b = as_float64(members, base)
    changed = np.abs(m - b) > epsilon
    count = changed.sum(axis=0)
    shared, unique = ((changed & where).sum(axis=(1, 2)) for where in (count > 1, count == 1))
    factors = 1 + r * np.clip(shared / np.maximum(unique, epsilon), 0, alpha)
    got = merge_tensor("ramplus_tl", members, base=base, r=r, alpha=alpha, epsilon=epsilon)
    np.testing.assert_allclose(got, naive_ram(m, b, epsilon, factors), rtol=2e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------- consensus


def naive_consensus(members, base, thresholds, k, scale, weights):
    task_vectors, out = members - base, base.copy()
    for position in np.ndindex(base.shape):
        own = task_vectors[(slice(None), *position)]
        together = len(own) * (weights * own).sum()
        used = sum(
            abs(tau) >= threshold * abs(together - tau)
            for tau, threshold in zip(own, thresholds, strict=True)
        )
        if used >= k:
            out[position] += scale / len(own) * together
    return out


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("threshold", [0.2, 0.6, [0.1, 0.4, 1.0, 2.0]])
@pytest.mark.parametrize("weights", [None, (0.5, -0.2, 0.4, 0.1)])
def test_consensus(k, threshold, weights):
    members, base = population((12, 10), 4)
    got = merge_tensor(
        "consensus", members, base=base, weights=weights, k=k, threshold=threshold, scale=0.9
    )
    w = np.full(4, 0.25) if weights is None else np.array(weights)
    expected = naive_consensus(*as_float64(members, base), np.broadcast_to(threshold, 4), k, 0.9, w)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


def test_consensus_drops_what_one_member_alone_uses():
    members = jnp.array([[3.0, 1.0, 1.0], [0.0, 1.0, 1.5], [0.0, 0.0, -2.5]])
    got = merge_tensor("consensus", members, base=jnp.zeros(3), threshold=0.5, k=2, scale=3.0)
    # alone, together, and cancelled by another: each is larger than half of its distance from the
    # sum 0
    assert got.tolist() == [0.0, 2.0, 0.0]
    assert merge_tensor(
        "consensus", members, base=jnp.zeros(3), threshold=0.5, k=1, scale=3.0
    ).tolist() == [3.0, 2.0, 0.0]


def test_more_members_than_there_are_cannot_agree():
    members, base = population((2, 2), 3)
    with pytest.raises(UserError, match="k = 4 of 3 members keeps nothing; give a k up to 3"):
        merge_tensor("consensus", members, base=base, k=4)


# --------------------------------------------------------------------------------------- one member


@pytest.mark.parametrize("t", [0.0, 1e-7, 0.3, 100.0])
def test_nearswap(t):
    members, base = population((12, 10), 1)
    got = merge_tensor("nearswap", members, base=base, t=t)
    (m,), b = as_float64(members[:1], base)
    distance = np.abs(m - b)
    w = np.clip(t / np.where(distance > 0, distance, 1), 0, 1)
    np.testing.assert_allclose(got, w * m + (1 - w) * b, rtol=1e-6, atol=1e-7)
    near = distance <= t
    assert np.array_equal(np.asarray(got)[near], np.asarray(members[0])[near])


def test_passthrough_keeps_every_bit_and_scales():
    patterns = (
        np.random.default_rng(1).integers(0, 2**16, (1, 64, 33), dtype=np.uint64).astype(np.uint16)
    )
    members = jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16)
    got = merge_tensor("passthrough", [members[0]], dtype="bfloat16")
    assert np.array_equal(np.asarray(got).view(np.uint16), patterns[0])
    (member,), _ = population((5, 4), 1)
    for scale in (0.5, [0.5]):
        np.testing.assert_allclose(
            merge_tensor("passthrough", [member], scale=scale), 0.5 * np.asarray(member), rtol=1e-7
        )


def naive_fusion(member, base, spread=1.5):
    rows = [x.reshape(x.shape[0] if x.ndim > 1 else 1, -1) for x in (member, base)]
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in rows)
    divergence = (p * np.log(p / q)).sum(axis=1, keepdims=True)
    importance = (np.abs(rows[0] - rows[1]) * divergence).reshape(base.shape)
    ordered = np.sort(importance.ravel())
    first, median, third = (ordered[int(f * (base.size - 1))] for f in (0.25, 0.5, 0.75))
    threshold = median + spread * (third - first)
    return np.where(importance >= threshold, member, base), importance, threshold


@pytest.mark.parametrize("spread", [1.5, 0.0, -0.3])
@pytest.mark.parametrize(
    ("shape", "size"),
    [((12, 40), 1.0), ((12, 300), 1e-2), ((70,), 0.1), ((3, 4, 5), 3.0), ((1, 1), 1.0)],
)
def test_arcee_fusion(shape, size, spread):
    members, base = population(shape, 1, size=size)
    (m,), b = as_float64(members, base)
    expected, importance, threshold = naive_fusion(m, b, spread)
    got = np.asarray(merge_tensor("arcee_fusion", members, base=base, spread=spread), np.float64)
    # float32 may decide otherwise where the importance is the threshold to its last digits
    sure = np.abs(importance - threshold) > 1e-5 * np.abs(threshold)
    assert sure.mean() > 0.9 or importance.size == 1
    assert np.array_equal(got[sure], expected[sure])
    assert np.isin(got, [m, b]).all()


def test_the_divergence_of_realistic_rows_is_not_rounding():
    """Weights of 0.02 and changes of 1e-4 have a KL of 5e-9.

    That is about what is lost in a sum of float32 terms that cancel.
    """
    generator = np.random.default_rng(0)
    base = jnp.asarray(0.02 * generator.normal(size=(40, 2048)), jnp.float32)
    member = base + jnp.asarray(
        1e-4 * generator.normal(size=(40, 1)) * generator.normal(size=(40, 2048)), jnp.float32
    )
    prepared = arcee_fusion.prepare(parts.InMemoryTensor([member], base))
    m, b = as_float64(member, base)
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (m, b))
    np.testing.assert_allclose(prepared["divergence"], (p * np.log(p / q)).sum(axis=1), rtol=1e-3)


def test_exp_is_exact_to_two_units_in_the_last_place():
    x = np.concatenate([np.linspace(-87, 0, 200_001), np.linspace(-1, 1, 20_001)]).astype(
        np.float32
    )
    np.testing.assert_allclose(
        jax.jit(arcee_fusion._exp)(x), np.exp(x.astype(np.float64)), rtol=2.4e-7
    )
    for n in range(1, 20):
        assert np.array_equal(jax.jit(arcee_fusion._exp)(x[:n]), jax.jit(arcee_fusion._exp)(x)[:n])


@pytest.mark.parametrize(
    "name", ["sce", "ram", "ramplus_tl", "nearswap", "passthrough", "arcee_fusion"]
)
def test_methods_that_take_no_weights_refuse_them(name):
    members, base = population((2, 3), 1)
    parameters = {"t": 0.1} if name == "nearswap" else {}
    with pytest.raises(UserError, match=f"merge method {name} takes no weights, .* leave them out"):
        merge_tensor(name, members, base=base, weights=[1.0], **parameters)


# ------------------------------------------------------------------------------------------- orders


def _bits(part):
    return [part.members[0]]


@pytest.mark.parametrize("distinct", [2, 1000, 2**32])
def test_order_statistics_are_those_of_a_sort(distinct):
    values = (
        np.random.default_rng(0).integers(0, distinct, (60, 30), dtype=np.uint64).astype(np.uint32)
    )
    values.ravel()[:3] = 0, 2**32 - 1, 2**32 - 1
    positions = [0, 1, 450, 900, math.prod(values.shape) - 1]
    results = top_k.order_statistics(
        parts.InMemoryTensor([jnp.asarray(values)], None), positions, _bits
    )
    assert np.array_equal(results, np.sort(values.ravel())[positions])
