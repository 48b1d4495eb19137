import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge.model import loss


def naive(x, head, targets, weights):
    """Sums of each example, in float64."""
    out = np.zeros(targets.shape)
    for place in np.ndindex(targets.shape):
        row = head.astype(np.float64) @ x[place].astype(np.float64)
        out[place] = weights[place] * (
            np.log(np.exp(row - row.max()).sum()) + row.max() - row[targets[place]]
        )
    return out.sum(-1)


def plain(x, head, targets, weights):
    """The same by jax alone, to be differentiated."""
    logits = jax.nn.log_softmax(jnp.einsum("BTD,VD->BTV", x, head))
    return -(jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] * weights).sum(-1)


def inputs(B=3, T=5, D=4, V=17, scale=1.0):
    generator = np.random.default_rng(0)
    x, head = (generator.normal(size=shape).astype(np.float32) for shape in ((B, T, D), (V, D)))
    return (
        x,
        head * np.float32(scale),
        generator.integers(0, V, (B, T)).astype(np.int32),
        (generator.random((B, T)) < 0.7).astype("f4"),
    )


# rows per chunk: all, one, and a number that does not divide the length (the last is padded)
@pytest.mark.parametrize("rows", [512, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_losses_and_gradients(rows, scale, monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", rows)
    arrays = inputs(scale=scale)
    total, sums = loss.linear_losses(*arrays)
    np.testing.assert_allclose(sums, naive(*arrays), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(total, sums.sum(), rtol=1e-6)
    (again, same), ours = jax.value_and_grad(
        lambda x, head: loss.linear_losses(x, head, *arrays[2:]), (0, 1), has_aux=True
    )(*arrays[:2])
    assert (again, same.tolist()) == (total, sums.tolist())
    theirs = jax.grad(lambda x, head: plain(x, head, *arrays[2:]).sum(), (0, 1))(*arrays[:2])
    for actual, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("rows", [512, 6])
def test_examples_that_share_a_row(rows, monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", rows)
    x, head, targets, weights = inputs(T=7)
    segments = np.array(
        [[1, 1, 1, 2, 2, 3, 0], [1, 1, 0, 0, 0, 0, 0], [1, 2, 2, 2, 2, 2, 2]], np.int32
    )
    weights = weights * (segments > 0)
    (expected, _), expected_gradient = jax.value_and_grad(
        lambda x: loss.linear_losses(x, head, targets, weights), has_aux=True
    )(x)
    packed = {"segments_BT": segments, "count": 3}
    (total, sums), gradient = jax.value_and_grad(
        lambda x: loss.linear_losses(x, head, targets, weights, **packed), has_aux=True
    )(x)
    for s in range(3):
        np.testing.assert_allclose(
            sums[:, s], naive(x, head, targets, weights * (segments == s + 1)), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    np.testing.assert_array_equal(gradient, expected_gradient)


def test_gradient_is_scaled_and_nothing_flows_through_the_sums():
    arrays = inputs()
    once, thrice = (
        jax.grad(lambda x, k=k: k * loss.linear_losses(x, *arrays[1:])[0])(arrays[0])
        for k in (1.0, 3.0)
    )
    np.testing.assert_allclose(thrice, 3 * once, rtol=1e-6)
    assert not jax.grad(lambda x: loss.linear_losses(x, *arrays[1:])[1].sum())(arrays[0]).any()


def test_examples_without_weight_are_zero():
    x, head, targets, weights = inputs()
    weights[1] = 0
    assert loss.linear_losses(x, head, targets, weights)[1][1] == 0


def test_bfloat16_is_that_of_rounded_inputs():
    x, head, targets, weights = inputs(D=8)
    low, low_head = (a.astype(jnp.bfloat16).astype(np.float32) for a in (x, head))
    sums = loss.linear_losses(x.astype(jnp.bfloat16), head, targets, weights)[1]
    assert sums.dtype == jnp.float32
    np.testing.assert_allclose(sums, naive(low, low_head, targets, weights), rtol=1e-5)
    slope_x, slope_head = jax.grad(
        lambda x, head: loss.linear_losses(x, head, targets, weights)[0], (0, 1)
    )(x.astype(jnp.bfloat16), head)
    assert (slope_x.dtype, slope_head.dtype) == (jnp.bfloat16, jnp.float32)
    expected = jax.grad(lambda x, head: plain(x, head, targets, weights).sum(), (0, 1))(
        low, low_head
    )
    np.testing.assert_allclose(slope_x.astype("f4"), expected[0], atol=0.05)
    np.testing.assert_allclose(slope_head, expected[1], atol=0.05)


@pytest.mark.parametrize("sizes", [(1, 4, 2), (1, 2, 4), (2, 2, 2)])
def test_sharded_is_the_same(sizes):
    arrays = inputs(B=8, T=6, D=8, V=32)
    mesh = meshes.make_mesh(*sizes)
    axes = (("batch", None, None), ("vocab", "embed"), ("batch", None), ("batch", None))
    placed = [
        jax.device_put(a, meshes.sharding(n, a.shape, mesh))
        for a, n in zip(arrays, axes, strict=True)
    ]
    losses_and_grads = jax.value_and_grad(
        lambda *arrays: loss.linear_losses(*arrays), (0, 1), has_aux=True
    )
    with jax.set_mesh(mesh):
        (total, sums), grads = jax.jit(losses_and_grads)(*placed)
        text = jax.jit(losses_and_grads).lower(*placed).compile().as_text()
    (expected, expected_sums), expected_grads = losses_and_grads(*arrays)
    for actual, reference in zip(
        (total, sums, *grads), (expected, expected_sums, *expected_grads), strict=True
    ):
        np.testing.assert_allclose(actual, reference, rtol=2e-5, atol=1e-5)
    assert "f32[8,6,32]" not in text
