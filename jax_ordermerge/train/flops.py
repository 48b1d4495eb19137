"""How much arithmetic training needs, counted on paper, and how much a device can do: their ratio is the MFU."""

import math
from typing import NamedTuple

import numpy as np

from jax_ordermerge import hardware
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.model import lora


def peak(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device with products of `dtype`, None where it is not known.

    Products of float32 run, at jax's default precision, in one pass of bfloat16 on a TPU and as TF32, at half the rate, on a GPU.

    Args:
        device_kind: of a jax device.
        dtype: `"bfloat16"` or `"float32"`.

    Example:
        >>> (
        ...     peak("TPU v5 lite", "float32"),
        ...     peak("NVIDIA A100-SXM4-80GB", "float32"),
        ...     peak("cpu", "float32"),
        ... )
        (197000000000000.0, 156000000000000.0, None)
    """
    found = hardware.find(device_kind)
    if found is None:
        return None
    return found.flops / 2 if dtype == "float32" and not found.sides else found.flops


def training_flops(config: ModelConfig, lengths: np.ndarray, adapters: Lora | None = None) -> float:
    """Return the FLOPs of one optimizer step on sequences: 6 N a token, and attention over the pairs that causality and window leave.

    `N` counts the weights that tokens are multiplied by: all matrices, the head included, the lookup of embeddings not. The backward
    pass needs twice the forward pass; what is computed twice to save memory, padding, norms and softmax do not count.

    Args:
        config: the model.
        lengths: int[n], tokens of each sequence.
        adapters: what is trained in place of the weights: these then have no gradient, which is a third of their 6 N.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> training_flops(
        ...     tiny, np.array([1])
        ... )  # 6 * 1536 weights, 12 * 16 for the pair of the token with itself
        9408.0

    Source: Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311 (which counts the pairs causality forbids too).
    """
    weights = sum(_weights(config))
    n = np.asarray(lengths, np.float64)
    window = np.minimum(n, config.sliding_window or math.inf)
    pairs = (
        n * window - window * (window - 1) / 2
    )  # the sum over queries i = 1..n of min(i, window)
    width = config.num_layers * config.num_heads * config.head_dim
    trained = (
        0
        if adapters is None
        else sum(math.prod(spec.shape) for spec in lora.table(config, adapters))
    )
    weighted = 6 * weights if adapters is None else 4 * weights + 6 * trained
    return float(weighted * n.sum() + 12 * width * pairs.sum())


def executed_flops(
    config: ModelConfig,
    rows: int,
    length: int,
    *,
    remat: str,
    kernel: str = "xla",
    adapters: Lora | None = None,
    pairs: bool = False,
) -> float:
    """Return the FLOPs of products that a training step really computes: padding, and what is computed again, count here.

    Products of layers run once forward and twice backward (of frozen weights once), and once more forward under `full` rematerialization;
    those of the head are never computed again. Attention computes the blocks that the causal mask touches: 2 products forward, again
    2 under `full`, and backward 6 (`xla`), 7 (`splash`) or 5 (`cudnn`). Norms, softmax and the optimizer are not products.

    Args:
        config: the model.
        rows: sequences of a step, padding rows included; of preference pairs twice their number.
        length: that rows are padded to.
        remat: `model.remat`.
        kernel: of attention.
        adapters: what is trained in place of the weights.
        pairs: whether the objective is of preference pairs, which takes one more product with the head.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [executed_flops(tiny, 1, 64, remat=remat) for remat in ("none", "full")]
        [1638400.0, 2064384.0]
    """
    layers, head = _weights(config)
    again = 1 if remat == "full" else 0
    low = (
        0
        if adapters is None
        else sum(math.prod(spec.shape) for spec in lora.table(config, adapters))
    )
    passes = (3 if adapters is None else 2) + again
    # the gradient of the head is made with the losses, whether the head is trained or not
    weighted = (
        2 * (passes * layers + (3 + again) * low + (4 if pairs else 3) * head) * rows * length
    )
    products = 2 + 2 * again + {"xla": 6, "cudnn": 5}.get(kernel, 7)
    block = max(64, -(-length // 8)) if kernel == "xla" else min(length, 512)
    seen = length * (length + min(block, length)) / 2
    if config.sliding_window:
        seen = min(seen, length * (config.sliding_window + block))
    return float(
        weighted
        + 2 * products * config.num_layers * config.num_heads * config.head_dim * seen * rows
    )


def forward_flops(config: ModelConfig, tokens: float, length: int) -> float:
    """Return the FLOPs of products of a forward pass over `tokens` tokens in rows of `length`.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> forward_flops(tiny, 64, 64)
        327680.0
    """
    seen = min(length, config.sliding_window or length) / 2
    return float(
        tokens
        * (
            2 * sum(_weights(config))
            + 4 * config.num_layers * config.num_heads * config.head_dim * seen
        )
    )


class _Products(NamedTuple):
    layers: int
    head: int


def _weights(config: ModelConfig) -> _Products:
    """Return the weights that a token is multiplied by."""
    layers = sum(
        math.prod(spec.shape)
        for spec in tensor_table(config)
        if spec.stacked and len(spec.hf_shape) == 2
    )
    return _Products(layers, config.vocab_size * config.hidden_size)
