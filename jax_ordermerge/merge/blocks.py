"""A small population as runs of elements: one program per method, whatever shapes the model has.

`population.merge` compiles a program for every shape of the tensor table. Beside the merge of a
large model that is nothing; a search that tries a hundred merges of a small one would spend most of
its time on it. A run of elements is to its Hugging Face tensor what a slab is in `engine`, so the
bits are those of the same merge of files.

Axis letters: `M` member, `K` run, `n` element of a run, `U` Hugging Face tensor.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.merge import population, rescale
from jax_ordermerge.merge.methods import parts, selection, table
from jax_ordermerge.merge.methods.reductions import BLOCK

# Elements of all members together: 32 MiB in bfloat16. The runs take that much once more.
LARGEST = 1 << 24
_KEPT = 8  # measurements: candidates that differ by lambda or density ask for the same ones


def fits(members: tree.Tree) -> bool:
    """Return whether a population is small enough, and lies on one device.

    Example:
        >>> fits({"w": jnp.ones((4, 3))})
        True
    """
    leaves = jax.tree.leaves(members)
    devices = {device for leaf in leaves for device in leaf.sharding.device_set}
    # runs are cut across tensors, which no sharding over several devices follows
    return len(devices) == 1 and sum(leaf.size for leaf in leaves) <= LARGEST


class _Runs(NamedTuple):
    """The runs of all tensors whose runs have one length, in the order of the tensor table.

    Attributes:
        members: [M, K, n].
        base: [K, n].
        tensors: int32[K], number of the tensor of each run.
        offsets: uint32[K, 2] = (lo, hi), index of the first element of each run in its tensor.
    """

    members: jax.Array
    base: jax.Array
    tensors: np.ndarray
    offsets: np.ndarray


class _Group(NamedTuple):
    """The runs of one length, and the paths of their entries in the tensor table."""

    paths: tuple[str, ...]
    runs: _Runs


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A Hugging Face tensor as a `parts.Tensor`. What is measured is measured of all tensors."""

    number: int
    shape: tuple[int, ...]
    weights: np.ndarray | None
    in_layer: bool
    key_bits: np.ndarray  # uint32[U, 2], of all tensors
    blocks: "Blocks"

    @property
    def count(self) -> int:
        return self.blocks.count

    def prepare(
        self, method: str, checked: table.Parameters
    ) -> tuple[dict[str, np.ndarray], parts.Static]:
        """Return what the method's `apply` needs to know of the tensor."""
        return parts.split_static(table.METHODS[method].prepare(self, **checked))

    def total(
        self,
        function: Callable[..., parts.ArrayTree],
        *arrays: parts.ArrayTree,
        reduce: parts.Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `parts.Tensor.total`."""
        totals = self.blocks.measure(
            function, arrays, self.key_bits, reduce=reduce, static=tuple(static.items())
        )
        return totals[self.number]


class Blocks:
    """The members and the base of a population that `fits`, as runs of elements.

    Args:
        members: parameter dict with a leading axis `M`.
        base: parameter dict.
        model: the architecture.
        dtype: what is merged and returned, as in `population.merge`.
    """

    def __init__(
        self, members: tree.Tree, base: tree.Tree, model: ModelConfig, dtype: DTypeLike
    ) -> None:
        self.count, self._dtype = tree.size(members), jnp.dtype(dtype)
        self._specs = arch.tensor_table(model)
        flat, flat_base = tree.flatten(members), tree.flatten(base)
        self._groups = [
            self._make_group(run, numbered, flat, flat_base)
            for run, numbered in self._by_run_length().items()
        ]
        self._runs = tuple(group.runs for group in self._groups)
        self._kept: dict[object, list[Any]] = {}
        # as `population.merge` leaves them: the same programs then take the merged model
        shardings = {path: population.member_shardings(leaf) for path, leaf in flat.items()}
        out = {
            path: flat_base[path].sharding if both is None else both.out
            for path, both in shardings.items()
        }
        self._join = jax.jit(self._join_runs, out_shardings=out)

    def merge(
        self,
        *,
        method: str,
        seed: int,
        weights: Sequence[float] | None,
        parameters: table.Parameters,
        scales: Mapping[str, float] | None,
    ) -> tree.Tree | None:
        """Return what `population.merge` returns, from one program for all tensors.

        None where there is no such program: the method is not defined by element, or it treats the
        tensors in different ways, as one that keeps everything of a very small tensor.

        Args:
            method, seed, weights, parameters, scales: as in `population.merge`.

        Raises:
            UserError: a parameter or the weights are wrong.
        """
        # by row or by matrix a tensor cannot be cut into runs
        checked = table.check_parameters(method, parameters)
        if table.METHODS[method].unit(checked) != "element":
            return None
        tensors = self._make_tensors(method, seed, weights, checked)
        key_bits = tensors[0].key_bits
        prepared = [tensor.prepare(method, checked) for tensor in tensors]
        static = prepared[0][1]
        shapes = [{name: x.shape for name, x in arrays.items()} for arrays, _ in prepared]
        # one program has one form: tensors that are prepared in two ways need two
        if any(s != shapes[0] for s in shapes) or any(s != static for _, s in prepared):
            return None
        arrays = {name: np.stack([x[name] for x, _ in prepared]) for name in prepared[0][0]}
        # One program for all lambdas, 1 among them: float32, and the one rounding comes after it.
        # A method that moves bits has nothing to round.
        result = None if table.METHODS[method].exact else jnp.dtype(jnp.float32)
        merged = _merge_runs(
            self._runs,
            key_bits,
            arrays,
            method=method,
            static=static,
            dtype=self._dtype,
            result=result,
        )
        return self._finish(merged, scales)

    def count_redrawn(
        self,
        *,
        method: str,
        seed: int,
        weights: Sequence[float] | None,
        parameters: table.Parameters,
    ) -> dict[str, np.ndarray]:
        """Return what `population_diagnostics.count_redrawn` returns."""
        checked = table.check_parameters(method, parameters)
        function = table.METHODS[method].count_redrawn(checked)
        if function is None:
            return {}
        counts = {}
        tensors = self._make_tensors(method, seed, weights, checked)
        for tensor, (_, _, name) in zip(tensors, self._tensors(), strict=True):
            arrays, static = tensor.prepare(method, checked)
            counts[name] = tensor.total(function, arrays["weights"], **dict(static))
        return counts

    def _make_tensors(
        self,
        method: str,
        seed: int,
        weights: Sequence[float] | None,
        checked: table.Parameters,
    ) -> list["_Tensor"]:
        """Return the U Hugging Face tensors as a method sees them."""
        checked_weights = table.check_weights(method, weights, self.count, checked)
        # one stream of random bits per tensor, as for files
        key_bits = np.stack(
            [
                table.key_bits(method, checked, seed, name, layer if spec.stacked else None)
                for spec, layer, name in self._tensors()
            ]
        )
        return [
            _Tensor(number, spec.hf_shape, checked_weights, spec.stacked, key_bits, self)
            for number, (spec, _, _) in enumerate(self._tensors())
        ]

    def rescale_member(self, number: int, scales: Mapping[str, float]) -> tree.Tree:
        """Return what `rescale.rescale_member` returns."""
        members = rescale.take_member([runs.members for runs in self._runs], number)
        return self._finish(members, scales)

    def measure(
        self,
        function: Callable[..., parts.ArrayTree],
        arrays: Sequence[parts.ArrayTree],
        key_bits: np.ndarray,
        *,
        reduce: parts.Reduce,
        static: parts.Static,
    ) -> list[Any]:
        """Return what `parts.Tensor.total` returns, of each of the U tensors."""
        # the arguments by value: candidates make new arrays with the same numbers
        leaves, structure = jax.tree.flatten((arrays, key_bits))
        values = tuple((np.asarray(x).tobytes(), np.shape(x), np.dtype(x.dtype)) for x in leaves)
        call = function, reduce, static, structure, values
        if call not in self._kept:
            # the oldest goes: candidates of one method follow each other
            if len(self._kept) == _KEPT:
                del self._kept[next(iter(self._kept))]
            totals = dict[int, Any]()
            by_group = parts.fetch(
                _measure_runs(
                    self._runs,
                    key_bits,
                    *arrays,
                    function=function,
                    static=static,
                    dtype=self._dtype,
                )
            )
            for group, measured in zip(self._groups, by_group, strict=True):
                # runs of a tensor are consecutive
                tensors = group.runs.tensors
                numbers, starts = np.unique(tensors, return_index=True)
                for number, start, end in zip(
                    numbers.tolist(), starts, [*starts[1:], len(tensors)], strict=True
                ):
                    totals[number] = jax.tree.map(
                        partial(_total, start=start, end=end, reduce=reduce), measured
                    )
            self._kept[call] = [totals[number] for number in range(len(totals))]
        return self._kept[call]

    def _tensors(self) -> Iterator[tuple[arch.TensorSpec, int, str]]:
        """Yield entry of the table, layer and name of each Hugging Face tensor."""
        for spec in self._specs:
            for layer, name in enumerate(spec.hf_names()):
                yield spec, layer, name

    def _by_run_length(self) -> dict[int, list[tuple[arch.TensorSpec, int]]]:
        """Return the entries of the table, with the numbers of their first tensors."""
        by_length: dict[int, list[tuple[arch.TensorSpec, int]]] = {}
        for number, (spec, layer, _) in enumerate(self._tensors()):
            if layer == 0:
                size = math.prod(spec.hf_shape)
                # A tensor that blocks do not fill is one run: `block_sums` pads its last block.
                by_length.setdefault(size if size % BLOCK else BLOCK, []).append((spec, number))
        return by_length

    def _make_group(
        self,
        run: int,
        numbered: Sequence[tuple[arch.TensorSpec, int]],
        members: Mapping[str, jax.Array],
        base: Mapping[str, jax.Array],
    ) -> _Group:
        paths = tuple(spec.path for spec, _ in numbered)
        (device,) = base[paths[0]].sharding.device_set

        # On the host: it is little, and no program has to be compiled for each shape.
        def join(flat: Mapping[str, jax.Array], *lead: int) -> jax.Array:
            rounded = [np.asarray(parts.round_to(flat[path], self._dtype)) for path in paths]
            runs = np.concatenate([x.reshape(*lead, -1, run) for x in rounded], axis=-2)
            return jax.device_put(runs, device)

        tensors, offsets = list[np.ndarray](), list[np.ndarray]()
        for spec, first in numbered:
            layers, per_tensor = len(spec.hf_names()), math.prod(spec.hf_shape) // run
            tensors.append(np.repeat(np.arange(first, first + layers, dtype=np.int32), per_tensor))
            offsets.append(np.tile(run * np.arange(per_tensor, dtype=np.uint32), layers))
        low = np.concatenate(offsets)  # below 2^32: the population is small
        runs = _Runs(
            join(members, self.count),
            join(base),
            np.concatenate(tensors),
            np.stack([low, np.zeros_like(low)], axis=1),
        )
        return _Group(paths, runs)

    def _finish(self, merged: Sequence[jax.Array], scales: Mapping[str, float] | None) -> tree.Tree:
        """Return the parameter dict of runs [K, n], of each group, with their lambdas."""
        if scales is None:
            rounded = [x.astype(self._dtype) for x in merged]
        else:
            lambdas = np.asarray([scales[name] for _, _, name in self._tensors()], np.float32)
            rounded = [
                rescale.rescale(
                    x, runs.base, lambdas[runs.tensors], stacked=True, dtype=self._dtype
                )
                for x, runs in zip(merged, self._runs, strict=True)
            ]
        flat = self._join(rounded)
        return tree.unflatten({spec.path: flat[spec.path] for spec in self._specs})

    def _join_runs(self, merged: Sequence[jax.Array]) -> dict[str, jax.Array]:
        shapes, leaves = {spec.path: spec.shape for spec in self._specs}, {}
        for group, runs in zip(self._groups, merged, strict=True):
            # as integers, since even slicing a bfloat16 array may quiet a NaN on CPU
            bits, first = selection.to_bits(runs), 0
            for path in group.paths:
                end = first + math.prod(shapes[path]) // runs.shape[1]
                leaf = bits[first:end].reshape(shapes[path])
                leaves[path], first = jax.lax.bitcast_convert_type(leaf, runs.dtype), end
        return leaves


def _total(runs: np.ndarray, *, start: int, end: int, reduce: parts.Reduce) -> np.ndarray:
    """Return the total of the runs of one tensor."""
    return parts.combine(list(runs[start:end]), reduce)


# All groups are in one program each time: starting a compilation takes longer than what a second
# group adds to it.


@partial(jax.jit, static_argnames=("method", "static", "dtype", "result"))
def _merge_runs(
    groups: tuple[_Runs, ...],
    key_bits: jax.Array,
    arrays: dict[str, jax.Array],
    *,
    method: str,
    static: parts.Static,
    dtype: DTypeLike,
    result: DTypeLike | None,
) -> tuple[jax.Array, ...]:
    """Merge the runs of each group.

    Args:
        groups: of `Blocks`.
        key_bits: uint32[U, 2].
        arrays: what the method's `prepare` returned, [U, ...].
        method, static, dtype: see `table.merge_part`; `result` is its `out`.
    """

    def merge_run(
        members: tuple[jax.Array, ...],
        base: jax.Array,
        tensor: jax.Array,
        offset: jax.Array,
    ) -> jax.Array:
        part = parts.Part(members, base, key_bits[tensor], offset)
        prepared = {name: x[tensor] for name, x in arrays.items()}
        return table.merge_part(
            part, prepared, method=method, static=static, dtype=dtype, out=result
        )

    return tuple(_map_runs(merge_run, runs) for runs in groups)


@partial(jax.jit, static_argnames=("function", "static", "dtype"))
def _measure_runs(
    groups: tuple[_Runs, ...],
    key_bits: jax.Array,
    *arrays: parts.ArrayTree,
    function: Callable[..., parts.ArrayTree],
    static: parts.Static,
    dtype: DTypeLike,
) -> tuple[parts.ArrayTree, ...]:
    """Return `function` of each run of each group, with a leading axis `K`."""

    def measure_run(
        members: tuple[jax.Array, ...], base: jax.Array, tensor: jax.Array, offset: jax.Array
    ) -> parts.ArrayTree:
        part = parts.Part(members, base, key_bits[tensor], offset)
        return function(parts.round_models(part, dtype), *arrays, **dict(static))

    return tuple(_map_runs(measure_run, runs) for runs in groups)


def _map_runs(function: Callable[..., parts.ArrayTree], runs: _Runs) -> parts.ArrayTree:
    return jax.vmap(function)(
        selection.unstack(runs.members), runs.base, runs.tensors, runs.offsets
    )
