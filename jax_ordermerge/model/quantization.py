"""Weights in 8 or 4 bits: codes, and one float32 scale per block of the input axis.

w[o, i] is stored as the code whose value times the scale of its block is nearest:

    int8   codes -127 .. 127, scale = max |w| / 127
    int4   codes -7 .. 7, scale = max |w| / 7
    nf4    16 quantiles of a normal distribution within ±1, scale = max |w|

In the parameter dict a quantized weight has, in place of `weight`, an entry by the name of its
format, and `scale` beside it: the dict says itself how it is read. Codes of 4 bits lie two in a
byte, those of the first half of a block in the low bits.

Axis letters: `O` output, `I` input, `C` blocks of the input axis.

Source: Dettmers et al. 2023 (QLoRA), https://arxiv.org/abs/2305.14314, appendix E for nf4. Values
are chosen by qwix, https://github.com/google/qwix.
"""

import importlib.util
from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ordermerge import tree
from jax_ordermerge.errors import UserError

SCALE: Final = "scale"

# Table of NF4 in QLoRA, appendix E, as its implementation has it in float32.
NF4: Final = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def _decode_nf4(codes: jax.Array) -> jax.Array:
    # Four rounds of selects halve the table by one bit each. A lookup is no vector operation on TPU
    # and CPU: on a CPU it took three times as long.
    values = [jnp.full(codes.shape, value, jnp.float32) for value in NF4]
    for bit in range(4):
        is_set = (codes >> bit) & 1 == 1
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [jnp.where(is_set, high, low) for low, high in pairs]
    return values[0]


def _decode_int4(codes: jax.Array) -> jax.Array:
    # two's complement of 4 bits
    return (codes ^ 8).astype(jnp.float32) - 8


class Format(NamedTuple):
    """How the codes of a weight are stored.

    Attributes:
        dtype: of an element of the stored array.
        per_byte: codes in it.
        decode: from codes, unsigned where there are two in a byte, to values in float32.
        calibration: of qwix, which takes the range of a block from it.
    """

    dtype: str
    per_byte: int
    decode: Callable[[jax.Array], jax.Array]
    calibration: str = "absmax"


# By name, which is also qwix's. By default qwix scales the largest weight of a block to 127.5 or
# 7.5, halfway between two codes, where the last digit of a division decides which one is stored,
# and devices may differ in that digit.
FORMATS: Final[dict[str, Format]] = {
    "int8": Format("int8", 1, lambda codes: codes.astype(jnp.float32), f"absmax,{127.5 / 127!r}"),
    "int4": Format("uint8", 2, _decode_int4, f"absmax,{7.5 / 7!r}"),
    "nf4": Format("uint8", 2, _decode_nf4),
}


def check_installed(setting: str) -> None:
    """Require the package that chooses the codes.

    Args:
        setting: what asks for it, for the message.

    Raises:
        UserError: it is not installed.

    Example:
        >>> check_installed("lora.base_dtype = nf4")
    """
    # asked without importing, which takes a second
    if importlib.util.find_spec("qwix") is None:
        raise UserError(
            f"{setting} needs the package qwix, which is not installed:"
            " pip install 'jax_ordermerge[quant]'"
        )


def quantize(weight: jax.Array, name: str, block: int) -> tuple[jax.Array, jax.Array]:
    """Return the codes of a weight as they are stored, and the scales.

    Args:
        weight: float32[..., O, I].
        name: of the format.
        block: elements of the input axis that share a scale; it divides I.

    Returns:
        codes [..., O, I] (with two codes per byte [..., O, I / 2]), scales float32[..., O, C].

    Raises:
        UserError: see `check_installed`.

    Example:
        >>> codes, scale = quantize(jnp.array([[0.9, -2.0, 0.5, 0.1]]), "int8", 2)
        >>> codes.tolist(), [round(127 * x, 3) for x in scale[0].tolist()]
        ([[57, -127, 127, 25]], [2.0, 0.5])
    """
    check_installed(name)
    import qwix  # an extra, and only training with a quantized base needs it

    last, form = weight.ndim - 1, FORMATS[name]
    quantized = qwix.quantize(
        weight.astype(jnp.float32),
        name,
        channelwise_axes=range(last),
        tiled_axes={last: block},
        calibration_method=form.calibration,
    )
    codes = quantized.qvalue
    if form.per_byte == 2:
        # the low bits of a negative code are those of its two's complement
        halves = codes.astype(jnp.uint8).reshape(*weight.shape[:-1], -1, 2, block // 2) & 15
        codes = (halves[..., 0, :] | halves[..., 1, :] << 4).reshape(*weight.shape[:-1], -1)
    return codes.astype(form.dtype), quantized.scale


def dequantize(codes: jax.Array, scale: jax.Array, name: str, dtype: DTypeLike) -> jax.Array:
    """Return a weight from its codes and scales, rounded once to `dtype`.

    Example:
        >>> codes, scale = quantize(jnp.array([[1.0, -2.0, 0.5, 0.1]]), "nf4", 4)
        >>> [round(w, 3) for w in dequantize(codes, scale, "nf4", "float32")[0].tolist()]
        [0.881, -2.0, 0.492, 0.159]
    """
    # Not `qwix.dequantize`: it looks nf4 up over one flat axis, which a mesh cannot divide as it
    # divides the weight, and every device would hold all of it. The tests hold it to these bits.
    blocks = codes.reshape(*scale.shape, -1)
    decode = FORMATS[name].decode
    if FORMATS[name].per_byte == 2:
        # Decoded before they are joined: joined first, XLA on CPU takes four times as long.
        values = jnp.concatenate([decode(blocks & 15), decode(blocks >> 4)], -1)
    else:
        values = decode(blocks)
    return (values * scale[..., None]).reshape(*codes.shape[:-1], -1).astype(dtype)


def stored_format(entries: Iterable[str]) -> str | None:
    """Return the format of a weight by the names of its entries; None where it is not quantized.

    Example:
        >>> stored_format({"nf4": 0, "scale": 0}), stored_format({"weight": 0, "bias": 0})
        ('nf4', None)
    """
    return next((name for name in entries if name in FORMATS), None)


def dense(params: tree.Tree, dtype: DTypeLike = jnp.float32) -> tree.Tree:
    """Return a parameter dict in which no weight is quantized; the others are as they were.

    Example:
        >>> codes, scale = quantize(jnp.array([[1.0, -2.0]]), "int8", 2)
        >>> params = {"norm": {"weight": jnp.ones(2)}, "up": {"int8": codes, "scale": scale}}
        >>> [round(w, 3) for w in dense(params)["up"]["weight"][0].tolist()]
        [1.008, -2.0]
    """
    name = stored_format(params)
    if name is not None:
        unchanged = {key: value for key, value in params.items() if key not in (name, SCALE)}
        return {"weight": dequantize(params[name], params[SCALE], name, dtype), **unchanged}
    return {
        key: dense(value, dtype) if isinstance(value, dict) else value
        for key, value in params.items()
    }
