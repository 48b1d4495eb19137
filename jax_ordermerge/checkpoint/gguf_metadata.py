"""The architecture of a model in GGUF, the format of llama.cpp: its keys, from and to a config.

A GGUF file has no `config.json`. The metadata hold it under the names of llama.cpp, and what they
leave out llama.cpp takes from its own code for the architecture. So a key that is not understood is
refused, and an architecture is listed here only where that code computes what this package does.
"""

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any, Final

import numpy as np

from jax_ordermerge.arch import ModelConfig, Rope, rope_frequencies
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.registry import Registry

# Factors of the rotary frequencies, by which llama.cpp stores the rope of Llama 3.
ROPE_FACTORS: Final = "rope_freqs.weight"


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of this package in GGUF.

    Attributes:
        name: `general.architecture`.
        permuted: whether the rows of q and k are interleaved: llama.cpp then rotates neighbours,
            where transformers rotates the two halves of a head.
    """

    name: str
    permuted: bool = False


# By the `model_type` of transformers. Of families that share an architecture the first is read.
ARCHITECTURES = Registry[Architecture]("family in GGUF")
ARCHITECTURES.register("llama", Architecture("llama", permuted=True))
ARCHITECTURES.register("mistral", Architecture("llama", permuted=True))
ARCHITECTURES.register("qwen2", Architecture("qwen2"))
ARCHITECTURES.register("qwen3", Architecture("qwen3"))

# Keys below the architecture, and the keys of `config.json` of the same value.
_SAME: Final = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}
# What llama.cpp takes where a file lacks the key; the others of `_SAME` must be there.
_DEFAULTS: Final[JsonRow] = {
    "attention.head_count_kv": None,  # as many as attention heads
    "rope.freq_base": 10000.0,
    "vocab_size": None,  # rows of the embedding
}
# The size of a head under three names. Rotating less than the head is another model.
_HEAD: Final = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_SCALING: Final = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
_SCALING_TYPE: Final = "rope.scaling.type"
# Keys without effect at these values.
_NEUTRAL: Final[dict[str, tuple[object, ...]]] = {
    "rope.scaling.finetuned": (True, False),
    "rope.scaling.attn_factor": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "attention.causal": (True,),
    # the layout with rows of q and k interleaved, which the architecture has anyway
    "tensor_data_layout": ("Meta AI original pth",),
}
# Notes on where a file comes from, and on how it was quantized.
_NOTES: Final = ("general.", "quantize.", "GGUF.", "tokenizer.")


def library() -> ModuleType:
    """Return the package `gguf`, which is an extra.

    Raises:
        UserError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            "GGUF files are read and written by the package gguf; install it with"
            ' pip install "jax_ordermerge[gguf]"'
        ) from error
    return gguf


def tensor_names(config: ModelConfig) -> dict[str, str]:
    """Return the GGUF name of each Hugging Face tensor, without the factors of the rope.

    Raises:
        UserError: the family has no architecture in GGUF, or llama.cpp has no such tensor.
    """
    from jax_ordermerge.arch import hf_tensors

    gguf = library()
    name = architecture(config.family).name
    numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[name], config.num_layers)
    names = {hf: table.get_name(hf, (".weight", ".bias")) for hf, _, _ in hf_tensors(config)}
    if unknown := [hf for hf, stored in names.items() if stored is None]:
        raise UserError(f"GGUF has no tensor for {unknown[0]} in the architecture {name}")
    return names


def architecture(family: str) -> Architecture:
    """Return the architecture in GGUF of a family.

    Raises:
        UserError: it has none.

    Example:
        >>> architecture("mistral").name
        'llama'
    """
    if family not in ARCHITECTURES:
        raise UserError(
            f"models of type {family} cannot be written as GGUF by this package (it can:"
            f" {', '.join(ARCHITECTURES)}); write them with --to hf, and convert that directory"
            " with convert_hf_to_gguf.py of llama.cpp"
        )
    return ARCHITECTURES[family]


# ---------------------------------------------------------------------------------------- reading


def read_config(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    factors: np.ndarray | None,
    path: str,
) -> ModelConfig:
    """Return the config of a model in GGUF.

    Args:
        metadata: values by key.
        shapes: shape of each tensor by its GGUF name, as numpy has it.
        factors: the tensor of factors of the rotary frequencies [H / 2], if there is one.
        path: of the file, for messages.

    Raises:
        UserError: the architecture is not supported, or a key is absent, unknown or of a value
            that is not supported; the message names it.
    """
    name = metadata.get("general.architecture")
    families = [family for family in ARCHITECTURES if ARCHITECTURES[family].name == name]
    if not families:
        supported = dict.fromkeys(row.name for row in ARCHITECTURES.values())
        raise UserError(
            f"{path}: general.architecture = {name!r} is not supported"
            f" (supported: {', '.join(supported)})"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise UserError(f"{path}: general.type = {kind!r}; expected a model")
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path} is one of {metadata['split.count']} files of a model; join them with"
            " llama-gguf-split --merge"
        )
    _check_keys(metadata, f"{name}.", path)
    values = {key.removeprefix(f"{name}."): value for key, value in metadata.items()}
    raw: Json = {"model_type": families[0]}
    for key, hf in _SAME.items():
        if key not in values and key not in _DEFAULTS:
            raise UserError(f"{path} has no {name}.{key}; it is not a complete model")
        raw[hf] = _short(values.get(key, _DEFAULTS.get(key)))
    raw["vocab_size"] = raw["vocab_size"] or shapes.get("token_embd.weight", (None,))[0]
    # before names of so many layers are made
    layers = raw["num_hidden_layers"]
    if isinstance(layers, int) and layers > len(shapes):
        raise UserError(
            f"{path}: {name}.block_count = {layers}, but it has {len(shapes)} tensors in all; it is"
            " not a complete model"
        )
    sizes = [values[key] for key in _HEAD if key in values]
    if any(size != sizes[0] for size in sizes):
        listed = ", ".join(f"{key} = {values[key]}" for key in _HEAD if key in values)
        raise UserError(f"{path}: {listed}; expected one size of the heads")
    # as JSON has it where it is absent: hidden_size / heads
    raw["head_dim"] = sizes[0] if sizes else None
    raw["rope_scaling"] = _read_rope(values, raw, factors, path)
    # llama.cpp takes the embedding where there is no head
    raw["tie_word_embeddings"] = "output.weight" not in shapes
    # of qwen2 they are part of the architecture, and no setting
    raw["attention_bias"] = families[0] != "qwen2" and "blk.0.attn_q.bias" in shapes
    raw["mlp_bias"] = "blk.0.ffn_up.bias" in shapes
    token = "tokenizer.ggml.{}_token_id"
    # llama.cpp stops at each of the three
    ends = (metadata.get(token.format(end)) for end in ("eos", "eot", "eom"))
    raw["eos_token_id"] = list(dict.fromkeys(end for end in ends if end is not None))
    raw["bos_token_id"] = metadata.get(token.format("bos"))
    raw["pad_token_id"] = metadata.get(token.format("padding"))
    return ModelConfig.from_hf(raw, path=path)


def _check_keys(metadata: Mapping[str, Any], prefix: str, path: str) -> None:
    supported = {*_SAME, *_HEAD, *_SCALING, _SCALING_TYPE}
    for key, value in metadata.items():
        if key.startswith((*_NOTES, "split.")):
            continue
        short = key.removeprefix(prefix)
        if short == key or (short not in supported and value not in _NEUTRAL.get(short, ())):
            raise UserError(f"{path}: the key {key} = {str(value)[:60]} is not supported")


def _short(value: Any) -> Any:
    # 1e-5 in float32 is 9.999999747378752e-06; the shortest decimal of the same float32 is what
    # the config had from which the file was made
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_rope(
    values: Mapping[str, Any], raw: JsonRow, factors: np.ndarray | None, path: str
) -> Json | None:
    """Return `rope_scaling` as transformers has it."""
    kind = values.get(_SCALING_TYPE, "none")
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{path}: {_SCALING_TYPE} = {kind!r} is not supported")
    if factors is not None and kind != "none":
        raise UserError(f"{path} has both {_SCALING_TYPE} and {ROPE_FACTORS}; expected one of them")
    if factors is not None:
        return _llama3_of(factors, raw, path)
    if kind == "none":
        return None
    scaling = {hf: _short(values[key]) for key, hf in _SCALING.items() if key in values}
    if kind == "linear":
        # positions are divided, wherever they were before
        scaling = {"factor": scaling.get("factor", 1.0)}
    return {"rope_type": kind, **scaling}


def _llama3_of(factors: np.ndarray, raw: JsonRow, path: str) -> Json | None:
    """Return the rope of Llama 3 whose factors a file holds; None where all of them are 1."""
    head = raw["head_dim"] or raw["hidden_size"] // raw["num_attention_heads"]
    if factors.shape == (head // 2,) and (factors == 1).all():
        return None
    # The file has the result and not the parameters. All published models have 1 and 4 for the
    # two bounds, and were extended from a power of two.
    for length in (2**power for power in range(10, 18)):
        rope = Rope(
            theta=raw["rope_theta"],
            kind="llama3",
            # the slowest frequencies are divided by all of it
            factor=float(factors.max()),
            original_max_position_embeddings=length,
        )
        expected = rope_factors(rope, head)
        if expected.shape == factors.shape and np.allclose(expected, factors, rtol=1e-5, atol=0):
            return rope.to_hf()
    raise UserError(f"{path}: {ROPE_FACTORS} are not those of a rope of type llama3")


def rope_factors(rope: Rope, head_dim: int) -> np.ndarray:
    """Return by what llama.cpp divides the frequencies of a rope of type llama3: float32 [H / 2].

    Example:
        >>> rope_factors(Rope(theta=500000.0, kind="llama3", factor=8.0), 64)[[0, -1]].tolist()
        [1.0, 8.0]
    """
    unscaled = dataclasses.replace(rope, kind="default")
    return rope_frequencies(unscaled, head_dim) / rope_frequencies(rope, head_dim)


# ---------------------------------------------------------------------------------------- writing


def metadata_of(config: ModelConfig) -> Json:
    """Return the keys of an architecture, without `general.architecture`.

    Raises:
        UserError: the family has no architecture in GGUF, or llama.cpp does not compute its rope
            or window.
    """
    name = architecture(config.family).name
    # it would attend to all tokens, and write worse text without an error
    if config.sliding_window is not None:
        raise UserError(
            f"a sliding window of {config.sliding_window} cannot be written as GGUF: llama.cpp has"
            f" none in the architecture {name}"
        )
    hf = config.to_hf("float32")
    keys = {key: hf[value] for key, value in _SAME.items()}
    keys["rope.freq_base"] = float(config.rope.theta)
    # always: some readers take 64 or hidden_size / heads where they are absent
    keys |= dict.fromkeys(_HEAD, config.head_dim)
    rope = config.rope
    if rope.kind in ("linear", "yarn"):
        if dataclasses.replace(rope, attention_factor=None, mscale=None) != rope:
            raise UserError("attention_factor and mscale of YaRN cannot be written as GGUF")
        if rope.mscale_all_dim is not None or not rope.truncate:
            raise UserError("mscale_all_dim and truncate of YaRN cannot be written as GGUF")
        scaling = rope.to_hf()
        keys[_SCALING_TYPE] = rope.kind
        keys |= {
            key: (int if value == "original_max_position_embeddings" else float)(scaling[value])
            for key, value in _SCALING.items()
            if value in scaling
        }
    elif rope.kind not in ("default", "llama3"):
        raise UserError(f"a rope of type {rope.kind} cannot be written as GGUF")
    return {f"{name}.{key}": value for key, value in keys.items()}


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each rotary head, as llama.cpp rotates neighbours.

    Args:
        weight: [heads * H, D], or the bias [heads * H].
        heads: number of them.

    Example:
        >>> permute(np.arange(4), 1).tolist(), unpermute(permute(np.arange(4), 1), 1).tolist()
        ([0, 2, 1, 3], [0, 1, 2, 3])
    """
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(weight.shape)


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return what `permute` has interleaved."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def rotary_heads(hf_name: str, config: ModelConfig) -> int:
    """Return the number of heads whose rows are interleaved in GGUF; 0 for other tensors."""
    if not architecture(config.family).permuted:
        return 0
    # q and k alone are rotated: the rows of v stay in their order
    if ".q_proj." in hf_name:
        return config.num_heads
    return config.num_kv_heads if ".k_proj." in hf_name else 0
