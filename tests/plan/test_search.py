"""Settings that serve better, on paper."""

import pytest

from jax_ordermerge.arch import ARCHITECTURES
from jax_ordermerge.config import make_config
from jax_ordermerge.hardware import MEMORY_FRACTION, parse
from jax_ordermerge.plan import analytic, search
from jax_ordermerge.plan.analytic import Work
from jax_ordermerge.train import flops

MODEL = ARCHITECTURES["llama-2-7b"]
CONFIG = make_config(
    {
        "model": {"remat": "full"},
        "population": {"members": 4},
        "data": {"max_length": 512},
        "training": {"batch": 64},
        "mesh": {"order": 4, "fsdp": -1},
    }
)
WORK = Work(64, 512, 64 * 512, flops.training_flops(MODEL, [512] * 64), 100)


def test_the_best_come_first_and_always_the_same():
    topology = parse("v5p:2x2x4")
    found = search.search(CONFIG, MODEL, topology, WORK)
    assert found == search.search(CONFIG, MODEL, topology, WORK)
    assert len(found) > 20
    assert len({repr(one.config) for one in found}) == len(found)
    costs = [one.cost for one in found]
    assert all(later > 0.97 * best for later, best in zip(costs[1:], costs, strict=False))
    assert costs[0] < 1.02 * min(costs)
    for one in found:
        assert one.step.memory.total <= MEMORY_FRACTION * topology.device.memory
        changed = search.settings(CONFIG, topology) | one.changes
        assert changed == search.settings(one.config, topology)


def test_what_is_learned_is_not_changed():
    kept = {"batch", "epochs", "learning_rate", "optimizer", "schedule"}
    for one in search.search(CONFIG, MODEL, parse("h100:8"), WORK):
        assert one.config.training.model_dump(include=kept) == CONFIG.training.model_dump(
            include=kept
        )
        assert one.config.lora is None
        assert one.config.population.members == 4


def test_where_all_members_do_not_fit_there_are_waves_and_then_nothing():
    waves = search.search(CONFIG, MODEL, parse("h100:4"), WORK)
    assert waves
    assert all(one.config.population.wave for one in waves)
    alone = search.with_changes(CONFIG, {"mesh": {"order": 1}})
    assert search.search(alone, MODEL, parse("a100:1"), WORK) == []
    assert search.search(search.with_adapters(alone), MODEL, parse("a100:1"), WORK)


@pytest.mark.parametrize(
    ("order", "fsdp", "slices", "dcn"),
    [(4, 8, 2, {}), (1, 8, 2, {"order": 1, "fsdp": 2}), (1, 3, 2, None)],
)
def test_members_lie_on_different_slices_as_far_as_they_can(order, fsdp, slices, dcn):
    assert search._across(order, fsdp, slices) == dcn


def test_cost_is_of_all_members():
    topology = parse("v5p:2x2x4")
    whole = analytic.step(CONFIG, MODEL, topology, WORK)
    waves = search.with_changes(
        CONFIG, {"mesh": {"order": 2, "fsdp": 8}, "population": {"wave": 2}}
    )
    half = analytic.step(waves, MODEL, topology, WORK)
    assert search.cost(CONFIG, whole) == whole.seconds
    assert search.cost(waves, half) == 2 * half.seconds
