"""The hash against a naive version in Python integers, its published vectors, and its quality."""

import functools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_ordermerge import rng
from jax_ordermerge.hash_rng import Index, _times, element_index, mix, random_bits

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "random_choice.md").read_text()
WORD = 0xFFFFFFFF


def naive_mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D & WORD
    x ^= x >> 15
    x = x * 0x846CA68B & WORD
    return x ^ x >> 16


def naive_hash(k0, k1, index, round_=0):
    a = naive_mix(k0 + 0x9E3779B9 * round_ & WORD)
    b = naive_mix(k1 ^ a)
    return naive_mix(naive_mix(index & WORD ^ a) ^ (index >> 32) ^ b)


def words(*names, seed=0):
    return jnp.asarray(rng.stream_key_bits(seed, *names))


def draws(key, shape, round_=0):
    return np.asarray(_draws(key, shape, round_))


@functools.partial(jax.jit, static_argnums=1)
def _draws(key, shape, round_):
    return random_bits(key, element_index(shape), round_)


def test_mix_has_the_published_vectors():
    rows = re.findall(r"^\| ([0-9a-f]{8}) \| ([0-9a-f]{8}) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for x, expected in rows:
        assert int(mix(jnp.uint32(int(x, 16)))) == int(expected, 16) == naive_mix(int(x, 16))


def test_hash_has_the_published_vectors():
    rows = re.findall(
        r"^\| (\d+) \| ([0-9a-f]{8}) \| ([0-9a-f]{8}) \| ([0-9a-f]{8}) \|$", PAGE, re.MULTILINE
    )
    assert len(rows) == 6
    for number, *expected in rows:
        i = int(number)
        index = Index(jnp.uint32(i & WORD), jnp.uint32(i >> 32))
        for round_, word in enumerate(expected):
            got = int(random_bits(jnp.array([1, 2], jnp.uint32), index, round_))
            assert got == int(word, 16) == naive_hash(1, 2, i, round_)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1)])
@pytest.mark.parametrize("offset", [None, 0, 5, 2**32 - 3, 2**40 + 2**32 - 1])
def test_index_is_row_major_from_any_offset(shape, offset):
    given = None if offset is None else jnp.array([offset & WORD, offset >> 32], jnp.uint32)
    lo, hi = element_index(shape, given)
    got = np.asarray(hi).astype(object) * 2**32 + np.asarray(lo).astype(object)
    expected = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(object) + (offset or 0)
    assert np.array_equal(got, expected)


def test_index_is_right_beyond_two_to_the_32_inside_one_array():
    # too large to allocate: the row number times the row length is what can overflow
    rows = jnp.array([0, 8191, 8192, 8193, 32767], jnp.uint32)
    lo, hi = _times(rows, (1 << 19) - 1)
    assert [int(h) * 2**32 + int(low) for low, h in zip(lo, hi, strict=True)] == [
        int(r) * ((1 << 19) - 1) for r in rows
    ]
    big = jnp.array([WORD, 123456789, 1 << 31], jnp.uint32)
    for stride in (WORD, (1 << 40) + 12345, 65536, 3):
        lo, hi = _times(big, stride)
        expected = [int(x) * stride & (1 << 64) - 1 for x in big]
        assert [int(h) * 2**32 + int(low) for low, h in zip(lo, hi, strict=True)] == expected


def test_a_slab_draws_what_the_whole_draws():
    key, shape = words("slab"), (11, 7)
    full = draws(key, shape)
    for start in (1, 6, 10):
        offset = jnp.array([start * 7, 0], jnp.uint32)
        part = jax.jit(lambda k, o, rows=11 - start: random_bits(k, element_index((rows, 7), o)))(
            key, offset
        )
        assert np.array_equal(part, full[start:])


def member_of(words_, members):
    return (words_ >> 16).astype(np.uint64) * members >> 16


@pytest.mark.parametrize("members", [2, 3, 4, 7])
def test_members_are_drawn_equally_often(members):
    p = []
    for name in range(20):
        counts = np.bincount(
            member_of(draws(words("frequency", name), (40_000,)), members), minlength=members
        )
        p.append(stats.chisquare(counts).pvalue)
    assert stats.kstest(p, "uniform").pvalue > 1e-3
    assert min(p) > 1e-4


def pair(kind):
    shape, n = (256, 1024), 256 * 1024
    h = draws(words("pair"), shape)
    if kind == "the two sides of 2^32":
        low = jax.lax.iota(jnp.uint32, n)
        return tuple(
            np.asarray(random_bits(words("pair"), Index(low, jnp.full(n, hi, jnp.uint32))))
            for hi in (0, 1)
        )
    return {
        "neighbours": lambda: (h[:, :-1], h[:, 1:]),
        "rows": lambda: (h[:-1], h[1:]),
        "rows apart by a power of two": lambda: (h[:-128], h[128:]),
        "tensors": lambda: (h, draws(words("pair", "other"), shape)),
        "adjacent layers": lambda: (
            draws(words("layers.1.q"), shape),
            draws(words("layers.2.q"), shape),
        ),
        "seeds": lambda: (h, draws(words("pair", seed=1), shape)),
        "rounds": lambda: (h, draws(words("pair"), shape, 1)),
        "later rounds": lambda: (draws(words("pair"), shape, 1), draws(words("pair"), shape, 2)),
        "plain keys": lambda: tuple(draws(jnp.array([0, k], jnp.uint32), shape) for k in (0, 1)),
    }[kind]()


KINDS = (
    "neighbours",
    "rows",
    "rows apart by a power of two",
    "tensors",
    "adjacent layers",
    "seeds",
    "rounds",
    "later rounds",
    "plain keys",
    "the two sides of 2^32",
)


@pytest.mark.parametrize("members", [2, 3, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_independent(kind, members):
    x, y = pair(kind)
    table = np.bincount(
        (member_of(x, members) * members + member_of(y, members)).ravel(), minlength=members**2
    )
    assert stats.chisquare(table).pvalue > 1e-4
    correlation = np.corrcoef(x.ravel().astype(float), y.ravel().astype(float))[0, 1]
    assert abs(correlation) < 4.5 / np.sqrt(x.size)


def test_consecutive_triples_fill_the_cube():
    h = draws(words("triples"), (3 * 60_000,)).reshape(-1, 3)
    cell = (h >> 29).astype(int) @ [64, 8, 1]
    assert stats.chisquare(np.bincount(cell, minlength=512)).pvalue > 1e-4


@pytest.mark.parametrize("bit", range(64))
def test_every_index_bit_flips_half_of_the_word(bit):
    n = 4096
    flip = jnp.uint32(1 << bit % 32)
    index = Index(jnp.arange(n, dtype=jnp.uint32) * 7919, jnp.arange(n, dtype=jnp.uint32) % 5)
    moved = Index(index.lo ^ flip, index.hi) if bit < 32 else Index(index.lo, index.hi ^ flip)
    key = words("avalanche")
    changed = np.asarray(random_bits(key, index) ^ random_bits(key, moved))
    rates = np.unpackbits(changed.view(np.uint8)).reshape(n, 32).mean(axis=0)
    assert np.abs(rates - 0.5).max() < 5 * 0.5 / np.sqrt(n)


def test_many_rounds_of_one_element_are_uniform():
    index = element_index((20_000,))
    h = jax.vmap(lambda r: random_bits(words("rounds"), Index(index.lo[0], index.hi[0]), r))(
        index.lo
    )
    assert stats.kstest(np.asarray(h) / 2**32, "uniform").pvalue > 1e-4
