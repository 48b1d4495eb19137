"""Shapes of published models by name, for plans without their files."""

from typing import Final

from jax_ordermerge.arch.config import ModelConfig
from jax_ordermerge.json_types import Json

# The keys of `config.json` that differ between the sizes of a release.
_COLUMNS: Final = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


# Between 3.1 and 3.2 only the factor of the rope differs: both stretch the same 8192 positions.
def _llama_3(factor: float) -> Json:
    return {
        "model_type": "llama",
        "vocab_size": 128256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


def _smollm2(theta: float) -> Json:
    return {
        "model_type": "llama",
        "vocab_size": 49152,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": theta,
        "tie_word_embeddings": True,
    }


def _mistral(vocab_size: int, theta: float, window: int | None) -> Json:
    return {
        "model_type": "mistral",
        "vocab_size": vocab_size,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "rope_theta": theta,
        "sliding_window": window,
    }


def _qwen25(vocab_size: int, positions: int, epsilon: float = 1e-6) -> Json:
    return {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "rms_norm_eps": epsilon,
        "max_position_embeddings": positions,
        "rope_theta": 1e6,
        # the smaller sizes, which have the smaller vocabulary, tie
        "tie_word_embeddings": vocab_size == 151936,
    }


# Vocabulary and head size are the defaults of the family. Heads times 128 need not be hidden_size.
def _qwen3(*, tied: bool) -> Json:
    return {
        "model_type": "qwen3",
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
    }


def _granite(head_dim: int, logits_scaling: float) -> Json:
    return {
        "model_type": "granite",
        "vocab_size": 49159,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 1e7,
        "tie_word_embeddings": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        # not 1 / sqrt(head_dim): the scale of the scores is a number of the file
        "attention_multiplier": 1 / head_dim,
        "logits_scaling": logits_scaling,
    }


def _gemma_3(vocab_size: int, window: int, **change: object) -> Json:
    # From 4B on the files hold images, too: these are the shapes of their text models.
    common: Json = {"model_type": "gemma3_text", "head_dim": 256, "query_pre_attn_scalar": 256}
    return {**common, "vocab_size": vocab_size, "sliding_window": window, **change}


_LLAMA_2: Final[Json] = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
}
_SMOLLM_3: Final[Json] = {
    "model_type": "smollm3",
    "max_position_embeddings": 65536,
    "rope_theta": 5e6,
}
_OLMO_2: Final[Json] = {
    "model_type": "olmo2",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 500000.0,
}
_GEMMA_2: Final[Json] = {"model_type": "gemma2"}
_LONG_GEMMA_3: Final = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
_PHI_3: Final[Json] = {
    "model_type": "phi3",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "sliding_window": 2047,
}
_PHI_4: Final[Json] = {
    "model_type": "phi3",
    "vocab_size": 100352,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 16384,
    "original_max_position_embeddings": 16384,
    "rope_theta": 250000.0,
}
_OLMO_3: Final[Json] = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        # 0.1 ln(factor) + 1, the default of YaRN
        "attention_factor": 1.2079441541679836,
    },
}
# What the sizes of a release have in common, and the columns of each.
_RELEASES: Final[tuple[tuple[Json, dict[str, tuple[int, ...]]], ...]] = (
    (
        _LLAMA_2,
        {
            "llama-2-7b": (4096, 11008, 32, 32, 32),
            "llama-2-13b": (5120, 13824, 40, 40, 40),
            "llama-2-70b": (8192, 28672, 80, 64, 8),
        },
    ),
    (
        _llama_3(8.0),
        {
            "llama-3.1-8b": (4096, 14336, 32, 32, 8),
            "llama-3.1-70b": (8192, 28672, 80, 64, 8),
            "llama-3.1-405b": (16384, 53248, 126, 128, 8),
            "llama-3.3-70b": (8192, 28672, 80, 64, 8),
        },
    ),
    (
        _llama_3(32.0) | {"tie_word_embeddings": True},
        {"llama-3.2-1b": (2048, 8192, 16, 32, 8), "llama-3.2-3b": (3072, 8192, 28, 24, 8)},
    ),
    (_mistral(32000, 1e4, 4096), {"mistral-7b-v0.1": (4096, 14336, 32, 32, 8)}),
    (_mistral(32768, 1e6, None), {"mistral-7b-v0.3": (4096, 14336, 32, 32, 8)}),
    (
        _smollm2(1e5),
        {"smollm2-135m": (576, 1536, 30, 9, 3), "smollm2-360m": (960, 2560, 32, 15, 5)},
    ),
    (_smollm2(1.3e5), {"smollm2-1.7b": (2048, 8192, 24, 32, 32)}),
    (
        _qwen25(151936, 32768),
        {"qwen2.5-0.5b": (896, 4864, 24, 14, 2), "qwen2.5-3b": (2048, 11008, 36, 16, 2)},
    ),
    (_qwen25(151936, 131072), {"qwen2.5-1.5b": (1536, 8960, 28, 12, 2)}),
    (_qwen25(152064, 131072), {"qwen2.5-7b": (3584, 18944, 28, 28, 4)}),
    (
        _qwen25(152064, 131072, 1e-5),
        {
            "qwen2.5-14b": (5120, 13824, 48, 40, 8),
            "qwen2.5-32b": (5120, 27648, 64, 40, 8),
            "qwen2.5-72b": (8192, 29568, 80, 64, 8),
        },
    ),
    (
        _qwen3(tied=True),
        {
            "qwen3-0.6b": (1024, 3072, 28, 16, 8),
            "qwen3-1.7b": (2048, 6144, 28, 16, 8),
            "qwen3-4b": (2560, 9728, 36, 32, 8),
        },
    ),
    (
        _qwen3(tied=False),
        {
            "qwen3-8b": (4096, 12288, 36, 32, 8),
            "qwen3-14b": (5120, 17408, 40, 40, 8),
            "qwen3-32b": (5120, 25600, 64, 64, 8),
        },
    ),
    (_granite(64, 8.0), {"granite-3.3-2b": (2048, 8192, 40, 32, 8)}),
    (_granite(128, 16.0), {"granite-3.3-8b": (4096, 12800, 40, 32, 8)}),
    (_SMOLLM_3, {"smollm3-3b": (2048, 11008, 36, 16, 4)}),
    (
        _OLMO_2,
        {
            "olmo-2-0425-1b": (2048, 8192, 16, 16, 16),
            "olmo-2-1124-7b": (4096, 11008, 32, 32, 32),
            "olmo-2-1124-13b": (5120, 13824, 40, 40, 40),
            "olmo-2-0325-32b": (5120, 27648, 64, 40, 8),
        },
    ),
    (
        _OLMO_3,
        {
            # the base has a date in its name; the names of Think and Instruct have none
            "olmo-3-1025-7b": (4096, 11008, 32, 32, 32),
            "olmo-3-7b": (4096, 11008, 32, 32, 32),
            "olmo-3-1125-32b": (5120, 27648, 64, 40, 8),
            "olmo-3-32b": (5120, 27648, 64, 40, 8),
        },
    ),
    (_GEMMA_2, {"gemma-2-2b": (2304, 9216, 26, 8, 4), "gemma-2-9b": (3584, 14336, 42, 16, 8)}),
    (
        # 144 is hidden_size / heads: this size does not scale the scores by its head size
        _GEMMA_2 | {"head_dim": 128, "query_pre_attn_scalar": 144},
        {"gemma-2-27b": (4608, 36864, 46, 32, 16)},
    ),
    (
        _gemma_3(262144, 512, max_position_embeddings=32768),
        {"gemma-3-270m": (640, 2048, 18, 4, 1), "gemma-3-1b": (1152, 6912, 26, 4, 1)},
    ),
    (
        _gemma_3(262208, 1024, **_LONG_GEMMA_3),
        {"gemma-3-4b": (2560, 10240, 34, 8, 4), "gemma-3-12b": (3840, 15360, 48, 16, 8)},
    ),
    (
        # 168 is hidden_size / heads, as in Gemma 2 27B
        _gemma_3(262208, 1024, head_dim=128, query_pre_attn_scalar=168, **_LONG_GEMMA_3),
        {"gemma-3-27b": (5376, 21504, 62, 32, 16)},
    ),
    (
        _PHI_3,
        {"phi-3-mini-4k": (3072, 8192, 32, 32, 32), "phi-3-medium-4k": (5120, 17920, 40, 40, 10)},
    ),
    (_PHI_4, {"phi-4": (5120, 17920, 40, 40, 10)}),
)
# Read as a file is, so that the defaults of the family fill what the rows leave out.
ARCHITECTURES: Final = {
    name: ModelConfig.from_hf(common | dict(zip(_COLUMNS, row, strict=True)), path=name)
    for common, sizes in _RELEASES
    for name, row in sizes.items()
}


def architecture_of(name: str) -> ModelConfig | None:
    """Return the architecture of a published model by its name on the hub, or None.

    Example:
        >>> architecture_of("meta-llama/Llama-2-7b-hf").num_layers, architecture_of("my/own-7b")
        (32, None)
    """
    # Fine-tuned variants of the publisher have the shape of their base.
    short = name.split("/")[-1].lower()
    for ending in ("-hf", "-instruct", "-chat", "-base", "-think", "-it", "-pt"):
        short = short.removesuffix(ending)
    return ARCHITECTURES.get(short)
