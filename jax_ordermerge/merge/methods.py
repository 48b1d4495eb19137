"""The table of merge methods, the check of their parameters, and the one way a kernel is called.

A method's parameters are the keyword-only arguments of its kernel: the signature is the schema.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.typing import DTypeLike

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge import average, select, sparsify

Parameters = Mapping[str, Any]
Unit = Literal["element", "row", "tensor"]
_NOT_PARAMETERS = ("base", "weights", "key", "offset")


@dataclass(frozen=True)
class Method:
    """One entry of the table.

    Attributes:
        function: the kernel `(members[M, *S], *, base, weights, key, **parameters) -> [*S]`.
        needs_base: whether parameters ask for the base.
        needs_key: whether the kernel draws; its key is named by the Hugging Face tensor, or by the layer where the parameter
            granularity is "layer" (see `key_words`).
        unit: the smallest part of a tensor that can be computed alone (slabs of elements, of rows, or the tensor only).
        weights: "mean" are divided by their sum, "sum" are used as they are, "probabilities" are drawn from.
        reference: where the equation stands.
    """

    function: Callable[..., jax.Array]
    needs_base: Callable[[Parameters], bool]
    needs_key: bool
    unit: Callable[[Parameters], Unit]
    weights: Literal["mean", "sum", "probabilities"]
    reference: str


def _always(_: Parameters) -> bool:
    return True


def _never(_: Parameters) -> bool:
    return False


def _element(_: Parameters) -> Unit:
    return "element"


def _tensor(_: Parameters) -> Unit:
    return "tensor"


def _select_unit(parameters: Parameters) -> Unit:
    granularity = parameters["granularity"]
    return granularity if granularity in ("element", "row") else "tensor"


def _resamples(parameters: Parameters) -> bool:
    return bool(parameters["resample"] != 0)


def _dare_unit(parameters: Parameters) -> Unit:
    return "tensor" if parameters["rescale"] == "norm" else "element"


METHODS: dict[str, Method] = {
    "average": Method(average.average, _never, False, _element, "mean", "arXiv 2203.05482, uniform soup"),
    "task_arithmetic": Method(average.task_arithmetic, _always, False, _element, "sum", "arXiv 2212.04089, section 2"),
    "selection": Method(select.select, _resamples, True, _select_unit, "probabilities", "arXiv 2410.03743"),
    "ties": Method(sparsify.ties, _always, False, _tensor, "sum", "arXiv 2306.01708, algorithm 1"),
    "dare_linear": Method(sparsify.dare_linear, _always, True, _dare_unit, "sum", "arXiv 2311.03099, equations 1 to 3"),
    "dare_ties": Method(sparsify.dare_ties, _always, True, _dare_unit, "sum", "arXiv 2311.03099 with 2306.01708"),
}


def check(name: str, parameters: Parameters | None = None) -> dict[str, Any]:
    """Return a method's parameters with every default filled in.

    Raises:
        UserError: the method or a parameter is unknown (the nearest is named), of the wrong type or out of range.

    Example:
        >>> check("ties", {"density": 0.5})
        {'density': 0.5, 'scale': 1.0, 'normalize': True}
        >>> check("ties", {"densty": 0.5})
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: merge method ties has no parameter 'densty' (did you mean 'density'?)
    """
    schema = _schema(name)
    given = dict(parameters or {})
    for key in given:
        if key not in schema.model_fields:
            known = list(schema.model_fields)
            hint = did_you_mean(str(key), known) if known else "; it takes none"
            raise UserError(f"merge method {name} has no parameter '{key}'{hint}")
    try:
        checked = schema.model_validate(given).model_dump()
    except pydantic.ValidationError as error:
        raise UserError(f"merge method {name}: {_expected(error)}") from error
    if checked.get("granularity") == "layer" and checked["resample"] != 0:
        raise UserError(
            "merge method selection: resample with granularity layer is not offered, since a layer is never wholly at the base;"
            " give resample: 0 or granularity: tensor"
        )
    return checked


@functools.cache
def _schema(name: str) -> type[pydantic.BaseModel]:
    if name not in METHODS:
        raise UserError(f"unknown merge method '{name}'{did_you_mean(name, METHODS)}")
    function = METHODS[name].function
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], parameter.default)
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key not in _NOT_PARAMETERS
    }
    return pydantic.create_model(name, __config__=pydantic.ConfigDict(extra="forbid", strict=True), **fields)


def _expected(error: pydantic.ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    same = [item for item in problems if item["loc"][0] == first["loc"][0]]
    return f"{first['loc'][0]} = {first['input']!r}: {' or '.join(item['msg'][0].lower() + item['msg'][1:] for item in same)}"


def check_weights(name: str, weights: Sequence[float] | None, members: int) -> np.ndarray | None:
    """Return the weights as a kernel takes them: float32[M], quantized uint32[M] for selection, or None for the default.

    Raises:
        UserError: not one weight a member, a weight is not finite, or (mean, probabilities) the sum is not positive.

    Example:
        >>> check_weights("selection", (1, 3), 2).tolist(), check_weights("average", (1, 3), 2).tolist()
        ([16384, 49152], [1.0, 3.0])
    """
    kind = METHODS[name].weights
    if weights is None:
        return select.quantize(np.ones(members)) if kind == "probabilities" else None
    given = [float(w) for w in weights]
    if len(given) != members:
        raise UserError(f"merge method {name}: {len(given)} weights for {members} members; give one a member")
    if not all(math.isfinite(w) for w in given):
        raise UserError(f"merge method {name}: weights {given} must be finite numbers")
    if kind == "probabilities":
        return select.quantize(given)
    if kind == "mean" and sum(given) <= 0:
        raise UserError(f"merge method {name}: weights {given} must have a positive sum")
    return np.asarray(given, np.float32)


def key_words(name: str, parameters: Parameters, seed: int, hf_name: str, layer: int | None) -> np.ndarray:
    """Return the key of one Hugging Face tensor as uint32[2].

    The stream is `(seed, method, hf_name)` with "select" for selection and "drop" for DARE; for granularity "layer" it is
    `(seed, "select", "layer", number)`, so that the tensors of a layer choose alike, and those outside the layers are named alone.

    Example:
        >>> parameters = check("selection", {"granularity": "layer"})
        >>> first, second = (key_words("selection", parameters, 0, hf_name, 3) for hf_name in ("a", "b"))
        >>> (first == second).all()
        np.True_
    """
    if not METHODS[name].needs_key:
        return np.zeros(2, np.uint32)
    if parameters.get("granularity") == "layer" and layer is not None:
        return rng.stream_words(seed, "select", "layer", layer)
    return rng.stream_words(seed, "select" if name == "selection" else "drop", hf_name)


def apply(
    members: jax.Array | Sequence[jax.Array],
    base: jax.Array | None,
    weights: jax.Array | None,
    words: jax.Array,
    offset: jax.Array | None = None,
    *,
    method: str,
    parameters: tuple[tuple[str, Any], ...],
    dtype: DTypeLike,
) -> jax.Array:
    """Merge one Hugging Face tensor, or a slab of it: cast to `dtype`, call the kernel, round once to `dtype`.

    Pure; `run` is the same under jit. Everything that merges (files, population) goes through here.

    Args:
        members: [M, *S], or M arrays [*S].
        base: [*S] if the method needs it.
        weights: as `check_weights` returns them.
        words: uint32[2], see `key_words`.
        offset: uint32[2], number of the slab's first unit (element or row).
        method, parameters, dtype: static; `parameters` are the items of what `check` returns.

    Returns:
        [*S] in `dtype`.

    Example:
        >>> apply([jnp.ones(2), jnp.zeros(2)], None, None, jnp.zeros(2), method="average", parameters=(), dtype="bfloat16").tolist()
        [0.5, 0.5]
    """
    entry, arguments = METHODS[method], dict(parameters)
    stacked = members if isinstance(members, jax.Array) else _stack(members, entry.weights == "probabilities")
    stacked = as_stored(stacked, dtype)
    if entry.needs_key:
        arguments["key"] = jax.random.wrap_key_data(words, impl="threefry2x32")
        arguments["offset"] = offset
    if base is not None and entry.needs_base(arguments):
        arguments["base"] = as_stored(base, dtype)
    return entry.function(stacked, weights=weights, **arguments).astype(dtype)


run = functools.partial(jax.jit, static_argnames=("method", "parameters", "dtype"))(apply)


def _stack(members: Sequence[jax.Array], exact: bool) -> jax.Array:
    if not exact:
        return jnp.stack(members)
    # as integers: even stacking bfloat16 may quiet a NaN on CPU, and XLA cancels the bitcasts against those of the selection
    return jax.lax.bitcast_convert_type(jnp.stack([select.to_bits(one) for one in members]), members[0].dtype)


def as_stored(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Round to the dtype that would be exported, for certain.

    Example:
        >>> as_stored(jnp.array([1.001]), "bfloat16").tolist()
        [1.0]
    """
    if x.dtype == jnp.dtype(dtype):
        return x
    # without the barrier XLA may keep excess precision: it drops a cast to bfloat16 that is followed by one back to float32
    return jax.lax.optimization_barrier(x.astype(dtype))
