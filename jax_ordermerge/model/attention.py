"""Attention that is causal by position inside a segment: packed documents never see each other."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ordermerge import mesh as meshes
from jax_ordermerge.model import kernels
from jax_ordermerge.model.kernels import MIXED, Kernel
from jax_ordermerge.model.layers import capped

# Added to a float32 score it replaces it, and exp(masked - visible score) is exactly 0. Infinity
# would give NaN in a row where every key is masked.
_MASKED = -1e30
# Queries per block: 64 was the fastest of 32, 64, 128, 256 on CPU. At most 8 blocks keep long
# sequences quick to compile, because blocks are unrolled.
_BLOCK, _BLOCKS = 64, 8


class Tokens(NamedTuple):
    """Position and document of each token, int32[B, T] each.

    Attributes:
        positions: position inside the document.
        segments: document number, 0 on padding.
    """

    positions: jax.Array
    segments: jax.Array


def visible(queries: Tokens, keys: Tokens, window: int | None = None) -> jax.Array:
    """Return bool[B, T, S]: whether a query may see a key.

    A query sees the keys of its own segment at its own or an earlier position, at most the last
    `window` of them. Padding is a segment like any other: it sees only padding, itself included, so
    that no softmax is empty.

    Example:
        >>> tokens = Tokens(jnp.array([[0, 1, 0, 1]]), jnp.array([[1, 1, 2, 2]]))
        >>> visible(tokens, tokens)[0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    """
    distance = queries.positions[:, :, None] - keys.positions[:, None, :]
    mask = (distance >= 0) & (queries.segments[:, :, None] == keys.segments[:, None, :])
    return mask if window is None else mask & (distance < window)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Tokens,
    keys: Tokens,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernel: Kernel = "xla",
) -> jax.Array:
    """Return softmax(cap(scale q k^T)) v over the visible keys; the softmax is float32.

    Queries are taken in blocks. When T == S, query t must be the token of key t, and the tokens of
    a segment must be ordered by position: then a block reads no key after its last query, nor one
    before its window, which halves the work. The backward pass recomputes the scores.

    Args:
        q_BTNH: queries; head n reads kv head n // (N / K).
        k_BSKH, v_BSKH: keys and values.
        queries, keys: positions and segments, int32[B, T] and int32[B, S].
        window: how many keys back a query sees, itself included; None is all.
        scale: factor of the scores; None is 1 / sqrt(H).
        softcap: bound of the scores, see `layers.capped`; None is none.
        kernel: from `kernels.choose`; all but `xla` need queries and keys of the same tokens.

    Returns:
        [B, T, N, H] in the dtype of `q_BTNH`. Policies of rematerialization know it, and what a
        kernel saves beside it, by the name `kernels.MIXED`.

    Example:
        >>> tokens = Tokens(jnp.array([[0, 1]]), jnp.array([[1, 1]]))
        >>> v = jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
        >>> attend(jnp.zeros((1, 2, 1, 1)), v, v, tokens, tokens).ravel().tolist()
        [2.0, 3.0]
    """
    qkv = q_BTNH, k_BSKH, v_BSKH
    if kernel in ("splash", "splash_interpreted"):
        interpret = kernel == "splash_interpreted"
        return kernels.splash(
            *qkv,
            queries.segments,
            window=window,
            scale=scale,
            softcap=softcap,
            interpret=interpret,
        )
    if kernel in ("cudnn", "cudnn_packed"):
        fused = kernels.cudnn if kernel == "cudnn" else kernels.cudnn_packed
        mixed = fused(*qkv, queries.segments, window=window, scale=scale)
        return checkpoint_name(mixed, MIXED)
    attention: Callable[..., jax.Array] = functools.partial(
        _attend, window=window, scale=scale, softcap=softcap
    )
    T, S, parts = q_BTNH.shape[1], k_BSKH.shape[1], meshes.extent("length")
    if T == S and parts > 1 and T % parts == 0:
        # Context parallel: each device has its own queries and all keys. Gathering the keys is the
        # only communication.
        attention = meshes.divide(attention, "length", (1, None, None, 1, None), 1)
    return checkpoint_name(attention(*qkv, queries, keys), MIXED)


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Tokens,
    keys: Tokens,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    # Grouped queries get an axis `G` of their own. Repeating the keys N / K times would multiply
    # their memory traffic instead.
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    size = max(_BLOCK, -(-T // _BLOCKS))
    blocks = []
    for begin in range(0, T, size):
        end = min(begin + size, T)
        # the keys that some query of the block can see, where query t is the token of key t
        first, last = (max(0, begin + 1 - window) if window else 0, end) if T == S else (0, S)
        block_queries = Tokens(*(x[:, begin:end] for x in queries))
        block_keys = Tokens(*(x[:, first:last] for x in keys))
        mask_BTS = visible(block_queries, block_keys, window)
        q, k, v = q_BKGTH[:, :, :, begin:end], k_BKSH[:, :, first:last], v_BKSH[:, :, first:last]
        blocks.append(_block(H**-0.5 if scale is None else scale, softcap, q, k, v, mask_BTS))
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# Layers are scanned, so the compiler cannot merge the forward computation with its repetition in
# the backward pass and needs no barrier against it.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(0, 1))
def _block(
    scale: float,
    softcap: float | None,
    q_BKGTH: jax.Array,
    k_BKSH: jax.Array,
    v_BKSH: jax.Array,
    mask_BTS: jax.Array,
) -> jax.Array:
    # one bias for all heads: it is broadcast over K and G
    bias_BTS = jnp.where(mask_BTS, 0.0, _MASKED)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = capped(scores * scale, softcap) + bias_BTS[:, None, None]
    # The softmax is normalized after the product with v: H columns are divided instead of S.
    # The maximum cancels in the quotient, so its gradient is zero and need not be computed.
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = powers.sum(-1, keepdims=True)
    mixed = jnp.einsum(
        "BKGTS,BKSH->BKGTH", powers.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(q_BKGTH.dtype)
