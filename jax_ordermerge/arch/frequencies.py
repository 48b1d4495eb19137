"""Frequencies of rotary position embeddings, of each supported kind."""

import math

import numpy as np

from jax_ordermerge.arch.rope import Rope


def rope_frequencies(rope: Rope, head_dim: int, *, is_long: bool = False) -> np.ndarray:
    """Return the rotation of each pair of dimensions in radians per position, float32[H / 2].

    `default`: theta^(-2i/H). `linear`: divided by `factor`. `llama3` and `yarn`: low frequencies
    are divided by `factor`, high ones are unchanged, and those between are interpolated, linearly
    in the frequency (`llama3`) or in the number of the dimension (`yarn`). `longrope`: each is
    divided by its entry of `short_factor`, or of `long_factor`.

    Args:
        rope: the parameters.
        head_dim: H. With a `partial_rotary_factor` only so many dimensions count.
        is_long: of a document longer than `original_max_position_embeddings`; `longrope` reads it.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; Llama 3.1,
    https://arxiv.org/abs/2407.21783; Peng et al. 2023 (YaRN), https://arxiv.org/abs/2309.00071;
    Ding et al. 2024 (LongRoPE), https://arxiv.org/abs/2402.13753.

    Example:
        >>> rope_frequencies(Rope(theta=100.0, kind="linear", factor=2.0), 4).round(3).tolist()
        [0.5, 0.05000000074505806]
    """
    head_dim = rope.turning(head_dim)
    # float32 throughout, as transformers computes them: float64 gives other last bits
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if rope.kind == "longrope":
        # multiplied before the division, as in transformers: elsewhere the last bits differ
        factors = np.array(rope.long_factor if is_long else rope.short_factor, np.float32)
        return 1.0 / (factors * rope.theta**exponents)
    frequencies = (1.0 / rope.theta**exponents).astype(np.float32)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor)
    if rope.kind == "llama3":
        # A dimension that turns often within the original context has seen all of its angles in
        # training. One that turns less than once would see new ones, so it is slowed down.
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        unscaled = np.clip((turns - low) / (high - low), 0, 1)
        scaled = (1 - unscaled) * frequencies / rope.factor + unscaled * frequencies
        return scaled.astype(np.float32)
    if rope.kind == "yarn":
        divided = _yarn_ramp(rope, head_dim)
        return frequencies / np.float32(rope.factor) * divided + frequencies * (1 - divided)
    return frequencies


def _yarn_ramp(rope: Rope, head_dim: int) -> np.ndarray:
    """Return how far each frequency is divided by `factor`: 0 not at all, 1 all; float32[H / 2]."""

    def dimension(turns: float) -> float:
        """Return the pair of dimensions that turns so often within the original length."""
        wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    # why H - 1 and not H / 2 - 1, the last pair? transformers and the authors' code have it so
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a step in place of a ramp
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    return np.clip((pairs - np.float32(low)) / np.float32(high - low), 0, 1)


def rope_scale(rope: Rope) -> float:
    """Return the factor of rotated queries and of rotated keys: 1 but for `yarn` and `longrope`.

    YaRN sharpens the softmax by the square of 0.1 ln(factor) + 1, LongRoPE by
    1 + ln(factor) / ln(original_max_position_embeddings), for short documents, too.

    Example:
        >>> rope = Rope(kind="yarn", factor=4.0)
        >>> round(rope_scale(rope), 4), rope_scale(Rope())
        (1.1386, 1.0)
    """
    if rope.kind not in ("yarn", "longrope"):
        return 1.0
    # what a file gives goes before the formula, as in transformers
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.kind == "longrope":
        # a context that is not extended sharpens nothing, as in transformers
        extended = math.log(max(rope.factor, 1))
        return math.sqrt(1 + extended / math.log(rope.original_max_position_embeddings))

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    # models of DeepSeek give both, and move a part of the factor into the softmax
    if rope.mscale is not None and rope.mscale_all_dim is not None:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)
