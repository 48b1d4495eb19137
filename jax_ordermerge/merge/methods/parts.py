"""A tensor seen in parts: how a merge method learns of the whole what it must know, and then merges each part alone.

A method is two functions. `known(tensor, **parameters)` runs on the host, once for each Hugging Face tensor; it may ask for sums over
all elements and returns a dict: arrays are handed to the second function as they are, everything else selects a program. `part(p,
**known)` is pure and runs on the device, on any run of elements (or of rows) of the tensor. So files are merged in slabs, a
population on a mesh in one piece, and both give the same bits: counts are integers, and floating sums are made in a fixed order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge.hash_rng import Index, element_index

BLOCK, _LANES = (
    256,
    32,
)  # elements of a floating partial sum, and how many of them are added side by side
_STATIC = (str, bool, int, type(None))
Reduce = Literal["sum", "join"]


class Part(NamedTuple):
    """A run of consecutive elements of one Hugging Face tensor, in all models.

    Attributes:
        members: M arrays [*s] in the dtype that is merged; apart and not stacked, since stacking would copy them.
        base: [*s], or None.
        words: uint32[2], the key of the tensor.
        offset: uint32[2] = (lo, hi), row-major index of the first element; None is 0.
        row: number of the first leading row; None is 0. Only where parts are whole rows.
    """

    members: tuple[Any, ...]
    base: Any
    words: Any
    offset: Any = None
    row: Any = None

    def floats(self) -> list[jax.Array]:
        """Return theta_i, M arrays float32[*s]."""
        return [member.astype(jnp.float32) for member in self.members]

    def base_float(self) -> jax.Array:
        """Return theta_0, float32[*s]."""
        assert self.base is not None
        return self.base.astype(jnp.float32)

    def task_vectors(self) -> list[jax.Array]:
        """Return the task vectors tau_i = theta_i - theta_0, M arrays float32[*s]."""
        base = self.base_float()
        return [member - base for member in self.floats()]

    def indices(self) -> Index:
        """Return the row-major index of every element within the tensor."""
        return element_index(self.members[0].shape, self.offset)


class Tensor(Protocol):
    """What `known` sees of a Hugging Face tensor.

    Attributes:
        shape: of the whole tensor.
        count: number of members M.
        weights: float64[M] as given, None for the default.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def count(self) -> int: ...

    @property
    def weights(self) -> np.ndarray | None: ...

    def total(
        self,
        function: Callable[..., Any],
        *arrays: Any,
        reduce: Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """Return the sum of `function(part, *arrays, **static)` over the tensor.

        Args:
            function: a function of a module, pure. Integer results (uint32) are added exactly. Floating results are what
                `block_sums` returns, [..., blocks, 32]: they are added up along both last axes, always in the same order.
            arrays: numbers and arrays it takes; they do not make it compile again.
            reduce: "join" puts the integers one after another along the last axis instead of adding them.
            among: numbers of elements; blocks of 256 that hold none of them would add zeros and may be passed over. The function then
                takes any run of elements.
            static: hashable choices.

        Returns:
            The same structure in numpy: int64[...] and float64[...].
        """


def rounded(x: jax.Array) -> jax.Array:
    """Return x, an array of products, in a way that keeps a following addition from being contracted with the multiplication.

    XLA computes x y + z with one rounding where both operations come to lie in one fusion, and which do depends on the shape and the
    mesh; so without this the last bit does too. (`optimization_barrier` and a no-op `reduce_precision` are removed before fusion.)

    Example:
        >>> rounded(jnp.array([0.1, jnp.inf, jnp.nan])).tolist()
        [0.10000000149011612, inf, nan]
    """
    return jnp.where(jnp.isnan(x), jnp.nan, x)


def block_sums(x: jax.Array) -> jax.Array:
    """Sum runs of 256 consecutive elements in one fixed order of additions: the same bits for any slab and on any mesh.

    Half of the way: 32 sums side by side, which `fold` adds up. (In one program XLA would make one slow expression of both.)

    Args:
        x: float32[*s]; the last run is filled up with zeros.

    Returns:
        float32[ceil(n / 256), 32].

    Example:
        >>> fold(block_sums(jnp.ones(600))).tolist()
        [256.0, 256.0, 88.0]
    """
    if x.size == 0:
        return jnp.zeros((0, _LANES), jnp.float32)
    x = rounded(x)
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        x = jnp.pad(x.ravel(), (0, -x.size % BLOCK))
    x = x.reshape(*x.shape[:-1], -1, BLOCK // _LANES, _LANES)
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    return x.reshape(-1, _LANES)


def fold(x: jax.Array) -> jax.Array:
    """Add up the last axis, a power of two long, in one fixed order.

    Example:
        >>> fold(jnp.arange(4.0)).item()
        6.0
    """
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def counts(flags: Sequence[jax.Array], axes: Sequence[int] | None = None) -> jax.Array:
    """Count the true elements of each array, in one pass over memory.

    Args:
        flags: K arrays bool[*s] of fewer than 2^32 elements.
        axes: along which to count, by default all.

    Returns:
        uint32[K], or uint32[K, *rest of s].

    Example:
        >>> counts([jnp.array([True, False]), jnp.array([True, True])]).tolist()
        [1, 2]
    """
    zeros = tuple(jnp.uint32(0) for _ in flags)
    axes = tuple(range(flags[0].ndim)) if axes is None else tuple(axes)
    add = functools.partial(jax.tree.map, jnp.add)
    return jnp.stack(
        jax.lax.reduce(tuple(flag.astype(jnp.uint32) for flag in flags), zeros, add, axes)
    )


def gram(part: Part, *, of: str) -> list[jax.Array]:
    """Return the inner products of all pairs (apart, since stacking them would take longer than adding them up), to be asked for by `tensor.total(gram, of=...)`; see `gram_matrix`."""
    vectors = part.task_vectors() if of == "task_vectors" else part.floats()
    if of == "models":
        vectors.append(part.base_float())
    return [
        block_sums(vectors[i] * vectors[j])
        for i in range(len(vectors))
        for j in range(i, len(vectors))
    ]


def gram_matrix(tensor: Tensor, of: str) -> np.ndarray:
    """Return the matrix of inner products <x_i, x_j>, float64.

    Args:
        tensor: the tensor.
        of: "members" (theta_i), "models" (theta_i, and theta_0 as the last), or "task_vectors" (theta_i - theta_0).

    Example:
        >>> gram_matrix(
        ...     InMemoryTensor([jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])], None), "members"
        ... ).tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    products = tensor.total(gram, of=of)
    size = tensor.count + (of == "models")
    out = np.zeros((size, size))
    out[np.triu_indices(size)] = np.array(products)
    return out + np.triu(out, 1).T


class InMemoryTensor:
    """A tensor in one piece in memory, as a `Tensor`."""

    def __init__(
        self,
        members: Sequence[jax.Array],
        base: jax.Array | None,
        *,
        weights: np.ndarray | None = None,
        words: np.ndarray | None = None,
    ) -> None:
        self.part = Part(
            tuple(members), base, jnp.asarray(np.zeros(2, np.uint32) if words is None else words)
        )
        self.shape, self.count, self.weights = tuple(members[0].shape), len(members), weights

    def total(
        self,
        function: Callable[..., Any],
        *arrays: Any,
        reduce: Reduce = "sum",
        among: Sequence[int] | None = None,
        **static: Any,
    ) -> Any:
        """See `Tensor.total`."""
        sums = Sums(reduce)
        sums.add(
            measure(
                self.part,
                *arrays,
                function=function,
                static=tuple(static.items()),
                dtype=self.part.members[0].dtype,
            )
        )
        return sums.result()


class Sums:
    """Adds what a function gave for the parts of a tensor, which come in order.

    Example:
        >>> sums = Sums()
        >>> for part in (
        ...     (jnp.uint32(1), jnp.ones((2, 3, 32))),
        ...     (jnp.uint32(2), jnp.ones((2, 1, 32))),
        ... ):
        ...     sums.add(part)
        >>> [x.tolist() for x in sums.result()]
        [3, [128.0, 128.0]]
    """

    def __init__(self, reduce: Reduce = "sum") -> None:
        self._found: list[Any] = []
        self._reduce = reduce

    def add(self, found: Any) -> None:
        """Take the result of one part."""
        if any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(found)):
            found = _fold_floats(found)
        self._found.append(jax.device_get(found))

    def result(self) -> Any:
        """Return the totals."""
        return jax.tree.map(self._add_parts, *self._found)

    def _add_parts(self, *parts: np.ndarray) -> np.ndarray:
        if np.issubdtype(parts[0].dtype, np.integer):
            whole = [part.astype(np.int64) for part in parts]
            return (
                np.concatenate(whole, axis=-1) if self._reduce == "join" else np.sum(whole, axis=0)
            )
        return np.concatenate(parts, axis=-1).astype(np.float64).sum(axis=-1)


@jax.jit
def _fold_floats(found: Any) -> Any:
    return jax.tree.map(lambda x: fold(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, found)


@functools.partial(jax.jit, static_argnames=("function", "static", "dtype"))
def measure(
    part: Part,
    *arrays: Any,
    function: Callable[..., Any],
    static: tuple[tuple[str, Any], ...],
    dtype: DTypeLike,
) -> Any:
    """Return `function(part, *arrays, **static)` of a part rounded to `dtype` first."""
    return function(stored(part, dtype), *arrays, **dict(static))


def stored(part: Part, dtype: DTypeLike) -> Part:
    """Round the models to the dtype that is merged."""
    return part._replace(
        members=tuple(as_stored(member, dtype) for member in part.members),
        base=None if part.base is None else as_stored(part.base, dtype),
    )


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


def split(known: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], tuple[tuple[str, Any], ...]]:
    """Separate what `known` returned into arrays and the choices that select a program.

    Example:
        >>> split({"scale": np.float32(2), "normalize": True})
        ({'scale': array(2., dtype=float32)}, (('normalize', True),))
    """
    static = tuple(
        (name, value)
        for name, value in known.items()
        if isinstance(value, _STATIC) and not isinstance(value, np.generic)
    )
    chosen = dict(static)
    return {name: np.asarray(value) for name, value in known.items() if name not in chosen}, static
