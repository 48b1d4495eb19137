"""Values of a Hugging Face `config.json`: their types, and the windows and ropes that they mean."""

import math
from typing import Final

from jax_ordermerge.arch import rope as ropes
from jax_ordermerge.arch.families import Family
from jax_ordermerge.arch.rope import Rope
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import JsonRow, JsonValue

_SIZES: Final = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
_OPTIONAL_SIZES: Final = ("num_key_value_heads", "head_dim")
_NUMBERS: Final = ("rms_norm_eps", "initializer_range")
_FLAGS: Final = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window")
_TOKEN_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
FULL, SLIDING = ropes.LAYER_TYPES
# Fields that a number of a file fills where it is not null.
_CAPS: Final = ("attention_softcap", "logit_softcap")
# A key of Gemma: the scores are divided by its root.
SQUARED_DIVISOR: Final = "query_pre_attn_scalar"
_MOST_LAYERS: Final = 10_000


def token_ids(value: JsonValue) -> tuple[JsonValue, ...]:
    # Hugging Face writes one id as an int and several as a list.
    return () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)


def check_values(values: JsonRow, family: Family, path: str) -> None:
    """Refuse values of another JSON type, which would fail far from the file."""
    for key in (*_SIZES, *_OPTIONAL_SIZES):
        value = values[key]
        # `type` and not `isinstance`: true is no size
        is_size = type(value) is int and value > 0
        if not is_size and not (key in _OPTIONAL_SIZES and value is None):
            raise UserError(f"{path}: {key} = {value!r}; expected a positive integer")
    # What layers have of their own is listed: a damaged number would take all memory.
    if values["num_hidden_layers"] > _MOST_LAYERS:
        raise UserError(
            f"{path}: num_hidden_layers = {values['num_hidden_layers']}; expected at most"
            f" {_MOST_LAYERS}"
        )
    for key in _NUMBERS:
        if type(values[key]) not in (int, float) or not values[key] >= 0:
            raise UserError(f"{path}: {key} = {values[key]!r}; expected a number")
    for key in family.numbers:
        value, nullable = values[key], family.numbers[key] in _CAPS
        if value is None and nullable:
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            wanted = "a positive number, or null" if nullable else "a positive number"
            raise UserError(f"{path}: {key} = {value!r}; expected {wanted}")
        if key == SQUARED_DIVISOR and value != int(value):
            raise UserError(f"{path}: {key} = {value!r}; expected a whole number")
    for key in _FLAGS:
        # the text "false" is true in Python
        if not isinstance(values[key], bool | None):
            raise UserError(f"{path}: {key} = {values[key]!r}; expected true or false")
    for key in _TOKEN_IDS:
        if any(type(value) is not int for value in token_ids(values[key])):
            raise UserError(f"{path}: {key} = {values[key]!r}; expected a token id, or null")


def read_ropes(
    config: JsonRow, values: JsonRow, family: Family, path: str, ignore: frozenset[str]
) -> tuple[Rope, Rope | None]:
    """Return the rope, and that of layers with a window where the family has it apart."""
    positions, keys = values["max_position_embeddings"], family.rope
    if family.sliding_rope is None:
        return ropes.from_hf(config, positions, path=path, keys=keys, ignore=ignore), None
    return ropes.pair_from_hf(
        config, positions, path=path, keys=keys, sliding_keys=family.sliding_rope, ignore=ignore
    )


def read_no_rope_layers(values: JsonRow, path: str) -> tuple[int, ...]:
    """Return the layers without rope: those with a 0 in `no_rope_layers`."""
    layers: int = values["num_hidden_layers"]
    has_rope, interval = values.get("no_rope_layers"), values.get("no_rope_layer_interval")
    if has_rope is None:
        # the default of transformers
        interval = 4 if interval is None else interval
        if type(interval) is not int or interval < 1:
            raise UserError(
                f"{path}: no_rope_layer_interval = {interval!r}; expected a positive integer"
            )
        return tuple(range(interval - 1, layers, interval))
    # against its name, the key has a 1 where a layer has a rope
    flags = isinstance(has_rope, list | tuple) and all(flag in (0, 1) for flag in has_rope)
    if not flags or len(has_rope) < layers:
        raise UserError(
            f"{path}: no_rope_layers = {has_rope!r}; expected a list of {layers} flags, one per"
            " layer: 1 with a rope, 0 without"
        )
    return tuple(layer for layer in range(layers) if not has_rope[layer])


def check_flags(values: JsonRow, family: Family, path: str) -> None:
    """Refuse options that are set but not read by a family."""
    unread = {
        # the fixed biases of Qwen2 are what `attention_bias` asks for
        "attention_bias": not (family.attention_bias or family.qkv_bias),
        "mlp_bias": not family.mlp_bias,
        "use_sliding_window": family.window != "by_layer",
    }
    for key, is_unread in unread.items():
        if values[key] and is_unread:
            raise UserError(
                f"{path}: {key} = {values[key]!r} is not supported for {values['model_type']}"
            )


def read_windows(values: JsonRow, family: Family, path: str) -> tuple[int | None, tuple[int, ...]]:
    """Return the window, and the layers that see all earlier tokens in spite of it."""
    layers, window, types = (
        values[key] for key in ("num_hidden_layers", "sliding_window", "layer_types")
    )
    by_layer, by_type = family.window == "by_layer", family.window == "by_type"
    if family.window == "none" or (by_layer and not values["use_sliding_window"]):
        window = None
    # positions are int32
    if window is not None and not (type(window) is int and 0 < window < 2**31):
        raise UserError(
            f"{path}: sliding_window = {window!r}; expected a positive integer below 2^31, or null"
        )
    if types is not None and not isinstance(types, list | tuple):
        raise UserError(f"{path}: layer_types = {types!r}; expected a list")
    if types is not None:
        unsupported = sorted({str(kind) for kind in types} - {FULL, SLIDING})
        if unsupported:
            raise UserError(f"{path}: layer_types with {unsupported} is not supported")
        if len(types) != layers:
            raise UserError(f"{path}: layer_types has {len(types)} entries for {layers} layers")
    if by_type and types is None:
        every = values.get(family.interval_key) or family.full_attention_interval
        if type(every) is not int or every < 1:
            raise UserError(
                f"{path}: {family.interval_key} = {every!r}; expected a positive integer"
            )
        types = [SLIDING if (layer + 1) % every else FULL for layer in range(layers)]
    if by_type and window is None and SLIDING in types:
        # transformers takes no such file either
        raise UserError(
            f"{path}: sliding_window = None, but layers of this {values['model_type']} have a"
            f" window; give its size, or layer_types with {FULL} alone"
        )
    # what the other keys say; `layer_types` decides only in families that read it
    if types is None or not (by_layer or by_type) or window is None:
        first = values["max_window_layers"] if by_layer and window is not None else 0
        if type(first) is not int:
            raise UserError(f"{path}: max_window_layers = {first!r}; expected an integer")
        resolved = [FULL if window is None or layer < first else SLIDING for layer in range(layers)]
        if types is not None and list(types) != resolved:
            raise UserError(
                f"{path}: layer_types asks for {' and '.join(sorted(set(types)))}, but by the other"
                f" keys every layer of this {values['model_type']} is {resolved[0]}"
            )
        types = resolved
    return window, tuple(layer for layer, kind in enumerate(types) if kind == FULL)
