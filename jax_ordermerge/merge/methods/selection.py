"""Parameter selection: every element is taken from one member.

There is no arithmetic on values: bits in, bits out.

Source: Ju et al., "Selective Parameter Merging", EMNLP 2024, https://arxiv.org/abs/2410.03743:
element-wise selection and resampling. Rounds, the exhaustive limit, `resample_from`, the other
granularities and the children are ours.
"""

import functools
from collections.abc import Sequence
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import Index, element_index, random_bits
from jax_ordermerge.merge.methods.parameters import PROBABILITY_UNITS, quantize, weights_or_ones
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import count_true
from jax_ordermerge.merge.methods.table import METHODS, Method, Parameters, Unit

Granularity = Literal["element", "row", "column", "tensor", "layer"]
Rounds = Annotated[int, Field(ge=0)] | Literal["exhaustive"]
ResampleFrom = Literal["all", "others"]
FIRST_ROUND_OF_CHILDREN = 1 << 30  # of the hash; the rounds of resampling start at 0
UNROLLED = 8  # up to so many rounds are one fused pass; beyond, a loop keeps compilation short


def to_bits(x: jax.Array) -> jax.Array:
    """Return the bit patterns of an array as unsigned integers of the same width.

    Example:
        >>> to_bits(jnp.array([1.0, -0.0], jnp.bfloat16)).tolist()
        [16256, 32768]
    """
    return jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def unstack(x: jax.Array) -> tuple[jax.Array, ...]:
    """Return the M arrays of a stack, with every bit.

    Example:
        >>> [member.tolist() for member in unstack(jnp.array([[1.0], [2.0]]))]
        [[1.0], [2.0]]
    """
    # as integers, since even slicing a bfloat16 array may quiet a NaN on CPU
    return tuple(jax.lax.bitcast_convert_type(bits, x.dtype) for bits in to_bits(x))


def select(
    members: jax.Array,
    *,
    base: jax.Array | None = None,
    weights: jax.Array | None = None,
    key: jax.Array,
    offset: jax.Array | None = None,
    resample: Rounds = 0,
    resample_from: ResampleFrom = "all",
    granularity: Granularity = "element",
) -> jax.Array:
    """Parameter selection: theta_j = theta_{s_j, j} with s_j ~ Categorical(p), per unit j.

    A unit whose member left it at the base is drawn again, `resample` times. "exhaustive" draws at
    once among the members that changed the unit, with their probabilities renormalized: the limit
    of many rounds. "Left at the base" is equality of bits after casting the base to the members'
    dtype. A unit of many elements was changed if one of them was.

    Args:
        members: [M, *S], any dtype.
        base: [*S], needed when resampling.
        weights: [M] probabilities p, as concrete numbers or already quantized (uint32, see
            `quantize`). 1/M by default.
        key: typed key (scalar) named by the tensor, or by the layer for granularity "layer".
        offset: uint32[2], number of a slab's first unit. For "element" and "row", with slabs of
            complete leading rows.
        resample: a number of rounds of redraws, or "exhaustive".
        resample_from: redraw among all members, or among those not yet drawn for the unit.
        granularity: what is taken from one member as a unit. "layer" is the tensor under a key that
            the tensors of a layer share.

    Returns:
        [*S] in the dtype of `members`. Every element has the bits of one member's.

    Example:
        >>> members = jnp.stack([jnp.zeros(6), jnp.ones(6)])
        >>> select(members, key=jax.random.key(0)).tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
        >>> select(
        ...     members, base=jnp.zeros(6), key=jax.random.key(0), resample="exhaustive"
        ... ).tolist()
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    # as integers before anything else, see `unstack`
    bits = tuple(to_bits(members))
    base_bits = None if base is None else to_bits(base.astype(members.dtype))
    row = None if offset is None else offset[0]
    part = Part(bits, base_bits, jax.random.key_data(key), offset, row)
    if weights is None:
        p = jnp.asarray(quantize(np.ones(len(bits))))
    elif jnp.issubdtype(weights.dtype, jnp.integer):
        p = jnp.asarray(weights, jnp.uint32)
    else:
        # on the host in float64: a sum on a device could differ in its last bit between programs
        p = jnp.asarray(quantize(np.asarray(weights)))
    out = apply(
        part, weights=p, resample=resample, resample_from=resample_from, granularity=granularity
    )
    return jax.lax.bitcast_convert_type(out, members.dtype)


def prepare(
    tensor: Tensor,
    *,
    resample: Rounds = 0,
    resample_from: ResampleFrom = "all",
    granularity: Granularity = "element",
    child: Annotated[int, Field(ge=0)] | None = None,
) -> Prepared:
    """Parameter selection: theta_j = theta_ij, with a member i drawn for each element j.

    Nothing is computed: the result consists of bits of the members. See `select`.

    Args:
        tensor: its weights are the probabilities p. 1/M by default.
        resample: as for `select`.
        resample_from: as for `select`.
        granularity: as for `select`.
        child: number c = 0 .. M-1 of one of M merges that share the members out. Unit j comes from
            member pi_j(c), with one random permutation pi_j of the members per unit. Every member's
            value is thus in exactly one child, each child alone is a selection with equal
            probabilities, and the mean of the children is exactly the average. None: no child.
    """
    # exact probabilities also with children, where they are equal and not used
    return {
        "weights": quantize(weights_or_ones(tensor)),
        "resample": resample,
        "resample_from": resample_from,
        "granularity": granularity,
        "child": child,
    }


def apply(
    part: Part,
    *,
    weights: jax.Array,
    resample: int | str,
    resample_from: ResampleFrom,
    granularity: Granularity,
    child: int | None = None,
) -> jax.Array:
    """Select within a part; `weights` are quantized."""
    if resample != 0 and part.base is None:
        raise ValueError("selection with resample needs the base")
    dtype, shape = part.members[0].dtype, part.members[0].shape
    # Integers throughout: floating-point operations may quiet a NaN, flush a subnormal or lose the
    # sign of a zero.
    bits = _member_bits(part)
    unit, thresholds = _unit_index(bits[0].shape, granularity, part), list(weights)
    out = bits[0]
    if child is not None:
        choice = permuted(part.key_bits, unit, len(bits), child)
    elif resample == 0 or part.base is None:
        choice = _draw(random_bits(part.key_bits, unit), thresholds)
    else:
        # where no member is chosen the base stays
        out = to_bits(part.base).reshape(bits[0].shape)
        changed = _changed_units(bits, out, unit)
        if isinstance(resample, str):
            # Probabilities are renormalized by W in `_draw`. Where W is no power of two that adds
            # an error of up to 2^-16 (docs/random_choice.md).
            among_changed = [
                jnp.where(flag, q, 0) for flag, q in zip(changed, thresholds, strict=True)
            ]
            choice = _draw(random_bits(part.key_bits, unit), among_changed)
        else:
            choice, _ = _draw_rounds(part.key_bits, unit, weights, changed, resample, resample_from)
    # why not a gather over a stack: it would copy the members
    for i in range(len(bits)):
        out = jnp.where(choice == i, bits[i], out)
    return jax.lax.bitcast_convert_type(out, dtype).reshape(shape)


def count_redrawn(
    part: Part,
    weights: jax.Array,
    *,
    resample: Rounds,
    resample_from: ResampleFrom,
    granularity: Granularity,
    child: None = None,
) -> jax.Array:
    """Count the units drawn again in each round of a selection, uint32[rounds].

    Counted are units that some member changed. For exhaustive resampling it is one number: of how
    many units the first draw, among all members, falls on a member that left the unit at the base.

    Args:
        part: a part.
        weights: quantized probabilities, uint32[M].
        resample: not 0.
        resample_from: as for `select`.
        granularity: as for `select`.
        child: None: children are not redrawn.

    Example:
        >>> ones, zeros = jnp.ones(600), jnp.zeros(600)
        >>> part = Part((zeros, ones), zeros, jnp.zeros(2, jnp.uint32))
        >>> settings = {"resample": 3, "resample_from": "all", "granularity": "element"}
        >>> count_redrawn(part, jnp.asarray(quantize([1, 1])), **settings).tolist()
        [297, 145, 69]
    """
    bits = _member_bits(part)
    unit = _unit_index(bits[0].shape, granularity, part)
    changed = _changed_units(bits, to_bits(part.base).reshape(bits[0].shape), unit)
    if not isinstance(resample, str):
        return _draw_rounds(part.key_bits, unit, weights, changed, resample, resample_from)[1]
    # what exhaustive resampling replaces: the plain draw of round 0
    first = _draw(random_bits(part.key_bits, unit), list(weights))
    return count_true([_any(changed) & ~_settled(first, changed)])


def permuted(key_bits: jax.Array, unit: Index, count: int, child: int) -> jax.Array:
    """Return pi_j(child) for every unit j, where pi_j is a random permutation of 0 .. count-1.

    All count! permutations are equally likely. pi_j is named by digits d_0 .. d_c, with d_c uniform
    on 0 .. count-1-c: pi_j(c) is number d_c of the members that are not among pi_j(0 .. c-1).

    Args:
        key_bits: uint32[2], the key.
        unit: number of each unit.
        count: number of members M.
        child: position in the permutation.

    Returns:
        int32 of the shape of `unit`.

    Example:
        >>> unit, key_bits = element_index((4,)), jnp.array([1, 2], jnp.uint32)
        >>> [permuted(key_bits, unit, 3, child).tolist() for child in range(3)]
        [[2, 0, 0, 1], [0, 2, 1, 0], [1, 1, 2, 2]]
    """
    # The digits are those of a hash, read as a fraction in mixed radix. A hash gives digits while
    # the product of their ranges is at most 2^16. No permutation is then likelier than another by
    # more than 2^-16 of its probability per hash (docs/random_choice.md).
    digits: list[jax.Array] = []
    number, product = 0, PROBABILITY_UNITS + 1
    for c in range(child + 1):
        choices = count - c
        product *= choices
        if product > PROBABILITY_UNITS:
            fraction = random_bits(key_bits, unit, FIRST_ROUND_OF_CHILDREN + number)
            number, product = number + 1, choices
        # integer part and fraction of choices * fraction / 2^32, without 64-bit integers
        low = (fraction & 0xFFFF) * choices
        high = (fraction >> 16) * choices + (low >> 16)
        digits.append(high >> 16)
        fraction = (high << 16) | (low & 0xFFFF)
    # from the last digit back: skip the members that earlier positions took
    member = digits.pop()
    for digit in reversed(digits):
        member = member + (member >= digit).astype(jnp.uint32)
    return member.astype(jnp.int32)


def _member_bits(part: Part) -> list[jax.Array]:
    # a scalar tensor becomes a vector of one element, so that it has an axis with units
    return [to_bits(member).reshape(member.shape or (1,)) for member in part.members]


def _unit_index(shape: tuple[int, ...], granularity: Granularity, part: Part) -> Index:
    """Return the number of each unit, in a shape that broadcasts to `shape`."""
    ones = (1,) * len(shape)
    if granularity == "element":
        return element_index(shape, part.offset)
    if granularity == "row":
        # 32 bits are enough here: no tensor has 2^32 rows
        offset = None if part.row is None else jnp.stack([part.row, jnp.zeros_like(part.row)])
        return element_index((shape[0], *ones[1:]), offset)
    # columns and tensors have no number within a slab
    if part.offset is not None:
        raise ValueError(f"granularity {granularity} cannot be computed on slabs")
    return element_index((*ones[1:], shape[-1]) if granularity == "column" else ones)


def _changed_units(bits: Sequence[jax.Array], base: jax.Array, unit: Index) -> list[jax.Array]:
    """Return which units each member changed, M arrays bool of the shape of `unit`."""
    # by bits: -0.0 in place of 0.0 is a change, and a NaN that the base has as well is none
    differs = [member != base for member in bits]
    axes = tuple(axis for axis, extent in enumerate(unit.lo.shape) if extent != base.shape[axis])
    return [jnp.any(x, axis=axes, keepdims=True) for x in differs] if axes else differs


def _draw(bits: jax.Array, weights: Sequence[jax.Array]) -> jax.Array:
    """Return the first member whose cumulative weight exceeds t = (h >> 16) W >> 16.

    Args:
        bits: h, uint32[*s], one random number per unit.
        weights: M quantized weights, scalars or [*s]. W is their sum.

    Returns:
        int32[*s]; M where all weights are 0.
    """
    # 16 bits of h times W <= 2^16 fit into 32 bits; the bias is below 2^-16
    total = sum(weights[1:], weights[0])
    t = ((bits >> 16) * total) >> 16
    # as many cumulative weights as lie at or below t
    choice, cumulative = jnp.zeros(t.shape, jnp.int32), jnp.zeros_like(total)
    for weight in weights:
        cumulative = cumulative + weight
        choice = choice + (cumulative <= t).astype(jnp.int32)
    return choice


def _draw_rounds(
    key_bits: jax.Array,
    unit: Index,
    p: jax.Array,
    changed: list[jax.Array],
    rounds: int,
    resample_from: ResampleFrom,
) -> tuple[jax.Array, jax.Array]:
    """Draw, then `rounds` times draw again where the chosen member left the unit at the base.

    Returns:
        The choice, int32 of the shape of `unit`, and what `count_redrawn` returns.
    """

    State = tuple[jax.Array, list[jax.Array], jax.Array]

    def redraw(round_: int | jax.Array, state: State) -> State:
        choice, drawn, redrawn = state
        weights = list(p)
        if resample_from == "others":
            weights = [jnp.where(flag, 0, q) for flag, q in zip(drawn, p, strict=True)]
        new = _draw(random_bits(key_bits, unit, round_), weights)
        settled = _settled(choice, changed)
        # new == M: every member was drawn and none changed the unit, so nothing is left to draw
        # from
        choice = jnp.where(settled | (new == len(changed)), choice, new)
        redrawn = redrawn.at[round_ - 1].set(count_true([_any(changed) & ~settled])[0])
        return choice, [flag | (choice == i) for i, flag in enumerate(drawn)], redrawn

    choice = _draw(random_bits(key_bits, unit), list(p))
    if resample_from == "others":  # after M - 1 redraws every member was drawn
        rounds = min(rounds, len(changed) - 1)
    state = choice, [choice == i for i in range(len(changed))], jnp.zeros(rounds, jnp.uint32)
    if rounds > UNROLLED:
        choice, _, redrawn = jax.lax.fori_loop(1, rounds + 1, redraw, state)
        return choice, redrawn
    for round_ in range(1, rounds + 1):
        state = redraw(round_, state)
    return state[0], state[2]


def _settled(choice: jax.Array, changed: Sequence[jax.Array]) -> jax.Array:
    """Return whether the chosen member changed the unit."""
    return _any([(choice == i) & flag for i, flag in enumerate(changed)])


def _any(flags: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.bitwise_or, flags)


def _check(parameters: Parameters, members: int, weights: np.ndarray | None) -> None:
    resample, child = parameters["resample"], parameters["child"]
    if parameters["granularity"] == "layer" and resample != 0:
        raise UserError(
            "merge method selection: resample with granularity layer is not offered, since a layer "
            "is never left at the base as a unit; give resample: 0 or granularity: tensor"
        )
    if child is None:
        return
    if child >= members:
        raise UserError(
            f"merge method selection: child = {child}, but {members} members have the "
            f"children 0 to {members - 1}"
        )
    # no permutation fits otherwise
    if resample != 0 or (weights is not None and np.ptp(weights) != 0):
        raise UserError(
            "merge method selection: the children are permutations of the members, "
            "so child goes with resample: 0 and equal weights"
        )


def _unit(parameters: Parameters) -> Unit:
    granularity = parameters["granularity"]
    return granularity if granularity in ("element", "row") else "tensor"


METHODS.register(
    "selection",
    Method(
        prepare,
        apply,
        "arXiv 2410.03743",
        needs_base=lambda parameters: bool(parameters["resample"] != 0),
        weights="probabilities",
        unit=_unit,
        draws="select",
        exact=True,
        check=_check,
        count_redrawn=lambda parameters: (
            count_redrawn
            if parameters["granularity"] == "element" and parameters["resample"] != 0
            else None
        ),
    ),
)
