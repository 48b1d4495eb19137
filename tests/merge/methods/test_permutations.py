"""The permutations by which the children of several selections share out the members."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng
from jax_ordermerge.errors import UserError
from jax_ordermerge.hash_rng import Index, random_bits
from jax_ordermerge.merge.methods.selection import permuted
from tests.merge.methods.test_table import KEY_BITS, merge, population_of


def naive_permutation(key_bits, unit, count):
    """The permutation of one unit in Python integers, by taking members out of a list."""
    left, out, number, product = list(range(count)), [], 0, None
    for choices in range(count, 0, -1):
        product = None if product is None else product * choices
        if product is None or product > 2**16:
            index = Index(jnp.uint32(unit & 0xFFFFFFFF), jnp.uint32(unit >> 32))
            fraction = int(random_bits(jnp.array(key_bits, jnp.uint32), index, 2**30 + number))
            number, product = number + 1, choices
        digit, fraction = divmod(fraction * choices, 2**32)
        out.append(left.pop(digit))
    return out


def test_permutations_of_the_children_have_the_published_vectors():
    page = (pathlib.Path(__file__).parents[3] / "docs" / "random_choice.md").read_text()
    rows = re.findall(
        r"^\| (\d+) \| ((?:\d ){2}\d) \| ((?:\d ){3}\d) \| ((?:\d ){9}\d) \|$", page, re.MULTILINE
    )
    assert len(rows) == 6
    for number, *expected in rows:
        i = int(number)
        unit = Index(jnp.uint32(i & 0xFFFFFFFF), jnp.uint32(i >> 32))
        for text in expected:
            count = len(text.split())
            results = [
                int(permuted(jnp.array([1, 2], jnp.uint32), unit, count, child))
                for child in range(count)
            ]
            assert " ".join(map(str, results)) == text
            assert results == naive_permutation([1, 2], i, count)


@pytest.mark.parametrize("granularity", ["element", "row", "column", "tensor"])
@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_the_children_share_the_members_out(granularity, count):
    """At each element the children permute the members, so their mean is the average."""
    patterns = (
        np.random.default_rng(0)
        .integers(0, 2**16, (count, 12, 10), dtype=np.uint64)
        .astype(np.uint16)
    )
    members = jax.lax.bitcast_convert_type(jnp.asarray(patterns), jnp.bfloat16)
    children = [
        merge(
            "selection", {"child": c, "granularity": granularity}, members, None, dtype="bfloat16"
        )
        for c in range(count)
    ]
    results = np.stack([np.asarray(child).view(np.uint16) for child in children])
    assert np.array_equal(np.sort(results, axis=0), np.sort(patterns, axis=0))


def test_permutations_are_uniform_and_independent():
    """Count the 24 permutations, and pairs: of neighbours, of tensors, and with the plain draw."""
    n, origin = 240_000, jnp.broadcast_to(jnp.arange(4.0)[:, None], (4, 240_000))

    def permutations(key_bits):
        results = [
            np.asarray(merge("selection", {"child": c}, origin, None, key_bits=key_bits), int)
            for c in range(4)
        ]
        return np.unique(np.stack(results), axis=1, return_inverse=True)[1].reshape(-1)

    one, other = permutations(KEY_BITS), permutations(rng.stream_key_bits(0, "another tensor"))
    assert one.max() == 23
    within_four_sigma(np.bincount(one), n, 1 / 24)
    within_four_sigma(np.bincount(24 * one + other), n, 1 / 576)
    within_four_sigma(np.bincount(24 * one[::2] + one[1::2]), n // 2, 1 / 576)
    plain = np.asarray(merge("selection", {}, origin, None), int)
    within_four_sigma(np.bincount(24 * plain + one), n, 1 / 96)


def within_four_sigma(counts, n, p):
    assert (np.abs(counts - n * p) < 4 * np.sqrt(n * p * (1 - p)) + n * p * 2.0**-16).all()


@pytest.mark.parametrize(
    ("parameters", "weights", "message"),
    [
        ({"child": 3}, None, "child = 3, but 3 members have the children 0 to 2"),
        ({"child": 0, "resample": 1}, None, "child goes with resample: 0 and equal weights"),
        (
            {"child": 0, "resample": "exhaustive"},
            None,
            "child goes with resample: 0 and equal weights",
        ),
        ({"child": 0}, (1, 2, 1), "child goes with resample: 0 and equal weights"),
    ],
)
def test_what_no_permutation_fits_is_refused_in_one_line(parameters, weights, message):
    members, base = population_of((2, 2))
    with pytest.raises(UserError, match=message) as caught:
        merge("selection", parameters, members, base, weights)
    assert "\n" not in str(caught.value)
