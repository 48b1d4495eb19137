"""Rotary position embeddings: frequencies of the supported kinds, and the rotation."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.arch import Rope


def rope_frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Return the rotation of each pair of dimensions in radians per position, float32[H / 2].

    `default`: theta^(-2i/H). `linear`: divided by `factor`. `llama3`: low frequencies are divided
    by `factor`, high ones are unchanged, and those between are interpolated.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; Llama 3.1,
    https://arxiv.org/abs/2407.21783.

    Example:
        >>> rope_frequencies(Rope(theta=100.0, kind="linear", factor=2.0), 4).round(3).tolist()
        [0.5, 0.05000000074505806]
    """
    # float32 throughout, as transformers computes them: float64 gives other last bits
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / rope.theta**exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        unscaled = np.clip((turns - low) / (high - low), 0, 1)
        scaled = (1 - unscaled) * frequencies / rope.factor + unscaled * frequencies
        return scaled.astype(np.float32)
    return frequencies


def rotate(x_BTNH: jax.Array, cos_BTH: jax.Array, sin_BTH: jax.Array) -> jax.Array:
    """Rotate each pair of dimensions by its angle, in float32; [B, T, N, H] in the dtype of x.

    Example:
        >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
        >>> rotate(x, jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))).ravel().tolist()
        [0.0, 1.0]
    """
    # Dimension i pairs with i + H/2, as in Hugging Face checkpoints. In the paper neighbours pair.
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos_BTH[:, :, None], sin_BTH[:, :, None]
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x_BTNH.dtype)
