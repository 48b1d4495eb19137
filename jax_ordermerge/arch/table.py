"""The tensor table: each tensor of a model is declared once.

Initialization, shardings, conversion, counts and merge units are derived from the table. No other
module spells the Hugging Face name of a tensor.

Axis letters: `L` layer, `D` embed, `F` mlp, `N` heads, `K` kv heads, `H` head dim, `V` vocab.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Final, Literal

from jax_ordermerge.arch.config import ModelConfig
from jax_ordermerge.arch.families import NormPlacement

Init = Literal["normal", "ones", "zeros", "uniform"]
Kind = Literal["embedding", "norm", "attention", "mlp", "head"]


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One entry of the tensor table.

    Attributes:
        path: where the array is in the parameter dict, e.g. `"layers/attention/q/weight"`; see
            `tree.flatten`.
        shape: with the leading `L` axis if stacked.
        axes: a logical axis name for each dimension; see `mesh.RULES`.
        init: initializer: `normal` (std `initializer_range`), `ones`, `zeros`, or, for adapters,
            `uniform` (within 1 / sqrt(last axis)).
        hf_name: the Hugging Face name; `{}` stands for the layer number if stacked.
        kind: the group that merge filters and reports put it in.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    init: Init
    hf_name: str
    kind: Kind

    @property
    def stacked(self) -> bool:
        """Whether the array holds all layers on a leading `L` axis."""
        return self.axes[0] == "layer"

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor, which is the unit of merging."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def is_matrix(self) -> bool:
        """Whether it is neither a norm nor a bias."""
        return len(self.hf_shape) >= 2

    @property
    def is_hidden_matrix(self) -> bool:
        """Whether it is a matrix of a layer: neither norm, bias, embedding nor head."""
        return self.is_matrix and self.kind not in ("embedding", "head")

    def hf_names(self) -> tuple[str, ...]:
        """Return the Hugging Face names in layer order; one name if not stacked."""
        # A stacked array has one Hugging Face tensor per layer: files and merges know no stacks.
        if not self.stacked:
            return (self.hf_name,)
        return tuple(self.hf_name.format(layer) for layer in range(self.shape[0]))


# Path and Hugging Face name of the norms of a layer: before attention, between attention and MLP,
# after the MLP. `post_attention_layernorm` is the norm before the MLP in Llama, and that of the
# output of attention elsewhere.
_Norms = dict[str, str]
_INPUT: Final = {"input_norm": "input_layernorm"}
_OUTPUTS: Final = (
    {"attention_output_norm": "post_attention_layernorm"},
    {"mlp_output_norm": "post_feedforward_layernorm"},
)
_NORMS: Final[dict[NormPlacement, tuple[_Norms, _Norms, _Norms]]] = {
    "before": (_INPUT, {"post_norm": "post_attention_layernorm"}, {}),
    "after": ({}, *_OUTPUTS),
    "both": (_INPUT, _OUTPUTS[0] | {"post_norm": "pre_feedforward_layernorm"}, _OUTPUTS[1]),
}


def tensor_table(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Return every tensor of a model, in the order of the forward pass.

    Args:
        config: the model.

    Returns:
        A `TensorSpec` per tensor: path in the parameter dict, shape (layers are stacked on a
        leading axis `L`), logical axes, initializer and Hugging Face names.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> spec = tensor_table(config)[2]
        >>> spec.path, spec.shape, spec.hf_names()[1]
        ('layers/attention/q/weight', (2, 8, 8), 'model.layers.1.self_attn.q_proj.weight')
    """
    D, V, H = config.hidden_size, config.vocab_size, config.head_dim
    # An axis is a pair of size and logical name, so that a shape and its sharding cannot diverge.
    embed, mlp = (D, "embed"), (config.intermediate_size, "mlp")
    heads = (config.num_heads * H, "heads")
    kv_heads = (config.num_kv_heads * H, "kv_heads")
    qkv_bias, output_bias, mlp_bias = config.qkv_bias, config.output_bias, config.mlp_bias
    input_norms, norms_between, output_norms = (
        [_norm(config, path, D, hf_name) for path, hf_name in names.items()]
        for names in _NORMS[config.norm_placement]
    )
    # q, k and v, and gate and up, are fused only where the files have them so: a merge treats each
    # Hugging Face tensor on its own, and in a fused matrix their norms and thresholds mix.
    if config.fused_projections:
        # The rows of q, k and v are divided as one axis, which cuts across heads where `tensor`
        # divides it; the compiler moves what a device lacks.
        rows = (heads[0] + 2 * kv_heads[0], "heads")
        qkv = [*_linear(config, "attention/qkv", "self_attn.qkv_proj", rows, embed, bias=qkv_bias)]
        both = (2 * mlp[0], "mlp")
        gate_up = [*_linear(config, "mlp/gate_up", "mlp.gate_up_proj", both, embed, bias=mlp_bias)]
    else:
        qkv = [
            *_linear(config, "attention/q", "self_attn.q_proj", heads, embed, bias=qkv_bias),
            *_linear(config, "attention/k", "self_attn.k_proj", kv_heads, embed, bias=qkv_bias),
            *_linear(config, "attention/v", "self_attn.v_proj", kv_heads, embed, bias=qkv_bias),
        ]
        gate_up = [
            *_linear(config, "mlp/gate", "mlp.gate_proj", mlp, embed, bias=mlp_bias),
            *_linear(config, "mlp/up", "mlp.up_proj", mlp, embed, bias=mlp_bias),
        ]
    specs = [
        _single("embed", (V, D), ("vocab", "embed"), "normal", "model.embed_tokens", "embedding"),
        *input_norms,
        *qkv,
    ]
    if config.qk_norm != "none":
        q_width, k_width = (H, H) if config.qk_norm == "per_head" else (heads[0], kv_heads[0])
        specs += [
            _norm(config, "attention/q_norm", q_width, "self_attn.q_norm"),
            _norm(config, "attention/k_norm", k_width, "self_attn.k_norm"),
        ]
    specs += [
        *_linear(config, "attention/o", "self_attn.o_proj", embed, heads, bias=output_bias),
        *norms_between,
        *gate_up,
        *_linear(config, "mlp/down", "mlp.down_proj", embed, mlp, bias=mlp_bias),
        *output_norms,
        _single("norm", (D,), ("norm",), _norm_init(config), "model.norm", "norm"),
    ]
    # a tied head is the embedding: it is no tensor of its own, in memory or in files
    if not config.tie_embeddings:
        specs.append(_single("head", (V, D), ("vocab", "embed"), "normal", "lm_head", "head"))
    return tuple(specs)


def _single(
    path: str, shape: tuple[int, ...], axes: tuple[str, ...], init: Init, hf: str, kind: Kind
) -> TensorSpec:
    return TensorSpec(f"{path}/weight", shape, axes, init, f"{hf}.weight", kind)


def _norm(config: ModelConfig, path: str, width: int, hf: str) -> TensorSpec:
    # Norms are small and read by every device: the logical axis `norm` is never divided.
    shape, hf_name = (config.num_layers, width), f"model.layers.{{}}.{hf}.weight"
    axes, init = ("layer", "norm"), _norm_init(config)
    return TensorSpec(f"layers/{path}/weight", shape, axes, init, hf_name, "norm")


def _norm_init(config: ModelConfig) -> Init:
    # a new norm multiplies by 1
    return "zeros" if config.norm_offset == 1 else "ones"


def _linear(
    config: ModelConfig,
    path: str,
    hf: str,
    out_axis: tuple[int, str],
    in_axis: tuple[int, str],
    *,
    bias: bool,
) -> Iterator[TensorSpec]:
    """Yield weight and bias of a linear layer; each axis is (size, logical name)."""
    shape = (config.num_layers, out_axis[0], in_axis[0])
    axes = ("layer", out_axis[1], in_axis[1])
    path, hf = f"layers/{path}", f"model.layers.{{}}.{hf}"
    # Hugging Face matrices are [out, in]; memory keeps this layout, so conversion copies bytes
    kind: Kind = "mlp" if path.startswith("layers/mlp") else "attention"
    yield TensorSpec(f"{path}/weight", shape, axes, "normal", f"{hf}.weight", kind)
    if bias:
        # a bias is divided as the output of its matrix is, so adding it needs no collective
        yield TensorSpec(f"{path}/bias", shape[:2], axes[:2], "zeros", f"{hf}.bias", kind)


def hf_tensors(config: ModelConfig) -> Iterator[tuple[str, TensorSpec, int | None]]:
    """Yield `(hf_name, spec, layer)` for every Hugging Face tensor, layer by layer.

    `layer` is None for tensors that are not stacked.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [name for name, _, layer in hf_tensors(config) if layer is None]
        ['model.embed_tokens.weight', 'model.norm.weight', 'lm_head.weight']
    """
    table = tensor_table(config)
    # Embedding, layers, norm, head: the order in which Hugging Face writes them, and a forward pass
    # reads them.
    first_stacked = next(index for index, spec in enumerate(table) if spec.stacked)
    yield from ((spec.hf_name, spec, None) for spec in table[:first_stacked])
    stacked = [spec for spec in table if spec.stacked]
    for layer in range(config.num_layers):
        yield from ((spec.hf_name.format(layer), spec, layer) for spec in stacked)
    yield from ((spec.hf_name, spec, None) for spec in table[first_stacked:] if not spec.stacked)


def parameter_count(config: ModelConfig) -> int:
    """Return the number of parameters; a tied head is not counted twice.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> parameter_count(config)
        1832
    """
    return sum(math.prod(spec.shape) for spec in tensor_table(config))
