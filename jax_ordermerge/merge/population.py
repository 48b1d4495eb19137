"""Merging a population in device memory: methods on stacked, sharded parameter dicts. Pure."""

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
from jax_ordermerge.merge import rescale
from jax_ordermerge.merge.methods import parts, selection, table

# `merge` takes arrays, `compile_merge` their descriptions.
Array = jax.Array | jax.ShapeDtypeStruct


def merge(
    members: tree.Tree,
    base: tree.Tree | None,
    config: ModelConfig,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None = None,
    parameters: table.Parameters | None = None,
    scales: Mapping[str, float] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> tree.Tree:
    """Merge the members of a population, Hugging Face tensor by Hugging Face tensor.

    Members and base are first rounded to `dtype`, as if they had been exported. The arithmetic is
    in float32 with one rounding at the end, in the same order everywhere. So the result has, on any
    mesh, the bits of a merge of the exported files (`engine.merge_plan`).

    Args:
        members: parameter dict with a leading axis `M`, on any mesh.
        base: parameter dict; may be None for methods that do not need it.
        config: the model.
        method: name of the method.
        seed: of the methods that draw random numbers.
        weights: one per member.
        parameters: of the method.
        scales: lambda of every Hugging Face tensor. The result is theta_0 + lambda (theta -
            theta_0), with theta the merge in float32, and one rounding at the end. Lambdas are
            traced: other values compile nothing again.
        dtype: what is merged and returned.

    Returns:
        The parameter dict in `dtype`, sharded as the members without their leading axis.

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
    merged: dict[str, jax.Array] = {}
    for spec in arch.tensor_table(config):
        names, base_leaf = spec.hf_names(), flat_base.get(spec.path)
        leaf = Leaf(
            flat[spec.path], base_leaf, names, spec.stacked, method, seed, weights, checked, dtype
        )
        if scales is None:
            merged[spec.path] = leaf.merge()
        else:  # leaf by leaf, so that there is never a whole model in float32
            lambdas = np.asarray([scales[name] for name in names], np.float32)
            merged[spec.path] = rescale.rescale(
                leaf.merge(jnp.float32),
                base_leaf,
                lambdas,
                stacked=spec.stacked,
                dtype=jnp.dtype(dtype),
            )
    return tree.unflatten(merged)


def compile_merge(
    config: ModelConfig,
    mesh: Mesh,
    *,
    members: int,
    method: str,
    weights: Sequence[float] | None = None,
    parameters: table.Parameters | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> jax.stages.Compiled:
    """Compile the merge of the largest tensor of a population, also for absent devices.

    Args:
        config: the model.
        mesh: where the population is.
        members: their number.
        method, weights, parameters, dtype: as in `merge`.

    Raises:
        UserError: as `merge`.
    """
    # the merge goes leaf by leaf, so the largest one decides how much memory it takes
    spec = max(arch.tensor_table(config), key=lambda spec: math.prod(spec.shape))
    (population,) = tree.flatten(
        convert.abstract_tensors([spec], mesh, members=members, dtype=dtype)
    ).values()
    (base,) = tree.flatten(convert.abstract_tensors([spec], mesh, dtype=dtype)).values()
    leaf = Leaf(
        population,
        base,
        spec.hf_names(),
        spec.stacked,
        method,
        seed=0,  # key bits are an argument: the program is the same for every seed
        weights=weights,
        parameters=table.check_parameters(method, parameters),
        dtype=dtype,
    )
    arguments, program = leaf.prepare()
    return _merge_leaf.lower(*arguments, **program).compile()


class MemberShardings(NamedTuple):
    """Shardings of one member of a population.

    Attributes:
        spread: with the mesh axis that holds members over its elements, if an axis can be divided.
        out: without that mesh axis.
    """

    spread: NamedSharding
    out: NamedSharding


def member_shardings(leaf: Array) -> MemberShardings | None:
    """Return shardings for one member of a leaf.

    Under an outer jit, and on no mesh, the result is None: both are left to the compiler.

    Args:
        leaf: [M, *s], an array or its description.

    Example:
        >>> member_shardings(jnp.ones((2, 3))) is None  # on no mesh
        True
    """
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    mesh = sharding.mesh
    # a PartitionSpec may be shorter than the array has axes
    entries = [*sharding.spec, *[None] * (leaf.ndim - len(sharding.spec))]
    member_axis, inner = entries[0], entries[1:]
    out = NamedSharding(mesh, P(*inner))
    if member_axis is None or mesh.shape[member_axis] == 1:
        return MemberShardings(out, out)
    # from the last axis on: the first may be the layer axis, which `_measure_leaf` indexes
    for axis in reversed(range(len(inner))):
        entry = inner[axis]
        names = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        names = (*names, member_axis)
        if leaf.shape[1 + axis] % math.prod(mesh.shape[name] for name in names) == 0:
            spec = P(*inner[:axis], names, *inner[axis + 1 :])
            return MemberShardings(NamedSharding(mesh, spec), out)
    # no axis can be divided further: every device of the member axis merges the same elements
    return MemberShardings(out, out)


class Leaf(NamedTuple):
    """An entry of the tensor table, and how it is merged.

    Attributes:
        members: [M, *S], or [M, L, *S] if stacked.
        base: the same without `M`, or None.
        names: Hugging Face name of each layer, or of the one tensor.
        stacked: whether there is a layer axis.
        method, seed, weights, dtype: as in `merge`.
        parameters: from `table.check_parameters`.

    Example:
        >>> members = jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])
        >>> parameters = table.check_parameters("average")
        >>> leaf = Leaf(members, None, ["w"], False, "average", 0, None, parameters, "float32")
        >>> leaf.merge().tolist()
        [[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]
    """

    members: Array
    base: Array | None
    names: Sequence[str]
    stacked: bool
    method: str
    seed: int
    weights: Sequence[float] | None
    parameters: table.Parameters
    dtype: DTypeLike

    def merge(self, out: DTypeLike | None = None) -> jax.Array:
        """Return the merged entry, [*S] or [L, *S], in dtype `out`, by default the one merged."""
        arguments, program = self.prepare()
        return _merge_leaf(*arguments, **program, result=None if out is None else jnp.dtype(out))

    def tensors(self) -> list["_LeafTensor"]:
        """Return the Hugging Face tensors of the entry."""
        weights = table.check_weights(
            self.method, self.weights, self.members.shape[0], self.parameters
        )
        return [_LeafTensor(self, layer, weights) for layer in range(len(self.names))]

    def prepare(self) -> tuple[tuple[parts.ArrayTree, ...], dict[str, Any]]:
        """Return the arguments of `_merge_leaf`, and the static ones that select its program."""
        # Each layer is a Hugging Face tensor with sums of its own. The static values follow from
        # the parameters, so those of all layers are equal.
        tensors = self.tensors()
        prepared = [tensor.prepare() for tensor in tensors]
        first_arrays, static = prepared[0]
        arrays = {name: np.stack([layer[name] for layer, _ in prepared]) for name in first_arrays}
        key_bits = np.stack([tensor.key_bits for tensor in tensors])
        program = {
            "method": self.method,
            "static": static,
            "dtype": jnp.dtype(self.dtype),
            "stacked": self.stacked,
            "shardings": member_shardings(self.members),
        }
        return (self.members, self.base, key_bits, arrays), program


@dataclasses.dataclass(frozen=True)
class _LeafTensor:
    """One Hugging Face tensor of an entry of the tensor table, as a `parts.Tensor`."""

    leaf: Leaf
    layer: int  # 0 if the entry is not stacked
    weights: np.ndarray | None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.leaf.members.shape[1 + self.leaf.stacked :])

    @property
    def count(self) -> int:
        return int(self.leaf.members.shape[0])

    @property
    def in_layer(self) -> bool:
        return self.leaf.stacked

    @property
    def key_bits(self) -> np.ndarray:
        """The random key, uint32[2]."""
        # a tensor outside the layers has no number, hence a stream of its own with granularity
        # "layer"
        leaf, layer = self.leaf, self.layer if self.leaf.stacked else None
        return table.key_bits(
            leaf.method, leaf.parameters, leaf.seed, leaf.names[self.layer], layer
        )

    def prepare(self) -> tuple[dict[str, np.ndarray], parts.Static]:
        """Return what the method's `apply` needs to know of the tensor."""
        return parts.split_static(
            table.METHODS[self.leaf.method].prepare(self, **self.leaf.parameters)
        )

    def total(
        self,
        function: Callable[..., parts.ArrayTree],
        *arrays: parts.ArrayTree,
        reduce: parts.Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `parts.Tensor.total`. The tensor is measured in one piece, on its devices."""
        leaf = self.leaf
        measure = functools.partial(
            _measure_leaf,
            function=function,
            static=tuple(static.items()),
            dtype=jnp.dtype(leaf.dtype),
            stacked=leaf.stacked,
            shardings=member_shardings(leaf.members),
        )
        arguments = (leaf.members, leaf.base, self.key_bits, self.layer, *arrays)
        if isinstance(leaf.members, jax.ShapeDtypeStruct):
            # nothing to measure: the merge compiles to the same program whatever the sums are
            shapes = jax.eval_shape(measure, *arguments)
            result = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes)
        else:
            result = measure(*arguments)
        sums = parts.Sums(reduce)
        sums.add(result)
        return sums.result()


@functools.partial(jax.jit, static_argnames=("function", "static", "dtype", "stacked", "shardings"))
def _measure_leaf(
    members: jax.Array,
    base: jax.Array | None,
    key_bits: jax.Array,
    layer: int,
    *arrays: parts.ArrayTree,
    function: Callable[..., parts.ArrayTree],
    static: parts.Static,
    dtype: DTypeLike,
    stacked: bool,
    shardings: MemberShardings | None,
) -> parts.ArrayTree:
    """Return `function` of one layer. The layer is traced, so all layers share one program."""
    member_list, base = _unstack(members, base, dtype, shardings)
    if stacked:
        take = functools.partial(jax.lax.dynamic_index_in_dim, index=layer, keepdims=False)
        member_list = tuple(map(take, member_list))
        base = None if base is None else take(base)
    result = function(parts.Part(member_list, base, key_bits), *arrays, **dict(static))
    return replicate(result, shardings)


@functools.partial(
    jax.jit, static_argnames=("method", "static", "dtype", "stacked", "shardings", "result")
)
def _merge_leaf(
    members: jax.Array,
    base: jax.Array | None,
    key_bits: jax.Array,
    arrays: dict[str, jax.Array],
    *,
    method: str,
    static: parts.Static,
    dtype: DTypeLike,
    stacked: bool,
    shardings: MemberShardings | None,
    result: DTypeLike | None = None,
) -> jax.Array:
    """Merge all layers of an entry of the tensor table.

    Args:
        members: [M, (L), *S].
        base: [(L), *S], or None.
        key_bits: uint32[L, 2]; L is 1 if not stacked, here and below.
        arrays: what the method's `prepare` returned, [L, ...].
        method, static, dtype: see `table.merge_part`; `result` is its `out`.
        stacked: whether there is a layer axis.
        shardings: from `member_shardings`.
    """
    member_list, base = _unstack(members, base, dtype, shardings)

    def merge_tensor(
        members: tuple[jax.Array, ...],
        base: jax.Array | None,
        key_bits: jax.Array,
        arrays: dict[str, jax.Array],
    ) -> jax.Array:
        part = parts.Part(members, base, key_bits)
        return table.merge_part(part, arrays, method=method, static=static, dtype=dtype, out=result)

    # vmap instead of a loop over layers: one small program, whatever the depth of the model
    if stacked:
        merged = jax.vmap(merge_tensor)(member_list, base, key_bits, arrays)
    else:
        arrays = {name: x[0] for name, x in arrays.items()}
        merged = merge_tensor(member_list, base, key_bits[0], arrays)
    if shardings is None:
        return merged
    # the all-gather of `_unstack`: the result has the layout of a member, without the member axis
    return jax.lax.with_sharding_constraint(merged, shardings.out)


def _unstack(
    members: jax.Array,
    base: jax.Array | None,
    dtype: DTypeLike,
    shardings: MemberShardings | None,
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return M members and the base in `dtype`, with the order axis over their elements.

    Over the mesh this is one all-to-all, and the result comes back by one all-gather: together the
    traffic of one all-reduce. But an all-reduce would add in an order that depends on the mesh.
    Here each device has all members of its elements and adds them in the order of everywhere else.
    """
    # rounded before they are sent: float32 members cross the mesh in bfloat16 where that is merged
    stored = parts.round_to(members, dtype)
    base = None if base is None else parts.round_to(base, dtype)
    if shardings is not None:
        # collectives of bfloat16 may quiet a NaN on CPU, so its bits are sent
        bits = selection.to_bits(stored) if stored.dtype.itemsize < 4 else stored
        spread = shardings.spread
        over_elements = NamedSharding(spread.mesh, P(None, *spread.spec))
        bits = jax.lax.with_sharding_constraint(bits, over_elements)
        stored = jax.lax.bitcast_convert_type(bits, stored.dtype)
        base = None if base is None else jax.lax.with_sharding_constraint(base, spread)
    return selection.unstack(stored), base


def replicate(values: parts.ArrayTree, shardings: MemberShardings | None) -> parts.ArrayTree:
    """Put sums on all devices of the mesh, since every process reads them on its host."""
    if shardings is None:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(shardings.out.mesh, P()))
