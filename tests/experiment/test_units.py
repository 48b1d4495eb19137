"""What the orders of a run moved, as its analysis is told: samples, fixed batches, or packs."""

import numpy as np

from jax_ordermerge.config import Config, Data, Population, Training
from jax_ordermerge.experiment.stages import analyze
from jax_ordermerge.train.orders import draw_orders
from jax_ordermerge.train.spec import TrainingSpec


def units(level, packing="none", examples=22):
    sizes = np.tile([5, 3, 4, 8], 6)[:examples]
    config = Config(
        population=Population(level=level, members=2),
        data=Data(packing=packing, max_length=8),
        training=Training(batch=4, epochs=2),
    )
    spec = TrainingSpec(training=config.training, data=config.data, population=config.population)
    orders = draw_orders(spec, sizes, range(2))
    return orders, analyze._units(config, orders, examples)


def test_samples_are_the_unit_where_batches_are_composed_anew():
    for level in ("sample", "balanced", "reverse", "same"):
        assert units(level)[1] == ("sample", None)
    assert units("sample", "bins")[1] == ("sample", None)


def test_fixed_batches_are_the_unit_in_every_member_and_epoch():
    orders, (unit, numbers) = units("batch")
    assert unit == "batch"
    batches = {frozenset(np.flatnonzero(numbers == number)) for number in range(6)}
    assert sorted(map(len, batches)) == [2, 4, 4, 4, 4, 4]
    for steps in orders.reshape(4, 6, 4):
        assert {frozenset(step[step >= 0]) for step in steps} == batches


def test_packs_are_the_unit_where_they_are_put_in_order():
    orders, (unit, numbers) = units("sample", "packs")
    assert unit == "pack"
    packs = {frozenset(row[row >= 0]) for row in orders[1, 1].reshape(-1, orders.shape[-1])}
    expected = {frozenset(np.flatnonzero(numbers == number)) for number in np.unique(numbers)}
    assert packs - {frozenset()} == expected
    assert units("batch", "packs")[1][0] == "batch"
