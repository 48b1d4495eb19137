"""Checkpoints of unlisted architectures: those that no row of the tensor table describes.

What the table says of a listed model is read here from the names of the tensors. A *stack of
layers* is a run of modules with the numbers 0 to n - 1 in one place of their names, as
`model.layers` of `model.layers.0.mlp.up_proj.weight`. A model may have several, say of vision and
of text.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from jax_ordermerge.arch.families import FAMILIES
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

# Modules with one row per token, as transformers and the published checkpoints name them: those of
# the output, and those of the input.
_HEADS = "lm_head|embed_out|proj_out|output|decoder|predictions"
_EMBEDDINGS = "embed_tokens|embed_in|wte|shared|word_embeddings|tok_embeddings|embeddings|embedding"
_HEAD = re.compile(rf"(?:^|\.)(?:{_HEADS})\.(?:weight|bias)$")
# `predictions.bias` has one number per token
_VOCABULARY = re.compile(rf"(?:^|\.)(?:{_EMBEDDINGS}|{_HEADS})\.(?:weight|bias)$")
# What stands before the layers: also positions, and norms of embeddings. LFM2 has a norm behind its
# last layer that is named for the embedding.
_INPUT = re.compile(r"(?:^|\.)(?:wte|wpe|shared|(?!embedding_norm\.)\w*embed\w*)(?:\.|$)")
# Modules whose one matrix holds several projections. A method that acts on the singular vectors, or
# on the length, of a matrix sees all of them at once.
_FUSED = re.compile(
    r"(?:^|\.)(qkv|qkv_proj|Wqkv|c_attn|query_key_value|kv_proj|W_pack|in_proj|in_proj_weight"
    r"|gate_up_proj|kv_a_proj_with_mqa|wi_gate_up)(?:\.|$)"
)
# Keys of config.json, or of a section of it, that hold a number of layers.
LAYER_KEYS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    # Flux has two stacks; the key of the first alone is called `num_layers`
    "num_single_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)


@dataclasses.dataclass(frozen=True)
class UnlistedConfig:
    """The config of a checkpoint that is merged tensor by tensor, by name.

    Attributes:
        file: its name: `config.json`, or `adapter_config.json` of an adapter.
        content: the parsed file; empty where there is none.
        stem: of the names of the weight files, e.g. `model` of `model.safetensors`.
        vocab_size: rows of the tensors in `vocabulary`; 0 where none are known.
        vocabulary: names of the tensors with one row per token.
    """

    file: str
    content: JsonRow
    stem: str
    vocab_size: int = 0
    vocabulary: tuple[str, ...] = ()

    @property
    def is_adapter(self) -> bool:
        """Whether the checkpoint is an adapter of PEFT."""
        return self.stem == "adapter_model"

    @property
    def kind(self) -> str:
        """The type of the model, as its config names it.

        Example:
            >>> UnlistedConfig("config.json", {"model_type": "mamba"}, "model").kind
            'mamba'
        """
        # of transformers, of diffusers, and of timm
        keys = ("peft_type",) if self.is_adapter else ("model_type", "_class_name", "architecture")
        # a single file has no config, so nothing says what it is
        return str(next((self.content[key] for key in keys if self.content.get(key)), "unknown"))


class Place(NamedTuple):
    """Where a tensor stands in a stack of layers.

    Attributes:
        stack: the name up to the number of the layer, e.g. `model.layers`.
        layer: the number.
        rest: the name behind it, e.g. `mlp.up_proj.weight`.
    """

    stack: str
    layer: int
    rest: str


def is_listed(config: JsonRow) -> bool:
    """Return whether the tensor table describes the model of a `config.json`.

    A class of a listed family with other tensors, e.g. `LlamaForSequenceClassification`, is not.

    Example:
        >>> is_listed({"model_type": "llama"}), is_listed({"model_type": "mixtral"})
        (True, False)
        >>> is_listed({"model_type": "qwen2", "architectures": ["Qwen2ForTokenClassification"]})
        False
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        return False
    architectures = config.get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return True
    listed = FAMILIES[name].architecture
    stem = listed.removesuffix("ForCausalLM")
    # Not every other name: fine-tunes rename the class and keep the tensors.
    # `Model` has no head, and stores its tensors without the prefix `model.`.
    return re.fullmatch(rf"{stem}(Model|For(?!CausalLM)\w+)", str(architectures[0])) is None


def find_stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the stacks of layers among the names of tensors, with their numbers of layers.

    Numbers that are no layers are left out: a single one; those with gaps, as in `classifier.0`,
    `classifier.2`; of modules without parts, as in `norms.0.weight`; and those within a layer.

    Example:
        >>> names = ["h.0.mlp.w", "h.1.mlp.w", "h.1.experts.0.up.w", "conv1.w", "head.0.w"]
        >>> find_stacks(names)
        {'h': 2}
    """
    numbers: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        # behind the number a module and its parameter: a number of a leaf is no layer
        for index in range(1, len(parts) - 2):
            if parts[index].isdecimal():
                numbers.setdefault(".".join(parts[:index]), set()).add(int(parts[index]))
    stacks = {
        prefix: len(layers)
        for prefix, layers in numbers.items()
        # one module with a number may be a layer, or the only part of a wrapper
        if len(layers) > 1 and layers == set(range(len(layers)))
    }
    return {
        prefix: count
        for prefix, count in stacks.items()
        # experts are within a layer
        if not any(prefix.startswith(f"{outer}.") for outer in stacks)
    }


def find_place(name: str, stacks: Collection[str]) -> Place | None:
    """Return where a tensor stands in one of some stacks, None for one outside of them.

    Example:
        >>> find_place("model.layers.3.mlp.weight", ["model.layers"])
        Place(stack='model.layers', layer=3, rest='mlp.weight')
    """
    parts = name.split(".")
    # from the left: the number of an expert stands behind that of its layer
    for index in range(1, len(parts) - 1):
        prefix = ".".join(parts[:index])
        if parts[index].isdecimal() and prefix in stacks:
            return Place(prefix, int(parts[index]), ".".join(parts[index + 1 :]))
    return None


def find_vocabulary(
    shapes: Mapping[str, tuple[int, ...]], config: JsonRow, stacks: Collection[str]
) -> tuple[str, ...]:
    """Return the tensors with one row per token, by names in use and the size of the vocabulary.

    Those of the input come first, by name: files of two models may have other orders, and
    safetensors stores `lm_head` before `model.embed_tokens`.

    Args:
        shapes: of all tensors.
        config: the parsed `config.json`, whose sections may hold the size.
        stacks: the stacks of layers, which hold no such tensor.

    Example:
        >>> shapes = {"lm_head.weight": (50, 8), "wte.weight": (50, 8), "wpe.weight": (32, 8)}
        >>> find_vocabulary(shapes, {"vocab_size": 50}, [])
        ('wte.weight', 'lm_head.weight')
    """
    sizes = [value for key, value in _entries(config) if key.split(".")[-1] == "vocab_size"]
    names = (
        name
        for name, shape in shapes.items()
        if shape
        # alone, the names would find a `decoder.weight` of anything
        and shape[0] in sizes
        and (_VOCABULARY.search(name) and find_place(name, stacks) is None)
    )
    return tuple(sorted(names, key=lambda name: (not is_input(name), name)))


def is_input(name: str) -> bool:
    """Return whether a tensor stands before the layers, by names in use.

    Example:
        >>> (
        ...     is_input("model.embed_tokens.weight"),
        ...     is_input("wpe.weight"),
        ...     is_input("lm_head.weight"),
        ... )
        (True, True, False)
    """
    return _INPUT.search(name) is not None and _HEAD.search(name) is None


def fused_modules(names: Iterable[str]) -> list[str]:
    """Return the modules whose matrices hold several projections, by names in use.

    Example:
        >>> fused_modules(["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight", "h.0.mlp.up.weight"])
        ['c_attn']
    """
    return sorted({match[1] for match in map(_FUSED.search, names) if match})


def config_differences(a: JsonRow, b: JsonRow) -> list[tuple[str, JsonValue, JsonValue]]:
    """Return the keys of two configs that have other values, sections spelled with a point.

    Example:
        >>> config_differences({"text": {"heads": 2}}, {"text": {"heads": 4}})
        [('text.heads', 2, 4)]
    """
    first, second = dict(_entries(a)), dict(_entries(b))
    return [
        (key, first.get(key), second.get(key))
        # not a set: messages name the first difference, on every machine the same
        for key in {**first, **second}
        if first.get(key) != second.get(key) and not _is_of_file(key)
    ]


def with_values(config: JsonRow, old: JsonValue, new: JsonValue, keys: Collection[str]) -> Json:
    """Return a config in which some keys have a new value wherever they have the old one.

    Example:
        >>> with_values({"vocab_size": 9, "text": {"vocab_size": 9}}, 9, 10, ["vocab_size"])
        {'vocab_size': 10, 'text': {'vocab_size': 10}}
    """
    return {
        key: with_values(value, old, new, keys)
        if isinstance(value, Mapping)
        # types count: True equals 1
        else (new if key in keys and value == old and type(value) is type(old) else value)
        for key, value in config.items()
    }


def _entries(config: JsonRow, prefix: str = "") -> Iterable[tuple[str, JsonValue]]:
    for key, value in config.items():
        # a config of several parts has one section per part, as `text_config`
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_of_file(key: str) -> bool:
    """Whether a key is of the file and not of the model."""
    # the dtype is compared tensor by tensor
    names = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "_diffusers_version")
    return key.split(".")[-1] in names
