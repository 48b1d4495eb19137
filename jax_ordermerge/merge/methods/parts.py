"""A tensor seen in parts: what a merge method may ask of the tensor, and what it computes on.

A method is a pair of functions:

- `prepare(tensor, **parameters)` runs on the host, once per Hugging Face tensor. It may ask for
  sums over all elements. It returns a dict: arrays become arguments of `apply`, everything else
  selects a program.
- `apply(part, **prepared)` is pure and runs on the device, on any run of elements (or of rows).

Files are thus merged in slabs and a population on a mesh in one piece, with the same bits: counts
are integers, and floating-point sums have a fixed order of additions (see `reductions`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge.hash_rng import Index, element_index
from jax_ordermerge.merge.methods.reductions import fold

AnyArray = Any  # an array of jax or numpy, a tracer or a ShapeDtypeStruct
ArrayTree = Any  # a pytree of arrays
Prepared = dict[str, Any]  # what `prepare` returns: arrays, and values that select a program
Static = tuple[tuple[str, Any], ...]  # the latter, hashable
Reduce = Literal["sum", "join"]

# A function is compared by identity. One at module level selects one program; a lambda made for
# each tensor would compile for each.
_STATIC = (str, bool, int, type(None), FunctionType)


class Part(NamedTuple):
    """A run of consecutive elements of one Hugging Face tensor, in all models.

    Attributes:
        members: M arrays [*s] in the dtype that is merged. A tuple: stacking would copy them.
        base: [*s], or None.
        key_bits: uint32[2], the random key of the tensor.
        offset: uint32[2] = (lo, hi), row-major index of the first element. None is 0.
        row: number of the first leading row. None is 0. Only where parts are runs of rows.
    """

    members: tuple[AnyArray, ...]
    base: AnyArray
    key_bits: AnyArray
    offset: AnyArray = None
    row: AnyArray = None

    def floats(self) -> list[jax.Array]:
        """Return theta_i, M arrays float32[*s]."""
        # float32 also for bfloat16 files: computing in the dtype of the inputs, as mergekit does,
        # leaves up to 40 % of bfloat16 results that are not the correctly rounded ones (karcher)
        return [member.astype(jnp.float32) for member in self.members]

    def base_float(self) -> jax.Array:
        """Return theta_0, float32[*s]."""
        assert self.base is not None
        return self.base.astype(jnp.float32)

    def task_vectors(self) -> list[jax.Array]:
        """Return the task vectors tau_i = theta_i - theta_0, M arrays float32[*s]."""
        # subtracted in float32: in bfloat16 a small difference would round
        base = self.base_float()
        return [member - base for member in self.floats()]

    def indices(self) -> Index:
        """Return the row-major index of every element within the tensor."""
        return element_index(self.members[0].shape, self.offset)


class Tensor(Protocol):
    """A Hugging Face tensor of all models, as `prepare` sees it.

    Attributes:
        shape: the shape of the tensor.
        count: number of members M.
        weights: float64[M] as given by the user, None for the default.
        in_layer: whether it is part of a numbered layer, as embeddings and the head are not.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def count(self) -> int: ...

    @property
    def weights(self) -> np.ndarray | None: ...

    @property
    def in_layer(self) -> bool: ...

    def total(
        self,
        function: Callable[..., ArrayTree],
        *arrays: ArrayTree,
        reduce: Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """Return the sum of `function(part, *arrays, **static)` over the tensor.

        Args:
            function: a pure function at module level, so that its compiled program is reused.
                Integer results (uint32) are added exactly. Floating-point results are what
                `block_sums` returns, [..., blocks, 32]: both last axes are summed, always in the
                same order.
            arrays: numbers and arrays. Other values do not compile again.
            reduce: "join" concatenates integers along the last axis instead of adding them.
            among: numbers of elements. Blocks of 256 that hold none of them contribute zeros and
                may be skipped. `function` must then accept any run of elements.
            static: hashable values that select the program.

        Returns:
            The same structure in numpy: int64[...] and float64[...].
        """


class InMemoryTensor:
    """A `Tensor` that lies in memory in one piece."""

    def __init__(
        self,
        members: Sequence[jax.Array],
        base: jax.Array | None,
        *,
        weights: np.ndarray | None = None,
        key_bits: np.ndarray | None = None,
        in_layer: bool = True,
    ) -> None:
        key_bits = np.zeros(2, np.uint32) if key_bits is None else key_bits
        # a key also for methods that draw none: one signature for all programs
        self.part = Part(tuple(members), base, jnp.asarray(key_bits))
        self.shape, self.count, self.weights = tuple(members[0].shape), len(members), weights
        self.in_layer = in_layer

    def total(
        self,
        function: Callable[..., ArrayTree],
        *arrays: ArrayTree,
        reduce: Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `Tensor.total`."""
        dtype = self.part.members[0].dtype
        choices = tuple(static.items())
        sums = Sums(reduce)
        sums.add(measure(self.part, *arrays, function=function, static=choices, dtype=dtype))
        return sums.result()


class Sums:
    """Accumulates what a function returned for the parts of a tensor, in order.

    Example:
        >>> sums = Sums()
        >>> sums.add((jnp.uint32(1), jnp.ones((2, 3, 32))))
        >>> sums.add((jnp.uint32(2), jnp.ones((2, 1, 32))))
        >>> [x.tolist() for x in sums.result()]
        [3, [128.0, 128.0]]
    """

    def __init__(self, reduce: Reduce = "sum") -> None:
        self._results: list[ArrayTree] = []
        self._reduce = reduce

    def add(self, result: ArrayTree) -> None:
        """Add the result of the next part."""
        self._results.append(fetch(result))

    def result(self) -> Any:
        """Return the totals."""
        return jax.tree.map(lambda *results: combine(results, self._reduce), *self._results)


def fetch(result: ArrayTree) -> ArrayTree:
    """Copy what a function returned to the host, with each 32 partial sums added up."""
    # on the device: 32 partial sums per block become one before they are copied
    if any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(result)):
        result = _fold_floats(result)
    return jax.device_get(result)


def combine(results: Sequence[np.ndarray], reduce: Reduce) -> np.ndarray:
    """Return the total of what `fetch` returned for the parts of a tensor, in order.

    Example:
        >>> combine([np.array([1, 2]), np.array([3, 4])], "join").tolist()
        [1, 2, 3, 4]
    """
    if np.issubdtype(results[0].dtype, np.integer):
        # a part has fewer than 2^32 elements, so its counts fit into uint32; a tensor may have more
        integers = [result.astype(np.int64) for result in results]
        if reduce == "join":
            return np.concatenate(integers, axis=-1)
        return np.sum(integers, axis=0)
    # One float64 sum over all blocks in order. Adding up part by part would round at the
    # boundaries of parts, and the bits would depend on where these lie.
    return np.concatenate(results, axis=-1).astype(np.float64).sum(axis=-1)


@jax.jit
def _fold_floats(result: ArrayTree) -> ArrayTree:
    return jax.tree.map(lambda x: fold(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, result)


@functools.partial(jax.jit, static_argnames=("function", "static", "dtype"))
def measure(
    part: Part,
    *arrays: ArrayTree,
    function: Callable[..., ArrayTree],
    static: Static,
    dtype: DTypeLike,
) -> ArrayTree:
    """Return `function(part, *arrays, **static)` of a part whose models are rounded to `dtype`."""
    return function(round_models(part, dtype), *arrays, **dict(static))


def round_models(part: Part, dtype: DTypeLike) -> Part:
    """Round members and base to the dtype that is merged."""
    return part._replace(
        members=tuple(round_to(member, dtype) for member in part.members),
        base=None if part.base is None else round_to(part.base, dtype),
    )


def round_to(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Cast to a dtype, and make sure that the rounding happens.

    Example:
        >>> round_to(jnp.array([1.001]), "bfloat16").tolist()
        [1.0]
    """
    # nothing to round, hence no barrier: it would also keep XLA from fusing what follows
    if x.dtype == jnp.dtype(dtype):
        return x
    # Without the barrier XLA may keep excess precision: it drops a cast to bfloat16 that is
    # followed by one back to float32.
    return jax.lax.optimization_barrier(x.astype(dtype))


def split_static(prepared: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Static]:
    """Split what `prepare` returned into arrays and the values that select a program.

    Example:
        >>> split_static({"scale": np.float32(2), "normalize": True})
        ({'scale': array(2., dtype=float32)}, (('normalize', True),))
    """
    # numpy's scalars are arguments: a number that selected the program would compile one per value
    static = {
        name: value
        for name, value in prepared.items()
        if isinstance(value, _STATIC) and not isinstance(value, np.generic)
    }
    arrays = {name: np.asarray(value) for name, value in prepared.items() if name not in static}
    return arrays, tuple(static.items())
