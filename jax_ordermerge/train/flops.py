"""How much arithmetic training needs, counted on paper, and how much a device can do: their ratio is the MFU."""

import math

import numpy as np

from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.model import lora

# Peak FLOP/s of one jax device (a chip; of TPU v4 and later chips both cores) with bfloat16 products, dense, from the makers' data
# sheets. The first name that `device_kind` contains counts.
_BFLOAT16 = {
    "TPU v6": 918e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v4": 275e12,
    "B200": 2250e12,
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "A100": 312e12,
}


def peak(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device with products of `dtype`, None where it is not known.

    Products of float32 run, at jax's default precision, in one pass of bfloat16 on a TPU and as TF32, at half the rate, on a GPU.

    Args:
        device_kind: of a jax device.
        dtype: `"bfloat16"` or `"float32"`.

    Example:
        >>> peak("TPU v5 lite", "float32"), peak("NVIDIA A100-SXM4-80GB", "float32"), peak("cpu", "float32")
        (197000000000000.0, 156000000000000.0, None)
    """
    found = next((flops for name, flops in _BFLOAT16.items() if name in device_kind), None)
    return found / 2 if found and dtype == "float32" and "TPU" not in device_kind else found


def training_flops(config: ModelConfig, lengths: np.ndarray, adapters: Lora | None = None) -> float:
    """Return the FLOPs of one optimizer step on sequences: 6 N a token, and attention over the pairs that causality and window leave.

    `N` counts the weights that tokens are multiplied by: all matrices, the head included, the lookup of embeddings not. The backward
    pass needs twice the forward pass; what is computed twice to save memory, padding, norms and softmax do not count.

    Args:
        config: the model.
        lengths: int[n], tokens of each sequence.
        adapters: what is trained in place of the weights: these then have no gradient, which is a third of their 6 N.

    Example:
        >>> tiny = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
        >>> training_flops(tiny, np.array([1]))  # 6 * 1536 weights, 12 * 16 for the pair of the token with itself
        9408.0

    Source: Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311 (which counts the pairs causality forbids too).
    """
    table = tensor_table(config)
    weights = sum(math.prod(spec.shape) for spec in table if len(spec.hf_shape) == 2 and spec.kind != "embedding")
    if config.tie_embeddings:
        weights += config.vocab_size * config.hidden_size
    n = np.asarray(lengths, np.float64)
    window = np.minimum(n, config.sliding_window or math.inf)
    pairs = n * window - window * (window - 1) / 2  # the sum over queries i = 1..n of min(i, window)
    width = config.num_layers * config.num_heads * config.head_dim
    trained = 0 if adapters is None else sum(math.prod(spec.shape) for spec in lora.table(config, adapters))
    weighted = 6 * weights if adapters is None else 4 * weights + 6 * trained
    return float(weighted * n.sum() + 12 * width * pairs.sum())
