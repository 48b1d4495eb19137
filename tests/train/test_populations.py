"""Orders and initializations of several populations, and of members that differ in either."""

import numpy as np
import pytest

from jax_ordermerge import config
from jax_ordermerge.data.order import LEVELS
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import lora
from jax_ordermerge.train.orders import draw_orders, population_seed
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.train.trainable import make_trainable

SIZES = np.full(40, 5)


def spec(seed=7, **population):
    return TrainingSpec(
        seed=seed,
        training=config.Training(batch=4, epochs=2),
        population=config.Population(members=4, **population),
    )


@pytest.mark.parametrize("level", LEVELS)
def test_each_population_has_the_orders_of_a_run_with_its_seed(level):
    several = draw_orders(spec(level=level, replicates=3), SIZES, range(12))
    for population in range(3):
        alone = spec(seed=population_seed(7, population), level=level)
        expected = draw_orders(alone, SIZES, range(4))
        assert several[4 * population : 4 * population + 4].tolist() == expected.tolist()
    # the same seed of the first, so the members of the first are those without replicates
    assert population_seed(7, 0) == 7
    assert len({order.tobytes() for order in several[::4]}) == 3
    # and a member is drawn alike, alone or with the others
    assert (
        draw_orders(spec(level=level, replicates=3), SIZES, (9,))[0].tolist() == several[9].tolist()
    )


def test_members_that_differ_in_their_initialization_have_one_order_per_population():
    orders = draw_orders(spec(vary="init", replicates=2), SIZES, range(8))
    plain = draw_orders(spec(), SIZES, (0,))
    assert all(order.tolist() == plain[0].tolist() for order in orders[:4])
    assert all(order.tolist() == orders[4].tolist() for order in orders[4:])
    assert orders[4].tolist() != orders[0].tolist()
    everything = draw_orders(spec(vary="all"), SIZES, range(4))
    assert everything.tolist() == draw_orders(spec(), SIZES, range(4)).tolist()


@pytest.mark.parametrize("vary", ["order", "init", "all"])
def test_initializations_of_members(tiny_model, vary):
    settings = config.Lora(rank=2, targets=("q",))
    population = config.Population(members=3, vary=vary)
    adapted = TrainingSpec(seed=7, population=population, lora=settings)
    trainable = make_trainable(adapted, tiny_model, make_mesh())
    starts = trainable.starts(dict, (0, 1, 2))
    values = [np.asarray(start["layers"]["attention"]["q"]["lora_a"]) for start in starts]
    shared = lora.init_params(tiny_model, settings, 7)["layers"]["attention"]["q"]["lora_a"]
    assert values[0].tobytes() == np.asarray(shared).tobytes()
    assert len(values) == (1 if vary == "order" else 3)
    assert len({value.tobytes() for value in values}) == len(values)
    # a member starts alike, whoever is trained beside it
    if vary != "order":
        alone = trainable.starts(dict, (2,))[0]
        assert (
            np.asarray(alone["layers"]["attention"]["q"]["lora_a"]).tobytes() == values[2].tobytes()
        )
