"""The arithmetic of training, counted from the tensor table, and the peak of a device.

Their ratio is the model FLOPs utilization (MFU).
"""

import collections
import math
from typing import Final, NamedTuple

import numpy as np

from jax_ordermerge import hardware
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.model import lora

# Values of `model.remat` with which the backward pass computes whole layers again.
RECOMPUTING: Final = ("full", "offload")


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Return the peak FLOP/s of a device for matmuls of `dtype`, None where it is not known.

    At JAX's default precision float32 matmuls run in one pass of bfloat16 on a TPU, and as TF32 at
    half the rate on a GPU.

    Args:
        device_kind: of a jax device.
        dtype: `"bfloat16"` or `"float32"`.

    Example:
        >>> peak_flops("TPU v5 lite", "float32"), peak_flops("NVIDIA A100-SXM4-80GB", "float32")
        (197000000000000.0, 156000000000000.0)
        >>> peak_flops("cpu", "float32") is None
        True
    """
    device = hardware.find(device_kind)
    if device is None:
        return None
    on_gpu = not device.sides  # the table gives the sides of a torus for TPUs alone
    return device.flops / 2 if dtype == "float32" and on_gpu else device.flops


def training_flops(config: ModelConfig, lengths: np.ndarray, adapters: Lora | None = None) -> float:
    """Return the FLOPs that one optimizer step on sequences needs.

    That is 6 N per token, and attention over the pairs that causality and window leave. `N` counts
    the weights that tokens are multiplied by: all matrices with the head, without the lookup of
    embeddings. The backward pass needs twice the forward pass. Recomputation, padding, norms and
    softmax do not count.

    Args:
        config: the architecture.
        lengths: int[n], tokens of each sequence.
        adapters: settings of adapters that are trained in place of the weights. The weights then
            have no gradient, which is a third of their 6 N.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> # 6 * 1536 weights, and 12 * 16 for the pair of the token with itself
        >>> training_flops(tiny, np.array([1]))
        9408.0

    Source: Chowdhery et al. 2022, appendix B, https://arxiv.org/abs/2204.02311. It also counts the
    pairs that causality forbids; we do not.
    """
    # 6 N: a multiply and an add per weight forward, twice that backward, for the gradients of
    # inputs and of weights. Attention: 2 matmuls of 2 FLOPs per pair and head dimension, times 3.
    weights = sum(_matmul_weights(config))
    n = np.asarray(lengths, np.float64)
    weighted = 6 * weights if adapters is None else 4 * weights + 6 * _low_rank(config, adapters)
    attention = 0.0
    for width, window in _attention_widths(config):
        seen = np.minimum(n, window)
        pairs = n * seen - seen * (seen - 1) / 2  # sum over queries i = 1..n of min(i, window)
        attention += 12 * width * pairs.sum()
    return float(weighted * n.sum() + attention)


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
    """Return the FLOPs of the matmuls that a training step executes, padding and remat included.

    Matmuls of layers run once forward and twice backward (of frozen weights once), and once more
    forward under `full` and `offload` rematerialization. Those of the head are never recomputed.
    Attention computes the blocks that the causal mask touches: 2 matmuls forward, 2 again where
    layers are recomputed, and backward 6 (`xla`), 7 (`splash`) or 5 (`cudnn`). Norms, softmax and
    the optimizer do not count.

    Args:
        config: the architecture.
        rows: sequences per step, padding rows included; of preference pairs twice their number.
        length: padded length of the rows.
        remat: `model.remat`.
        kernel: attention kernel.
        adapters: settings of adapters that are trained in place of the weights.
        pairs: whether the objective is of preference pairs, which takes one more matmul with the
            head.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [executed_flops(tiny, 1, 64, remat=remat) for remat in ("none", "full")]
        [1638400.0, 2064384.0]
    """
    layers, head = _matmul_weights(config)
    again = 1 if remat in RECOMPUTING else 0
    low = 0 if adapters is None else _low_rank(config, adapters)
    passes = (3 if adapters is None else 2) + again
    # the gradient of the head is computed with the losses, whether the head is trained or not
    weights = passes * layers + (3 + again) * low + (4 if pairs else 3) * head
    matmuls = 2 + 2 * again + {"xla": 6, "cudnn": 5}.get(kernel, 7)
    # the xla kernel cuts the queries into 8 blocks at most, fused kernels into blocks of 512
    block = max(64, -(-length // 8)) if kernel == "xla" else min(length, 512)
    causal = length * (length + min(block, length)) / 2
    attention = sum(
        2 * matmuls * width * min(causal, length * (window + block)) * rows
        for width, window in _attention_widths(config)
    )
    return float(2 * weights * rows * length + attention)


def forward_flops(config: ModelConfig, tokens: float, length: int) -> float:
    """Return the FLOPs of the matmuls of a forward pass over `tokens` tokens in rows of `length`.

    Example:
        >>> tiny = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> forward_flops(tiny, 64, 64)
        327680.0
    """
    attention = sum(
        4 * width * min(length, window) / 2 for width, window in _attention_widths(config)
    )
    return float(tokens * (2 * sum(_matmul_weights(config)) + attention))


class _Weights(NamedTuple):
    layers: int
    head: int


def _matmul_weights(config: ModelConfig) -> _Weights:
    """Return the number of weights that a token is multiplied by."""
    # The head counts also where it is tied to the embedding. Norms and biases are left out: they
    # are vectors, and their work is that of memory.
    matrices = (s for s in tensor_table(config) if s.stacked and len(s.hf_shape) == 2)
    layers = sum(math.prod(spec.shape) for spec in matrices)
    return _Weights(layers, config.vocab_size * config.hidden_size)


def _attention_widths(config: ModelConfig) -> list[tuple[int, float]]:
    """Return the dimensions of all heads of the layers of each window, and the window."""
    layers = collections.Counter(config.windows)
    return [
        (count * config.num_heads * config.head_dim, math.inf if window is None else window)
        for window, count in layers.items()
    ]


def _low_rank(config: ModelConfig, adapters: Lora) -> int:
    """Return the number of weights of one adapter."""
    return sum(math.prod(spec.shape) for spec in lora.table(config, adapters))
