"""TSV-Merge, Iso-C and KnOTS against the papers' equations in numpy and float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import iso_c, knots, parts, spectral, table, tsv_merge
from jax_ordermerge.merge.methods.table import merge_tensor

SHAPES = [(9, 7), (6, 14), (5, 5)]


def population_of(shape, count=3, rank=None, seed=0):
    """Members and base, float32. With a rank, each task vector has that rank."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape)
    changes = generator.normal(size=(count, *shape))
    if rank is not None:
        left, right = (generator.normal(size=(count, size, rank)) for size in shape)
        changes = left @ right.transpose(0, 2, 1)
    return np.float32(base + 0.1 * changes), np.float32(base)


def task_vectors_of(members, base):
    return [member.astype(np.float64) - base.astype(np.float64) for member in members]


def nearest_orthogonal(matrix):
    p, _, qt = np.linalg.svd(matrix, full_matrices=False)
    return p @ qt


def naive_tsv(task_vectors, share):
    top_k = int(share * min(task_vectors[0].shape))
    left, right, middle = [], [], []
    for task_vector in task_vectors:
        u, s, vt = np.linalg.svd(task_vector, full_matrices=False)
        left.append(u[:, :top_k])
        middle.extend(s[:top_k])
        right.append(vt[:top_k])
    u, vt = nearest_orthogonal(np.hstack(left)), nearest_orthogonal(np.vstack(right))
    return u @ np.diag(middle) @ vt


def naive_iso(task_vectors):
    mean = sum(task_vectors) / len(task_vectors)
    u, s, vt = np.linalg.svd(mean, full_matrices=False)
    return u @ np.diag(np.full(len(s), s.mean())) @ vt


def naive_knots(task_vectors, density, rank):
    u, s, vt = np.linalg.svd(np.hstack(task_vectors), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    pieces = np.split(np.diag(s) @ vt, len(task_vectors), axis=1)
    trimmed = []
    for piece in pieces:
        top_k = round(density * piece.size)
        places = np.argsort(-abs(piece), axis=None)[:top_k]
        thin = np.zeros(piece.size)
        thin[places] = piece.ravel()[places]
        trimmed.append(thin.reshape(piece.shape))
    merged = np.zeros_like(trimmed[0])
    for place in np.ndindex(merged.shape):
        values = [piece[place] for piece in trimmed]
        agreeing = [x for x in values if x * sum(values) > 0]
        merged[place] = np.mean(agreeing) if agreeing else 0
    return u @ merged


CASES = {
    "tsv": ("tsv_merge", {"density": 0.4}, lambda taus: naive_tsv(taus, 0.4)),
    "tsv-default": ("tsv_merge", {}, lambda taus: naive_tsv(taus, 1 / 3)),
    "iso": ("iso_c", {}, naive_iso),
    "knots": (
        "knots",
        {"density": 0.3},
        lambda taus: naive_knots(taus, 0.3, min(taus[0].shape[0], 3 * taus[0].shape[1])),
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", CASES)
def test_the_equation_of_the_paper(case, shape):
    name, parameters, naive = CASES[case]
    members, base = population_of(shape)
    merged = merge_tensor(name, jnp.asarray(members), base=base, scale=0.7, **parameters)
    expected = base.astype(np.float64) + 0.7 * naive(task_vectors_of(members, base))
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


def test_knots_of_adapters_uses_the_rank_that_they_span():
    """Rank 2 of each of 3 members: 6 directions of 20, in which alone coordinates are counted."""
    members, base = population_of((20, 30), rank=2)
    merged = merge_tensor("knots", jnp.asarray(members), base=base, density=0.5)
    expected = base + naive_knots(task_vectors_of(members, base), 0.5, rank=6)
    np.testing.assert_allclose(merged, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [20, 4])
def test_knots_of_factors_is_that_of_their_products(rows):
    """Ranks 2 and 3, the same column twice among them; also more of them than there are rows."""
    generator = np.random.default_rng(0)
    factors = [
        (generator.normal(size=(rows, rank)), generator.normal(size=(rank, 9))) for rank in (2, 3)
    ]
    factors[1][0][:, 0] = factors[0][0][:, 0]
    left, right = knots.merge_factors(factors, 0.4)
    assert left.shape[1] == min(rows, 5)
    rank = min(rows, 4)
    expected = naive_knots([b @ a for b, a in factors], 0.4, rank)
    np.testing.assert_allclose(left @ right, expected, atol=1e-9)


def test_isotropic_adapters_keep_rank_and_nuclear_norm():
    members, base = population_of((20, 30), count=2, rank=2)
    merged = np.asarray(merge_tensor("iso_c", jnp.asarray(members), base=base), np.float64) - base
    mean = np.mean(task_vectors_of(members, base), axis=0)
    before, after = (np.linalg.svd(x, compute_uv=False) for x in (mean, merged))
    np.testing.assert_allclose(after[:4], before[:4].mean(), rtol=1e-4)
    assert after[4] < 1e-5 * after[0]


def test_the_weights_of_iso_c():
    members, base = population_of((9, 7))
    merged = merge_tensor("iso_c", jnp.asarray(members), base=base, weights=(1, 0, 0))
    alone = merge_tensor("iso_c", jnp.asarray(members[:1]), base=base)
    np.testing.assert_allclose(merged, alone, rtol=1e-6)
    with pytest.raises(UserError, match="tsv_merge takes no weights"):
        merge_tensor("tsv_merge", jnp.asarray(members), base=base, weights=(1, 0, 0))


def test_identical_members_of_tsv_give_their_first_singular_vectors():
    members, base = population_of((9, 7), count=1)
    merged = merge_tensor("tsv_merge", jnp.asarray(np.repeat(members, 3, 0)), base=base)
    u, s, vt = np.linalg.svd(task_vectors_of(members, base)[0], full_matrices=False)
    np.testing.assert_allclose(merged, base + (u[:, :2] * s[:2]) @ vt[:2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["tsv_merge", "iso_c", "knots"])
def test_vectors_and_what_is_in_no_layer_are_averaged(name):
    for shape, in_layer in (((8,), True), ((8, 5), False), ((2, 3, 4), True)):
        members, base = population_of(shape)
        tensor = parts.InMemoryTensor(
            list(jnp.asarray(members)), jnp.asarray(base), in_layer=in_layer
        )
        prepared, static = parts.split_static(
            table.METHODS[name].prepare(tensor, **table.check_parameters(name, {"scale": 0.5}))
        )
        merged = table.merge_part_jit(
            tensor.part, prepared, method=name, static=static, dtype=jnp.dtype("float32")
        )
        expected = base + 0.5 * np.mean(task_vectors_of(members, base), axis=0)
        np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["tsv_merge", "iso_c", "knots"])
def test_a_matrix_that_no_member_changed_stays_at_the_base(name):
    _, base = population_of((6, 4))
    merged = merge_tensor(name, jnp.asarray([base, base]), base=base)
    assert np.array_equal(merged, base)


@pytest.mark.parametrize(
    ("formula", "numbers"),
    [
        (lambda xp, taus: tsv_merge.merge(xp, taus, top_k=2), []),
        (iso_c.merge, [np.full(3, 1 / 3, np.float32)]),
        (knots.merge, [np.float32(0.3)]),
    ],
    ids=["tsv_merge", "iso_c", "knots"],
)
def test_accelerators_compute_the_same_in_float32(formula, numbers):
    members, base = population_of((9, 14))
    expected = formula(np, task_vectors_of(members, base), *numbers)
    device = formula(jnp, list(jnp.asarray(members - base)), *map(jnp.asarray, numbers))
    np.testing.assert_allclose(device, expected, rtol=1e-4, atol=1e-5)


def test_knots_of_tall_matrices_decomposes_the_shorter_side(monkeypatch):
    sizes = []
    eigh = np.linalg.eigh
    monkeypatch.setattr(np.linalg, "eigh", lambda gram: sizes.append(len(gram)) or eigh(gram))
    members, base = population_of((40, 5))
    task_vectors = task_vectors_of(members, base)
    merged = knots.merge(np, task_vectors, np.float32(0.4))
    assert sizes == [15]  # three matrices of five columns, of 40 rows
    np.testing.assert_allclose(merged, naive_knots(task_vectors, 0.4, rank=15), atol=1e-9)


def test_left_vectors_of_one_tall_matrix():
    matrix = np.random.default_rng(0).normal(size=(12, 3))
    u, s = spectral.left_vectors(np, [matrix])
    np.testing.assert_allclose(s[:3], np.linalg.svd(matrix, compute_uv=False), rtol=1e-10)
    np.testing.assert_allclose(u[:, :3] @ (u[:, :3].T @ matrix), matrix, atol=1e-12)
    assert spectral.significant(np, s, matrix.shape).tolist() == [True] * 3
