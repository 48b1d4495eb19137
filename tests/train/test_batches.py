import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest

from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import batches


@pytest.fixture
def plan(tiny_spec, tiny_examples):
    spec = tiny_spec(
        population={"members": 4},
        training={"batch": 4, "microbatch": 2},
        data={"buckets": [8, 16]},
    )
    return batches.make_plan(spec, tiny_examples)


def test_every_sample_once_an_epoch(plan, tiny_examples):
    assert (plan.steps, plan.epoch_steps) == (12, 6)
    for place in range(4):
        for epoch in range(2):
            rows = np.concatenate([plan.rows(epoch * 6 + step)[place] for step in range(6)])
            np.testing.assert_array_equal(np.sort(rows[rows >= 0]), np.arange(21))
    assert (
        sum(plan.sequence_lengths(step).sum() for step in range(12))
        == 4 * 2 * tiny_examples.lengths.sum()
    )


def test_members_alone_have_the_same_batches(plan, tiny_examples):
    single = batches.make_plan(plan.spec, tiny_examples, (2,))
    for step in range(plan.steps):
        for name, array in single.batch(step, 0).items():
            np.testing.assert_array_equal(array, plan.batch(step, 2)[name])


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2), (4, 2, 1), (4, 1, 2)])
def test_batches_on_the_mesh(plan, shape):
    mesh = make_mesh(*shape)
    abstract = batches.abstract_batch(plan, mesh)
    on_devices = batches.device_batch(plan, 5, abstract)
    for name, array in on_devices.items():
        expected = np.stack([plan.batch(5, place)[name] for place in range(4)])
        np.testing.assert_array_equal(array, expected)
        assert (array.shape, array.dtype, array.sharding) == (
            abstract[name].shape,
            abstract[name].dtype,
            abstract[name].sharding,
        )
    assert {shard.data.shape for shard in on_devices["tokens"].addressable_shards} == {
        (4 // shape[0], 2, 2 // shape[1], 24)
    }


def test_members_that_pad_alike(tiny_examples, plan):
    alike = batches.make_plan(plan.spec, tiny_examples, mesh=make_mesh(4, 2))
    single = batches.make_plan(plan.spec, tiny_examples, (3,), mesh=make_mesh(4, 2))
    for step in range(plan.steps):
        buckets = np.stack([plan.batch(step, place)["bucket"] for place in range(4)])
        for place in range(4):
            np.testing.assert_array_equal(alike.batch(step, place)["bucket"], buckets.max(0))
        np.testing.assert_array_equal(single.batch(step, 0)["bucket"], buckets.max(0))


def test_feed_gives_the_batches_from_a_step_on(plan):
    abstract = batches.abstract_batch(plan, make_mesh())
    ids = [jax.device_get(batch["ids"]) for batch in batches.feed(plan, abstract, 9)]
    assert len(ids) == 3
    for step, step_ids in enumerate(ids, start=9):
        np.testing.assert_array_equal(np.sort(step_ids.reshape(4, -1)), np.sort(plan.rows(step)))


def test_feed_builds_ahead_but_not_far(plan, monkeypatch):
    steps = []
    monkeypatch.setattr(batches, "device_batch", lambda plan, step, abstract: steps.append(step))
    with contextlib.closing(batches.feed(plan, {}, 0)) as feed:
        for _ in range(4):
            next(feed)
    assert 4 <= len(steps) <= 6
    assert steps == sorted(steps)


def test_feed_stops_when_it_is_left_early(plan):
    feed = batches.feed(plan, batches.abstract_batch(plan, make_mesh()), 0)
    with contextlib.closing(feed):
        next(feed)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_feed_raises_what_was_raised_in_its_thread(plan):
    broken = dataclasses.replace(plan, lengths=(8,))  # some examples are longer
    abstract = batches.abstract_batch(plan, make_mesh())
    with pytest.raises(ValueError, match="expected at most 8"):
        list(batches.feed(broken, abstract, 0))
