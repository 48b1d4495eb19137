"""A tensor seen in parts: how a merge method learns of the whole what it must know, and then merges each part alone.

A method is two functions. `known(tensor, **parameters)` runs on the host, once for each Hugging Face tensor; it may ask for sums over
all elements and returns a dict: arrays are handed to the second function as they are, everything else selects a program. `part(p,
**known)` is pure and runs on the device, on any run of elements (or of rows) of the tensor. So files are merged in slabs, a
population on a mesh in one piece, and both give the same bits: counts are integers, and floating sums are made in a fixed order.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge.merge.counter import Index, element_index

BLOCK, _LANES = 256, 32  # elements of a floating partial sum, and how many of them are added side by side
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
            among: numbers of elements; parts that hold none of them would add zeros and may be passed over.
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
    return jnp.stack(jax.lax.reduce(tuple(flag.astype(jnp.uint32) for flag in flags), zeros, add, axes))


def gram(part: Part, *, of: str) -> list[jax.Array]:
    """Return the inner products of all pairs (apart, since stacking them would take longer than adding them up), to be asked for by `tensor.total(gram, of=...)`; see `gram_matrix`."""
    vectors = part.taus() if of == "taus" else part.floats()
    if of == "models":
        vectors.append(part.base_float())
    return [block_sums(vectors[i] * vectors[j]) for i in range(len(vectors)) for j in range(i, len(vectors))]


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
    out[np.triu_indices(size)] = np.array(products)
    return out + np.triu(out, 1).T


def cut_of_largest(
    tensor: Tensor,
    keep: np.ndarray,
    values: Callable[..., Sequence[jax.Array]],
    *arrays: Any,
    **static: Any,
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
    keep, size = np.asarray(keep, np.int64), math.prod(tensor.shape)
    found = _Search(keep, size)
    # among bfloat16 numbers few values are distinct, and the one where the largest end is then seen at once
    sample = tensor.total(_sample, *arrays, values=values, reduce="join", **static)
    cuts = _cuts_from_sample(np.sort(sample, axis=1)[:, ::-1], keep / size)
    while found.open.any():
        counted = tensor.total(_reached, cuts.astype(np.uint32), *arrays, values=values, **static)
        found.learn(cuts, counted.reshape(cuts.shape))
        cuts = found.cuts()
    return found.low.astype(np.uint32), found.at_high


class _Search:
    """An interval for each kind of value: `keep` values or more are at or above `low`, fewer than `keep` at or above `high`."""

    def __init__(self, keep: np.ndarray, size: int) -> None:
        self._keep = keep
        self.low, self.high = np.zeros(len(keep), np.int64), np.full(len(keep), 1 << 32, np.int64)
        self._at_low, self.at_high = np.full(len(keep), size, np.int64), np.zeros(len(keep), np.int64)

    @property
    def open(self) -> np.ndarray:
        return self.high - self.low > 1

    def cuts(self) -> np.ndarray:
        """Return int64[K, 3]: where few values are left, quarters of the interval; else its middle and both sides of a straight line.

        If the values were spread evenly, a standard deviation of where the line misses would be sqrt(values) / 2 of them. Three cuts
        tell most for the time they take: two bits a pass.
        """
        low, width = self.low[:, None], (self.high - self.low)[:, None]
        inside = np.maximum(self._at_low - self.at_high, 4)[:, None]
        quarters = low + width * np.array([1, 2, 3]) / 4
        line = low + width * ((self._at_low - self._keep)[:, None] / inside)
        aside = np.maximum(1.5 * width / (2 * np.sqrt(inside)), 1)
        guesses = np.concatenate([line - aside, low + width / 2, line + aside], axis=1)
        cuts = np.where(inside < 64, quarters, guesses).astype(np.int64)
        return np.clip(cuts, np.minimum(low + 1, (1 << 32) - 1), np.maximum(self.high[:, None] - 1, 1))

    def learn(self, cuts: np.ndarray, counted: np.ndarray) -> None:
        """Narrow the intervals by how many values are at or above each cut."""
        for cut, count in zip(cuts.T, counted.T, strict=True):
            inside = (cut > self.low) & (cut < self.high)
            down, up = inside & (count >= self._keep), inside & (count < self._keep)
            self.low, self._at_low = np.where(down, cut, self.low), np.where(down, count, self._at_low)
            self.high, self.at_high = np.where(up, cut, self.high), np.where(up, count, self.at_high)
        # all from `low` on are kept, so nothing is chosen among equals: the search is over
        exact = (self._at_low == self._keep) & self.open & (self.low > 0)
        self.high, self.at_high = np.where(exact, self.low, self.high), np.where(exact, self._keep, self.at_high)
        self.low, self._at_low = np.where(exact, self.low - 1, self.low), np.where(exact, self._keep + 1, self._at_low)


def _cuts_from_sample(sample: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return int64[K, 4]: the value where the largest end in a sample [K, m], the next greater, and values around them."""
    count = sample.shape[1]
    at = (fraction * count)[:, None] + np.sqrt(count * fraction * (1 - fraction))[:, None] * np.array([3.5, 0, -3.5])
    low, middle, high = np.take_along_axis(sample, at.clip(0, count - 1).astype(np.int64), axis=1).T
    return np.stack([low, middle, middle + 1, high + 1], axis=1).clip(1, (1 << 32) - 1)


def _sample(part: Part, *arrays: Any, values: Callable[..., Sequence[jax.Array]], **static: Any) -> jax.Array:
    """Return evenly placed values of a part, uint32[K, m]."""
    found = [x.ravel() for x in values(part, *arrays, **static)]
    stride = max(1, found[0].size // 2048)
    return jnp.stack([x[::stride] for x in found])


def _reached(part: Part, cuts: jax.Array, *arrays: Any, values: Callable[..., Sequence[jax.Array]], **static: Any) -> jax.Array:
    found = values(part, *arrays, **static)
    return counts([x >= cuts[i, j] for i, x in enumerate(found) for j in range(cuts.shape[1])])


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
        sums.add(measure(self.part, *arrays, function=function, static=tuple(static.items()), dtype=self.part.members[0].dtype))
        return sums.result()


class Sums:
    """Adds what a function gave for the parts of a tensor, which come in order.

    Example:
        >>> sums = Sums()
        >>> for part in ((jnp.uint32(1), jnp.ones((2, 3, 32))), (jnp.uint32(2), jnp.ones((2, 1, 32)))):
        ...     sums.add(part)
        >>> [x.tolist() for x in sums.result()]
        [3, [128.0, 128.0]]
    """

    def __init__(self, reduce: Reduce = "sum") -> None:
        self._found: list[Any] = []
        self._reduce = reduce

    def add(self, found: Any) -> None:
        """Take the result of one part."""
        self._found.append(jax.device_get(_fold_floats(found)))

    def result(self) -> Any:
        """Return the totals."""
        return jax.tree.map(self._add_parts, *self._found)

    def _add_parts(self, *parts: np.ndarray) -> np.ndarray:
        if np.issubdtype(parts[0].dtype, np.integer):
            whole = [part.astype(np.int64) for part in parts]
            return np.concatenate(whole, axis=-1) if self._reduce == "join" else np.sum(whole, axis=0)
        return np.concatenate(parts, axis=-1).astype(np.float64).sum(axis=-1)


@jax.jit
def _fold_floats(found: Any) -> Any:
    return jax.tree.map(lambda x: fold(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, found)


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
