"""Selection against a naive loop over elements in Python integers, and its exactness."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.parameters import quantize
from jax_ordermerge.merge.methods.parts import Part
from jax_ordermerge.merge.methods.selection import count_redrawn, select, to_bits, unstack

WORD = 0xFFFFFFFF


def naive_mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def naive_hash(key_bits, index, round_):
    a = naive_mix(key_bits[0] + 0x9E3779B9 * round_ & WORD)
    b = naive_mix(key_bits[1] ^ a)
    return naive_mix(naive_mix(index & WORD ^ a) ^ (index >> 32) ^ b)


def naive_draw(h, weights):
    t = (h >> 16) * sum(weights) >> 16
    reached = 0
    for i, weight in enumerate(weights):
        reached += weight
        if reached > t:
            return i
    return None


def naive_select(members, base, p, key_bits, resample, resample_from, granularity):
    """Element by element; members [M, n rows, n columns] and base as integers."""
    out = np.zeros_like(members[0])
    columns = out.shape[1]
    for position in np.ndindex(out.shape):
        r, c = position
        unit = {"element": r * columns + c, "row": r, "column": c}.get(granularity, 0)
        part = {"element": position, "row": (r, slice(None)), "column": (slice(None), c)}.get(
            granularity, ...
        )
        changed = [bool((m[part] != base[part]).any()) for m in members] if base is not None else []
        if resample == "exhaustive":
            chosen = naive_draw(
                naive_hash(key_bits, unit, 0),
                [q if ch else 0 for q, ch in zip(p, changed, strict=True)],
            )
        else:
            chosen = naive_draw(naive_hash(key_bits, unit, 0), p)
            drawn = {chosen}
            for round_ in range(1, resample + 1):
                if changed[chosen]:
                    break
                left = [
                    0 if resample_from == "others" and i in drawn else q for i, q in enumerate(p)
                ]
                again = naive_draw(naive_hash(key_bits, unit, round_), left)
                if again is None:
                    break
                chosen = again
                drawn.add(chosen)
        out[position] = base[position] if chosen is None else members[chosen][position]
    return out


def sparse_members(shape, members=3, zeros=0.6, seed=0, dtype=jnp.bfloat16):
    generator = np.random.default_rng(seed)
    base = generator.normal(size=shape).astype(np.float32)
    task_vectors = generator.normal(size=(members, *shape)) * (
        generator.random((members, *shape)) > zeros
    )
    return jnp.asarray(base + task_vectors, dtype), jnp.asarray(base, dtype)


KEY = rng.stream(5, "select", "t")
WORDS = [int(w) for w in rng.stream_key_bits(5, "select", "t")]


ROUNDS = [(0, "all"), (1, "all"), (1, "others"), (5, "others"), (12, "all"), ("exhaustive", "all")]


@pytest.mark.parametrize(
    ("granularity", "resample", "source", "weights"),
    [("element", *rounds, weights) for rounds in ROUNDS for weights in (None, (0.0, 0.7, 0.2))]
    + [
        (unit, *rounds, (0.5, 0.2, 0.3))
        for unit in ("row", "column", "tensor")
        for rounds in ROUNDS[2::3]
    ]
    + [("layer", 0, "all", None)],
)
def test_against_the_naive_loop(granularity, resample, source, weights):
    members, base = sparse_members(
        (9, 5), zeros={"element": 0.6, "row": 0.9, "column": 0.95}.get(granularity, 0.99)
    )
    p = quantize(weights or (1, 1, 1)).tolist()
    expected = naive_select(
        np.asarray(to_bits(members)),
        np.asarray(to_bits(base)),
        p,
        WORDS,
        resample,
        source,
        granularity,
    )
    merge = functools.partial(
        select,
        weights=None if weights is None else np.array(weights),
        resample=resample,
        resample_from=source,
        granularity=granularity,
    )
    got = jax.jit(merge)(members, base=base, key=KEY)
    assert got.dtype == members.dtype
    assert np.array_equal(to_bits(got), expected)


@pytest.mark.parametrize(
    ("resample", "source"),
    [(1, "all"), (2, "others"), (5, "others"), (12, "all"), ("exhaustive", "all")],
)
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.0, 0.7, 0.2)])
def test_units_drawn_again_are_counted(resample, source, weights):
    members, base = sparse_members((9, 50))
    p, changed = (
        quantize(weights),
        np.asarray(to_bits(members) != to_bits(base)[None]).reshape(3, -1),
    )
    rounds = 1 if resample == "exhaustive" else min(resample, 2) if source == "others" else resample
    expected = [0] * rounds
    for unit in np.flatnonzero(changed.any(axis=0)):
        drawn = []
        for round_ in range(rounds + 1):
            again = naive_draw(
                naive_hash(WORDS, int(unit), round_),
                [0 if source == "others" and i in drawn else int(q) for i, q in enumerate(p)],
            )
            drawn.append(drawn[-1] if again is None else again)
            if changed[drawn[-1], unit] or round_ == rounds:
                break
            expected[round_] += 1
    part = Part(unstack(members), base, jnp.array(WORDS, jnp.uint32))
    count = jax.jit(
        lambda part, p: count_redrawn(
            part, p, resample=resample, resample_from=source, granularity="element"
        )
    )
    assert count(part, p).tolist() == expected
    assert sum(expected) > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_bits_of_members_pass_untouched(dtype):
    """NaN payloads, -0.0, infinities and subnormals included."""
    width = jnp.dtype(dtype).itemsize * 8
    unsigned = f"uint{width}"
    patterns = (
        np.random.default_rng(1)
        .integers(0, 2**width, (4, 64, 33), dtype=np.uint64)
        .astype(unsigned)
    )
    members = jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.dtype(dtype))
    for resample in (0, 2, "exhaustive"):
        merge = jax.jit(functools.partial(select, key=KEY, resample=resample))
        got = np.asarray(to_bits(merge(members, base=members[0])))
        assert (got[None] == patterns).any(axis=0).all()


@pytest.mark.parametrize("weights", [(1, 1, 1, 1), (1, 2, 0, 5)])
def test_counts_lie_within_four_sigma(weights):
    members = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[:, None, None], (4, 300, 401))
    chosen = np.asarray(
        jax.jit(functools.partial(select, weights=np.array(weights)))(members, key=KEY)
    )
    p = np.array(weights) / sum(weights)
    counts, n = np.bincount(chosen.ravel(), minlength=4), chosen.size
    assert (np.abs(counts - n * p) <= 4 * np.sqrt(n * p * (1 - p)) + n * 2.0**-16 * (p > 0)).all()


def test_exhaustive_resampling_leaves_nothing_at_the_base():
    members, base = sparse_members((200, 100), zeros=0.8)
    got = jax.jit(functools.partial(select, resample="exhaustive"))(members, base=base, key=KEY)
    differs = (to_bits(members) != to_bits(base)[None]).any(axis=0)
    assert 0.2 < float(differs.mean()) < 0.8
    assert np.array_equal(to_bits(got) != to_bits(base), differs)


def test_exhaustive_is_uniform_over_those_that_changed():
    """Where two of three changed an element, each of them is taken half of the time."""
    n = 60_000
    members = jnp.stack([jnp.full(n, 1.0), jnp.full(n, 2.0), jnp.zeros(n)])
    got = np.asarray(select(members, base=jnp.zeros(n), key=KEY, resample="exhaustive"))
    assert abs((got == 1).sum() - n / 2) < 4 * np.sqrt(n / 4) + n * 2.0**-16
    assert (got != 0).all()


@pytest.mark.parametrize(
    ("resample", "source", "expected"),
    [(0, "all", 2 / 3), (1, "all", 4 / 9), (1, "others", 1 / 3), (2, "others", 0)],
)
def test_rounds_leave_the_share_at_the_base_that_theory_says(resample, source, expected):
    n = 60_000
    members = jnp.stack([jnp.zeros(n), jnp.ones(n), jnp.zeros(n)])
    got = np.asarray(
        select(members, base=jnp.zeros(n), key=KEY, resample=resample, resample_from=source)
    )
    share = (got == 0).mean()
    assert abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / n) + 2.0**-15


def test_base_is_compared_after_the_cast_to_the_members_dtype():
    base = jnp.asarray(np.random.default_rng(0).normal(size=500), jnp.float32)
    members = jnp.stack([base.astype(jnp.bfloat16), (base + 1).astype(jnp.bfloat16)])
    got = select(members, base=base, key=KEY, resample="exhaustive")
    assert np.array_equal(to_bits(got), to_bits(members[1]))


@pytest.mark.parametrize("granularity", ["element", "row"])
def test_slabs_give_the_bits_of_the_whole(granularity):
    members, base = sparse_members((13, 6))
    merge = jax.jit(functools.partial(select, key=KEY, resample=2, granularity=granularity))
    full = merge(members, base=base)
    for start in (1, 12):
        first = start * (6 if granularity == "element" else 1)
        offset = jnp.array([first, 0], jnp.uint32)
        part = merge(members[:, start:], base=base[start:], offset=offset)
        assert np.array_equal(to_bits(part), to_bits(full[start:]))


@pytest.mark.parametrize("first", [2**32 - 17, 2**33 + 5])
def test_indices_beyond_two_to_the_32(first):
    members = sparse_members((5, 7))[0]
    got = jax.jit(select)(
        members, key=KEY, offset=jnp.array([first & WORD, first >> 32], jnp.uint32)
    )
    p = quantize((1, 1, 1)).tolist()
    chosen = [naive_draw(naive_hash(WORDS, first + i, 0), p) for i in range(35)]
    expected = np.asarray(to_bits(members)).reshape(3, 35)[chosen, np.arange(35)].reshape(5, 7)
    assert np.array_equal(to_bits(got), expected)


def test_slabs_of_columns_and_missing_base_are_defects_of_the_caller():
    members = sparse_members((4, 4))[0]
    with pytest.raises(ValueError, match="column cannot be computed on slabs"):
        select(members, key=KEY, granularity="column", offset=jnp.zeros(2, jnp.uint32))
    with pytest.raises(ValueError, match="needs the base"):
        select(members, key=KEY, resample=1)


def test_quantize_is_exact_to_two_to_the_minus_16():
    generator = np.random.default_rng(0)
    for _ in range(200):
        w = generator.random(generator.integers(1, 9)) + 1e-3
        q = quantize(w)
        assert q.sum() == 65536
        assert np.abs(q / 65536 - w / w.sum()).max() <= 2.0**-16
    with pytest.raises(UserError, match="not negative"):
        quantize([1, -1])
    with pytest.raises(UserError, match="sum is positive"):
        quantize([0, 0])
    with pytest.raises(UserError, match="below 1/131072"):
        quantize([1, 1e-9])
