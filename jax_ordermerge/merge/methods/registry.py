"""The table of merge methods, the check of their parameters, and the one way a tensor is merged.

A method's parameters are the keyword-only arguments of its `known` function: the signature is the schema.
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
from jax_ordermerge.hash_rng import random_words, round_stochastically
from jax_ordermerge.merge.methods import average, masks, selection, sparsify, spherical
from jax_ordermerge.merge.methods.parts import (
    InMemoryTensor,
    Part,
    Tensor,
    as_stored,
    split,
    stored,
)

Parameters = Mapping[str, Any]
Unit = Literal["element", "row", "tensor"]
Static = tuple[tuple[str, Any], ...]


def _always(_: Parameters) -> bool:
    return True


def _never(_: Parameters) -> bool:
    return False


def _element(_: Parameters) -> Unit:
    return "element"


@dataclass(frozen=True)
class Method:
    """One entry of the table.

    Attributes:
        known: `(tensor, **parameters) -> dict`, on the host: what of the whole tensor its parts must know (see `parts`).
        part: `(part, **known) -> [*s]`, pure, on the device.
        reference: where the equation stands.
        needs_base: whether parameters ask for the base.
        draws: names the stream of its random numbers, "" for none.
        unit: what a part may be: any run of elements, a run of whole rows, or the tensor only.
        weights: "mean" are divided by their sum, "sum" are used as they are, "probabilities" are drawn from.
        exact: the result is bits of the inputs and no arithmetic on them.
        members: how many members it takes at least and at most.
    """

    known: Callable[..., dict[str, Any]]
    part: Callable[..., jax.Array]
    reference: str
    needs_base: Callable[[Parameters], bool] = _always
    draws: str = ""
    unit: Callable[[Parameters], Unit] = _element
    weights: Literal["mean", "sum", "probabilities"] = "sum"
    exact: bool = False
    members: tuple[int, float] = (1, math.inf)


def _row(_: Parameters) -> Unit:
    return "row"


def _select_unit(parameters: Parameters) -> Unit:
    granularity = parameters["granularity"]
    return granularity if granularity in ("element", "row") else "tensor"


def _resamples(parameters: Parameters) -> bool:
    return bool(parameters["resample"] != 0)


def _of_task_vectors(parameters: Parameters) -> bool:
    return bool(parameters["of"] == "task_vectors")


def _vector_unit(parameters: Parameters) -> Unit:
    """A direction of the whole tensor is found in advance; rows are found in a part, and columns need all rows."""
    unit: dict[str, Unit] = {"tensor": "element", "row": "row", "column": "tensor"}
    return unit[parameters["granularity"]]


METHODS: dict[str, Method] = {
    "average": Method(
        average.average,
        average.average_part,
        "arXiv 2203.05482, uniform soup",
        needs_base=_never,
        weights="mean",
    ),
    "task_arithmetic": Method(
        average.task_arithmetic, average.task_arithmetic_part, "arXiv 2212.04089, section 2"
    ),
    "norm_matched": Method(
        average.norm_matched,
        average.task_arithmetic_part,
        "the average at the members' length",
        weights="mean",
    ),
    "lambda_matched": Method(
        average.lambda_matched,
        average.task_arithmetic_part,
        "the average at the length of a selection",
        draws="select",
        weights="probabilities",
    ),
    "fisher": Method(
        average.fisher,
        average.fisher_part,
        "arXiv 2111.09832, equation 5",
        needs_base=_never,
        members=(2, math.inf),
    ),
    "slerp": Method(
        spherical.slerp,
        average.linear_part,
        "Shoemake, SIGGRAPH 1985",
        needs_base=_never,
        members=(2, 2),
    ),
    "nuslerp": Method(
        spherical.nuslerp,
        spherical.nuslerp_part,
        "mergekit",
        needs_base=_of_task_vectors,
        unit=_vector_unit,
        members=(2, 2),
    ),
    "multislerp": Method(
        spherical.multislerp,
        average.linear_part,
        "mergekit",
        needs_base=_of_task_vectors,
        weights="mean",
    ),
    "karcher": Method(
        spherical.karcher,
        average.linear_part,
        "Karcher, CPAM 30 (1977)",
        needs_base=_of_task_vectors,
        weights="mean",
    ),
    "model_stock": Method(
        spherical.model_stock,
        spherical.model_stock_part,
        "arXiv 2403.19522",
        unit=_vector_unit,
        members=(2, math.inf),
    ),
    "selection": Method(
        selection.selection,
        selection.selection_part,
        "arXiv 2410.03743",
        needs_base=_resamples,
        draws="select",
        unit=_select_unit,
        weights="probabilities",
        exact=True,
    ),
    "ties": Method(sparsify.ties, sparsify.generalized_part, "arXiv 2306.01708, algorithm 1"),
    "dare_linear": Method(
        sparsify.dare_linear,
        sparsify.generalized_part,
        "arXiv 2311.03099, equations 1 to 3",
        draws="drop",
    ),
    "dare_ties": Method(
        sparsify.dare_ties,
        sparsify.generalized_part,
        "arXiv 2311.03099 with 2306.01708",
        draws="drop",
    ),
    "breadcrumbs": Method(sparsify.breadcrumbs, sparsify.generalized_part, "arXiv 2312.06795"),
    "breadcrumbs_ties": Method(
        sparsify.breadcrumbs_ties, sparsify.generalized_part, "arXiv 2312.06795 with 2306.01708"
    ),
    "della": Method(
        sparsify.della, sparsify.generalized_part, "arXiv 2406.11617", draws="drop", unit=_row
    ),
    "della_linear": Method(
        sparsify.della_linear,
        sparsify.generalized_part,
        "arXiv 2406.11617 without election",
        draws="drop",
        unit=_row,
    ),
    "sce": Method(masks.sce, masks.sce_part, "arXiv 2408.07990"),
    "ram": Method(masks.ram, masks.ram_part, "arXiv 2601.13572"),
    "ramplus_tl": Method(masks.ramplus_tl, masks.ram_part, "arXiv 2601.13572"),
    "consensus": Method(masks.consensus, masks.consensus_part, "arXiv 2405.07813"),
    "nearswap": Method(masks.nearswap, masks.nearswap_part, "mergekit", members=(1, 1)),
    "passthrough": Method(
        masks.passthrough, masks.passthrough_part, "mergekit", needs_base=_never, members=(1, 1)
    ),
    "arcee_fusion": Method(
        masks.arcee_fusion, masks.arcee_fusion_part, "mergekit", unit=_row, members=(1, 1)
    ),
}


def check(name: str, parameters: Parameters | None = None) -> dict[str, Any]:
    """Return a method's parameters with every default filled in.

    Raises:
        UserError: the method or a parameter is unknown (the nearest is named), of the wrong type or out of range.

    Example:
        >>> check("ties", {"density": 0.5})
        {'density': 0.5, 'scale': 1.0, 'normalize': True, 'rescale': 'none'}
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


def find(name: str) -> Method:
    """Return the entry of a method.

    Raises:
        UserError: there is none of that name; the nearest is named.
    """
    if name not in METHODS:
        raise UserError(f"unknown merge method '{name}'{did_you_mean(name, METHODS)}")
    return METHODS[name]


@functools.cache
def _schema(name: str) -> type[pydantic.BaseModel]:
    function = find(name).known
    hints = get_type_hints(function, include_extras=True)
    fields: dict[str, Any] = {
        key: (
            hints[key],
            ... if parameter.default is inspect.Parameter.empty else parameter.default,
        )
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
    return pydantic.create_model(
        name, __config__=pydantic.ConfigDict(extra="forbid", strict=True), **fields
    )


def _expected(error: pydantic.ValidationError) -> str:
    problems = error.errors()
    first = problems[0]
    same = [item for item in problems if item["loc"][0] == first["loc"][0]]
    if first["type"] == "missing":
        return f"the parameter {first['loc'][0]} must be given"
    return f"{first['loc'][0]} = {first['input']!r}: {' or '.join(item['msg'][0].lower() + item['msg'][1:] for item in same)}"


def check_weights(
    name: str, weights: Sequence[float] | None, members: int, parameters: Parameters | None = None
) -> np.ndarray | None:
    """Return the weights as float64[M], or None for the default; `parameters` may say that they are not divided by their sum.

    Raises:
        UserError: too few or too many members, not one weight a member, a weight is not finite, the sum is not positive (mean), or
            they are no probabilities (probabilities).

    Example:
        >>> check_weights("average", (1, 3), 2).tolist()
        [1.0, 3.0]
    """
    method = find(name)
    low, high = method.members
    if not low <= members <= high:
        wanted = (
            f"{low}"
            if low == high
            else f"at least {low}"
            if high == math.inf
            else f"{low} to {int(high)}"
        )
        raise UserError(f"merge method {name} takes {wanted} models, {members} were given")
    if weights is None:
        return None
    given = [float(w) for w in weights]
    if len(given) != members:
        raise UserError(
            f"merge method {name}: {len(given)} weights for {members} members; give one a member"
        )
    if not all(math.isfinite(w) for w in given):
        raise UserError(f"merge method {name}: weights {given} must be finite numbers")
    if method.weights == "probabilities":
        selection.quantize(given)
    divided = method.weights == "mean" and (parameters or {}).get("normalize", True)
    if divided and sum(given) <= 0:
        raise UserError(f"merge method {name}: weights {given} must have a positive sum")
    return np.asarray(given, np.float64)


def key_words(
    name: str, parameters: Parameters, seed: int, hf_name: str, layer: int | None
) -> np.ndarray:
    """Return the key of one Hugging Face tensor as uint32[2].

    The stream is `(seed, method, hf_name)` with "select" for selection and "drop" for DARE; for granularity "layer" it is
    `(seed, "select", "layer", number)`, so that the tensors of a layer choose alike, and those outside the layers are named alone.

    Example:
        >>> parameters = check("selection", {"granularity": "layer"})
        >>> first, second = (
        ...     key_words("selection", parameters, 0, hf_name, 3) for hf_name in ("a", "b")
        ... )
        >>> (first == second).all()
        np.True_
    """
    draws = METHODS[name].draws
    if not draws:
        return np.zeros(2, np.uint32)
    if parameters.get("granularity") == "layer" and layer is not None:
        return rng.stream_key_bits(seed, draws, "layer", layer)
    return rng.stream_key_bits(seed, draws, hf_name)


def apply(
    part: Part,
    known: Mapping[str, Any],
    rounding: jax.Array | None = None,
    *,
    method: str,
    static: Static,
    dtype: DTypeLike,
    out: DTypeLike | None = None,
) -> jax.Array:
    """Merge a part: round the models to `dtype`, compute, round once to `out`.

    Pure; `run` is the same under jit. Everything that merges (files, population) goes through here.

    Args:
        part: of one Hugging Face tensor.
        known: the arrays that the method's `known` returned, see `parts.split`.
        rounding: uint32[2], the key of stochastic rounding to bfloat16; None rounds to nearest even.
        method, static, dtype, out: select the program; `static` is the rest of what `known` returned, `out` is `dtype` by default.

    Returns:
        [*s] in `out`.
    """
    merged = METHODS[method].part(stored(part, dtype), **known, **dict(static))
    if rounding is not None and merged.dtype == jnp.float32 and (out or dtype) == jnp.bfloat16:
        return round_stochastically(merged, random_words(rounding, part.indices()))
    return as_stored(merged, out or dtype)


run = functools.partial(jax.jit, static_argnames=("method", "static", "dtype", "out"))(apply)


def redraws(name: str, parameters: Parameters) -> bool:
    """Whether elements may be drawn again, so that `select.redrawn` says how many were.

    Example:
        >>> redraws("selection", check("selection", {"resample": 2})), redraws("average", {})
        (True, False)
    """
    return name == "selection" and parameters["granularity"] == "element" and _resamples(parameters)


def merge_tensor(
    name: str,
    members: Sequence[jax.Array],
    *,
    base: jax.Array | None = None,
    weights: Sequence[float] | None = None,
    words: np.ndarray | None = None,
    dtype: DTypeLike = jnp.float32,
    **parameters: Any,
) -> jax.Array:
    """Merge one Hugging Face tensor that lies in memory.

    Args:
        name: of the method.
        members: M arrays [*S], or one [M, *S].
        base: [*S].
        weights: one a member.
        words: uint32[2], the key (see `key_words`).
        dtype: models are rounded to it first, the result is stored in it.
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
    checked = check(name, parameters)
    models = [as_stored(jnp.asarray(one), dtype) for one in members]
    base = (
        as_stored(jnp.asarray(base), dtype)
        if base is not None and METHODS[name].needs_base(checked)
        else None
    )
    tensor = InMemoryTensor(
        models, base, weights=check_weights(name, weights, len(models), checked), words=words
    )
    known, static = split(learn(tensor, name, checked))
    return run(tensor.part, known, method=name, static=static, dtype=jnp.dtype(dtype))


def learn(tensor: Tensor, name: str, checked: Parameters) -> dict[str, Any]:
    """Return what the method's parts must know of the whole tensor; `checked` is what `check` returned."""
    return METHODS[name].known(tensor, **checked)
