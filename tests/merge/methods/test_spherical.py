"""Arcs, spherical means and Model Stock against naive float64; same bits in parts and on meshes."""

import numpy as np
import pytest

from jax_ordermerge.merge.methods.table import merge_tensor

AS_MERGEKIT = {"lerp_above": 0.9995, "zero": "right_angle"}
SHAPES = [(), (5,), (1, 7), (7, 1), (40, 300), (3, 4, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(shape, count, spread=0.5, seed=0):
    """Members around a base, float32."""
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape).astype(np.float32)
    members = [
        (base + spread * generator.normal(size=shape)).astype(np.float32) for _ in range(count)
    ]
    return members, base


def close(got, expected, models):
    """Compare within 1e-6 of the size of the models.

    Coefficients of opposite sign cancel, so the result itself may be smaller.
    """
    size = max(np.abs(np.asarray(x, np.float64)).max() for x in models)
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=0, atol=1e-6 * size)


def rows_of(x, along):
    """The vectors that have a direction, as rows of a matrix: its inverse is `back`."""
    if along == "tensor" or x.ndim < 2:
        return x.reshape(1, -1)
    return (
        np.moveaxis(x, 0, -1).reshape(-1, x.shape[0])
        if along == "column"
        else x.reshape(-1, x.shape[-1])
    )


def back(rows, like, along):
    if along == "column" and like.ndim > 1:
        return np.moveaxis(rows.reshape(*like.shape[1:], like.shape[0]), -1, 0)
    return rows.reshape(like.shape)


# --------------------------------------------------------------------------------- naive references


def naive_arc(a, b, t, above=1.0):
    norms = [np.linalg.norm(x) if np.linalg.norm(x) > 1e-8 else 1 for x in (a, b)]
    cosine = np.clip((a / norms[0]) @ (b / norms[1]), -1, 1)
    if abs(cosine) > above or abs(cosine) == 1:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def naive_arcs(members, t, along="tensor", above=1.0):
    a, b = (rows_of(np.asarray(x, np.float64), along) for x in members)
    return back(
        np.stack([naive_arc(x, y, t, above) for x, y in zip(a, b, strict=True)]), members[0], along
    )


def naive_multislerp(xs, w, eps=1e-8):
    """With the exponential map, as mergekit writes it."""
    flat = [np.asarray(x, np.float64).ravel() for x in xs]
    norms = [np.linalg.norm(x) for x in flat]
    units = [x / (n + eps) for x, n in zip(flat, norms, strict=True)]
    mean = sum(wi * u for wi, u in zip(w, units, strict=True))
    mu = mean / np.linalg.norm(mean)
    tangent = sum(wi * (u - (u @ mu) * mu) for wi, u in zip(w, units, strict=True))
    angle = np.linalg.norm(tangent) + eps
    out = (np.cos(angle) * mu + np.sin(angle) * tangent / angle) * np.dot(w, norms)
    return out.reshape(xs[0].shape)


def naive_karcher(xs, w, max_iter=10, tol=1e-5):
    flat = [np.asarray(x, np.float64).ravel() for x in xs]
    norms = np.array([np.linalg.norm(x) for x in flat])
    units = [x / n for x, n in zip(flat, norms, strict=True) if n > tol]
    alphas = w[norms > tol] / w[norms > tol].sum()
    mu = sum(a * u for a, u in zip(alphas, units, strict=True))
    mu = units[0] if np.linalg.norm(mu) < tol else mu / np.linalg.norm(mu)
    for _ in range(max_iter):
        tangent = np.zeros_like(mu)
        for a, u in zip(alphas, units, strict=True):
            angle = np.arccos(np.clip(u @ mu, -1, 1))
            if angle >= tol:
                tangent += a * angle / np.sin(angle) * (u - (u @ mu) * mu)
        size = np.linalg.norm(tangent)
        if size < tol:
            break
        mu = np.cos(size) * mu + np.sin(size) * tangent / size
        mu /= np.linalg.norm(mu)
    return (mu * (w @ norms)).reshape(xs[0].shape)


def naive_model_stock(members, base, along="tensor", clamp=1e-6, least=-np.inf):
    rows = [rows_of(np.asarray(x, np.float64) - base, along) for x in members]
    count, out = len(members), []
    for task_vectors in zip(*rows, strict=True):
        cosines = [
            np.clip(
                task_vectors[i]
                @ task_vectors[j]
                / max(np.linalg.norm(task_vectors[i]) * np.linalg.norm(task_vectors[j]), clamp),
                -1,
                1,
            )
            for i in range(count)
            for j in range(i + 1, count)
        ]
        c = np.mean(cosines)
        divisor = 1 + (count - 1) * c
        t = 0 if abs(divisor) < 1e-6 else count * c / divisor
        out.append(max(t, least) * np.mean(task_vectors, axis=0))
    return base + back(np.stack(out), base, along)


# --------------------------------------------------------------------------------------------- arcs


@shapes
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 1.0])
def test_slerp(shape, t):
    members, _ = draw(shape, 2)
    close(merge_tensor("slerp", members, t=t), naive_arcs(members, t), members)


@shapes
@pytest.mark.parametrize("along", ["tensor", "row", "column"])
@pytest.mark.parametrize("of", ["members", "task_vectors"])
def test_nuslerp(shape, along, of):
    members, base = draw(shape, 2)
    start = base if of == "task_vectors" else np.float32(0)
    t = 0.2 / 0.8
    expected = start + naive_arcs([x - start for x in members], t, along)
    got = merge_tensor("nuslerp", members, base=base, weights=(0.6, 0.2), of=of, granularity=along)
    close(got, expected, [*members, base])


def test_nuslerp_weights():
    members, _ = draw((4, 5), 2)
    half = merge_tensor("slerp", members, t=0.5)
    assert np.array_equal(merge_tensor("nuslerp", members), half)
    assert np.array_equal(merge_tensor("nuslerp", members, weights=(1, -1)), half)
    assert np.array_equal(
        merge_tensor("nuslerp", members, weights=(1, 3)), merge_tensor("slerp", members, t=0.75)
    )


def test_the_line_of_mergekit_is_off_by_the_square_of_the_angle():
    """arc - line = Omega^2 t (1-t) ((2-t) x_1 + (1+t) x_2) / 6 + O(Omega^4).

    mergekit's switch lies at Omega = 0.0316.
    """
    t, measured = 0.3, []
    for spread in (0.02, 0.01, 0.005):
        members, _ = draw((64, 256), 2, spread)
        a, b = (x.ravel().astype(np.float64) for x in members)
        angle = np.arccos(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        arc, line = (
            np.asarray(merge_tensor("slerp", members, t=t, lerp_above=above), np.float64).ravel()
            for above in (None, 0.9995)
        )
        close(line, (1 - t) * a + t * b, members)
        theory = angle**2 * t * (1 - t) * ((2 - t) * a + (1 + t) * b) / 6
        np.testing.assert_allclose(np.linalg.norm(arc - line), np.linalg.norm(theory), rtol=0.02)
        measured.append((angle, np.linalg.norm(arc - line)))
    (first, far), _, (last, near) = measured
    assert far / near == pytest.approx((first / last) ** 2, rel=0.02)


@pytest.mark.parametrize("spread", [1.0, 1e-2, 1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("along", ["tensor", "row"])
def test_arcs_are_stable_as_models_become_one(spread, along):
    members, _ = draw((8, 300), 2, spread)
    got = merge_tensor("nuslerp", members, weights=(0.7, 0.3), granularity=along)
    close(got, naive_arcs(members, 0.3, along), members)


@pytest.mark.parametrize("along", ["tensor", "row"])
def test_mergekit_switch(along):
    """Rows on both sides of the switch."""
    (a, b), _ = draw((6, 50), 2, 0.0)
    noise = np.random.default_rng(5).normal(size=(6, 50))
    b = (a + np.array([0.3, 0.1, 0.02, 0.01, 0.001, -2])[:, None] * noise).astype(np.float32)
    got = merge_tensor("nuslerp", [a, b], weights=(0.7, 0.3), granularity=along, **AS_MERGEKIT)
    close(got, naive_arcs([a, b], 0.3, along, 0.9995), [a, b])


@pytest.mark.parametrize("along", ["tensor", "row", "column"])
def test_a_model_of_zeros_has_no_direction(along):
    (a, _), _ = draw((4, 6), 2)
    zeros = np.zeros_like(a)
    settings = {"weights": (0.7, 0.3), "granularity": along}
    close(merge_tensor("nuslerp", [a, zeros], **settings), 0.7 * a, [a])
    close(
        merge_tensor("nuslerp", [zeros, a], **settings, zero="right_angle"),
        np.sin(0.3 * np.pi / 2) * a,
        [a],
    )
    close(merge_tensor("nuslerp", [zeros, zeros], **settings), zeros, [a])
    # a row that is zero in one of the models
    b = np.where(np.arange(4)[:, None] == 1, 0, a[::-1])
    close(
        merge_tensor("nuslerp", [a, b], **settings)[1],
        0.7 * a[1] if along == "row" else naive_arcs([a, b], 0.3, along)[1],
        [a],
    )


@pytest.mark.parametrize("along", ["tensor", "row", "column"])
def test_opposite_and_parallel_models_are_joined_by_the_line(along):
    (a, _), _ = draw((4, 6), 2)
    for factor in (-1.0, 1.0, 3.0, -0.5):
        got = merge_tensor(
            "nuslerp", [a, np.float32(factor) * a], weights=(0.7, 0.3), granularity=along
        )
        close(got, (0.7 + 0.3 * factor) * a, [3 * a])


# ------------------------------------------------------------------------------ means on the sphere


@shapes
@pytest.mark.parametrize("weights", [None, (0.5, 0.2, 0.9)])
@pytest.mark.parametrize("normalize", [True, False])
def test_multislerp(shape, weights, normalize):
    members, base = draw(shape, 3, 0.2)
    w = np.array([1 / 3] * 3 if weights is None else weights)
    w = w / w.sum() if normalize else w
    close(
        merge_tensor("multislerp", members, weights=weights, normalize=normalize),
        naive_multislerp(members, w),
        members,
    )
    task_vectors = [x.astype(np.float64) - base for x in members]
    if np.size(base) > 1:  # single numbers of both signs may cancel
        got = merge_tensor(
            "multislerp",
            members,
            base=base,
            weights=weights,
            normalize=normalize,
            of="task_vectors",
        )
        close(got, base + naive_multislerp(task_vectors, w), [*members, base, 3 * task_vectors[0]])


def test_multislerp_where_directions_cancel():
    (a, b), base = draw((4, 6), 2)
    close(merge_tensor("multislerp", [a, -a]), 0 * a, [a])
    close(merge_tensor("multislerp", [a, -2 * a], weights=(1, 1)), -0.5 * a, [a])
    close(merge_tensor("multislerp", [a, b, -a, -b]), 0 * a, [a])
    assert np.array_equal(
        merge_tensor("multislerp", [base] * 3, base=base, of="task_vectors"), base
    )
    # one member left the tensor alone: the direction of the other, at half its length
    close(
        merge_tensor("multislerp", [a, base], base=base, of="task_vectors"),
        base + 0.5 * (a.astype(np.float64) - base),
        [a, base],
    )


@pytest.mark.parametrize("shape", [(1,), (5,), (40, 30)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_karcher(shape, count):
    for spread in (2.0, 0.3, 1e-4, 0.0):
        members, _ = draw(shape, count, spread)
        if np.size(members[0]) == 1:  # on the line there are two directions only
            members = [np.abs(x) for x in members]
        close(
            merge_tensor("karcher", members),
            naive_karcher(members, np.full(count, 1 / count)),
            members,
        )


def test_karcher_with_weights_steps_and_task_vectors():
    members, base = draw((6, 9), 3, 1.0)
    w = np.array([0.5, 0.25, 0.25])
    close(merge_tensor("karcher", members, weights=(2, 1, 1)), naive_karcher(members, w), members)
    for steps in (0, 1):
        close(
            merge_tensor("karcher", members, max_iter=steps),
            naive_karcher(members, np.full(3, 1 / 3), steps),
            members,
        )
    task_vectors = [x.astype(np.float64) - base for x in members]
    got = merge_tensor(
        "karcher", members, base=base, weights=w.tolist(), of="task_vectors", max_iter=60
    )
    close(got, base + naive_karcher(task_vectors, w, 60), [*members, base])


def test_karcher_is_least_in_squared_angles():
    members, _ = draw((6, 9), 3, 1.0)
    units = [x.ravel().astype(np.float64) / np.linalg.norm(x) for x in members]

    def cost(x):
        x = np.asarray(x, np.float64).ravel()
        return sum(np.arccos(np.clip(x @ u / np.linalg.norm(x), -1, 1)) ** 2 for u in units)

    mean = np.asarray(merge_tensor("karcher", members, max_iter=100), np.float64)
    generator = np.random.default_rng(1)
    assert all(
        cost(mean + 0.01 * generator.normal(size=mean.shape)) > cost(mean) for _ in range(20)
    )


def test_karcher_without_directions():
    (a, b), base = draw((4, 6), 2)
    zeros = np.zeros_like(a)
    assert np.array_equal(merge_tensor("karcher", [zeros, zeros]), zeros)
    close(merge_tensor("karcher", [a, zeros]), 0.5 * a, [a])
    assert np.array_equal(merge_tensor("karcher", [base, base], base=base, of="task_vectors"), base)
    close(
        merge_tensor("karcher", [a, -a]), a, [a]
    )  # starts at the first; the other is opposite to it
    assert np.isfinite(merge_tensor("karcher", [a, -a, b])).all()
    small = [np.float32(1e-9) * x for x in (a, b)]
    close(merge_tensor("karcher", small) * 1e9, naive_karcher([a, b], np.full(2, 0.5)), [a, b])


# -------------------------------------------------------------------------------------- Model Stock


@shapes
@pytest.mark.parametrize("along", ["tensor", "row"])
@pytest.mark.parametrize("count", [2, 4])
def test_model_stock(shape, along, count):
    generator = np.random.default_rng(1)
    base = generator.normal(size=shape).astype(np.float32)
    common = generator.normal(size=shape)
    members = [
        (base + common + generator.normal(size=shape)).astype(np.float32) for _ in range(count)
    ]
    expected = naive_model_stock(members, base, along, clamp=1e-30, least=0)
    close(
        merge_tensor("model_stock", members, base=base, granularity=along),
        expected,
        [*members, base],
    )


@pytest.mark.parametrize("along", ["tensor", "row"])
def test_model_stock_as_mergekit(along):
    """Negative cosines and small task vectors, a row of each, under mergekit's clamp."""
    generator = np.random.default_rng(3)
    base = generator.normal(size=(6, 40)).astype(np.float32)
    common = generator.normal(size=(6, 40))
    size = np.array([1, 1, 1e-4, 1e-5, 1e-4, 0])[:, None]
    own = [
        sign * common + 0.8 * generator.normal(size=(6, 40))
        for sign in (1, np.where(np.arange(6) % 2, -0.3, 1)[:, None], 1)
    ]
    members = [(base + size * x).astype(np.float32) for x in own]
    expected = naive_model_stock(members, base, along)
    got = merge_tensor(
        "model_stock", members, base=base, granularity=along, norm_floor=1e-6, t_floor=None
    )
    close(got, expected, [*members, base])


@pytest.mark.parametrize("along", ["tensor", "row"])
def test_model_stock_without_a_common_direction(along):
    (a, _), base = draw((4, 6), 2, 0.1)
    opposite = [base + np.float32(0.5), base - np.float32(0.5) - (a - base) * 0.01]
    settings = {"base": base, "granularity": along}
    assert np.array_equal(merge_tensor("model_stock", opposite, **settings), base)
    assert np.array_equal(merge_tensor("model_stock", [base, base, base], **settings), base)
    assert np.array_equal(merge_tensor("model_stock", [a, base], **settings), base)
    # equal task vectors, however small, are the answer; under mergekit's clamp they would vanish
    tiny = base + np.float32(1e-6)
    close(merge_tensor("model_stock", [tiny, tiny], **settings), tiny, [base])
    assert (
        float(
            np.abs(np.asarray(merge_tensor("model_stock", [tiny, tiny], **settings)) - base).mean()
        )
        > 9e-7
    )
    clamped = merge_tensor("model_stock", [tiny, tiny], **settings, norm_floor=1e-6)
    assert float(np.abs(np.asarray(clamped) - base).mean()) < 1e-9
