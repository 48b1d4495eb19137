"""Parameter selection: every element is taken from one member. No arithmetic on values, bits in and bits out."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import Index, element_index, key_words, random_words
from jax_ordermerge.merge.methods.parts import Part, Tensor, counts

Granularity = Literal["element", "row", "column", "tensor", "layer"]
Rounds = Annotated[int, Field(ge=0)] | Literal["exhaustive"]
ONE = 1 << 16  # probabilities are multiples of 2^-16
CHILDREN = 1 << 30  # the first round of the draws for children; those of resampling start at 0
UNROLLED = 8  # up to so many rounds are one fused pass; beyond, a loop keeps compilation short


def to_bits(x: jax.Array) -> jax.Array:
    """Return the bit patterns of an array as unsigned integers of the same width.

    Example:
        >>> to_bits(jnp.array([1.0, -0.0], jnp.bfloat16)).tolist()
        [16256, 32768]
    """
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the M arrays of a stack, bit by bit: even slicing a bfloat16 array may quiet a NaN on CPU.

    Example:
        >>> [one.tolist() for one in unstack(jnp.array([[1.0], [2.0]]))]
        [[1.0], [2.0]]
    """
    return tuple(jax.lax.bitcast_convert_type(one, x.dtype) for one in to_bits(x))


def quantize(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return probabilities as multiples of 2^-16, by largest remainder; the draw is then integer arithmetic throughout.

    Args:
        weights: [M], not negative, with a positive sum.

    Returns:
        uint32[M] with sum 65536.

    Raises:
        UserError: a weight is negative, the sum is not positive, or a positive weight is too small to be drawn.

    Example:
        >>> quantize([1, 1, 1]).tolist(), quantize([0, 1]).tolist()
        ([21846, 21845, 21845], [0, 65536])
    """
    w = np.asarray(weights, np.float64)
    if not np.isfinite(w).all() or (w < 0).any() or w.sum() <= 0:
        raise UserError(
            f"selection weights {w.tolist()}: probabilities are not negative and their sum is positive; change the weights"
        )
    exact = w / w.sum() * ONE
    whole = np.floor(exact).astype(np.int64)
    order = np.argsort(-(exact - whole), kind="stable")
    whole[order[: ONE - whole.sum()]] += 1
    if ((whole == 0) & (w > 0)).any():
        raise UserError(
            f"selection weights {w.tolist()}: a probability is below 1/{2 * ONE}; make it 0 or larger"
        )
    return whole.astype(np.uint32)


def select(
    members: jax.Array,
    *,
    base: jax.Array | None = None,
    weights: jax.Array | None = None,
    key: jax.Array,
    offset: jax.Array | None = None,
    resample: Rounds = 0,
    resample_from: Literal["all", "others"] = "all",
    granularity: Granularity = "element",
) -> jax.Array:
    """Parameter selection: theta_j = theta_{s_j, j} with s_j ~ Categorical(p), independently for every unit j.

    A unit whose chosen member left it at the base is drawn again, `resample` times; "exhaustive" draws at once among the members
    that changed the unit, with their probabilities renormalized: the limit of many rounds. "Left at the base" is equality of bits
    after casting the base to the members' dtype; a unit of many elements was changed if one of them was.

    Args:
        members: [M, *S], any dtype.
        base: [*S], needed when resampling.
        weights: [M] probabilities p, as concrete numbers or already quantized (uint32, see `quantize`). 1/M by default.
        key: typed key (scalar) named by the tensor, or by the layer for granularity "layer".
        offset: uint32[2], number of a slab's first unit; for "element" and "row", with slabs of whole leading rows.
        resample: redraws: a number of rounds, or "exhaustive".
        resample_from: redraw among all members, or among those not yet drawn for the unit.
        granularity: what is taken from one member together; "layer" is the whole tensor under a key shared by the layer.

    Returns:
        [*S] in the dtype of `members`; every element has the bits of one member's.

    Example:
        >>> members = jnp.stack([jnp.zeros(6), jnp.ones(6)])
        >>> select(members, key=jax.random.key(0)).tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
        >>> select(
        ...     members, base=jnp.zeros(6), key=jax.random.key(0), resample="exhaustive"
        ... ).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]

    Source: Ju et al., "Selective Parameter Merging" (EMNLP 2024, arXiv 2410.03743): element-wise selection and resampling. Rounds,
    the exhaustive limit, `resample_from` and the other granularities are ours.
    """
    # as integers before anything else: even slicing a bfloat16 array may quiet a NaN on CPU
    bits = tuple(to_bits(members))
    kept = None if base is None else to_bits(base.astype(members.dtype))
    part = Part(bits, kept, key_words(key), offset, None if offset is None else offset[0])
    p = _thresholds(weights, len(bits))
    out = selection_part(
        part, weights=p, resample=resample, resample_from=resample_from, granularity=granularity
    )
    return jax.lax.bitcast_convert_type(out, members.dtype)


def selection(
    tensor: Tensor,
    *,
    resample: Rounds = 0,
    resample_from: Literal["all", "others"] = "all",
    granularity: Granularity = "element",
    child: Annotated[int, Field(ge=0)] | None = None,
) -> dict[str, Any]:
    """Parameter selection; see `select`.

    Args:
        tensor: its weights are the probabilities p. 1/M by default.
        resample, resample_from, granularity: as for `select`.
        child: number c = 0 .. M-1 of one of M merges that share the members out: unit j comes from member pi_j(c), with one random
            permutation pi_j of the members a unit. So every member's value is in exactly one child, each child alone is a selection
            with equal probabilities, and the mean of the M children is exactly the average. None draws without regard to others.

    Raises:
        UserError: there is no such child, or resampling or unequal weights are asked for with it: then no permutation fits.
    """
    p = quantize(np.ones(tensor.count) if tensor.weights is None else tensor.weights)
    if child is not None and child >= tensor.count:
        raise UserError(
            f"merge method selection: child = {child}, but {tensor.count} members have the children 0 to {tensor.count - 1}"
        )
    equal = tensor.weights is None or np.ptp(tensor.weights) == 0
    if child is not None and (resample != 0 or not equal):
        raise UserError(
            "merge method selection: the children are permutations of the members, so child goes with resample: 0 and equal weights"
        )
    return {
        "weights": p,
        "resample": resample,
        "resample_from": resample_from,
        "granularity": granularity,
        "child": child,
    }


def selection_part(
    p: Part,
    *,
    weights: jax.Array,
    resample: int | str,
    resample_from: Literal["all", "others"],
    granularity: Granularity,
    child: int | None = None,
) -> jax.Array:
    """Select within a part; `weights` are quantized."""
    if resample != 0 and p.base is None:
        raise ValueError("selection with resample needs the base")
    dtype, shape = p.members[0].dtype, p.members[0].shape
    bits = _bits(p)
    unit, thresholds = _unit_index(bits[0].shape, granularity, p), list(weights)
    if child is not None:
        choice, kept = permuted(p.words, unit, len(bits), child), bits[0]
    elif resample == 0 or p.base is None:
        choice, kept = _draw(random_words(p.words, unit), thresholds), bits[0]
    else:
        kept = to_bits(p.base).reshape(bits[0].shape)
        changed = [_any_in_unit(member != kept, unit.lo.shape) for member in bits]
        if isinstance(resample, str):
            choice = _draw(
                random_words(p.words, unit),
                [jnp.where(c, q, 0) for c, q in zip(changed, thresholds, strict=True)],
            )
        else:
            choice, _ = _draw_rounds(p.words, unit, weights, changed, resample, resample_from)
    out = kept
    for i in range(len(bits)):
        out = jnp.where(choice == i, bits[i], out)
    return jax.lax.bitcast_convert_type(out, dtype).reshape(shape)


def redrawn(
    p: Part,
    weights: jax.Array,
    *,
    resample: Rounds,
    resample_from: Literal["all", "others"],
    granularity: Granularity,
    child: None = None,
) -> jax.Array:
    """Return how many units were drawn again in each round of a selection, uint32[rounds]: those of which some member left the base.

    Of exhaustive resampling, one number: of how many the first draw, made among all members, falls on one that left it at the base.

    Args:
        p: a part.
        weights: quantized probabilities, uint32[M].
        resample: not 0; the rest as for `selection`, whose children are not redrawn.

    Example:
        >>> one, zero = jnp.ones(600), jnp.zeros(600)
        >>> part = Part((zero, one), zero, jnp.zeros(2, jnp.uint32))
        >>> redrawn(
        ...     part,
        ...     jnp.asarray(quantize([1, 1])),
        ...     resample=3,
        ...     resample_from="all",
        ...     granularity="element",
        ... ).tolist()
        [297, 145, 69]
    """
    bits = _bits(p)
    unit = _unit_index(bits[0].shape, granularity, p)
    changed = [
        _any_in_unit(member != to_bits(p.base).reshape(member.shape), unit.lo.shape)
        for member in bits
    ]
    if not isinstance(resample, str):
        return _draw_rounds(p.words, unit, weights, changed, resample, resample_from)[1]
    first = _draw(random_words(p.words, unit), list(weights))
    return counts([_any(changed) & ~_settled(first, changed)])


def _bits(p: Part) -> list[jax.Array]:
    return [to_bits(member).reshape(member.shape or (1,)) for member in p.members]


def permuted(words: jax.Array, unit: Index, count: int, child: int) -> jax.Array:
    """Return pi_j(child), int32 of the shape of `unit`: a permutation of 0 .. count-1 for every unit j, all count! equally likely.

    pi_j is named by digits d_0, d_1, ..., d_c uniform on 0 .. count-1-c: pi_j(c) is number d_c of those not among pi_j(0 .. c-1). The
    digits are those of a hash as a fraction in mixed radix; a hash gives digits while the product of their ranges is at most 2^16, so
    that each hash makes no permutation more likely than another by more than 2^-16 of it (docs/random_choice.md).

    Args:
        words: uint32[2], the key.
        unit: number of each unit.
        count: number of members M.
        child: position in the permutation.

    Example:
        >>> unit = element_index((4,))
        >>> [permuted(jnp.array([1, 2], jnp.uint32), unit, 3, child).tolist() for child in range(3)]
        [[2, 0, 0, 1], [0, 2, 1, 0], [1, 1, 2, 2]]
    """
    digits: list[jax.Array] = []
    number, product = 0, ONE + 1
    for c in range(child + 1):
        choices = count - c
        product *= choices
        if product > ONE:
            fraction, number, product = (
                random_words(words, unit, CHILDREN + number),
                number + 1,
                choices,
            )
        # the integer part and the fraction of choices * fraction / 2^32
        low = (fraction & 0xFFFF) * choices
        high = (fraction >> 16) * choices + (low >> 16)
        digits.append(high >> 16)
        fraction = (high << 16) | (low & 0xFFFF)
    member = digits.pop()
    for digit in reversed(digits):
        member = member + (member >= digit).astype(jnp.uint32)
    return member.astype(jnp.int32)


def _thresholds(weights: jax.Array | None, count: int) -> jax.Array:
    if weights is None:
        return jnp.asarray(quantize(np.ones(count)))
    if jnp.issubdtype(weights.dtype, jnp.integer):
        return jnp.asarray(weights, jnp.uint32)
    # on the host in float64: a float sum on a device could differ in its last bit between programs
    return jnp.asarray(quantize(np.asarray(weights)))


def _unit_index(shape: tuple[int, ...], granularity: Granularity, p: Part) -> Index:
    """Return the number of each unit, in a shape that broadcasts to `shape`."""
    ones = (1,) * len(shape)
    if granularity == "element":
        return element_index(shape, p.offset)
    if granularity == "row":
        return element_index(
            (shape[0], *ones[1:]),
            None if p.row is None else jnp.stack([p.row, jnp.zeros_like(p.row)]),
        )
    if p.offset is not None:
        raise ValueError(f"granularity {granularity} cannot be computed on slabs")
    return element_index((*ones[1:], shape[-1]) if granularity == "column" else ones)


def _any_in_unit(differs: jax.Array, unit: tuple[int, ...]) -> jax.Array:
    axes = tuple(axis for axis, extent in enumerate(unit) if extent != differs.shape[axis])
    return jnp.any(differs, axis=axes, keepdims=True) if axes else differs


def _draw(words: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Return the first member whose cumulative weight exceeds t = (h >> 16) W >> 16, or M where all weights are 0; int32."""
    total = sum(weights[1:], weights[0])
    t = ((words >> 16) * total) >> 16
    choice, cumulative = jnp.zeros(t.shape, jnp.int32), jnp.zeros_like(total)
    for weight in weights:
        cumulative = cumulative + weight
        choice = choice + (cumulative <= t).astype(jnp.int32)
    return choice


def _draw_rounds(
    words: jax.Array,
    unit: Index,
    p: jax.Array,
    changed: list[jax.Array],
    rounds: int,
    resample_from: Literal["all", "others"],
) -> tuple[jax.Array, jax.Array]:
    """Draw, then `rounds` times draw again where the chosen member left the unit at the base; see `redrawn` for what is counted."""

    State = tuple[jax.Array, list[jax.Array], jax.Array]

    def redraw(round_: int | jax.Array, state: State) -> State:
        choice, drawn, again = state
        weights = (
            list(p)
            if resample_from == "all"
            else [jnp.where(d, 0, q) for d, q in zip(drawn, p, strict=True)]
        )
        new = _draw(random_words(words, unit, round_), weights)
        settled = _settled(choice, changed)
        # new == M: everyone was drawn and none changed the unit, so nothing is left to draw from
        choice = jnp.where(settled | (new == len(changed)), choice, new)
        again = again.at[round_ - 1].set(counts([_any(changed) & ~settled])[0])
        return choice, [d | (choice == i) for i, d in enumerate(drawn)], again

    choice = _draw(random_words(words, unit), list(p))
    if resample_from == "others":
        rounds = min(rounds, len(changed) - 1)
    state = choice, [choice == i for i in range(len(changed))], jnp.zeros(rounds, jnp.uint32)
    if rounds > UNROLLED:
        choice, _, again = jax.lax.fori_loop(1, rounds + 1, redraw, state)
        return choice, again
    for round_ in range(1, rounds + 1):
        state = redraw(round_, state)
    return state[0], state[2]


def _settled(choice: jax.Array, changed: Sequence[jax.Array]) -> jax.Array:
    return _any([(choice == i) & c for i, c in enumerate(changed)])


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    found = flags[0]
    for flag in flags[1:]:
        found = found | flag
    return found
