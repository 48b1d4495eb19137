"""Order within a tensor: the k largest values, order statistics, ranks within rows. Ties are broken in a defined way everywhere."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from jax_ordermerge.hash_rng import mix
from jax_ordermerge.merge.methods.parts import BLOCK, Part, Tensor, counts

_GUESS = 1  # which of the first cuts a sample lets expect to be the right one
Known = dict[str, Any]
Values = Callable[..., Sequence[jax.Array]]


def magnitudes(p: Part) -> list[jax.Array]:
    """Return the bits of |tau_i| as uint32, M arrays: integer order is the order of the magnitudes, NaN the largest."""
    return [jax.lax.bitcast_convert_type(jnp.abs(tau), jnp.uint32) for tau in p.task_vectors()]


class Place(NamedTuple):
    """Where elements stand among those of equal value, uint32[*s] each: by the rank of their block, then by their place in it.

    A block is 256 consecutive elements, row-major; its rank is the hash of its number (`counter.mix`, a bijection). So ties go to
    whole blocks that lie anywhere: defined, the same everywhere, and favouring no part of the tensor. In bf16 ties at a cut are many,
    and a rank of every element alone would have to be searched for bit by bit; blocks are counted in one pass.
    """

    block: jax.Array
    within: jax.Array


def places(p: Part) -> Place:
    """Return the `Place` of every element of a part."""
    number, within = _blocks(p)
    return Place(mix(number), within)


def _blocks(p: Part) -> tuple[jax.Array, jax.Array]:
    index = p.indices()
    return _block_number(index.lo, index.hi), index.lo & (BLOCK - 1)


def _block_number(lo: jax.Array, hi: jax.Array) -> jax.Array:
    """Return the number of the block in which an element lies, of which these are the halves of the index."""
    shift = BLOCK.bit_length() - 1
    return (lo >> shift) | (hi << (32 - shift))


def largest(
    tensor: Tensor, keep: np.ndarray, values: Values, *arrays: Any
) -> dict[str, np.ndarray]:
    """Find the `keep_i` largest values of each kind i, ties broken by `places`; `is_largest` then tells which they are.

    Args:
        tensor: of n elements.
        keep: int[K], from 0 to n.
        values: a function of a module, `values(part, *arrays)` -> K arrays uint32 below 2^32 - 1.

    Returns:
        least, block and within, uint32[K] each: values from `least` on are kept; of those one less, the ones in blocks of a lower
        rank than `block`, and in the block of this rank the elements before `within`.
    """
    keep = np.asarray(keep, np.int64)
    size = math.prod(tensor.shape)
    found = cut_of_largest(tensor, np.clip(keep, 1, size), values, *arrays)
    nothing, everything = keep <= 0, keep >= size
    wanted = np.where(nothing | everything, 0, keep - found.above)
    block, within = np.zeros(len(keep), np.int64), np.zeros(len(keep), np.int64)
    if wanted.any():
        guessed = (found.cut == found.guess)[wanted > 0].all()
        equal = (
            found.equal
            if guessed
            else tensor.total(_equal_by_block, found.cut, *arrays, of=values, reduce="join")
        )
        ranks, order = _block_ranks(equal.shape[1])
        seen = np.cumsum(equal[:, order], axis=1)
        at = (seen[:, :-1] < wanted[:, None]).sum(axis=1)
        last, each = order[at], np.arange(len(keep))
        missing = wanted - (seen[each, at] - equal[each, last])
        words = tensor.total(
            _equal_in_block,
            found.cut,
            last.astype(np.uint32),
            *arrays,
            of=values,
            among=BLOCK * last,
        )
        flags = np.unpackbits(words.astype("<u4").view(np.uint8), axis=1, bitorder="little")
        block = np.where(wanted > 0, ranks[last], 0)
        within = np.where(
            wanted > 0, (np.cumsum(flags[:, :-1], axis=1) < missing[:, None]).sum(axis=1) + 1, 0
        )
    return {
        "least": np.where(
            nothing, 0xFFFFFFFF, np.where(everything, 0, found.cut.astype(np.int64) + 1)
        ).astype(np.uint32),
        "block": block.astype(np.uint32),
        "within": within.astype(np.uint32),
    }


@functools.lru_cache(
    maxsize=8
)  # the tensors of a model have few sizes, and sorting takes a tenth of a merge
def _block_ranks(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rank of each block of a tensor, and the blocks in the order of their ranks."""
    ranks = mix(np.arange(count, dtype=np.uint32))
    return ranks, np.argsort(ranks)


def _equal_by_block(p: Part, cut: jax.Array, *arrays: Any, of: Values) -> jax.Array:
    """Count the values equal to the cut, uint32[K, blocks]."""
    return counts([_in_blocks(x == cut[i]) for i, x in enumerate(of(p, *arrays))], (1,))


def _equal_in_block(
    p: Part, cut: jax.Array, block: jax.Array, *arrays: Any, of: Values
) -> jax.Array:
    """Return which values of one block are equal to the cut, a bit each: uint32[K, 8]."""
    first = 0 if p.offset is None else _block_number(*p.offset)
    bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)
    found = []
    for i, x in enumerate(of(p, *arrays)):
        words = jnp.where(_in_blocks(x == cut[i]).reshape(-1, BLOCK // 32, 32), bits, 0).sum(
            -1, dtype=jnp.uint32
        )
        number = first + jnp.arange(len(words), dtype=jnp.uint32)
        found.append(jnp.where((number == block[i])[:, None], words, 0).sum(0, dtype=jnp.uint32))
    return jnp.stack(found)


def _in_blocks(flags: jax.Array) -> jax.Array:
    if flags.ndim == 0 or flags.shape[-1] % BLOCK:
        flags = jnp.pad(flags.ravel(), (0, -flags.size % BLOCK))
    return flags.reshape(-1, BLOCK)


def is_largest(value: jax.Array, place: Place, known: Known, i: int) -> jax.Array:
    """Return bool[*s]: whether a value of kind i is among the largest that `largest` found; `place` is `places` of the part."""
    # the sum fits: the block of rank 2^32 - 1 lies 9e11 elements in
    before = place.block < known["block"][i] + (place.within < known["within"][i]).astype(
        jnp.uint32
    )
    return value + before.astype(jnp.uint32) >= known["least"][i]


class Cut(NamedTuple):
    """Where the largest values of K kinds end; see `cut_of_largest`.

    Attributes:
        cut: uint32[K].
        above: int64[K], how many values are greater.
        guess: uint32[K], what a sample let expect; among bfloat16 numbers mostly the cut itself.
        equal: int64[K, blocks], how many values of each block of 256 are equal to the guess.
    """

    cut: np.ndarray
    above: np.ndarray
    guess: np.ndarray
    equal: np.ndarray


def cut_of_largest(tensor: Tensor, keep: np.ndarray, values: Values, *arrays: Any) -> Cut:
    """Find where the `keep` largest values end, by counting only: no sort, and nothing is gathered from a mesh.

    Args:
        tensor: the tensor.
        keep: int[K], at least 1 and at most the number of elements, how many of each kind of value to keep.
        values: `values(part, *arrays)` returns K arrays uint32[*s]. (For floats that are not negative, the order of the
            bits is the order of the numbers.) Where only some elements compete, the others have the value 0.

    Returns:
        Exactly `above` <= keep values are greater than the cut; the rest is to be chosen among those equal to it. `above` equals
        `keep` where no value need be chosen (the cut then lies somewhere between two values).

    Example:
        >>> from jax_ordermerge.merge.parts import InMemoryTensor
        >>> found = cut_of_largest(
        ...     InMemoryTensor([jnp.array([1.0, 2.0, 2.0, 3.0])], jnp.zeros(4)),
        ...     np.array([2]),
        ...     magnitudes,
        ... )
        >>> float(found.cut.view(np.float32)[0]), found.above.tolist()
        (2.0, [1])
    """
    keep, size = np.asarray(keep, np.int64), math.prod(tensor.shape)
    found = _Search(keep, size)
    # among bfloat16 numbers few values are distinct, and the one where the largest end is then seen at once
    sample = tensor.total(_sample, *arrays, values=values, reduce="join")
    cuts = _cuts_from_sample(np.sort(sample, axis=1)[:, ::-1], keep / size)
    guess = cuts[:, _GUESS]
    # what must be known of the blocks if the guess is right is counted in the same pass
    counted, equal = tensor.total(
        _first_look, cuts.astype(np.uint32), *arrays, values=values, reduce="join"
    )
    found.learn(cuts, counted.sum(axis=-1))
    while found.open.any():
        cuts = found.cuts()
        found.learn(
            cuts,
            tensor.total(_reached, cuts.astype(np.uint32), *arrays, values=values).reshape(
                cuts.shape
            ),
        )
    return Cut(found.low.astype(np.uint32), found.at_high, guess.astype(np.uint32), equal)


class _Search:
    """An interval for each kind of value: `keep` values or more are at or above `low`, fewer than `keep` at or above `high`."""

    def __init__(self, keep: np.ndarray, size: int) -> None:
        self._keep = keep
        self.low, self.high = np.zeros(len(keep), np.int64), np.full(len(keep), 1 << 32, np.int64)
        self._at_low, self.at_high = (
            np.full(len(keep), size, np.int64),
            np.zeros(len(keep), np.int64),
        )

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
        return np.clip(
            cuts, np.minimum(low + 1, (1 << 32) - 1), np.maximum(self.high[:, None] - 1, 1)
        )

    def learn(self, cuts: np.ndarray, counted: np.ndarray) -> None:
        """Narrow the intervals by how many values are at or above each cut."""
        for cut, count in zip(cuts.T, counted.T, strict=True):
            inside = (cut > self.low) & (cut < self.high)
            down, up = inside & (count >= self._keep), inside & (count < self._keep)
            self.low, self._at_low = (
                np.where(down, cut, self.low),
                np.where(down, count, self._at_low),
            )
            self.high, self.at_high = (
                np.where(up, cut, self.high),
                np.where(up, count, self.at_high),
            )
        # all from `low` on are kept, so nothing is chosen among equals: the search is over
        exact = (self._at_low == self._keep) & self.open & (self.low > 0)
        self.high, self.at_high = (
            np.where(exact, self.low, self.high),
            np.where(exact, self._keep, self.at_high),
        )
        self.low, self._at_low = (
            np.where(exact, self.low - 1, self.low),
            np.where(exact, self._keep + 1, self._at_low),
        )


def _cuts_from_sample(sample: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Return int64[K, 4]: the value where the largest end in a sample [K, m], the next greater, and values around them."""
    count = sample.shape[1]
    at = (fraction * count)[:, None] + np.sqrt(count * fraction * (1 - fraction))[
        :, None
    ] * np.array([3.5, 0, -3.5])
    low, middle, high = np.take_along_axis(sample, at.clip(0, count - 1).astype(np.int64), axis=1).T
    return np.stack([low, middle, middle + 1, high + 1], axis=1).clip(1, (1 << 32) - 1)


def _sample(p: Part, *arrays: Any, values: Values) -> jax.Array:
    """Return evenly placed values of a part, uint32[K, m]."""
    found = [x.ravel() for x in values(p, *arrays)]
    stride = max(1, found[0].size // 2048)
    return jnp.stack([x[::stride] for x in found])


def _first_look(
    p: Part, cuts: jax.Array, *arrays: Any, values: Values
) -> tuple[jax.Array, jax.Array]:
    """Count the values at or above each cut, uint32[K, C, 1], and those of each block that are equal to the guess, uint32[K, blocks]."""
    flags = [
        [x >= cuts[i, j] for j in range(cuts.shape[1])] + [x == cuts[i, _GUESS]]
        for i, x in enumerate(values(p, *arrays))
    ]
    found = counts([_in_blocks(flag) for kind in flags for flag in kind], (1,))
    found = found.reshape(len(flags), -1, found.shape[1])
    return found[:, :-1].sum(axis=-1, keepdims=True, dtype=jnp.uint32), found[:, -1]


def _reached(p: Part, cuts: jax.Array, *arrays: Any, values: Values) -> jax.Array:
    found = values(p, *arrays)
    return counts([x >= cuts[i, j] for i, x in enumerate(found) for j in range(cuts.shape[1])])


def order_statistics(
    tensor: Tensor, positions: Sequence[int], values: Callable[..., jax.Array], *arrays: Any
) -> np.ndarray:
    """Return the values at some positions of the sorted tensor, exactly, by counting: 11 passes.

    Args:
        tensor: of n elements.
        positions: K numbers from 0 (the smallest) to n - 1.
        values: a function of a module, `values(part, *arrays)` -> uint32[*s].

    Returns:
        uint32[K].
    """
    size = math.prod(tensor.shape)
    at_least = size - np.asarray(positions, np.int64)  # so many are at or above the value
    low, width = np.zeros(len(at_least), np.int64), 1 << 32
    while width > 1:
        step = max(1, width // 8)
        cuts = low[:, None] + np.arange(step, width, step)
        reached = tensor.total(
            _at_or_above, cuts.ravel().astype(np.uint32), *arrays, values=values
        ).reshape(cuts.shape)
        low, width = low + step * (reached >= at_least[:, None]).sum(axis=1), step
    return low.astype(np.uint32)


def _at_or_above(
    p: Part, cuts: jax.Array, *arrays: Any, values: Callable[..., jax.Array]
) -> jax.Array:
    found = values(p, *arrays)
    return counts([found >= cuts[i] for i in range(cuts.shape[0])])


def row_ranks(values: jax.Array) -> jax.Array:
    """Return the rank of every element within its row, 0 for the smallest; of equal ones, that in the lower column comes first.

    On CPU by numpy, radix sorts of 16 bits of what is not zero: 8 ns an element where 60 % are zero. There jnp.argsort takes 140.

    Args:
        values: uint32[*s]; a row is what one index of the first axis holds. A vector is one row.

    Returns:
        uint32[*s].

    Example:
        >>> row_ranks(jnp.array([[3, 1, 2, 1]], jnp.uint32)).tolist()
        [[3, 0, 2, 1]]
    """
    rows = values.reshape(values.shape[0] if values.ndim > 1 else 1, -1)
    return jax.lax.platform_dependent(
        rows, cpu=_row_ranks_on_host, default=_row_ranks_on_device
    ).reshape(values.shape)


def _row_ranks_on_device(rows: jax.Array) -> jax.Array:
    return jnp.argsort(jnp.argsort(rows, axis=-1, stable=True), axis=-1).astype(jnp.uint32)


def _row_ranks_on_host(rows: jax.Array) -> jax.Array:
    # why not jax.pure_callback: it computes on one device of a mesh and waits there for the collectives of the others, forever
    result = jax.ShapeDtypeStruct(rows.shape, jnp.uint32)
    return buffer_callback(_write_row_ranks, result, vmap_method="expand_dims")(rows)


def _write_row_ranks(_: Any, out: Any, rows: Any) -> None:
    values, ranks = np.asarray(rows), np.asarray(out)
    width = values.shape[-1]
    values, ranks = values.reshape(-1, width), ranks.reshape(-1, width)
    step = max(1, (1 << 16) // max(width, 1))  # rows at a time: what fits into a core's cache
    for start in range(0, len(values), step):
        _rank_rows(
            values[start : start + step].astype(np.uint32, copy=False), ranks[start : start + step]
        )


def _rank_rows(values: np.ndarray, ranks: np.ndarray) -> None:
    """Rank zeros by counting; they are most of a task vector. Sort the others by low bits, then by row and high bits."""
    zero = values == 0
    np.cumsum(zero, axis=1, dtype=np.uint32, out=ranks)
    zeros = ranks[:, -1].astype(np.int64)
    ranks -= 1  # right for the zeros; all others follow
    at = np.flatnonzero(~zero)
    if not at.size:
        return
    chosen = values.reshape(-1)[at]
    low, high = chosen.astype(np.uint16), (chosen >> 16).astype(np.uint16)
    by_low = np.argsort(low, kind="stable")
    at, high = at[by_low], high[by_low]
    span = int(high.max()) - int(high.min()) + 1
    if span * len(values) <= 1 << 16:
        key = (at // values.shape[1] * span).astype(np.uint16) + (high - high.min())
        at = at[np.argsort(key, kind="stable")]
    else:
        at = at[np.argsort(high, kind="stable")]
        at = at[np.argsort(at // values.shape[1], kind="stable")]
    others = values.shape[1] - zeros
    ranks.reshape(-1)[at] = np.arange(at.size) + np.repeat(
        zeros - (np.cumsum(others) - others), others
    )
