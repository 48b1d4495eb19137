"""Weighted sums, and the averages of matched length, against numpy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.table import merge_tensor

generator = np.random.default_rng(0)
MEMBERS = generator.normal(size=(3, 6, 5)).astype(np.float32)
BASE = generator.normal(size=(6, 5)).astype(np.float32)


@pytest.mark.parametrize("weights", [None, (1, 2, 5), (0.2, 0.0, 0.3), (-1, 2, 1)])
@pytest.mark.parametrize("normalize", [True, False])
def test_average(weights, normalize):
    w = np.array((1, 1, 1) if weights is None else weights, float)
    expected = np.tensordot(w, MEMBERS.astype(float), 1) / (w.sum() if normalize else 1)
    got = merge_tensor("average", MEMBERS, weights=weights, normalize=normalize)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weights", [None, (1, 1, 1), (0.5, -0.2, 0.7)])
@pytest.mark.parametrize("scale", [1.0, 0.9, -0.5])
@pytest.mark.parametrize("normalize", [True, False])
def test_task_arithmetic(weights, scale, normalize):
    """Weights are used as they are, as in mergekit (normalize: false); by default 1/M."""
    w = np.array((1 / 3, 1 / 3, 1 / 3) if weights is None else weights, float)
    w = w / w.sum() if normalize else w
    expected = BASE + scale * sum(
        wi * (m.astype(float) - BASE) for wi, m in zip(w, MEMBERS, strict=True)
    )
    got = merge_tensor(
        "task_arithmetic", MEMBERS, base=BASE, weights=weights, scale=scale, normalize=normalize
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_bfloat16_is_computed_in_float32_and_rounded_once():
    members = jnp.asarray(MEMBERS, jnp.bfloat16)
    got = merge_tensor("average", members, dtype="bfloat16")
    expected = np.asarray(members, np.float64).mean(axis=0)
    assert np.array_equal(got, jnp.asarray(expected, jnp.bfloat16))


def test_members_are_added_in_order():
    """1e8 + 1 - 1e8 is 0 in float32, 1e8 - 1e8 + 1 is 1: the order is that of the list."""
    terms = jnp.array([[1e8], [1.0], [-1e8]])
    assert combine(terms, jnp.ones(3)).tolist() == [0.0]
    assert combine(terms[jnp.array([0, 2, 1])], jnp.ones(3)).tolist() == [1.0]


# ---------------------------------------------------------------------------------- matched lengths


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


@pytest.mark.parametrize("shape", [(), (1,), (700,), (6, 50), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
def test_norm_matched(shape, weights):
    base = generator.normal(size=shape).astype(np.float32)
    task_vectors = [np.abs(generator.normal(size=shape)) * size for size in (1, 0.5, 2)]
    members = [(base + tau).astype(np.float32) for tau in task_vectors]
    task_vectors = [member.astype(np.float64) - base for member in members]
    w = np.full(3, 1 / 3) if weights is None else np.array(weights) / 8
    mean, length = (
        np.tensordot(w, np.stack(task_vectors), 1),
        w @ [norm(tau) for tau in task_vectors],
    )
    got = merge_tensor("norm_matched", members, base=base, weights=weights)
    np.testing.assert_allclose(got, base + length / norm(mean) * mean, rtol=1e-6, atol=4e-6)
    assert norm(got - base) == pytest.approx(length, rel=1e-5)


def test_norm_matched_where_nothing_is_left():
    assert np.array_equal(merge_tensor("norm_matched", [BASE, BASE], base=BASE), BASE)
    step = np.float32(0.5)
    np.testing.assert_allclose(
        merge_tensor("norm_matched", [BASE + step, BASE - step], base=BASE), BASE, atol=1e-6
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"resample": 0},
        {"resample": 1},
        {"resample": 2, "resample_from": "others"},
        {"resample": 12},
    ],
    ids=str,
)
@pytest.mark.parametrize("weights", [None, (1, 2, 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lambda_matched(settings, weights, dtype):
    """Its lambda is that of the selection a user gets from the same seed."""
    base = jnp.asarray(generator.normal(size=(40, 50)), dtype)
    changed = generator.random((3, 40, 50)) < 0.5
    members = [
        jnp.where(one, base + jnp.asarray(generator.normal(size=(40, 50)), dtype), base)
        for one in changed
    ]
    key_bits = table.key_bits("selection", {}, 7, "a.weight", None)
    assert np.array_equal(key_bits, table.key_bits("lambda_matched", {}, 7, "a.weight", None))
    own = {"resample": "exhaustive", **settings}
    selected = merge_tensor(
        "selection", members, base=base, weights=weights, key_bits=key_bits, dtype=dtype, **own
    )
    task_vectors = [
        np.asarray(x, np.float64) - np.asarray(base, np.float64) for x in (*members, selected)
    ]
    mean = np.tensordot(
        np.full(3, 1 / 3) if weights is None else np.array(weights) / 8,
        np.stack(task_vectors[:3]),
        1,
    )
    scale = (task_vectors[3] * mean).sum() / (mean * mean).sum()
    assert scale > 1.3 if own["resample"] == "exhaustive" else scale > 0.8
    got = merge_tensor(
        "lambda_matched",
        members,
        base=base,
        weights=weights,
        key_bits=key_bits,
        dtype=dtype,
        **settings,
    )
    expected = np.asarray(base, np.float64) + scale * mean
    np.testing.assert_allclose(
        np.asarray(got, np.float64), expected, rtol=1e-6 if dtype == "float32" else 2**-8, atol=1e-6
    )


def test_lambda_matched_of_an_unchanged_tensor_is_the_base():
    key_bits = rng.stream_key_bits(0, "select", "a")
    assert np.array_equal(
        merge_tensor("lambda_matched", [BASE, BASE], base=BASE, key_bits=key_bits), BASE
    )


def test_fisher_weights_each_element():
    information = np.abs(generator.normal(size=MEMBERS.shape)).astype(np.float32)
    information[:, 0, :2] = 0  # nobody knows anything of these: the plain average
    for weights in (None, (1.0, 2.0, 0.5)):
        w = np.array(weights or (1, 1, 1), float).reshape(3, 1, 1)
        matter = w * information
        expected = np.where(
            matter.sum(0) > 0,
            (matter * MEMBERS).sum(0) / np.where(matter.sum(0) > 0, matter.sum(0), 1),
            (w * MEMBERS).sum(0) / w.sum(),
        )
        given = None if weights is None else (*weights, 0, 0, 0)
        got = merge_tensor("fisher", [*MEMBERS, *information], weights=given)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="as many Fisher diagonals"):
        merge_tensor("fisher", [*MEMBERS])
