"""Orders: golden digests, and the properties of each level for any sizes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ordermerge.data.order import LEVELS, digest, locate, order_indices, permutation, positions
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream_key_bits

# (member, epoch) = (0, 0), (1, 0), (3, 2) of 103 examples, batch 8, seed 7, 4 members
GOLDEN = {
    "sample": ["5cda327242879c2d", "afa3ba7ed179218f", "02808e087fa0aa6b"],
    "batch": ["1e555a9a0ccaf4c4", "221e7b1190817b82", "f80a0f625e3fc26f"],
    "balanced": ["5cda327242879c2d", "8667177bab2c713d", "ee66c5fc84e28abd"],
    "same": ["5cda327242879c2d", "5cda327242879c2d", "d410c38558ef4130"],
    "reverse": ["5cda327242879c2d", "86c292b2eda9f67f", "9df22438c343c67d"],
}


def order(level="sample", examples=103, batch=8, seed=7, member=0, members=4, epoch=0, **settings):
    return order_indices(
        level=level,
        examples=examples,
        batch=batch,
        seed=seed,
        member=member,
        members=members,
        epoch=epoch,
        **settings,
    )


def sequence(indices):
    return indices[indices >= 0]


sizes = {
    "examples": st.integers(1, 200),
    "batch": st.integers(1, 40),
    "seed": st.integers(-(2**70), 2**70),
    "members": st.integers(1, 6),
    "epoch": st.integers(0, 5),
}


@pytest.mark.parametrize("level", LEVELS)
def test_golden_digests(level):
    assert [
        digest(order(level, member=m, epoch=e))[:16] for m, e in ((0, 0), (1, 0), (3, 2))
    ] == GOLDEN[level]


def test_permutation_is_the_sort_of_philox_words():
    # Philox4x64-10 written out from the paper, so that not even numpy's generator is taken on trust
    def philox(counter, key):
        mask = 2**64 - 1
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * counter[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * counter[2], 2**64)
            counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        return counter

    low, high = map(int, stream_key_bits(7, "golden"))
    words = [
        word for block in (1, 2, 3) for word in philox([block, 0, 0, 0], [low + (high << 32), 0])
    ]
    assert (
        permutation(12, 7, "golden").tolist()
        == sorted(range(12), key=words.__getitem__)
        == [5, 9, 8, 10, 1, 11, 0, 4, 3, 2, 6, 7]
    )


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=40, deadline=None)
@given(**sizes, data=st.data())
def test_every_sample_once_and_padding_last(level, data, members, **given_sizes):
    member = data.draw(st.integers(0, members - 1))
    indices = order(level, member=member, members=members, **given_sizes)
    examples, batch = given_sizes["examples"], given_sizes["batch"]
    assert indices.dtype == np.int32
    assert indices.shape == (-(-examples // batch), batch)
    assert sorted(sequence(indices)) == list(range(examples))
    assert (indices.reshape(-1)[:examples] >= 0).all()
    where = positions(indices, examples)
    assert where.min() == 0
    assert where.max() == (1 if len(indices) > 1 else 0)


@settings(max_examples=40, deadline=None)
@given(**sizes)
def test_balanced_visits_equally_spaced_positions(examples, batch, seed, members, epoch):
    places = np.empty((members, examples), int)
    for member in range(members):
        run = sequence(order("balanced", examples, batch, seed, member, members, epoch))
        places[member, run] = np.arange(examples)
    gaps = np.diff(np.sort(places, axis=0), axis=0, append=np.sort(places, axis=0)[:1] + examples)
    # n / k apart all the way round, to the whole sample
    assert gaps.min() >= examples // members
    assert gaps.max() <= -(-examples // members)


def test_balanced_cancels_position_exactly_when_blocks_are_whole():
    where = np.stack([positions(order("balanced", 96, 8, member=m), 96) for m in range(4)])
    np.testing.assert_allclose(
        np.sort(where, 0)[1:] - np.sort(where, 0)[:-1], 3 / 11, rtol=1e-12
    )  # 3 of 12 steps, of 11 intervals


@settings(max_examples=30, deadline=None)
@given(**sizes)
def test_reverse_pairs(examples, batch, seed, members, epoch):
    for pair in range(members // 2):
        forward, backward = (
            sequence(order("reverse", examples, batch, seed, 2 * pair + end, members, epoch))
            for end in (0, 1)
        )
        assert forward.tolist() == backward[::-1].tolist()


@settings(max_examples=30, deadline=None)
@given(**sizes)
def test_batch_keeps_composition(examples, batch, seed, members, epoch):
    first = order("batch", examples, batch, seed, 0, members, 0)
    last = order("batch", examples, batch, seed, members - 1, members, epoch)
    assert {tuple(step) for step in first} == {tuple(step) for step in last}
    assert (first[-1] == last[-1]).all() or examples % batch == 0


def test_same_is_the_same_and_changes_by_epoch():
    assert (order("same", member=0) == order("same", member=3)).all()
    assert (order("same", epoch=0) != order("same", epoch=1)).any()


@pytest.mark.parametrize("level", ["sample", "batch", "balanced", "reverse"])
def test_members_epochs_and_seeds_differ(level):
    runs = {
        digest(order(level, seed=s, member=m, epoch=e))
        for s in (0, 1)
        for m in range(4)
        for e in range(3)
    }
    assert len(runs) == 24  # among them seed 0 epoch 1 against seed 1 epoch 0


def test_sample_does_not_depend_on_how_many_members_there_are():
    assert (order(member=1, members=2) == order(member=1, members=8)).all()


@pytest.mark.parametrize("level", LEVELS)
def test_never_repeats_the_first_epoch(level):
    assert (
        order(level, member=2, epoch=5, reshuffle="never") == order(level, member=2, epoch=0)
    ).all()


def test_positions_are_uniform():
    counts = np.zeros((6, 6))
    for epoch in range(6000):
        counts[np.arange(6), sequence(order(examples=6, batch=6, epoch=epoch))] += 1
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    assert (
        chi_square < 52.6
    )  # 25 degrees of freedom, p = 0.001; the orders are fixed, so this cannot flicker


def test_coordinates_in_packed_rows():
    indices = np.array([[[4, 1], [0, -1]], [[3, 2], [-1, -1]]])
    assert locate(indices, 5).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert positions(indices, 5).tolist() == [0, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="each of 6 samples once; given 5, 5 of them different"):
        locate(indices, 6)


def test_positions_by_hand():
    assert positions(np.array([[3, 1], [0, 4], [2, -1]]), 5).tolist() == [0.5, 0, 1, 0, 0.5]
    assert positions(np.array([[1, 0, -1]]), 2).tolist() == [0, 0]


@pytest.mark.parametrize("indices", [[[0, 1], [1, -1]], [[0, -1]], [[0, 2]]])
def test_positions_refuse_what_is_no_epoch(indices):
    with pytest.raises(ValueError, match="samples once"):
        positions(np.array(indices), 2)


def test_digest_knows_the_shape():
    assert digest(np.array([[1, 2]])) != digest(np.array([[1], [2]]))
    assert digest(np.array([[1, 2]], np.int64)) == digest(np.array([[1, 2]], np.int32))


def test_bad_input():
    with pytest.raises(UserError, match="did you mean 'sample'"):
        order("samples")
    for wrong in ({"member": 4}, {"examples": 0}, {"batch": 0}, {"epoch": -1}):
        with pytest.raises(ValueError, match="must be at least 1"):
            order(**wrong)
