"""The k largest values of a tensor and its order statistics, found by counting.

Why not by sorting: a sort of a sharded tensor gathers it, and costs many passes over memory.
Counting how many values reach a few thresholds is one pass, works slab by slab and on any mesh, and
is exact because counts are integers. Ties are broken in a defined way everywhere.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.hash_rng import mix
from jax_ordermerge.merge.methods.parts import ArrayTree, Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import BLOCK, count_true

_GUESS = 1  # which of the first thresholds is the expected cut, see `_thresholds_from_sample`
Values = Callable[..., Sequence[jax.Array]]
# Elements of a tensor whose values are copied to the host and ranked there: one program and one
# pass, where counting takes four programs and some ten passes, each of which the host waits for.
_ON_HOST = 1 << 18


def magnitudes(part: Part) -> list[jax.Array]:
    """Return the bits of |tau_i| as uint32, M arrays.

    The order of the integers is the order of the magnitudes, with NaN the largest.
    """
    # `abs` clears the sign bit: -0.0 counts as 0.0, and without signs bits sort like numbers
    return [jax.lax.bitcast_convert_type(jnp.abs(tau), jnp.uint32) for tau in part.task_vectors()]


# ------------------------------------------------------------------------------- the k largest


class Place(NamedTuple):
    """Where elements stand among those of equal value: by rank of their block, then within it.

    A block is 256 consecutive elements, row-major. Its rank is the hash of its number
    (`hash_rng.mix`, a bijection). Ties thus go to complete blocks anywhere in the tensor: defined,
    the same everywhere, and without preference for a part of the tensor.

    Attributes:
        block: uint32[*s], rank of the block.
        within: uint32[*s], position in the block.
    """

    # why not a rank of every element: in bfloat16 many elements tie at a cut, and such ranks would
    # have to be searched bit by bit, while blocks are counted in one pass
    block: jax.Array
    within: jax.Array


def places(part: Part) -> Place:
    """Return the `Place` of every element of a part."""
    index = part.indices()
    if index.lo.shape[-1:] != (BLOCK,):
        return Place(mix(_block_number(index.lo, index.hi)), index.lo & (BLOCK - 1))
    # Rows of the length of a block touch one block, or two where the part does not begin with one.
    # A compiler takes the hashes of the two out of the loop over a row, where they cost the most.
    lo, hi = index.lo[..., :1], index.hi[..., :1]
    position = (lo & (BLOCK - 1)) + jax.lax.broadcasted_iota(
        jnp.uint32, index.lo.shape, index.lo.ndim - 1
    )
    first = _block_number(lo, hi)
    block = jnp.where(position < BLOCK, mix(first), mix(first + 1))
    return Place(block, position & (BLOCK - 1))


def _block_number(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Return the number of the block of an element whose index is (lo, hi)."""
    shift = BLOCK.bit_length() - 1
    # the block number fits into uint32 up to 2^40 elements
    return (lo >> shift) | (hi << (32 - shift))


def find_largest(
    tensor: Tensor, keep: np.ndarray, values: Values, *arrays: ArrayTree
) -> dict[str, np.ndarray]:
    """Find the `keep_i` largest values of each kind i, with ties broken by `places`.

    Args:
        tensor: of n elements.
        keep: int[K], from 0 to n.
        values: a function at module level, `values(part, *arrays)` -> K arrays uint32 below
            2^32 - 1.
        arrays: what `values` takes.

    Returns:
        least, block and within, uint32[K] each, for `is_largest`: values from `least` on are kept.
        Of the values least - 1, those in blocks of a lower rank than `block` are kept, and in the
        block of this rank those before `within`.
    """
    keep = np.asarray(keep, np.int64)
    size = math.prod(tensor.shape)
    # the search needs 1 .. n; kinds that keep nothing or everything are set right at the end
    counts: _Counts = (_OnHost if size <= _ON_HOST else _OnDevices)(tensor, values, arrays)
    cut, above = counts.cut(np.clip(keep, 1, size))
    nothing, everything = keep <= 0, keep >= size
    ties = np.where(nothing | everything, 0, keep - above)  # how many equal values are kept
    block, within = np.zeros(len(keep), np.int64), np.zeros(len(keep), np.int64)
    if ties.any():
        equal = counts.equal_by_block(cut, ties > 0)
        # the block in which the last kept value lies, and how many values of it are kept
        ranks, order = _block_ranks(equal.shape[1])
        cumulative = np.cumsum(equal[:, order], axis=1)
        nth = (cumulative[:, :-1] < ties[:, None]).sum(axis=1)
        last, kind = order[nth], np.arange(len(keep))
        missing = ties - (cumulative[kind, nth] - equal[kind, last])
        flags = counts.equal_in_block(cut, last)
        position = (np.cumsum(flags[:, :-1], axis=1) < missing[:, None]).sum(axis=1) + 1
        block, within = np.where(ties > 0, ranks[last], 0), np.where(ties > 0, position, 0)
    least = np.where(everything, 0, cut.astype(np.int64) + 1)
    return {
        # values are below 2^32 - 1, so this least keeps none
        "least": np.where(nothing, 0xFFFFFFFF, least).astype(np.uint32),
        "block": block.astype(np.uint32),
        "within": within.astype(np.uint32),
    }


class _Counts(Protocol):
    """What `find_largest` asks of a tensor, of K kinds of values."""

    def cut(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return where the `keep` largest values end, uint32[K], and how many are greater."""

    def equal_by_block(self, cut: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        """Count the values equal to the cut, int64[K, blocks], right where bool[K] `kinds` is."""

    def equal_in_block(self, cut: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Return which values of one block are equal to the cut, bool[K, 256]."""


class _OnDevices:
    """Counts by passes over the tensor."""

    def __init__(self, tensor: Tensor, values: Values, arrays: Sequence[ArrayTree]) -> None:
        self._tensor, self._values, self._arrays = tensor, values, arrays

    def cut(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self._cut = cut_of_largest(self._tensor, keep, self._values, *self._arrays)
        return self._cut.value, self._cut.above

    def equal_by_block(self, cut: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        # the first pass of the search counted the blocks at its guess; one more where that was
        # wrong
        if (cut == self._cut.guess)[kinds].all():
            return self._cut.equal
        counts: np.ndarray = self._tensor.total(
            _equal_by_block, cut, *self._arrays, of=self._values, reduce="join"
        )
        return counts

    def equal_in_block(self, cut: np.ndarray, block: np.ndarray) -> np.ndarray:
        bits = self._tensor.total(
            _equal_in_block,
            cut,
            block.astype(np.uint32),
            *self._arrays,
            of=self._values,
            among=(BLOCK * block).tolist(),
        )
        # little endian on every host: bit b of word w is element 32 w + b of the block
        return np.unpackbits(bits.astype("<u4").view(np.uint8), axis=1, bitorder="little") > 0


class _OnHost:
    """Counts of the values of a small tensor, which are read once."""

    def __init__(self, tensor: Tensor, values: Values, arrays: Sequence[ArrayTree]) -> None:
        joined = tensor.total(_all_values, *arrays, values=values, reduce="join")
        self._values = joined.astype(np.uint32)

    def cut(self, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size = self._values.shape[1]
        cut = np.array(
            [np.partition(x, size - k)[size - k] for x, k in zip(self._values, keep, strict=True)]
        )
        return cut, (self._values > cut[:, None]).sum(axis=1)

    def equal_by_block(self, cut: np.ndarray, kinds: np.ndarray) -> np.ndarray:
        return self._equal(cut).sum(axis=2)

    def equal_in_block(self, cut: np.ndarray, block: np.ndarray) -> np.ndarray:
        return self._equal(cut)[np.arange(len(cut)), block]

    def _equal(self, cut: np.ndarray) -> np.ndarray:
        """Return which values are equal to the cut, bool[K, blocks, 256]."""
        equal = self._values == cut[:, None]
        padded = np.pad(equal, ((0, 0), (0, -equal.shape[1] % BLOCK)))
        return padded.reshape(len(cut), -1, BLOCK)


def _all_values(part: Part, *arrays: ArrayTree, values: Values) -> jax.Array:
    """Return the values of a part, uint32[K, n]."""
    return jnp.stack([x.ravel() for x in values(part, *arrays)])


def is_largest(value: jax.Array, place: Place, largest: Prepared, i: int) -> jax.Array:
    """Return bool[*s]: whether a value of kind i is among the largest.

    Args:
        value: uint32[*s].
        place: `places` of the part.
        largest: what `find_largest` returned.
        i: the kind.
    """
    # One comparison: a value equal to least - 1 that comes early enough counts as one more. The sum
    # block + 1 fits, since the block of rank 2^32 - 1 lies 9e11 elements in.
    next_block = (place.within < largest["within"][i]).astype(jnp.uint32)
    early = place.block < largest["block"][i] + next_block
    return value + early.astype(jnp.uint32) >= largest["least"][i]


@functools.lru_cache(maxsize=8)
def _block_ranks(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of each block of a tensor, and the blocks in the order of their ranks."""
    # cached: the tensors of a model have few sizes, and sorting takes a tenth of a merge
    ranks = mix(np.arange(count, dtype=np.uint32))
    return ranks, np.argsort(ranks)


def _equal_by_block(part: Part, cut: jax.Array, *arrays: ArrayTree, of: Values) -> jax.Array:
    """Count the values equal to the cut, uint32[K, blocks]."""
    return count_true([_in_blocks(x == cut[i]) for i, x in enumerate(of(part, *arrays))], (1,))


def _equal_in_block(
    part: Part, cut: jax.Array, block: jax.Array, *arrays: ArrayTree, of: Values
) -> jax.Array:
    """Return which values of one block are equal to the cut, one bit each: uint32[K, 8]."""
    first = 0 if part.offset is None else _block_number(*part.offset)
    bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    packed = []
    for i, x in enumerate(of(part, *arrays)):
        flags = _in_blocks(x == cut[i]).reshape(-1, BLOCK // 32, 32)
        words = jnp.where(flags, bits, 0).sum(-1, dtype=jnp.uint32)
        number = first + jnp.arange(len(words), dtype=jnp.uint32)
        # blocks other than the one asked for add zeros, so that `total` may skip them
        packed.append(jnp.where((number == block[i])[:, None], words, 0).sum(0, dtype=jnp.uint32))
    return jnp.stack(packed)


def _in_blocks(flags: jax.Array) -> jax.Array:
    if flags.ndim == 0 or flags.shape[-1] % BLOCK:
        flags = jnp.pad(flags.ravel(), (0, -flags.size % BLOCK))
    return flags.reshape(-1, BLOCK)


# ------------------------------------------------------------------------------- search of a cut


class Cut(NamedTuple):
    """Where the largest values of K kinds end; see `cut_of_largest`.

    Attributes:
        value: uint32[K], the cut.
        above: int64[K], how many values are greater.
        guess: uint32[K], the cut expected from a sample; among bfloat16 numbers mostly the cut.
        equal: int64[K, blocks], how many values of each block of 256 are equal to the guess.
    """

    value: np.ndarray
    above: np.ndarray
    guess: np.ndarray
    equal: np.ndarray


def cut_of_largest(tensor: Tensor, keep: np.ndarray, values: Values, *arrays: ArrayTree) -> Cut:
    """Find where the `keep` largest values end, by counting only.

    Args:
        tensor: the tensor.
        keep: int[K], from 1 to the number of elements: how many of each kind of value to keep.
        values: `values(part, *arrays)` returns K arrays uint32[*s]. For floats that are not
            negative the order of the bits is the order of the numbers. Where only some elements
            compete, the others have the value 0.
        arrays: what `values` takes.

    Returns:
        The cut. Exactly `above` <= keep values are greater; the rest is to be chosen among those
        equal to the cut. `above` equals `keep` where nothing need be chosen (the cut then lies
        between two values).

    Example:
        >>> from jax_ordermerge.merge.methods.parts import InMemoryTensor
        >>> tensor = InMemoryTensor([jnp.array([1.0, 2.0, 2.0, 3.0])], jnp.zeros(4))
        >>> cut = cut_of_largest(tensor, np.array([2]), magnitudes)
        >>> float(cut.value.view(np.float32)[0]), cut.above.tolist()
        (2.0, [1])
    """
    keep, size = np.asarray(keep, np.int64), math.prod(tensor.shape)
    search = _Search(keep, size)
    # among bfloat16 numbers few values are distinct, so that a sample mostly shows the cut at once
    sample = tensor.total(_sample, *arrays, values=values, reduce="join")
    thresholds = _thresholds_from_sample(np.sort(sample, axis=1)[:, ::-1], keep / size)
    guess = thresholds[:, _GUESS].astype(np.uint32)
    # the blocks are counted in the same pass, in case the guess is right
    counts, equal = tensor.total(
        _count_with_blocks, thresholds.astype(np.uint32), *arrays, values=values, reduce="join"
    )
    search.narrow(thresholds, counts.sum(axis=-1))
    while search.open.any():
        thresholds = search.thresholds()
        counts = tensor.total(_count_reaching, thresholds.astype(np.uint32), *arrays, values=values)
        search.narrow(thresholds, counts.reshape(thresholds.shape))
    return Cut(search.low.astype(np.uint32), search.at_high, guess, equal)


class _Search:
    """An interval [low, high) of values for each of K kinds, which holds the cut.

    Invariant: `keep` values or more reach `low`, and fewer than `keep` reach `high`.
    """

    def __init__(self, keep: np.ndarray, size: int) -> None:
        kinds = len(keep)
        self._keep = keep
        # int64: the end 2^32 of the interval is no uint32
        self.low, self.high = np.zeros(kinds, np.int64), np.full(kinds, 1 << 32, np.int64)
        # how many values reach them
        self._at_low, self.at_high = np.full(kinds, size, np.int64), np.zeros(kinds, np.int64)

    @property
    def open(self) -> np.ndarray:
        return self.high - self.low > 1

    def thresholds(self) -> np.ndarray:
        """Return the values at which to count next, int64[K, 3].

        Where fewer than 64 values are left in the interval: its quarters. Elsewhere: its middle,
        and both sides of where a straight line through the counts reaches `keep`.
        """
        # three thresholds give most for the time they take: two bits per pass
        low, width = self.low[:, None], (self.high - self.low)[:, None]
        inside = np.maximum(self._at_low - self.at_high, 4)[:, None]
        quarters = low + width * np.array([1, 2, 3]) / 4
        line = low + width * ((self._at_low - self._keep)[:, None] / inside)
        # of evenly spread values the line misses by sqrt(values) / 2 values, one standard deviation
        aside = np.maximum(1.5 * width / (2 * np.sqrt(inside)), 1)
        guesses = np.concatenate([line - aside, low + width / 2, line + aside], axis=1)
        thresholds = np.where(inside < 64, quarters, guesses).astype(np.int64)
        least = np.minimum(low + 1, (1 << 32) - 1)
        return np.clip(thresholds, least, np.maximum(self.high[:, None] - 1, 1))

    def narrow(self, thresholds: np.ndarray, counts: np.ndarray) -> None:
        """Narrow the intervals, given how many values reach each threshold, both int64[K, C]."""
        for threshold, count in zip(thresholds.T, counts.T, strict=True):
            inside = (threshold > self.low) & (threshold < self.high)
            self._raise_low(inside & (count >= self._keep), threshold, count)
            self._lower_high(inside & (count < self._keep), threshold, count)
        # all values from `low` on are kept, so none is chosen among equals: the search is over
        exact = (self._at_low == self._keep) & self.open & (self.low > 0)
        self._lower_high(exact, self.low, self._keep)
        self._raise_low(exact, self.low - 1, self._keep + 1)

    def _raise_low(self, where: np.ndarray, value: np.ndarray, count: np.ndarray) -> None:
        self.low = np.where(where, value, self.low)
        self._at_low = np.where(where, count, self._at_low)

    def _lower_high(self, where: np.ndarray, value: np.ndarray, count: np.ndarray) -> None:
        self.high = np.where(where, value, self.high)
        self.at_high = np.where(where, count, self.at_high)


def _thresholds_from_sample(sample: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return the first values at which to count, int64[K, 4].

    Args:
        sample: [K, m], descending.
        fraction: [K], of the values that are kept.

    Returns:
        A value below the cut, the expected cut, the next greater value, and a value above.
    """
    count = sample.shape[1]
    # 3.5 standard deviations of the position of the cut in the sample
    deviation = np.sqrt(count * fraction * (1 - fraction))[:, None] * np.array([3.5, 0, -3.5])
    positions = ((fraction * count)[:, None] + deviation).clip(0, count - 1).astype(np.int64)
    low, middle, high = np.take_along_axis(sample, positions, axis=1).T
    return np.stack([low, middle, middle + 1, high + 1], axis=1).clip(1, (1 << 32) - 1)


def _sample(part: Part, *arrays: ArrayTree, values: Values) -> jax.Array:
    """Return evenly spaced values of a part, uint32[K, m]."""
    flat = [x.ravel() for x in values(part, *arrays)]
    # 2,048 values of a part or somewhat more: the position of the cut among m values has a standard
    # deviation of at most sqrt(m) / 2, about 1 % of the sample
    stride = max(1, flat[0].size // 2048)
    return jnp.stack([x[::stride] for x in flat])


def _count_with_blocks(
    part: Part, thresholds: jax.Array, *arrays: ArrayTree, values: Values
) -> tuple[jax.Array, jax.Array]:
    """Count the values that reach each threshold, and per block those equal to the guess.

    Returns:
        uint32[K, C, 1] and uint32[K, blocks].
    """
    flags = [
        [x >= thresholds[i, j] for j in range(thresholds.shape[1])] + [x == thresholds[i, _GUESS]]
        for i, x in enumerate(values(part, *arrays))
    ]
    counts = count_true([_in_blocks(flag) for kind in flags for flag in kind], (1,))
    counts = counts.reshape(len(flags), -1, counts.shape[1])
    return counts[:, :-1].sum(axis=-1, keepdims=True, dtype=jnp.uint32), counts[:, -1]


def _count_reaching(
    part: Part, thresholds: jax.Array, *arrays: ArrayTree, values: Values
) -> jax.Array:
    """Count the values of kind i that reach thresholds[i, j], uint32[K C]."""
    return count_true(
        [
            x >= thresholds[i, j]
            for i, x in enumerate(values(part, *arrays))
            for j in range(thresholds.shape[1])
        ]
    )


# ------------------------------------------------------------------------------ order statistics


def order_statistics(
    tensor: Tensor, positions: Sequence[int], values: Values, *arrays: ArrayTree
) -> np.ndarray:
    """Return the values at some positions of the sorted tensor, exactly, in 11 counting passes.

    Args:
        tensor: of n elements.
        positions: K numbers from 0 (the smallest) to n - 1.
        values: a function at module level, `values(part, *arrays)` -> [uint32[*s]].
        arrays: what `values` takes.

    Returns:
        uint32[K].
    """
    # so many elements reach the value at the position
    at_least = math.prod(tensor.shape) - np.asarray(positions, np.int64)
    low, width = np.zeros(len(at_least), np.int64), 1 << 32
    while width > 1:  # three bits per pass
        step = max(1, width // 8)
        thresholds = low[:, None] + np.arange(step, width, step)
        counts = tensor.total(
            _count_reaching, thresholds.reshape(1, -1).astype(np.uint32), *arrays, values=values
        ).reshape(thresholds.shape)
        # counts fall as thresholds rise, so the number of thresholds that are reached is the digit
        low, width = low + step * (counts >= at_least[:, None]).sum(axis=1), step
    return low.astype(np.uint32)
