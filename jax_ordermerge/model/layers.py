"""Norm, linear layer and embedding of the Llama family, in two forms of the same program.

Axis letters as in `llama.py`, and `O` output, `I` input of a linear layer, `R` a row of `[B, T]`.
"""

import functools
import math
from typing import Final, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_ordermerge import mesh as meshes
from jax_ordermerge.model import quantization

# How a program is written. Both forms compute the same, and differ in the order of sums.
#
# `flat`: products over rows [B T, I]. With two contracted axes in the gradient of the weight, XLA
# on CPU copies the whole transposed gradient of the output.
# `by_head`: products [B, T, I] to [B, T, N, H]. The kernels of accelerators take heads, and XLA
# would turn the flat output for them in memory: for a 7B model on v5p four times the copies.
# There, too, what devices exchange costs time: tables are divided, and gathered once per step.
Form = Literal["flat", "by_head"]
# Name of an adapted output for rematerialization policies.
ADAPTED: Final = "adapted"


def choose_form(mesh: Mesh) -> Form:
    """Return the form of a program for the devices of a mesh, which may be described only.

    Example:
        >>> choose_form(meshes.make_mesh())
        'flat'
    """
    return "flat" if meshes.platform(mesh) == "cpu" else "by_head"


class Norm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last `axes` axes, in float32.

    The weight counts from `offset`, and the result is divided by `divisor` before it is rounded to
    `dtype`.
    """

    epsilon: float
    dtype: DTypeLike
    axes: int = 1
    offset: float = 0.0
    divisor: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape, axes = x.shape[-self.axes :], tuple(range(-self.axes, 0))
        weight = self.param("weight", nn.initializers.ones, (math.prod(shape),)).reshape(shape)
        # in float32: in bfloat16 a small weight would vanish beside the 1
        weight = weight if self.offset == 0 else weight.astype(jnp.float32) + self.offset
        # bfloat16 has 8 significant bits: a mean of squares over D would be off in the third digit
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=axes, keepdims=True) + self.epsilon)
        # broadcast by name: the tests raise on implicit rank promotion, which hides wrong axes
        x = x * jnp.broadcast_to(weight, x.shape)
        return (x if self.divisor == 1 else x / self.divisor).astype(self.dtype)


def scaled(x: jax.Array, factor: float) -> jax.Array:
    """Return x times a factor, rounded once; a factor of 1 adds no operation.

    Example:
        >>> scaled(jnp.ones(2, "bfloat16"), 0.5).tolist()
        [0.5, 0.5]
    """
    # float32 first: in bfloat16 the factor would be rounded too, which torch does not do
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """Return cap tanh(x / cap): x where it is small, and never more than the cap; None is no cap.

    Example:
        >>> capped(jnp.array([0.0, 5000.0]), 50.0).tolist()
        [0.0, 50.0]
    """
    return x if cap is None else jnp.tanh(x / cap) * cap


def project(x_BTI: jax.Array, weight_OI: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x weight^T over flat rows, with one output axis.

    Example:
        >>> project(jnp.ones((1, 3, 2)), jnp.ones((4, 2)), "float32").shape
        (1, 3, 4)
    """
    x_RI = x_BTI.reshape(-1, x_BTI.shape[-1])
    y_RO = jnp.einsum("RI,OI->RO", x_RI, weight_OI, preferred_element_type=dtype)
    return y_RO.reshape(*x_BTI.shape[:-1], weight_OI.shape[0])


def _project_by_head(
    x: jax.Array, weight_OI: jax.Array, dtype: DTypeLike, outputs: tuple[int, ...]
) -> jax.Array:
    """Contract all axes of x [B, T, ...] but two; the outputs get axes of their own."""
    weight = weight_OI.reshape(*outputs, *x.shape[2:])
    contracted = tuple(range(2, x.ndim)), tuple(range(len(outputs), weight.ndim))
    return jax.lax.dot_general(x, weight, (contracted, ((), ())), preferred_element_type=dtype)


# The gradient of a weight contracts the rows of two arrays, and XLA on TPU writes the first of them
# again in another layout. Where jax differentiates, that is the gradient of the output: of q, k, v,
# gate and up. Here it is x, which these share.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _project_embed(x_BTD: jax.Array, weight: jax.Array, dtype: DTypeLike, axis: str) -> jax.Array:
    """Contract `D` of x and of a weight [..., D], whose other axes together are the logical `axis`.

    The weight has its axes before it comes here. XLA does not merge two collectives: if forward
    and backward pass split it each for themselves, it would be gathered for each.
    """
    contracted = (2,), (weight.ndim - 1,)
    return jax.lax.dot_general(x_BTD, weight, (contracted, ((), ())), preferred_element_type=dtype)


def _project_embed_forward(
    x_BTD: jax.Array, weight: jax.Array, dtype: DTypeLike, axis: str
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project_embed(x_BTD, weight, dtype, axis), (x_BTD, weight)


def _project_embed_backward(
    dtype: DTypeLike, axis: str, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTD, weight = saved
    outputs = tuple(range(2, grad.ndim)), tuple(range(weight.ndim - 1))
    grad_BTD = jax.lax.dot_general(grad, weight, (outputs, ((), ())), preferred_element_type=dtype)
    rows = (0, 1), (0, 1)
    grad_DO = jax.lax.dot_general(x_BTD, grad, (rows, ((), ())), preferred_element_type=dtype)
    grad_DO = meshes.constrain(grad_DO.reshape(x_BTD.shape[2], -1), "embed", axis)
    # without the barrier XLA joins product and transposition
    return grad_BTD, jax.lax.optimization_barrier(grad_DO).T.reshape(weight.shape)


_project_embed.defvjp(_project_embed_forward, _project_embed_backward)


class _QuantizedProduct(NamedTuple):
    """What is static in a product with a quantized weight.

    Attributes:
        format: of the weight, see `quantization`.
        axes: logical axes of the weight.
        inputs, outputs: axes behind `B` and `T` of x and of the product.
        dtype, form: as in `Linear`.
    """

    format: str
    axes: tuple[str, str]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    dtype: DTypeLike
    form: Form


# A weight that is only read has no gradient, but the backward pass multiplies by it. Where jax
# differentiates, the dense weight of each layer would be saved for that: all of the dense base.
# Here codes and scales are, which the scan over layers has anyway.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _project_quantized(
    x: jax.Array, codes: jax.Array, scale: jax.Array, product: _QuantizedProduct
) -> jax.Array:
    """Return the product of x [B, T, *inputs] with a quantized weight, [B, T, *outputs]."""
    weight_OI = _dequantize(codes, scale, product)
    if product.form == "flat":
        return project(x, weight_OI, product.dtype)
    return _project_by_head(x, weight_OI, product.dtype, product.outputs)


def _project_quantized_forward(
    x: jax.Array, codes: jax.Array, scale: jax.Array, product: _QuantizedProduct
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _project_quantized(x, codes, scale, product), (codes, scale)


def _project_quantized_backward(
    product: _QuantizedProduct, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None, None]:
    weight_OI = _dequantize(*saved, product)
    if product.form == "flat":
        grad_RO = grad.reshape(-1, weight_OI.shape[0])
        grad_x = jnp.einsum("RO,OI->RI", grad_RO, weight_OI, preferred_element_type=product.dtype)
        return grad_x.reshape(*grad.shape[:2], *product.inputs), None, None
    weight = weight_OI.reshape(*product.outputs, *product.inputs)
    outputs = tuple(range(2, grad.ndim)), tuple(range(len(product.outputs)))
    grad_x = jax.lax.dot_general(
        grad, weight, (outputs, ((), ())), preferred_element_type=product.dtype
    )
    return grad_x, None, None


_project_quantized.defvjp(_project_quantized_forward, _project_quantized_backward)


def _dequantize(codes: jax.Array, scale: jax.Array, product: _QuantizedProduct) -> jax.Array:
    # Codes are gathered over `fsdp`, and not the dense weight, which is two to four times as large.
    gathered = [None if axis == "embed" else axis for axis in product.axes]
    codes, scale = (meshes.constrain(array, *gathered) for array in (codes, scale))
    return quantization.dequantize(codes, scale, product.format, product.dtype)


class Linear(nn.Module):
    """x weight^T (+ bias) with weight `[out, in]`, and + (x lora_a^T) lora_b^T with an adapter.

    x is [B, T, ...] and the result [B, T, *outputs]: the axes behind `T` are the factors of `in`
    and `out`, such as heads and head dim. An adapter is two more entries of the parameter dict,
    `lora_a` and `lora_b`, beside the weight. A quantized weight is two entries in its place, see
    `quantization`; it is dense only here, and has no gradient.

    `axes` are the logical axes of the weight in the tensor table.
    """

    outputs: tuple[int, ...]
    axes: tuple[str, str]
    bias: bool
    dtype: DTypeLike
    form: Form

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        B, T = x.shape[:2]
        features = math.prod(self.outputs)
        outputs = self.outputs
        if self.form == "flat":
            x, outputs = x.reshape(B, T, -1), (features,)
        name = quantization.stored_format(self.variables.get("params", ()))
        if name is None:
            shape = features, math.prod(x.shape[2:])
            weight = self.param("weight", nn.initializers.zeros, shape)
            y = self._product(x, weight.astype(self.dtype), outputs, self.axes)
        else:
            stored = (self.get_variable("params", key) for key in (name, quantization.SCALE))
            product = _QuantizedProduct(
                name, self.axes, x.shape[2:], outputs, self.dtype, self.form
            )
            y = _project_quantized(x, *stored, product)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (features,))
            y = y + bias.astype(self.dtype).reshape(outputs)[None, None]
        if self.has_variable("params", "lora_a"):
            a = self.get_variable("params", "lora_a").astype(self.dtype)
            b = self.get_variable("params", "lora_b").astype(self.dtype)
            change = self._product(self._product(x, a, a.shape[:1]), b, outputs)
            y = checkpoint_name(y + change, ADAPTED)
        return y.reshape(B, T, *self.outputs)

    def _product(
        self,
        x: jax.Array,
        weight_OI: jax.Array,
        outputs: tuple[int, ...],
        axes: tuple[str, str] | None = None,
    ) -> jax.Array:
        if self.form == "flat":
            return project(x, weight_OI, self.dtype)
        if axes is not None and axes[1] == "embed":
            weight = weight_OI.reshape(*outputs, x.shape[2])
            return _project_embed(x, weight, self.dtype, axes[0])
        if axes is not None:
            # and its gradient, which XLA divided otherwise in the loop and moved behind it
            weight_OI = meshes.constrain(weight_OI, *axes)
        return _project_by_head(x, weight_OI, self.dtype, outputs)


class Embedding(nn.Module):
    """A `[V, D]` table."""

    vocab_size: int
    hidden_size: int
    dtype: DTypeLike
    form: Form

    def setup(self) -> None:
        self.weight = self.param(
            "weight", nn.initializers.zeros, (self.vocab_size, self.hidden_size)
        )

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        # The whole vocabulary on every device: XLA's partitioner crashes on a lookup in a table
        # that `order`, `fsdp` and `tensor` all divide.
        if self.form == "flat":
            table_VD = meshes.constrain(self.weight.astype(self.dtype), None, "looked_up")
            x_BTD = jnp.take(table_VD, tokens_BT, axis=0)
        else:
            # Each device looks up its columns for the tokens of all, and the devices exchange
            # them. A table that is gathered instead has a gradient that is scattered from all
            # tokens of the global batch on every device: 16 GiB for 7B on 256 chips.
            # In float32, as the gradient of the lookup adds up the rows of equal tokens one by one:
            # in bfloat16 the sum would stay where a row is below its last digit, of ones at 256.
            table_VD = meshes.constrain(self.weight, None, "embed")
            tokens_BT = meshes.constrain(tokens_BT, "replica", "length")
            x_BTD = jnp.take(table_VD, tokens_BT, axis=0).astype(self.dtype)
            x_BTD = meshes.constrain(x_BTD, "replica", "length", "embed")
        return meshes.constrain(x_BTD, "batch", "length", None)
