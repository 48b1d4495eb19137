"""Attention that is causal by position inside one segment, so packed documents never see each other."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jax_ordermerge import mesh as meshes
from jax_ordermerge.model import kernels
from jax_ordermerge.model.kernels import MIXED, Kernel

# Added to a float32 score it leaves nothing of it, and exp of it less any visible score is exactly 0.
_MASKED = -1e30
# Queries a block: 64 was the fastest of 32, 64, 128, 256 on CPU; at most 8 blocks keep long sequences quick to compile.
_BLOCK, _BLOCKS = 64, 8


class Tokens(NamedTuple):
    """Where tokens stand. int32[B, T] each.

    Attributes:
        positions: position inside the document.
        segments: document number, 0 on padding.
    """

    positions: jax.Array
    segments: jax.Array


def visible(queries: Tokens, keys: Tokens, window: int | None = None) -> jax.Array:
    """Return bool[B, T, S]: whether a query may see a key.

    A query sees the keys of its own segment at its own or an earlier position, the last `window` of them. Padding is a segment
    like any other: it sees only padding, and itself, so that no softmax is empty.

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
    kernel: Kernel = "xla",
) -> jax.Array:
    """Return softmax(q k^T / sqrt(H)) v over the visible keys, in the dtype of `q_BTNH`; softmax in float32.

    Queries are taken in blocks. When T == S, query t must be the token of key t, and tokens of a segment must stand in the order of
    their positions: then a block reads no key behind its last query, nor one before its window, which halves the work. Scores are
    computed again in the backward pass instead of being stored.

    Args:
        q_BTNH: queries; head n reads kv head n // (N / K).
        k_BSKH, v_BSKH: keys and values.
        queries, keys: positions and segments, int32[B, T] and int32[B, S].
        window: how many keys back a query sees, itself included; None is all.
        kernel: from `kernels.choose`; all but `xla` need queries and keys of the same tokens.

    Returns:
        [B, T, N, H]. Policies of rematerialization know it, and what a kernel keeps beside it, by the name `kernels.MIXED`.

    Example:
        >>> tokens = Tokens(jnp.array([[0, 1]]), jnp.array([[1, 1]]))
        >>> v = jnp.array([2.0, 4.0]).reshape(1, 2, 1, 1)
        >>> attend(jnp.zeros((1, 2, 1, 1)), v, v, tokens, tokens).ravel().tolist()
        [2.0, 3.0]
    """
    match kernel:
        case "splash" | "splash_interpreted":
            interpret = kernel == "splash_interpreted"
            return kernels.splash(
                q_BTNH, k_BSKH, v_BSKH, queries.segments, window=window, interpret=interpret
            )
        case "cudnn":
            return checkpoint_name(
                kernels.cudnn(q_BTNH, k_BSKH, v_BSKH, queries.segments, window=window), MIXED
            )
    if (
        q_BTNH.shape[1] == k_BSKH.shape[1]
        and meshes.extent("length") > 1
        and q_BTNH.shape[1] % meshes.extent("length") == 0
    ):
        # every device its own queries and all keys: context parallel, of which the gathering of the keys is all the traffic
        local = functools.partial(_attend, window=window)
        mixed = meshes.divide(local, "length", (1, None, None, 1, None), 1)(
            q_BTNH, k_BSKH, v_BSKH, queries, keys
        )
    else:
        mixed = _attend(q_BTNH, k_BSKH, v_BSKH, queries, keys, window=window)
    return checkpoint_name(mixed, MIXED)


def _attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    queries: Tokens,
    keys: Tokens,
    *,
    window: int | None,
) -> jax.Array:
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKGTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    size = max(_BLOCK, -(-T // _BLOCKS))
    blocks = []
    for begin in range(0, T, size):
        end = min(begin + size, T)
        first, last = (max(0, begin + 1 - window) if window else 0, end) if T == S else (0, S)
        mask_BTS = visible(
            Tokens(*(x[:, begin:end] for x in queries)),
            Tokens(*(x[:, first:last] for x in keys)),
            window,
        )
        blocks.append(
            _block(
                q_BKGTH[:, :, :, begin:end],
                k_BKSH[:, :, first:last],
                v_BKSH[:, :, first:last],
                mask_BTS,
            )
        )
    return jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


# Layers are scanned, so the compiler cannot merge the two computations and needs no barrier against it.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _block(
    q_BKGTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask_BTS: jax.Array
) -> jax.Array:
    bias_BTS = jnp.where(mask_BTS, 0.0, _MASKED)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    scores = scores * q_BKGTH.shape[-1] ** -0.5 + bias_BTS[:, None, None]
    # the softmax is divided after the product with v, over H columns instead of S
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = powers.sum(-1, keepdims=True)
    mixed = jnp.einsum(
        "BKGTS,BKSH->BKGTH", powers.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32
    )
    return (mixed / total).astype(q_BKGTH.dtype)
