"""Rotary position embeddings: the rotation of queries and keys."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.arch import Rope, rope_frequencies, rope_scale


class Rotation(NamedTuple):
    """Cosines and sines of the angle of each pair of dimensions, float32[B, T, H / 2]."""

    cos_BTH: jax.Array
    sin_BTH: jax.Array


def rotation(
    rope: Rope | None,
    head_dim: int,
    positions_BT: jax.Array,
    is_long_BT: jax.Array | None = None,
) -> Rotation:
    """Return the rotation of the tokens at these positions, float32; None turns none of them.

    Args:
        rope: the parameters, or None.
        head_dim: H.
        positions_BT: float32.
        is_long_BT: which tokens are of documents that are long for `longrope`; None is of none.

    Example:
        >>> rotation(None, 4, jnp.ones((1, 1))).sin_BTH.tolist()
        [[[0.0, 0.0]]]
    """
    if rope is None:
        # x * 1 - y * 0 is x, bit for bit: layers with and without a rope share a program
        sin = jnp.zeros((*positions_BT.shape, head_dim // 2), jnp.float32)
        return Rotation(jnp.ones_like(sin), sin)
    frequencies: np.ndarray | jax.Array = rope_frequencies(rope, head_dim)[None, None]
    if is_long_BT is not None:
        long = rope_frequencies(rope, head_dim, is_long=True)[None, None]
        frequencies = jnp.where(is_long_BT[:, :, None], long, frequencies)
    angles = positions_BT[:, :, None] * frequencies
    # queries and keys are both rotated, so the scores get the square of it
    scale = rope_scale(rope)
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale)


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotate each pair of dimensions by its angle, in float32; [B, T, N, H] in the dtype of x.

    Dimensions behind those that the angles are of are returned as they are.

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> rotate(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).ravel().tolist()
        [0.0, 1.0]
    """
    # Dimension i pairs with i + H/2, as in Hugging Face checkpoints. In the paper neighbours pair.
    # Halves first, then float32: XLA on TPU would write all of x in float32.
    turning, H = 2 * cos_BTH.shape[-1], x_BTNH.shape[-1]
    x, still = (x_BTNH, None) if turning == H else jnp.split(x_BTNH, [turning], axis=-1)
    first, second = (half.astype(jnp.float32) for half in jnp.split(x, 2, axis=-1))
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
    return rotated if still is None else jnp.concatenate([rotated, still], axis=-1)
