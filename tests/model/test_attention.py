import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model.attention import Tokens, attend


def naive(q, k, v, queries, keys, window):
    B, T, N, H = q.shape
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        kv = n // (N // k.shape[2])
        distance = queries.positions[b, t] - keys.positions[b]
        seen = (distance >= 0) & (queries.segments[b, t] == keys.segments[b])
        if window is not None:
            seen &= distance < window
        scores = k[b, seen, kv].astype(np.float64) @ q[b, t, n] / np.sqrt(H)
        powers = np.exp(scores - scores.max())
        out[b, t, n] = powers @ v[b, seen, kv] / powers.sum()
    return out


def inputs(T, S, N=4, K=2, H=6, B=2):
    generator = np.random.default_rng(T + S)
    return [
        generator.normal(size=shape).astype(np.float32) * 2
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    ]


def packed(T, lengths, left=0):
    """Documents one after another, padding in front (left) and behind."""
    positions, segments = np.zeros((2, T), np.int32), np.zeros((2, T), np.int32)
    for row in range(2):
        at = left
        for number, length in enumerate(lengths[:: 1 - 2 * row]):
            positions[row, at : at + length] = np.arange(length)
            segments[row, at : at + length] = number + 1
            at += length
    return Tokens(positions, segments)


@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize(
    ("T", "lengths", "left"), [(5, (5,), 0), (150, (20, 90, 31), 0), (131, (60, 41), 30)]
)
def test_against_a_loop(T, lengths, left, window):
    q, k, v = inputs(T, T)
    tokens = packed(T, lengths, left)
    out = np.asarray(jax.jit(lambda *a: attend(*a, tokens, tokens, window=window))(q, k, v))
    assert np.isfinite(out).all()
    real = tokens.segments > 0
    expected = naive(q, k, v, tokens, tokens, window)
    np.testing.assert_allclose(out[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("window", [None, 5])
def test_queries_against_a_longer_cache(window):
    q, k, v = inputs(3, 20)
    keys = packed(20, (9, 4), left=2)
    slots = slice(12, 15)  # the last tokens of the second document of row 0
    queries = Tokens(keys.positions[:, slots], keys.segments[:, slots])
    out = np.asarray(jax.jit(lambda *a: attend(*a, queries, keys, window=window))(q, k, v))
    real = queries.segments > 0
    np.testing.assert_allclose(out[real], naive(q, k, v, queries, keys, window)[real], atol=1e-5)


def test_gradients_do_not_leak_between_documents():
    q, k, v = inputs(140, 140)
    tokens = packed(140, (50, 80))
    mine = (tokens.segments == 2)[:, :, None, None]

    def of_document_2(q, k, v):
        return jnp.where(mine, attend(q, k, v, tokens, tokens), 0).sum()

    for gradient in jax.jit(jax.grad(of_document_2, argnums=(0, 1, 2)))(q, k, v):
        gradient = np.asarray(gradient)
        assert np.isfinite(gradient).all()
        assert abs(gradient[tokens.segments == 2]).max() > 0
        assert not gradient[tokens.segments != 2].any()


def test_gradients_against_plain_softmax():
    q, k, v = inputs(100, 100)
    tokens = packed(100, (37, 63))

    def plain(q, k, v):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        distance = tokens.positions[:, :, None] - tokens.positions[:, None]
        seen = (distance >= 0) & (tokens.segments[:, :, None] == tokens.segments[:, None])
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / np.sqrt(q.shape[-1])
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
        return jnp.einsum("BNTS,BSNH->BTNH", weights, v)

    ours = jax.jit(
        jax.grad(lambda *a: jnp.sin(attend(*a, tokens, tokens)).sum(), argnums=(0, 1, 2))
    )(q, k, v)
    expected = jax.jit(jax.grad(lambda *a: jnp.sin(plain(*a)).sum(), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_softmax_is_float32_in_bfloat16():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(70, 70))
    tokens = packed(70, (70,))
    out = jax.jit(lambda *a: attend(*a, tokens, tokens))(q, k, v)
    assert out.dtype == jnp.bfloat16
    expected = naive(*(np.asarray(x, np.float32) for x in (q, k, v)), tokens, tokens, None)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, atol=0.05)


# ------------------------------------------------------------ on a mesh


@pytest.mark.parametrize("window", [None, 40])
def test_positions_divided_over_devices_change_nothing(window):
    """Context parallel: each device has its own queries and all keys. Also of packed rows."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.normal(size=(2, 192, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 192)), axis=1), jnp.int32)
    starts = np.array(
        [[np.flatnonzero(row == segment)[0] for segment in row] for row in np.asarray(segments)]
    )
    tokens = Tokens(jnp.asarray(np.arange(192) - starts, jnp.int32), segments)

    def loss(q, k, v):
        out = attend(q, k, v, tokens, tokens, window=window)
        return (out * g).sum(), out

    both = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    plain = both(q, k, v)
    mesh = make_mesh(1, 2, 1, sequence=4)
    with jax.set_mesh(mesh):
        compiled = both.lower(q, k, v).compile()
        divided = compiled(q, k, v)
    assert "all-reduce" in compiled.as_text()
    for expected, actual in zip(jax.tree.leaves(plain), jax.tree.leaves(divided), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
