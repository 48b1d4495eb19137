"""Merging a population in device memory: the kernels over stacked, sharded parameter dicts. Pure."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import diagnostics
from jax_ordermerge.merge.methods import parts, reductions, selection, table


def merge(
    members: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    config: ModelConfig,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    scales: Mapping[str, float] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> tree.Tree:
    """Merge the members of a population, Hugging Face tensor by Hugging Face tensor.

    Members and base are rounded to `dtype` first, as if they had been exported; the arithmetic is float32 with one rounding at the
    end, in the same order everywhere. So the result has the bits of merging the exported files (`engine.merge`), on any mesh.

    Args:
        members: parameter dict with a leading axis `M`, on any mesh.
        base: parameter dict; may be None for methods that do not need it.
        config: the model.
        method: a name of `methods.table.METHODS`.
        seed: of the methods that draw.
        weights: one a member.
        parameters: of the method.
        scales: lambda of every Hugging Face tensor: the result is theta_0 + lambda (theta - theta_0), theta what the method gives in
            float32, with one rounding at the end. Lambdas are traced: other values compile nothing anew.
        dtype: what is merged and returned.

    Returns:
        The parameter dict in `dtype`, sharded as the members are without their leading axis.

    Raises:
        UserError: the method, a parameter or the weights are wrong, or the base is missing.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1
        ... )
        >>> flat = {
        ...     spec.path: jnp.stack([jnp.zeros(spec.shape), jnp.ones(spec.shape)])
        ...     for spec in arch.tensor_table(config)
        ... }
        >>> merged = merge(
        ...     tree.unflatten(flat), None, config, method="average", seed=0, weights=(1, 3)
        ... )
        >>> merged["norm"]["weight"].tolist()
        [0.75, 0.75]
    """
    checked = table.check_parameters(method, parameters)
    if (table.METHODS[method].needs_base(checked) or scales is not None) and base is None:
        raise UserError(f"merge method {method} with {checked} needs the base; give it")
    flat, flat_base = tree.flatten(members), tree.flatten(base or {})
    run = functools.partial(
        merge_leaf, method=method, seed=seed, weights=weights, parameters=checked, dtype=dtype
    )
    found: dict[str, jax.Array] = {}
    for spec in arch.tensor_table(config):
        own, own_base, names = flat[spec.path], flat_base.get(spec.path), spec.hf_names()
        if scales is None:
            found[spec.path] = run(own, own_base, names, spec.stacked)
        else:  # a leaf at a time, so that no whole model is ever in float32
            whole = run(own, own_base, names, spec.stacked, out="float32")
            lambdas = np.asarray([scales[name] for name in names], np.float32)
            found[spec.path] = _rescaled(
                whole, own_base, lambdas, stacked=spec.stacked, dtype=jnp.dtype(dtype)
            )
    return tree.unflatten(found)


def merge_leaf(
    members: jax.Array,
    base: jax.Array | None,
    names: Sequence[str],
    stacked: bool,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None,
    parameters: Mapping[str, Any],
    dtype: DTypeLike,
    out: DTypeLike | None = None,
) -> jax.Array:
    """Merge one entry of the tensor table.

    Args:
        members: [M, *S], or [M, L, *S] if stacked.
        base: the same without `M`, or None.
        names: Hugging Face name of each layer, or of the one tensor.
        stacked: whether there is a layer axis.
        method, seed, weights, dtype: as in `merge`.
        parameters: as `table.check_parameters` returned them.
        out: dtype of the result, by default `dtype`.

    Returns:
        [*S] or [L, *S] in `out`.

    Example:
        >>> members = jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])
        >>> settings = {
        ...     "method": "average",
        ...     "parameters": table.check_parameters("average"),
        ...     "seed": 0,
        ...     "weights": None,
        ... }
        >>> merge_leaf(members, None, ["w"], False, dtype="float32", **settings).tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """
    chosen = _Chosen(method, seed, weights, parameters, dtype)
    arguments, settings = _prepared(members, base, names, stacked, chosen)
    return _merge_leaf(*arguments, **settings, result=None if out is None else jnp.dtype(out))


@functools.partial(jax.jit, static_argnames=("stacked", "dtype"))
def _rescaled(
    merged: jax.Array, base: jax.Array, scales: jax.Array, *, stacked: bool, dtype: DTypeLike
) -> jax.Array:
    """Return theta_0 + lambda (theta - theta_0) in `dtype`: bit for bit the task arithmetic of one member, theta."""
    start = parts.round_to(base, dtype).astype(jnp.float32)
    lambdas = scales.reshape(-1, *(1,) * (merged.ndim - 1)) if stacked else scales[0]
    return parts.round_to(
        start + reductions.rounded(lambdas * reductions.rounded(merged - start)), dtype
    )


def compile_merge(
    config: ModelConfig,
    mesh: Mesh,
    *,
    members: int,
    method: str,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> Any:
    """Return the compiled merge of the largest tensor of a population, `jax.stages.Compiled`; the devices need not be here.

    Args:
        config: the model.
        mesh: where the population is.
        members: their number.
        method, weights, parameters, dtype: as in `merge`.

    Raises:
        UserError: as `merge`.
    """
    spec = max(arch.tensor_table(config), key=lambda spec: math.prod(spec.shape))
    (population,) = tree.flatten(
        convert.abstract_tensors([spec], mesh, members=members, dtype=dtype)
    ).values()
    (base,) = tree.flatten(convert.abstract_tensors([spec], mesh, dtype=dtype)).values()
    checked = table.check_parameters(method, parameters)
    chosen = _Chosen(method, 0, weights, checked, dtype)
    arguments, settings = _prepared(population, base, spec.hf_names(), spec.stacked, chosen)
    return _merge_leaf.lower(*arguments, **settings).compile()


class _Chosen(NamedTuple):
    """A method and what it is given; `parameters` as `table.check_parameters` returned them."""

    method: str
    seed: int
    weights: Sequence[float] | None
    parameters: Mapping[str, Any]
    dtype: DTypeLike


def _prepared(
    members: Any, base: Any, names: Sequence[str], stacked: bool, chosen: _Chosen
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of `_merge_leaf`, arrays or their descriptions, and what selects its program."""
    tensors = _tensors(members, base, names, stacked, chosen)
    inner = without_members(members)
    learned = [
        parts.split_static(table.prepare(tensor, chosen.method, chosen.parameters))
        for tensor in tensors
    ]
    known = {name: np.stack([arrays[name] for arrays, _ in learned]) for name in learned[0][0]}
    settings = {
        "method": chosen.method,
        "static": learned[0][1],
        "dtype": jnp.dtype(chosen.dtype),
        "stacked": stacked,
        "spread": tensors[0].leaf.spread,
        "out": None if inner is None else inner[1],
    }
    return (members, base, np.stack([tensor.words for tensor in tensors]), known), settings


class _Leaf(NamedTuple):
    """One entry of the tensor table: [M, (L), *S] and [(L), *S]. `spread` shards a member so that no axis holds members."""

    members: jax.Array
    base: jax.Array | None
    stacked: bool
    spread: NamedSharding | None


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One Hugging Face tensor of a leaf, as a `parts.Tensor`."""

    leaf: _Leaf
    layer: int
    words: np.ndarray
    weights: np.ndarray | None
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.members.shape[1 + self.leaf.stacked :])

    @property
    def count(self) -> int:
        return int(self.leaf.members.shape[0])

    def total(
        self,
        function: Callable[..., Any],
        *arrays: Any,
        reduce: parts.Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `parts.Tensor.total`: the leaf in one piece, wherever it lies."""
        measure = functools.partial(
            _measure_leaf,
            function=function,
            static=tuple(static.items()),
            dtype=self.dtype,
            stacked=self.leaf.stacked,
            spread=self.leaf.spread,
        )
        given = self.leaf.members, self.leaf.base, self.words, self.layer, *arrays
        sums = parts.Sums(reduce)
        if isinstance(
            self.leaf.members, jax.ShapeDtypeStruct
        ):  # only described: the program does not depend on what the sums are
            sums.add(
                jax.tree.map(lambda x: np.ones(x.shape, x.dtype), jax.eval_shape(measure, *given))
            )
        else:
            sums.add(measure(*given))
        return sums.result()


def _tensors(
    members: Any, base: Any, names: Sequence[str], stacked: bool, chosen: _Chosen
) -> list[_Tensor]:
    """Return the Hugging Face tensors of a leaf, of arrays or of their descriptions."""
    method, seed, weights, parameters, dtype = chosen
    layers = range(len(names)) if stacked else (None,)
    words = [
        table.key_bits(method, parameters, seed, name, layer)
        for name, layer in zip(names, layers, strict=True)
    ]
    given = table.check_weights(method, weights, members.shape[0], parameters)
    inner = without_members(members)
    leaf = _Leaf(members, base, stacked, None if inner is None else inner[0])
    return [_Tensor(leaf, i, words[i], given, jnp.dtype(dtype)) for i in range(len(names))]


@functools.partial(jax.jit, static_argnames=("function", "static", "dtype", "stacked", "spread"))
def _measure_leaf(
    members: jax.Array,
    base: jax.Array | None,
    words: jax.Array,
    layer: int,
    *arrays: Any,
    function: Callable[..., Any],
    static: table.Static,
    dtype: DTypeLike,
    stacked: bool,
    spread: NamedSharding | None,
) -> Any:
    own, own_base = _apart(members, base, dtype, spread)
    if stacked:
        own = tuple(jax.lax.dynamic_index_in_dim(one, layer, keepdims=False) for one in own)
        own_base = (
            None
            if own_base is None
            else jax.lax.dynamic_index_in_dim(own_base, layer, keepdims=False)
        )
    found = function(parts.Part(own, own_base, words), *arrays, **dict(static))
    # every process reads the sums, so they must lie on all devices
    return (
        found
        if spread is None
        else jax.lax.with_sharding_constraint(found, NamedSharding(spread.mesh, P()))
    )


@functools.partial(
    jax.jit, static_argnames=("method", "static", "dtype", "stacked", "spread", "out", "result")
)
def _merge_leaf(
    members: jax.Array,
    base: jax.Array | None,
    words: jax.Array,
    known: dict[str, jax.Array],
    *,
    method: str,
    static: table.Static,
    dtype: DTypeLike,
    stacked: bool,
    spread: NamedSharding | None,
    out: NamedSharding | None,
    result: DTypeLike | None = None,
) -> jax.Array:
    own, own_base = _apart(members, base, dtype, spread)

    def one(
        members: tuple[jax.Array, ...],
        base: jax.Array | None,
        words: jax.Array,
        known: dict[str, jax.Array],
    ) -> jax.Array:
        return table.merge_part(
            parts.Part(members, base, words),
            known,
            method=method,
            static=static,
            dtype=dtype,
            out=result,
        )

    if stacked:
        merged = jax.vmap(one)(own, own_base, words, known)
    else:
        merged = one(own, own_base, words[0], {name: x[0] for name, x in known.items()})
    return merged if out is None else jax.lax.with_sharding_constraint(merged, out)


def _apart(
    members: jax.Array, base: jax.Array | None, dtype: DTypeLike, spread: NamedSharding | None
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return the members as M arrays, and the base, rounded to `dtype` and with the order axis of the mesh over their elements.

    Over the mesh this is one all-to-all, and the result comes back by one all-gather: together the traffic of one all-reduce. But
    each device has all members of its elements, so the additions keep the order that they have everywhere else.
    """
    stored = parts.round_to(members, dtype)
    if spread is not None:
        bits = (
            selection.to_bits(stored) if stored.dtype.itemsize < 4 else stored
        )  # collectives of bfloat16 may quiet a NaN on CPU
        bits = jax.lax.with_sharding_constraint(
            bits, NamedSharding(spread.mesh, P(None, *spread.spec))
        )
        stored = jax.lax.bitcast_convert_type(bits, stored.dtype)
    own = selection.unstack(stored)
    if base is None:
        return own, None
    own_base = parts.round_to(base, dtype)
    return own, own_base if spread is None else jax.lax.with_sharding_constraint(own_base, spread)


def without_members(leaf: Any) -> tuple[NamedSharding, NamedSharding] | None:
    """Return two shardings of one member of a leaf: with the order axis over its elements, and without it.

    Under an outer jit both are left to the compiler.

    Args:
        leaf: [M, *s], an array or its description.

    Example:
        >>> without_members(jnp.ones((2, 3))) is None  # on no mesh
        True
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh, entries = sharding.mesh, list(sharding.spec) + [None] * (leaf.ndim - len(sharding.spec))
    held, inner = entries[0], entries[1:]
    out = NamedSharding(mesh, P(*inner))
    if held is None or mesh.shape[held] == 1:
        return out, out
    for axis in reversed(range(len(inner))):
        names = (
            ()
            if inner[axis] is None
            else inner[axis]
            if isinstance(inner[axis], tuple)
            else (inner[axis],)
        )
        if (
            leaf.shape[1 + axis]
            % (math.prod(mesh.shape[name] for name in names) * mesh.shape[held])
            == 0
        ):
            return NamedSharding(mesh, P(*inner[:axis], (*names, held), *inner[axis + 1 :])), out
    return out, out


def measure_diagnostics(
    members: Mapping[str, Any],
    base: Mapping[str, Any],
    merged: Mapping[str, Any],
    config: ModelConfig,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Describe a merge by its task vectors, per Hugging Face tensor and in total.

    Args:
        members: parameter dict with a leading axis `M`.
        base: parameter dict.
        merged: parameter dict; members and base are rounded to its dtype first.
        config: the model.
        method, seed, weights, parameters: of the merge; a selection with resampling draws again, to say how often it did.

    Returns:
        `{"total": numbers, "tensors": {hf_name: numbers}}`, plain Python (see `geometry.summarize`).
    """
    checked: dict[str, Any] = {}
    count_redrawn = None
    if method in table.METHODS:
        checked = table.check_parameters(method, parameters)
        count_redrawn = table.METHODS[method].count_redrawn(checked)
    flat, flat_base, flat_merged = tree.flatten(members), tree.flatten(base), tree.flatten(merged)
    found: dict[str, tuple[diagnostics.Moments, int]] = {}
    for spec in arch.tensor_table(config):
        own, own_base, own_merged = flat[spec.path], flat_base[spec.path], flat_merged[spec.path]
        inner = without_members(own)
        # every process reads the sums, so they must lie on all devices
        everywhere = None if inner is None else NamedSharding(inner[0].mesh, P())
        moments = jax.device_get(_moments(own, own_base, own_merged, everywhere))
        tensors: list[_Tensor] | None = None
        if count_redrawn is not None:
            chosen = _Chosen(method, seed, weights, checked, own_merged.dtype)
            tensors = _tensors(own, own_base, spec.hf_names(), spec.stacked, chosen)
        for layer, name in enumerate(spec.hf_names()):
            one = (
                diagnostics.Moments(*(x[:, layer] for x in moments[:2]))
                if spec.stacked
                else moments
            )
            if tensors is not None and count_redrawn is not None:
                known, static = parts.split_static(table.prepare(tensors[layer], method, checked))
                one = one._replace(
                    redrawn=tensors[layer].total(count_redrawn, known["weights"], **dict(static))
                )
            found[name] = diagnostics.total(one), math.prod(spec.hf_shape)
    return diagnostics.report((name, *found[name]) for name, _, _ in arch.hf_tensors(config))


@functools.partial(jax.jit, static_argnames="everywhere")
def _moments(
    members: jax.Array, base: jax.Array, merged: jax.Array, everywhere: NamedSharding | None
) -> diagnostics.Moments:
    found = diagnostics.moments(
        parts.round_to(members, merged.dtype), parts.round_to(base, merged.dtype), merged
    )
    return found if everywhere is None else jax.lax.with_sharding_constraint(found, everywhere)
