"""A tensor seen in parts: how a merge method learns of the whole what it must know, and then merges each part alone.

A method is two functions. `known(tensor, **parameters)` runs on the host, once for each Hugging Face tensor; it may ask for sums over
all elements and returns a dict: arrays are handed to the second function as they are, everything else selects a program. `part(p,
**known)` is pure and runs on the device, on any run of elements (or of rows) of the tensor. So files are merged in slabs, a
population on a mesh in one piece, and both give the same bits: counts are integers, and floating sums are made in a fixed order.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge.merge.counter import Index, element_index

BLOCK, _LANES = 256, 32  # elements of a floating partial sum, and how many of them are added side by side
_STATIC = (str, bool, int, type(None))


class Part(NamedTuple):
    """A run of consecutive elements of one Hugging Face tensor, in all models.

    Attributes:
        members: M arrays [*s] in the dtype that is merged; apart and not stacked, since stacking would copy them.
        base: [*s], or None.
        words: uint32[2], the key of the tensor.
        offset: uint32[2] = (lo, hi), row-major index of the first element; None is 0.
        row: number of the first leading row; None is 0. Only where parts are whole rows.
    """

    members: tuple[jax.Array, ...]
    base: jax.Array | None
    words: jax.Array
    offset: jax.Array | None = None
    row: jax.Array | None = None

    def floats(self) -> list[jax.Array]:
        """Return theta_i, M arrays float32[*s]."""
        return [member.astype(jnp.float32) for member in self.members]

    def base_float(self) -> jax.Array:
        """Return theta_0, float32[*s]."""
        assert self.base is not None
        return self.base.astype(jnp.float32)

    def taus(self) -> list[jax.Array]:
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

    def total(self, function: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
        """Return the sum of `function(part, *arrays, **static)` over the tensor.

        Args:
            function: a function of a module, pure. Integer results (uint32) are added exactly. Floating results are what
                `block_sums` returns, [..., blocks]: they are added in float64 along the last axis, always in the same order.
            arrays: numbers and arrays it takes; they do not make it compile again.
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

    Args:
        x: float32[*s]; the last run is filled up with zeros.

    Returns:
        float32[ceil(n / 256)].

    Example:
        >>> block_sums(jnp.ones(600)).tolist()
        [256.0, 256.0, 88.0]
    """
    if x.size == 0:
        return jnp.zeros(0, jnp.float32)
    x = rounded(x)
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        x = jnp.pad(x.ravel(), (0, -x.size % BLOCK))
    x = x.reshape(*x.shape[:-1], -1, BLOCK // _LANES, _LANES)
    while x.shape[-2] > 1:
        half = x.shape[-2] // 2
        x = x[..., :half, :] + x[..., half:, :]
    # two passes: one expression of 256 terms would be slow code
    x = jax.lax.optimization_barrier(x[..., 0, :])
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x.ravel()


def counts(flags: Sequence[jax.Array]) -> jax.Array:
    """Count the true elements of each array, in one pass over memory.

    Args:
        flags: K arrays bool[*s] of fewer than 2^32 elements.

    Returns:
        uint32[K].

    Example:
        >>> counts([jnp.array([True, False]), jnp.array([True, True])]).tolist()
        [1, 2]
    """
    zeros = tuple(jnp.uint32(0) for _ in flags)
    axes = tuple(range(flags[0].ndim))
    add = functools.partial(jax.tree.map, jnp.add)
    return jnp.stack(jax.lax.reduce(tuple(flag.astype(jnp.uint32) for flag in flags), zeros, add, axes))


def gram(part: Part, *, of: str) -> jax.Array:
    """Return the inner products of all pairs, to be asked for by `tensor.total(gram, of=...)`; see `gram_matrix`."""
    vectors = part.taus() if of == "taus" else part.floats()
    if of == "models":
        vectors.append(part.base_float())
    return jnp.stack([block_sums(vectors[i] * vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))])


def gram_matrix(tensor: Tensor, of: str) -> np.ndarray:
    """Return the matrix of inner products <x_i, x_j>, float64.

    Args:
        tensor: the tensor.
        of: "members" (theta_i), "models" (theta_i, and theta_0 as the last), or "taus" (theta_i - theta_0).

    Example:
        >>> gram_matrix(Whole([jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])], None), "members").tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    products = tensor.total(gram, of=of)
    size = tensor.count + (of == "models")
    out = np.zeros((size, size))
    out[np.triu_indices(size)] = products
    return out + np.triu(out, 1).T


def cut_of_largest(
    tensor: Tensor, keep: np.ndarray, values: Callable[..., Sequence[jax.Array]], *arrays: Any, **static: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Find where the `keep` largest values end, by counting only: no sort, and nothing is gathered from a mesh.

    Args:
        tensor: the tensor.
        keep: int[K], at least 1 and at most the number of elements, how many of each kind of value to keep.
        values: `values(part, *arrays, **static)` returns K arrays uint32[*s]. (For floats that are not negative, the order of the
            bits is the order of the numbers.) Where only some elements compete, the others have the value 0.

    Returns:
        cut uint32[K] and above int64[K]: exactly `above` <= keep values are greater than the cut; the rest is to be chosen among
        those equal to it. `above` equals `keep` where no value need be chosen (the cut then lies somewhere between two values).

    Example:
        >>> values = Whole([jnp.array([1.0, 2.0, 2.0, 3.0])], None)
        >>> cut, above = cut_of_largest(values, np.array([2]), _magnitudes_of_members)
        >>> float(cut.view(np.float32)[0]), above.tolist()
        (2.0, [1])
    """
    keep = np.asarray(keep, np.int64)
    low, high = np.zeros(len(keep), np.int64), np.full(len(keep), 1 << 32, np.int64)  # at or above low: >= keep; above high: < keep
    at_low, at_high = np.full(len(keep), np.prod(tensor.shape, dtype=np.int64)), np.zeros(len(keep), np.int64)
    while (high - low > 1).any():
        cuts = _next_cuts(low, high, at_low, at_high, keep)
        reached = tensor.total(_reached, cuts.astype(np.uint32), *arrays, values=values, **static).reshape(cuts.shape)
        for column in range(cuts.shape[1]):
            cut, count = cuts[:, column], reached[:, column]
            inside = (cut > low) & (cut < high)
            down, up = inside & (count >= keep), inside & (count < keep)
            low, at_low = np.where(down, cut, low), np.where(down, count, at_low)
            high, at_high = np.where(up, cut, high), np.where(up, count, at_high)
        exact = (at_low == keep) & (high - low > 1) & (low > 0)
        # all from `low` on are kept, so nothing is chosen among equals: the search is over
        high, at_high = np.where(exact, low, high), np.where(exact, keep, at_high)
        low, at_low = np.where(exact, low - 1, low), np.where(exact, keep + 1, at_low)
    return low.astype(np.uint32), at_high


def _reached(part: Part, cuts: jax.Array, *arrays: Any, values: Callable[..., Sequence[jax.Array]], **static: Any) -> jax.Array:
    found = values(part, *arrays, **static)
    return counts([x >= cuts[i, j] for i, x in enumerate(found) for j in range(cuts.shape[1])])


def _next_cuts(low: np.ndarray, high: np.ndarray, at_low: np.ndarray, at_high: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Return int64[K, 3] cuts: quarters of a wide interval, and of a narrow one its middle and both sides of a straight line's guess."""
    width = high - low
    quarters = low[:, None] + np.maximum(width[:, None] * np.array([1, 2, 3]) // 4, 1)
    line = low + width * (at_low - keep) / np.maximum(at_low - at_high, 1)
    aside = np.maximum(width // 32, 1)
    guesses = np.stack([line - aside, low + width / 2, line + aside], axis=1).astype(np.int64)
    cuts = np.where((width > 1 << 24)[:, None], quarters, guesses)
    return np.clip(cuts, np.minimum(low + 1, (1 << 32) - 1)[:, None], np.maximum(high - 1, 1)[:, None])


def _magnitudes_of_members(part: Part) -> list[jax.Array]:
    return [jax.lax.bitcast_convert_type(jnp.abs(x), jnp.uint32) for x in part.floats()]


class Whole:
    """A tensor in one piece in memory, as a `Tensor`."""

    def __init__(
        self,
        members: Sequence[jax.Array],
        base: jax.Array | None,
        *,
        weights: np.ndarray | None = None,
        words: np.ndarray | None = None,
    ) -> None:
        self.part = Part(tuple(members), base, jnp.asarray(np.zeros(2, np.uint32) if words is None else words))
        self.shape, self.count, self.weights = tuple(members[0].shape), len(members), weights

    def total(self, function: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
        """See `Tensor.total`."""
        sums = Sums()
        sums.add(measure(self.part, *arrays, function=function, static=tuple(static.items()), dtype=self.part.members[0].dtype))
        return sums.result()


class Sums:
    """Adds what a function gave for the parts of a tensor, which come in order.

    Example:
        >>> sums = Sums()
        >>> for part in ((jnp.uint32(1), jnp.ones((2, 3))), (jnp.uint32(2), jnp.ones((2, 1)))):
        ...     sums.add(part)
        >>> [x.tolist() for x in sums.result()]
        [3, [4.0, 4.0]]
    """

    def __init__(self) -> None:
        self._found: list[Any] = []

    def add(self, found: Any) -> None:
        """Take the result of one part."""
        self._found.append(jax.device_get(found))

    def result(self) -> Any:
        """Return the totals."""
        return jax.tree.map(_add_parts, *self._found)


def _add_parts(*parts: np.ndarray) -> np.ndarray:
    if np.issubdtype(parts[0].dtype, np.integer):
        return np.sum([part.astype(np.int64) for part in parts], axis=0)
    return np.concatenate(parts, axis=-1).astype(np.float64).sum(axis=-1)


@functools.partial(jax.jit, static_argnames=("function", "static", "dtype"))
def measure(part: Part, *arrays: Any, function: Callable[..., Any], static: tuple[tuple[str, Any], ...], dtype: DTypeLike) -> Any:
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
        (name, value) for name, value in known.items() if isinstance(value, _STATIC) and not isinstance(value, np.generic)
    )
    chosen = dict(static)
    return {name: np.asarray(value) for name, value in known.items() if name not in chosen}, static
