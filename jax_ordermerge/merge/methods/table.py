"""The table of merge methods, the check of their parameters, and the one way a tensor is merged.

Each module of this package that defines a method registers it here. The parameters of a method are
the keyword-only arguments of its `prepare` function: the signature is the schema. Arguments that
`functools.partial` binds are not parameters.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.typing import DTypeLike

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.hash_rng import random_bits, round_stochastically
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.merge.methods.parameters import FLOAT32_MAX, quantize
from jax_ordermerge.merge.methods.parts import (
    InMemoryTensor,
    Part,
    Prepared,
    Static,
    round_models,
    round_to,
    split_static,
)
from jax_ordermerge.registry import Registry

Parameters = JsonRow
Unit = Literal["element", "row", "tensor"]


class Choice(NamedTuple):
    """The members that a method with `needs="validation"` merges.

    Attributes:
        members: their numbers, in the order in which they are merged.
        losses: the validation loss after each step of the search, for the record.
    """

    members: tuple[int, ...]
    losses: list[float]


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        prepare: `(tensor, **parameters) -> dict`, on the host: what `apply` needs to know of the
            tensor as a whole (see `parts`).
        apply: `(part, **prepared) -> [*s]`, pure, on the device.
        reference: where the equation stands.
        needs_base: whether the method needs the base, given its parameters.
        weights: "none": the method takes no weights; "sum": they are used as they are; "mean":
            they are divided by their sum; "probabilities": members are drawn with them.
        members: the least and the largest number of members.
        unit: what a part may be, given the parameters: any run of elements, a run of rows, or only
            the tensor as a whole.
        workspace: bytes of host memory per element of a tensor that `apply` needs beside the
            models, given their number.
        draws: name of the stream of random numbers, "" for a method that draws none.
        exact: the result consists of bits of the inputs, without any arithmetic on them.
        needs: the kind of data that the method needs beside the models, supplied by
            `experiment.data_dependent`. "fisher": the M models are followed by the diagonals of
            their M Fisher matrices. "validation": `choose` picks the members by losses on
            validation data.
        choose: `(losses, loss_of) -> Choice`, for "validation": the loss of each member, and a
            function from numbers of members to the loss of their merge.
        check: `(parameters, members, weights)`: raises `UserError` for what does not go together.
        count_redrawn: for diagnostics: a function of `(part, weights, **parameters)` that counts
            the elements drawn again, or None where the parameters redraw none.
    """

    prepare: Callable[..., Prepared]
    apply: Callable[..., jax.Array]
    reference: str
    needs_base: Callable[[Parameters], bool] = lambda parameters: True
    weights: Literal["none", "sum", "mean", "probabilities"] = "sum"
    members: tuple[int, float] = (1, math.inf)
    unit: Callable[[Parameters], Unit] = lambda parameters: "element"
    workspace: Callable[[int], int] = lambda members: 0
    draws: str = ""
    exact: bool = False
    needs: str | None = None
    choose: Callable[[Sequence[float], Callable[[Sequence[int]], float]], Choice] | None = None
    check: Callable[[Parameters, int, np.ndarray | None], None] = lambda *checked: None
    count_redrawn: Callable[[Parameters], Callable[..., jax.Array] | None] = lambda parameters: None


# Filled by the modules of this package, which the table imports when it is first read. This module
# imports none of them, so that each of them may import it. A method is data: engine, population,
# recipes and command line read this table alone.
METHODS = Registry[Method]("merge method", "jax_ordermerge.merge.methods")


# ----------------------------------------------------------------------------------------- checks


def check_parameters(name: str, parameters: Parameters | None = None) -> Json:
    """Return the parameters of a method with every default filled in.

    Each is checked alone; `check_weights` checks that they go together.

    Args:
        name: of the method.
        parameters: by name.

    Raises:
        UserError: the method or a parameter is unknown (the message names the nearest), or a value
            has the wrong type or is out of range.

    Example:
        >>> check_parameters("ties", {"density": 0.5})
        {'density': 0.5, 'scale': 1.0, 'normalize': True, 'rescale': 'none'}
        >>> check_parameters("ties", {"densty": 0.5})
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: merge method ties has no parameter 'densty' \
(did you mean 'density'?)
    """
    schema = _schema(METHODS[name].prepare)
    # Before pydantic, whose message would not name the nearest.
    for key in parameters or {}:
        if key not in schema.model_fields:
            names = parameter_names(name)
            hint = did_you_mean(str(key), names) if names else "; it takes none"
            raise UserError(f"merge method {name} has no parameter '{key}'{hint}")
    try:
        return schema.model_validate(dict(parameters or {})).model_dump()
    except pydantic.ValidationError as error:
        raise UserError(f"merge method {name}: {_describe(error)}") from error


def parameter_names(name: str) -> list[str]:
    """Return the names of the parameters that a method takes.

    Example:
        >>> parameter_names("task_arithmetic")
        ['scale', 'normalize']
    """
    return list(_schema(METHODS[name].prepare).model_fields)


@functools.cache
def _schema(prepare: Callable[..., Prepared]) -> type[pydantic.BaseModel]:
    # cached, since a recipe checks the parameters of every tensor, and the model is slow to build
    # `functools.partial` makes several methods of one function; what it binds is no parameter.
    function, bound = prepare, {}
    if isinstance(prepare, functools.partial):
        function, bound = prepare.func, prepare.keywords
    # with the extras: the bounds of the values stand in `Annotated`
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key: (hints[key], ... if field.default is inspect.Parameter.empty else field.default)
        for key, field in inspect.signature(function).parameters.items()
        if field.kind is inspect.Parameter.KEYWORD_ONLY and key not in bound
    }
    # strict: a text such as "0.5" or "false" in a config is a mistake, not a number or a switch
    config = pydantic.ConfigDict(extra="forbid", strict=True)
    return pydantic.create_model("Parameters", __config__=config, **fields)


def _describe(error: pydantic.ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    if first["type"] == "missing":
        return f"the parameter {first['loc'][0]} must be given"
    # A parameter of several types has one problem for each of them. In a list, only what is wrong
    # with its first wrong number counts: that a list is no number helps nobody.
    problems = [problem for problem in problems if problem["loc"][0] == first["loc"][0]]
    first = max(problems, key=lambda problem: len(problem["loc"]))
    expected = [
        problem["msg"][0].lower() + problem["msg"][1:]
        for problem in problems
        if problem["loc"][2:] == first["loc"][2:]
    ]
    return f"{first['loc'][0]} = {first['input']!r}: {' or '.join(expected)}"


def refuse_weights(name: str, weights: Sequence[float] | None) -> None:
    """Refuse weights for a method that takes none.

    Raises:
        UserError: the method takes no weights, and some were given.
    """
    if weights is not None and METHODS[name].weights == "none":
        values = [float(weight) for weight in weights]
        raise UserError(
            f"merge method {name} takes no weights, {values} were given; leave them out"
        )


def check_weights(
    name: str, weights: Sequence[float] | None, members: int, parameters: Parameters | None = None
) -> np.ndarray | None:
    """Return the weights as float64[M], or None for the default.

    Args:
        name: of the method.
        weights: one per member, or None.
        members: the number of members.
        parameters: from `check_parameters`. They are checked to go with each other, with the
            weights and with the number of members. `normalize: false` allows any sum of weights.

    Raises:
        UserError: there are too few or too many members; or the method takes no weights, their
            number is not that of the members, or a value is not allowed; or parameters do not go
            together.

    Example:
        >>> check_weights("average", (1, 3), 2).tolist()
        [1.0, 3.0]
    """
    method = METHODS[name]
    low, high = method.members
    if not low <= members <= high:
        expected = f"{low} to {high}"
        if low == high:
            expected = f"{low}"
        elif high == math.inf:
            expected = f"at least {low}"
        raise UserError(f"merge method {name} takes {expected} models, {members} were given")
    refuse_weights(name, weights)
    # None and no list of ones: the defaults differ, 1 or 1/M by method
    checked = None if weights is None else _read_weights(name, weights, members, parameters)
    for key, value in (parameters or {}).items():
        if isinstance(value, list) and len(value) != members:
            raise UserError(
                f"merge method {name}: {key} = {value}: give one number for all of the {members}"
                " members, or one per member"
            )
    if parameters is not None:
        # last: it may assume that each value alone is right
        method.check(parameters, members, checked)
    return checked


def _read_weights(
    name: str, weights: Sequence[float], members: int, parameters: Parameters | None
) -> np.ndarray:
    method, values = METHODS[name], [float(weight) for weight in weights]
    # not cut or repeated: which member a weight belongs to would be a guess
    if len(values) != members:
        raise UserError(
            f"merge method {name}: {len(values)} weights for {members} members; give one per member"
        )
    if not all(abs(value) <= FLOAT32_MAX for value in values):
        raise UserError(f"merge method {name}: weights {values} must be finite numbers in float32")
    if method.weights == "probabilities":
        quantize(values)  # raises where they are none
    divided = method.weights == "mean" and (parameters or {}).get("normalize", True)
    # mergekit divides by a sum of zero: infinities in the files, and exit code 0
    if divided and sum(values) <= 0:
        raise UserError(f"merge method {name}: weights {values} must have a positive sum")
    return np.asarray(values, np.float64)


def refuse_data_dependent(name: str) -> None:
    """Refuse a method that needs data, for a merge of models alone.

    Raises:
        UserError: the method needs data.
    """
    needs = METHODS[name].needs
    if needs is not None:
        # of models alone `fisher` would take half of them for the diagonals of the others
        what = "gradients of training examples" if needs == "fisher" else f"{needs} data"
        raise UserError(
            f"merge method {name} needs {what}, which a merge of models alone does not have: "
            "add it to merge.methods of an experiment, for `ordermerge run`"
        )


# ---------------------------------------------------------------------------------------- merging


def key_bits(
    name: str, parameters: Parameters, seed: int, hf_name: str, layer: int | None
) -> np.ndarray:
    """Return the random key of one Hugging Face tensor as uint32[2].

    The stream is `(seed, draws, hf_name)`, with `draws` of the method's row: "select" or "drop".
    For granularity "layer" it is `(seed, draws, "layer", number)`: the tensors of a layer then make
    the same choice. Tensors outside the layers still have one stream each.

    Example:
        >>> parameters = check_parameters("selection", {"granularity": "layer"})
        >>> first, second = (
        ...     key_bits("selection", parameters, 0, hf_name, 3) for hf_name in ("a", "b")
        ... )
        >>> (first == second).all()
        np.True_
    """
    draws = METHODS[name].draws
    if not draws:  # a key all the same, so that all methods have the same arguments
        return np.zeros(2, np.uint32)
    if parameters.get("granularity") == "layer" and layer is not None:
        return rng.stream_key_bits(seed, draws, "layer", layer)
    return rng.stream_key_bits(seed, draws, hf_name)


def merge_part(
    part: Part,
    prepared: Mapping[str, Any],
    rounding: jax.Array | None = None,
    *,
    method: str,
    static: Static,
    dtype: DTypeLike,
    out: DTypeLike | None = None,
) -> jax.Array:
    """Merge a part: round the models to `dtype`, compute in float32, round once to `out`.

    Pure. Files and populations are both merged here, hence to the same bits.

    Args:
        part: of one Hugging Face tensor.
        prepared: the arrays that the method's `prepare` returned, see `parts.split_static`.
        rounding: uint32[2], the key of stochastic rounding to bfloat16. None rounds to nearest
            even.
        method: selects the program, as do all arguments below.
        static: the other values that `prepare` returned.
        dtype: what is merged.
        out: dtype of the result, `dtype` by default.

    Returns:
        [*s] in `out`.
    """
    # the models as they would be exported: a merge of files sees no other values
    merged = METHODS[method].apply(round_models(part, dtype), **prepared, **dict(static))
    # a method that moves bits returns `dtype`; where that is bfloat16 nothing is left to round
    if rounding is not None and merged.dtype == jnp.float32 and (out or dtype) == jnp.bfloat16:
        return round_stochastically(merged, random_bits(rounding, part.indices()))
    return round_to(merged, out or dtype)


# The method is named by a string and its choices by a tuple, which jit can compare. Numbers of a
# recipe vary by layer; they are arrays, so that no value of them compiles again.
merge_part_jit = jax.jit(merge_part, static_argnames=("method", "static", "dtype", "out"))


def merge_tensor(
    name: str,
    members: Sequence[jax.Array],
    *,
    base: jax.Array | None = None,
    weights: Sequence[float] | None = None,
    key_bits: np.ndarray | None = None,
    dtype: DTypeLike = jnp.float32,
    **parameters: JsonValue,
) -> jax.Array:
    """Merge one Hugging Face tensor that lies in memory.

    Args:
        name: of the method.
        members: M arrays [*S], or one [M, *S].
        base: [*S].
        weights: one per member.
        key_bits: uint32[2], the random key (see `key_bits`).
        dtype: models are rounded to it first, and the result is stored in it.
        parameters: of the method.

    Returns:
        [*S] in `dtype`.

    Example:
        >>> merge_tensor(
        ...     "average", [jnp.array([1.0, 2.0]), jnp.array([3.0, 6.0])], weights=(3, 1)
        ... ).tolist()
        [1.5, 3.0]
        >>> merge_tensor(
        ...     "ties", jnp.array([[1.0, 3.0], [2.0, -1.0]]), base=jnp.zeros(2), density=1.0
        ... ).tolist()
        [1.5, 3.0]
    """
    checked = check_parameters(name, parameters)
    # before `prepare` as well, which must measure the numbers that `apply` merges
    models = [round_to(jnp.asarray(member), dtype) for member in members]
    if base is not None:
        # an unused base would be read and moved for nothing
        needs_base = METHODS[name].needs_base(checked)
        base = round_to(jnp.asarray(base), dtype) if needs_base else None
    checked_weights = check_weights(name, weights, len(models), checked)
    tensor = InMemoryTensor(models, base, weights=checked_weights, key_bits=key_bits)
    arrays, static = split_static(METHODS[name].prepare(tensor, **checked))
    return merge_part_jit(tensor.part, arrays, method=name, static=static, dtype=jnp.dtype(dtype))
