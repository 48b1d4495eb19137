"""Batches against loops over examples."""

import dataclasses
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.pack import (
    bucket_lengths,
    collate,
    length_batches,
    pack_in_order,
    pack_tightly,
    step_batch,
)


def make(lengths, seed=0):
    draw = np.random.default_rng(seed)
    tokens = [draw.integers(1, 100, n) for n in lengths]
    answers = [np.arange(n) >= n // 2 for n in lengths]
    return Examples(
        Ragged.of(tokens, np.int32), Ragged.of(answers, np.bool_), np.arange(len(lengths)) * 3 + 1
    )


def collate_by_loops(examples, rows, length):
    shape = (len(rows), length)
    batch = {
        name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segments")
    }
    batch |= {"weights": np.zeros(shape, np.float32), "ids": np.full(len(rows), -1, np.int32)}
    for b, row in enumerate(rows):
        if row < 0:
            continue
        batch["ids"][b] = examples.ids[row]
        tokens, answers = examples.tokens[row], examples.answers[row]
        for t in range(len(tokens)):
            batch["tokens"][b, t], batch["positions"][b, t], batch["segments"][b, t] = (
                tokens[t],
                t,
                1,
            )
            if t + 1 < len(tokens):
                batch["targets"][b, t], batch["weights"][b, t] = tokens[t + 1], answers[t + 1]
    return batch


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name in expected:
        assert batch[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(batch[name], expected[name], err_msg=name)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 24), min_size=1, max_size=8),
    extra=st.integers(0, 9),
    data=st.data(),
)
def test_collate_equals_loops(lengths, extra, data):
    examples = make(lengths)
    rows = np.array(data.draw(st.lists(st.integers(-1, len(lengths) - 1), min_size=1, max_size=6)))
    assert_same(
        collate(examples, rows, max(lengths) + extra),
        collate_by_loops(examples, rows, max(lengths) + extra),
    )


def test_collate_never_cuts():
    with pytest.raises(ValueError, match="given 9 tokens, expected at most 8"):
        collate(make([3, 9]), np.array([0, 1]), 8)


def test_a_padding_row_has_no_weight_and_no_id():
    batch = collate(make([5]), np.array([-1]), 8)
    assert not any(
        batch[name].any() for name in ("tokens", "targets", "positions", "segments", "weights")
    )
    assert batch["ids"].tolist() == [-1]


@pytest.mark.parametrize(
    ("longest", "buckets", "expected"),
    [
        (512, (), (512,)),
        (509, (), (512,)),
        (300, (256, 128), (128, 256, 304)),
        (100, (128,), (104,)),
        (1, (), (8,)),
        (64, (64, 32, 32), (32, 64)),
    ],
)
def test_bucket_lengths(longest, buckets, expected):
    assert bucket_lengths(longest, buckets) == expected


@settings(max_examples=40, deadline=None)
@given(data=st.data(), microbatch=st.integers(1, 4), steps=st.integers(1, 4), several=st.booleans())
def test_step_batch_holds_the_rows_and_their_buckets(data, microbatch, steps, several):
    lengths = [3, 8, 9, 16, 17, 30, 5, 5, 12, 24, 2, 31]
    examples = make(lengths)
    rows = np.array(data.draw(st.permutations(range(12))))[: microbatch * steps]
    rows = np.pad(rows, (0, microbatch * steps - rows.size), constant_values=-1)
    rows[-1] = data.draw(st.sampled_from([rows[-1], -1]))
    buckets = bucket_lengths(31, (8, 16) if several else ())
    batch = step_batch(examples, rows, microbatch=microbatch, lengths=buckets)
    assert batch["tokens"].shape == (steps, microbatch, 32)
    if several:
        rows = sorted(rows, key=lambda row: lengths[row] if row >= 0 else 0)
    expected = collate_by_loops(examples, rows, 32)
    bucket = batch.pop("bucket")
    assert bucket.dtype == np.int32
    assert_same(
        {name: array.reshape(expected[name].shape) for name, array in batch.items()}, expected
    )
    for a in range(steps):
        used = batch["segments"][a].sum(1).max()
        assert used <= buckets[bucket[a]]
        assert bucket[a] == 0 or used > buckets[bucket[a] - 1]


def test_step_batch_keeps_the_order_with_one_length():
    batch = step_batch(make([9, 3, 5, 7]), np.array([0, 1, 2, 3]), microbatch=2, lengths=(16,))
    assert batch["ids"].tolist() == [[1, 4], [7, 10]]
    assert batch["bucket"].tolist() == [0, 0]


def test_step_batch_refuses_a_remainder():
    with pytest.raises(ValueError, match="not a multiple of microbatch = 2"):
        step_batch(make([9, 3, 5]), np.array([0, 1, 2]), microbatch=2, lengths=(16,))


def test_length_batches_hold_each_example_once():
    lengths = np.random.default_rng(1).integers(1, 60, 37)
    examples = make(lengths)
    buckets = bucket_lengths(int(lengths.max()), (16, 32))
    batches = list(length_batches(examples, 8, buckets))
    ids = np.concatenate([batch["ids"] for batch in batches])
    assert sorted(ids[ids >= 0]) == examples.ids.tolist()
    assert (ids >= 0).sum() == 37
    assert (ids[-3:] == -1).all()
    for batch in batches:
        rows = np.where(batch["ids"] < 0, -1, (batch["ids"] - 1) // 3)
        longest = max(lengths[row] for row in rows if row >= 0)
        assert batch["tokens"].shape == (8, min(size for size in buckets if size >= longest))
        assert_same(batch, collate_by_loops(examples, rows, batch["tokens"].shape[1]))


def test_take_and_digest():
    examples = make([4, 6, 5])
    assert [row.tolist() for row in examples.take(np.array([2, 0])).tokens] == [
        examples.tokens[2].tolist(),
        examples.tokens[0].tolist(),
    ]
    assert examples.take(np.arange(3)).digest == examples.digest
    assert examples.take(np.array([0, 2, 1])).digest != examples.digest
    with pytest.raises(IndexError):
        examples.tokens[3]


def test_a_batch_costs_well_under_a_millisecond():
    examples = make(np.random.default_rng(0).integers(20, 513, 2000))
    rows = np.random.default_rng(1).integers(0, 2000, 32)
    spans = []
    for _ in range(50):
        begin = time.perf_counter()
        collate(examples, rows, 512)
        spans.append(time.perf_counter() - begin)
    assert (
        min(spans) < 1e-3
    )  # the best of many: what the code costs, not what else the machine does


# ------------------------------------------------------------------ packing


def in_order_by_loops(sizes, length):
    """Rows as lists; the open ones are looked through from the oldest."""
    closed, rows = [], []
    for number, size in enumerate(sizes):
        fitting = [row for row in rows if sum(sizes[number] for number in row) + size <= length]
        if fitting:
            fitting[0].append(number)
            continue
        if len(rows) == 8:
            closed.append(rows.pop(0))
        rows.append([number])
    return closed + rows


def tightly_by_loops(sizes, length):
    """Rows as lists; all are looked through."""
    rows = []
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        fitting = [
            row for row in rows if sum(sizes[number] for number in row) + sizes[number] <= length
        ]
        if fitting:
            max(fitting, key=lambda row: sum(sizes[number] for number in row)).append(number)
        else:
            rows.append([number])
    return rows


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_packing_equals_loops(sizes):
    in_order, tight = (pack(np.array(sizes), 20) for pack in (pack_in_order, pack_tightly))
    assert [
        [number for number in row if number >= 0] for row in in_order.tolist()
    ] == in_order_by_loops(sizes, 20)
    totals = [sum(sizes[number] for number in row if number >= 0) for row in tight.tolist()]
    # of rows equally full it does not matter which is chosen
    assert sorted(totals) == sorted(
        sum(sizes[number] for number in row) for row in tightly_by_loops(sizes, 20)
    )
    for packed in (in_order, tight):
        assert packed.dtype == np.int32
        assert sorted(packed[packed >= 0]) == list(range(len(sizes)))
        assert ((packed[:, 1:] < 0) | (packed[:, :-1] >= 0)).all()


@pytest.mark.parametrize(("length", "in_order", "tight"), [(512, 0.93, 0.98), (2048, 0.98, 0.995)])
def test_rows_are_nearly_full_and_keep_the_order(length, in_order, tight):
    sizes = np.random.default_rng(0).lognormal(5.0, 0.4, 5000).astype(int).clip(20, 512)
    packed = pack_in_order(sizes, length)
    assert sizes.sum() / (length * len(packed)) > in_order
    assert sizes.sum() / (length * len(pack_tightly(sizes, length))) > tight
    row = np.empty(5000)
    row[packed[packed >= 0]] = np.nonzero(packed >= 0)[0]
    assert np.corrcoef(row, np.arange(5000))[0, 1] > 0.9999


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 24), min_size=1, max_size=12),
    extra=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_packed_rows_are_rows_side_by_side(sizes, extra, seed):
    examples = make(sizes, seed)
    packed = np.pad(pack_in_order(np.array(sizes), 30), [(0, 1), (0, 0)], constant_values=-1)
    batch = collate(examples, packed, 30 + extra)
    assert batch["ids"].tolist() == np.where(packed < 0, -1, examples.ids[packed]).tolist()
    for place, rows in enumerate(packed):
        expected_batch = collate_by_loops(examples, rows, 30)
        for name in ("tokens", "targets", "positions", "segments", "weights"):
            side_by_side = [
                expected_batch[name][s, : sizes[row]] * (s + 1 if name == "segments" else 1)
                for s, row in enumerate(rows)
                if row >= 0
            ]
            expected = np.concatenate([*side_by_side, np.zeros(30 + extra)])[: 30 + extra]
            np.testing.assert_array_equal(batch[name][place], expected, err_msg=name)
            assert batch[name].dtype == expected_batch[name].dtype


def test_packed_rows_are_not_cut():
    with pytest.raises(ValueError, match="given 12 tokens, expected at most 8"):
        collate(make([5, 7]), np.array([[0, 1]]), 8)


def test_a_step_of_packed_rows():
    examples = make([5, 7, 3, 6])
    batch = step_batch(
        examples, np.array([[0, 2], [1, -1], [3, -1], [-1, -1]]), microbatch=2, lengths=(8,)
    )
    assert batch["tokens"].shape == (2, 2, 8)
    assert batch["ids"].tolist() == [[[1, 7], [4, -1]], [[10, -1], [-1, -1]]]
    assert batch["bucket"].tolist() == [0, 0]


# ------------------------------------------------------------------ preference pairs


def make_pairs(chosen, rejected):
    reference = np.random.default_rng(2).normal(size=(len(chosen), 2)).astype(np.float32)
    return dataclasses.replace(make(chosen), rejected=make(rejected, seed=1), reference=reference)


def test_a_pair_is_collated_as_two_sequences():
    pairs = make_pairs([4, 9, 5], [7, 3, 6])
    batch = collate(pairs, np.array([2, -1, 0]), 12)
    for side, part in enumerate((make([4, 9, 5]), make([7, 3, 6], seed=1))):
        expected = collate_by_loops(part, [2, -1, 0], 12)
        ids = expected.pop("ids")
        assert_same({name: batch[name][:, side] for name in expected}, expected)
        np.testing.assert_array_equal(batch["ids"], ids)
    np.testing.assert_array_equal(
        batch["reference"], [pairs.reference[2], [0, 0], pairs.reference[0]]
    )


def test_pairs_are_padded_to_the_longer_sequence():
    pairs = make_pairs([4, 9, 5, 5], [7, 3, 6, 15])
    batch = step_batch(pairs, np.array([0, 1, 2, 3]), microbatch=2, lengths=(8, 16))
    assert batch["tokens"].shape == (2, 2, 2, 16)
    assert batch["ids"].tolist() == [[7, 1], [4, 10]]  # shortest first: 6, 7, 9 and 15 tokens
    assert batch["bucket"].tolist() == [0, 1]
    assert [row.tolist() for row in pairs.sequences.tokens] == [
        row.tolist() for n in range(4) for row in (pairs.tokens[n], pairs.rejected.tokens[n])
    ]


def test_pairs_need_a_reference():
    pairs = dataclasses.replace(make_pairs([4], [5]), reference=None)
    with pytest.raises(ValueError, match="have no reference log-probabilities"):
        collate(pairs, np.array([0]), 8)


def test_take_and_digest_of_pairs():
    pairs = make_pairs([4, 9, 5], [7, 3, 6])
    batch_pairs = pairs.take(np.array([2, 0]))
    np.testing.assert_array_equal(batch_pairs.reference, pairs.reference[[2, 0]])
    assert batch_pairs.rejected.tokens[0].tolist() == pairs.rejected.tokens[2].tolist()
    assert pairs.take(np.arange(3)).digest == pairs.digest != pairs.parts[0].digest
    assert dataclasses.replace(pairs, rejected=make([7, 3, 6], seed=2)).digest != pairs.digest
