"""`ModelConfig`: the shape and mathematics of a model, from and to a Hugging Face config."""

import dataclasses
from collections.abc import Iterable

from jax_ordermerge.arch import rope as ropes
from jax_ordermerge.arch.families import (
    ACTIVATIONS,
    DEFAULTS,
    FAMILIES,
    Activation,
    Family,
    NormPlacement,
    QkNorm,
)
from jax_ordermerge.arch.hf_keys import check_keys
from jax_ordermerge.arch.hf_values import (
    FULL,
    SLIDING,
    SQUARED_DIVISOR,
    check_flags,
    check_values,
    read_no_rope_layers,
    read_ropes,
    read_windows,
    token_ids,
)
from jax_ordermerge.arch.rope import Rope
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape and mathematics of a decoder model.

    It is hashable, so it can be a static argument of `jax.jit`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> config.head_dim, config.num_kv_heads
        (4, 2)
    """

    family: str = "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    # 0 and not None: `__post_init__` fills both in, so readers always see an int.
    num_kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope: Rope = dataclasses.field(default_factory=Rope)
    sliding_rope: Rope | None = None  # of the layers with a window; None: `rope`
    sliding_window: int | None = None
    # Layers that see all earlier tokens although there is a window. Numbers and not a flag per
    # layer: a model of some other depth keeps them.
    full_attention_layers: tuple[int, ...] = ()
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    # Whether q, k and v are one matrix, and gate and up are one.
    fused_projections: bool = False
    qk_norm: QkNorm = "none"
    norm_placement: NormPlacement = "before"
    no_rope_layers: tuple[int, ...] = ()
    norm_offset: float = 0.0  # what the weight of a norm counts from
    activation: Activation = "silu"
    # Factors of the embeddings (None: sqrt(hidden_size), rounded to the compute dtype), of what a
    # block adds to the residual stream, and of the scores of attention (None: 1 / sqrt(head_dim));
    # the divisor of the logits.
    embedding_scale: float | None = 1.0
    residual_scale: float = 1.0
    attention_scale: float | None = None
    logit_divisor: float = 1.0
    # Soft caps: x becomes cap tanh(x / cap).
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    # A tuple, because a list would make the config unhashable; chat models have several.
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        FAMILIES[self.family]  # refuses an unknown family
        # `object.__setattr__`, because the dataclass is frozen
        if not self.head_dim:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        # Grouped-query attention reshapes heads to [kv heads, group], which needs equal groups.
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"{self.num_heads} attention heads cannot share {self.num_kv_heads} kv heads;"
                " heads must be a multiple"
            )
        # One spelling of each model, because configs are compared: no window where no layer has it.
        windowed = set(range(self.num_layers)) - set(self.full_attention_layers)
        window = self.sliding_window if windowed else None
        full = () if window is None else set(range(self.num_layers)) - windowed
        object.__setattr__(self, "sliding_window", window)
        object.__setattr__(self, "full_attention_layers", tuple(sorted(full)))
        without_rope = set(self.no_rope_layers) & set(range(self.num_layers))
        object.__setattr__(self, "no_rope_layers", tuple(sorted(without_rope)))
        # and no second rope where no layer would turn otherwise
        if window is None or self.sliding_rope == self.rope:
            object.__setattr__(self, "sliding_rope", None)
        pairs = self.rope.turning(self.head_dim) / 2
        for factors in (self.rope.short_factor, self.rope.long_factor):
            if factors and len(factors) != pairs:
                raise UserError(
                    f"longrope has {len(factors)} factors for {pairs:g} pairs of dimensions that"
                    " turn; it needs one per pair"
                )
        if self.attention_scale == self.head_dim**-0.5:
            object.__setattr__(self, "attention_scale", None)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: how many keys back a query sees; None is all.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32,
            ...     hidden_size=8,
            ...     intermediate_size=16,
            ...     num_layers=3,
            ...     num_heads=2,
            ...     sliding_window=4,
            ...     full_attention_layers=(0,),
            ... )
            >>> config.windows
            (None, 4, 4)
        """
        full = self.full_attention_layers
        return tuple(
            None if layer in full else self.sliding_window for layer in range(self.num_layers)
        )

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """The rope of each layer; None is none."""
        sliding = self.sliding_rope or self.rope
        ropes = (self.rope if window is None else sliding for window in self.windows)
        without = self.no_rope_layers
        return tuple(None if layer in without else rope for layer, rope in enumerate(ropes))

    @property
    def context_length(self) -> int:
        """How many positions the model reads: those of its files, extended by its rope."""
        if FAMILIES[self.family].rope.counts_extended:
            return self.max_position_embeddings
        return self.rope.extend(self.max_position_embeddings)

    @classmethod
    def from_hf(
        cls, config: JsonRow, ignore: Iterable[str] = (), path: str = "config.json"
    ) -> "ModelConfig":
        """Read the dict of a `config.json`. A key that it lacks means what transformers takes.

        Args:
            config: the parsed file, written by any transformers from 4.3x to 5.x.
            ignore: keys to ignore although they are unknown.
            path: of the file, for messages.

        Raises:
            UserError: a key is unknown, or changes the model in a way that is not supported.

        Example:
            >>> ModelConfig.from_hf({"model_type": "llama", "hidden_act": "gelu"})
            Traceback (most recent call last):
            ...
            jax_ordermerge.errors.UserError: config.json: hidden_act = 'gelu' is not supported
            (supported: 'silu', 'swish')
        """
        name = config.get("model_type")
        if not isinstance(name, str) or name not in FAMILIES:
            raise UserError(
                f"{path}: model_type = {name!r} is not supported (supported: {', '.join(FAMILIES)})"
            )
        family, ignore = FAMILIES[name], frozenset(ignore)
        # Before any value is read: an unsupported option must not be hidden by a missing key.
        check_keys(config, ignore, path, family.keys, family.must_be)
        values = {**DEFAULTS, **family.defaults, **config}
        check_values(values, family, path)
        check_flags(values, family, path)
        window, full_attention_layers = read_windows(values, family, path)
        rope, sliding_rope = read_ropes(config, values, family, path, ignore)
        bias = bool(values["attention_bias"]) and family.attention_bias
        return cls(
            family=name,
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            num_kv_heads=values["num_key_value_heads"] or 0,
            head_dim=values["head_dim"] or 0,
            max_position_embeddings=values["max_position_embeddings"],
            rms_norm_eps=values["rms_norm_eps"],
            rope=rope,
            sliding_rope=sliding_rope,
            sliding_window=window,
            full_attention_layers=full_attention_layers,
            qkv_bias=bias or family.qkv_bias,
            # `attention_bias` covers all four matrices. The fixed biases of Qwen2 are of q, k and v
            # alone.
            output_bias=bias,
            mlp_bias=bool(values["mlp_bias"]),
            qk_norm=family.qk_norm,
            norm_placement=family.norm_placement,
            no_rope_layers=read_no_rope_layers(values, path) if family.no_rope_layers else (),
            **{
                field: values[key] ** -0.5 if key == SQUARED_DIVISOR else values[key]
                for key, field in family.numbers.items()
            },
            **family.fields,
            tie_embeddings=bool(values["tie_word_embeddings"]),
            bos_token_id=values["bos_token_id"],
            eos_token_ids=token_ids(values["eos_token_id"]),
            pad_token_id=values["pad_token_id"],
            initializer_range=values["initializer_range"],
        )

    def with_ends(self, ends: Iterable[int]) -> "ModelConfig":
        """Return this config with further end-of-sequence tokens before its own.

        Some readers know one end only and take the first. So ends that a fine-tune has learned go
        before those of its base, unless the base has all of them.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32,
            ...     hidden_size=8,
            ...     intermediate_size=16,
            ...     num_layers=2,
            ...     num_heads=2,
            ...     eos_token_ids=(1, 2),
            ... )
            >>> config.with_ends([2]).eos_token_ids, config.with_ends([2, 5]).eos_token_ids
            ((1, 2), (2, 5, 1))
        """
        ends = tuple(ends)
        if set(ends) <= set(self.eos_token_ids):
            return self
        return dataclasses.replace(
            self, eos_token_ids=tuple(dict.fromkeys((*ends, *self.eos_token_ids)))
        )

    def to_hf(self, dtype: str) -> Json:
        """Return a `config.json` that transformers 4 and 5, vLLM, SGLang and llama.cpp read alike.

        Args:
            dtype: dtype of the tensors beside the file, e.g. `"bfloat16"`.

        Example:
            >>> config = ModelConfig(
            ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
            ... )
            >>> ModelConfig.from_hf(config.to_hf("float32")) == config
            True
        """
        family = FAMILIES[self.family]
        eos = self.eos_token_ids
        # Keys that a family of transformers does not know are left out of its file.
        optional: Json = {}
        if family.attention_bias:
            optional["attention_bias"] = self.output_bias
        if family.mlp_bias:
            optional["mlp_bias"] = self.mlp_bias
        if family.no_rope_layers:
            # transformers marks the layers that have a rope
            optional["no_rope_layers"] = [int(rope is not None) for rope in self.layer_ropes]
        for key, field in family.numbers.items():
            optional[key] = getattr(self, field)
            if field == "attention_scale":
                # a whole number again: the config class of transformers takes no other
                scale = self.attention_scale or self.head_dim**-0.5
                optional[key] = round(scale**-2) if key == SQUARED_DIVISOR else scale
        sliding_rope = None
        if family.sliding_rope is not None:
            # No other rope than the default one is read there. The file has it also where no layer
            # has a window.
            sliding_rope = self.sliding_rope or Rope(theta=self.rope.theta)
        return {
            "architectures": [family.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            # Always written: where it is absent, readers assume hidden_size / heads, wrong for
            # Qwen3.
            "head_dim": self.head_dim,
            # `check_keys` lets no other activation of a family through.
            family.activation_key: ACTIVATIONS[self.activation][0],
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            **ropes.to_hf(
                self.rope,
                sliding_rope,
                family.rope,
                self.max_position_embeddings,
                family.sliding_rope,
            ),
            "tie_word_embeddings": self.tie_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos),
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
            # transformers 5 reads `dtype`, transformers 4 reads `torch_dtype`.
            "dtype": dtype,
            "torch_dtype": dtype,
            **optional,
            **self._windows_to_hf(family),
        }

    def _windows_to_hf(self, family: Family) -> Json:
        window, windows = self.sliding_window, self.windows
        if family.window == "none":
            return {}
        if family.window == "all":
            return {"sliding_window": window}
        types = [FULL if window is None else SLIDING for window in windows]
        if family.window == "by_type":
            # transformers reads the window also where no layer has it
            window = DEFAULTS["sliding_window"] if window is None else window
            return {"sliding_window": window, "layer_types": types}
        if window is None:
            return {"use_sliding_window": False}
        return {
            "use_sliding_window": True,
            "sliding_window": window,
            # the form of transformers before 4.53, which has no `layer_types`
            "max_window_layers": windows.index(window),
            "layer_types": types,
        }
