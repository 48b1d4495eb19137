import jax
import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Lora
from jax_ordermerge.train import flops

SHAPE = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_layers": 3,
    "num_heads": 4,
    "head_dim": 6,
}


def counted(config, lengths):
    """Multiply and add, position by position, forward once and backward twice."""
    D, F, N, K, H = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
    )
    total = 0
    for length in lengths:
        for query in range(length):
            for layer in range(config.num_layers):
                has_window = config.sliding_window and layer not in config.full_attention_layers
                window = config.sliding_window if has_window else length
                total += 2 * D * (N + 2 * K) * H + 2 * N * H * D  # q, k, v and o
                total += 3 * 2 * D * F  # gate, up, down
                for key in range(length):
                    if key <= query and query - key < window:
                        total += N * (2 * H + 2 * H)  # score, weighted value
            total += 2 * D * config.vocab_size
    return 3 * total


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"num_kv_heads": 2},
        {"tie_embeddings": True},
        {"sliding_window": 4, "family": "mistral"},
        {"sliding_window": 4, "family": "qwen3", "full_attention_layers": (0, 2)},
        {"qkv_bias": True, "qk_norm": "per_head"},
    ],
)
def test_training_flops_are_those_counted_one_by_one(change):
    config = ModelConfig(**(SHAPE | change))
    lengths = np.array([1, 3, 4, 5, 11])
    assert flops.training_flops(config, lengths) == counted(config, lengths)


def test_executed_and_forward_flops_of_layers_with_and_without_a_window():
    # two layers without a window and one with: the mean of three models of one kind of layer
    mixed, full, window = (
        ModelConfig(**SHAPE | {"sliding_window": 100, "full_attention_layers": layers})
        for layers in ((0, 2), (0, 1, 2), ())
    )
    for count in (
        lambda config: flops.executed_flops(config, 2, 1000, remat="full"),
        lambda config: flops.executed_flops(config, 2, 5000, remat="none", kernel="splash"),
        lambda config: flops.forward_flops(config, 3000, 1000),
    ):
        assert count(window) < count(mixed) < count(full)
        assert 3 * count(mixed) == pytest.approx(2 * count(full) + count(window), rel=1e-12)


def test_frozen_weights_have_no_gradient():
    config, lengths, rank = ModelConfig(**SHAPE), np.array([1, 3, 4, 5, 11]), 2
    D, F, Q = 12, 20, 4 * 6
    matrices = 3 * (4 * D * Q + 3 * D * F) + 50 * D  # of 3 layers and the head
    low = 3 * rank * ((D + Q) + (F + D))  # of q and down
    counted_flops = flops.training_flops(config, lengths, Lora(rank=rank, targets=("q", "down")))
    assert counted_flops == counted(config, lengths) - lengths.sum() * (2 * matrices - 6 * low)


def test_peaks():
    assert flops.peak_flops("TPU v6 lite", "bfloat16") == 918e12
    assert (
        flops.peak_flops("TPU v5p", "bfloat16") == flops.peak_flops("TPU v5", "bfloat16") == 459e12
    )
    assert flops.peak_flops("NVIDIA H100 PCIe", "bfloat16") < flops.peak_flops(
        "NVIDIA H100 80GB HBM3", "bfloat16"
    )
    assert flops.peak_flops("NVIDIA B200", "float32") == 1125e12
    assert flops.peak_flops(jax.devices("cpu")[0].device_kind, "bfloat16") is None
