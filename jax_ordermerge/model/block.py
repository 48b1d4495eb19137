"""One layer of a decoder: attention and MLP with their norms.

Axis letters as in `llama.py`.
"""

import functools
from collections.abc import Sequence
from typing import Final, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.model.attention import Tokens, attend
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.model.layers import Form, Linear, Norm, scaled
from jax_ordermerge.model.rope import Rotation, rotate

# Gemma was trained with the approximation by tanh: the exact GELU would be another model.
_ACTIVATIONS = {"silu": nn.silu, "gelu_tanh": functools.partial(nn.gelu, approximate=True)}
# Name of the input of a layer for rematerialization policies.
LAYER_INPUT: Final = "layer_input"
KeysValues = Sequence[jax.Array] | None


class LayerInputs(NamedTuple):
    """Inputs that all layers share: tokens, rotations by rope, the cache slot to write."""

    queries: Tokens
    keys: Tokens
    rotations: tuple[Rotation, ...]
    start: jax.Array


class PerLayer(NamedTuple):
    """In what a layer differs from the others of a scan, [L] of all; None where none differs.

    Attributes:
        has_window: whether it has the window.
        rotation: index of its rotation in `LayerInputs.rotations`.
    """

    has_window: jax.Array | None = None
    rotation: jax.Array | None = None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions, over the cache where there is one.

    `window` is that of this layer, or of those that have one where scanned layers differ.
    `last_only` computes the last query alone: in the last layer of a prompt no other is needed.
    """

    config: ModelConfig
    dtype: DTypeLike
    window: int | None
    kernel: Kernel = "xla"
    last_only: bool = False
    form: Form = "flat"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kv: KeysValues,
        shared: LayerInputs,
        layer: PerLayer,
    ) -> tuple[jax.Array, KeysValues]:
        c, D = self.config, x_BTD.shape[-1]
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        rotation = _select(shared.rotations, layer.rotation)
        query_inputs = x_BTD, shared.queries, rotation
        if self.last_only:
            query_inputs = jax.tree.map(last, query_inputs)
        x_q_BTD, queries, query_rotation = query_inputs
        settings = c.qkv_bias, self.dtype, self.form
        if c.fused_projections:
            qkv = Linear((N + 2 * K, H), ("heads", "embed"), *settings, name="qkv")(x_BTD)
            # Why not three products with slices of the weight? An adapter is of the whole, and
            # devices that divide its rows would exchange weights in place of results.
            q, k, v = jnp.split(qkv, [N, N + K], axis=2)
            q = last(q) if self.last_only else q
        else:
            q = Linear((N, H), ("heads", "embed"), *settings, name="q")(x_q_BTD)
            k = Linear((K, H), ("kv_heads", "embed"), *settings, name="k")(x_BTD)
            v = Linear((K, H), ("kv_heads", "embed"), *settings, name="v")(x_BTD)
        if c.qk_norm != "none":  # before the rotation
            axes = 1 if c.qk_norm == "per_head" else 2
            q = norm(c, self.dtype, name="q_norm", axes=axes)(q)
            k = norm(c, self.dtype, name="k_norm", axes=axes)(k)
        # Queries are divided over `length`, keys are not: each device attends from its own
        # positions to all of them (context parallel).
        q = meshes.constrain(rotate(q, *query_rotation), "batch", "length", "heads", None)
        k = meshes.constrain(rotate(k, *rotation), "batch", None, "kv_heads", None)
        v = meshes.constrain(v, "batch", None, "kv_heads", None)
        if kv is not None:
            kv = _update(kv[0], k, shared.start), _update(kv[1], v, shared.start)
            # attention transposes them back, and the compiler drops both transposes
            k, v = (x_BKSH.transpose(0, 2, 1, 3) for x_BKSH in kv)
        # the kernels of accelerators need queries and keys of the same tokens
        kernel: Kernel = self.kernel if kv is None else "xla"
        attention = functools.partial(
            attend, scale=c.attention_scale, softcap=c.attention_softcap, kernel=kernel
        )
        windowed = functools.partial(attention, window=self.window)
        inputs = q, k, v, queries, shared.keys
        if layer.has_window is None:
            mixed = windowed(*inputs)
        else:
            # Why not one mask with a traced window? The window is a constant of every kernel, and
            # one that is known leaves out the blocks before it.
            mixed = jax.lax.cond(layer.has_window, windowed, attention, *inputs)
        settings = c.output_bias, self.dtype, self.form
        return Linear((D,), ("embed", "heads"), *settings, name="o")(mixed), kv


def norm(
    config: ModelConfig,
    dtype: DTypeLike,
    *,
    name: str | None = None,
    axes: int = 1,
    divisor: float = 1.0,
) -> Norm:
    """Return a norm of the model; see `layers.Norm`."""
    return Norm(config.rms_norm_eps, dtype, axes, config.norm_offset, divisor, name=name)


def _select(rotations: Sequence[Rotation], index: jax.Array | None) -> Rotation:
    # one rope for all layers of the scan, so there is nothing to choose
    if index is None:
        (rotation,) = rotations
        return rotation
    return Rotation(*(jax.lax.select_n(index, *arrays) for arrays in zip(*rotations, strict=True)))


def last(x_BT: jax.Array) -> jax.Array:
    """Return the last position of each row, [B, 1, ...]."""
    return x_BT[:, -1:]


def _update(cache_BKSH: jax.Array, new_BTKH: jax.Array, start: jax.Array) -> jax.Array:
    new_BKTH = new_BTKH.transpose(0, 2, 1, 3).astype(cache_BKSH.dtype)
    return jax.lax.dynamic_update_slice(cache_BKSH, new_BKTH, (0, 0, start, 0))


class MLP(nn.Module):
    """down(f(gate(x)) * up(x)) with the activation f."""

    config: ModelConfig
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        settings = c.mlp_bias, self.dtype, self.form
        F, axes = c.intermediate_size, ("mlp", "embed")
        if c.fused_projections:
            # one product as for q, k and v, for the same reasons
            both_BTF = Linear((2 * F,), axes, *settings, name="gate_up")(x_BTD)
            gate_BTF, up_BTF = jnp.split(both_BTF, 2, axis=-1)
        else:
            gate_BTF = Linear((F,), axes, *settings, name="gate")(x_BTD)
            up_BTF = Linear((F,), axes, *settings, name="up")(x_BTD)
        hidden_BTF = _ACTIVATIONS[c.activation](gate_BTF) * up_BTF
        hidden_BTF = meshes.constrain(hidden_BTF, "batch", "length", "mlp")
        outer = (c.hidden_size,), ("embed", "mlp")
        return Linear(*outer, *settings, name="down")(hidden_BTF)


class Block(nn.Module):
    """One layer: attention and MLP, each added to the residual stream.

    Norms are before the two (`input_norm`, `post_norm`), after them (`attention_output_norm`,
    `mlp_output_norm`), or both, by `norm_placement`.
    """

    config: ModelConfig
    dtype: DTypeLike
    window: int | None
    kernel: Kernel = "xla"
    last_only: bool = False
    form: Form = "flat"

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        kv: KeysValues,
        shared: LayerInputs,
        layer: PerLayer,
    ) -> tuple[jax.Array, KeysValues]:
        c = self.config
        x_BTD = checkpoint_name(x_BTD, LAYER_INPUT)
        attention = Attention(
            c, self.dtype, self.window, self.kernel, self.last_only, self.form, name="attention"
        )
        normed_BTD = self._before("input_norm", x_BTD)
        change_BTD, kv = attention(normed_BTD, kv, shared, layer)
        change_BTD = self._after("attention_output_norm", change_BTD)
        x_BTD = (last(x_BTD) if self.last_only else x_BTD) + change_BTD
        x_BTD = meshes.constrain(x_BTD, "batch", "length", None)
        normed_BTD = self._before("post_norm", x_BTD)
        change_BTD = MLP(c, self.dtype, self.form, name="mlp")(normed_BTD)
        change_BTD = self._after("mlp_output_norm", change_BTD)
        return meshes.constrain(x_BTD + change_BTD, "batch", "length", None), kv

    def _before(self, name: str, x_BTD: jax.Array) -> jax.Array:
        if self.config.norm_placement == "after":
            return x_BTD
        return norm(self.config, self.dtype, name=name)(x_BTD)

    def _after(self, name: str, change_BTD: jax.Array) -> jax.Array:
        if self.config.norm_placement != "before":
            change_BTD = norm(self.config, self.dtype, name=name)(change_BTD)
        # after the norm, which would undo a scale
        return scaled(change_BTD, self.config.residual_scale)
