"""The estimate on paper, against numbers counted by hand for a tiny model."""

import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import make_config
from jax_ordermerge.hardware import parse
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.analytic import Work
from jax_ordermerge.train import flops

# D 8, F 16, V 32, 2 layers, 2 heads of 4, untied: by layer 4 x 64 + 3 x 128 weights and 2 x 8 norms
MODEL = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
MATRICES, NORMS = 2 * (4 * 64 + 3 * 128) + 2 * 32 * 8, 2 * 2 * 8 + 8
WORK = Work(rows=8, length=16, tokens=100.0, flops=1e6, steps=10)


def config(**sections):
    given = {
        "population": {"members": 4},
        "training": {"batch": 8},
        "data": {"max_length": 16},
        "model": {"remat": "full"},
    }
    return make_config(given | sections)


def test_what_stays_between_steps_is_counted_by_hand():
    # 2 members a device, matrices over fsdp and tensor, norms everywhere; two moments, and two counters of int32
    step = analytic.step(
        config(mesh={"order": 2, "fsdp": 2, "tensor": 2}), MODEL, parse("v5e:2x4"), WORK
    )
    held = 2 * 4 * (MATRICES / 4 + NORMS)
    assert step.memory.parameters == held
    assert 2 * held < step.memory.optimizer <= 2 * held + 2 * 4 * 4
    assert step.memory.base == 0
    assert step.memory.batch == 2 * 8 * (5 * 4 * 16 + 8) / 2
    assert step.memory.total == sum(
        (
            step.memory.parameters,
            step.memory.optimizer,
            step.memory.base,
            step.memory.batch,
            step.memory.temporaries,
        )
    )


def test_adapters_hold_the_base_once():
    step = analytic.step(
        config(mesh={"order": 2, "fsdp": 4}, lora={"rank": 2, "targets": ["q"]}),
        MODEL,
        parse("v5e:2x4"),
        WORK,
    )
    # of 2 layers A [2, 8], divided over fsdp, and B [8, 2], which has no axis that is divided
    assert step.memory.parameters == 2 * 4 * 2 * (2 * 8 / 4 + 8 * 2)
    assert step.memory.base == 2 * (MATRICES / 4 + NORMS)  # bfloat16, once


def test_a_wave_holds_its_members_alone():
    whole, half = (
        analytic.step(
            config(population={"members": 4, "wave": wave}), MODEL, parse("v5e:1x1"), WORK
        )
        for wave in (None, 2)
    )
    assert half.memory.parameters == whole.memory.parameters / 2
    assert half.memory.temporaries == whole.memory.temporaries
    assert half.seconds == pytest.approx(whole.seconds / 2)


def counted(remat, again):
    """Multiply and add: 3 passes of layers (and again), 3 of the head; attention of one block of 16 queries, 4 H a pair and pass."""
    tokens, pairs = 8 * 16, 8 * 16 * 16
    layers, head = MATRICES - 2 * 32 * 8, 32 * 8
    return 2 * tokens * ((3 + again) * layers + 3 * head) + 2 * (8 + 2 * again) * 2 * 8 * pairs


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", 0), ("full", 1)])
def test_executed_flops_are_counted_by_hand(remat, again):
    assert flops.executed_flops(MODEL, 8, 16, remat=remat) == counted(remat, again)
    one = analytic.step(
        config(model={"remat": remat, "attention": "xla"}, mesh={"order": 2, "fsdp": 2}),
        MODEL,
        parse("v5e:2x2"),
        WORK,
    )
    assert one.executed == 2 * counted(remat, again) / 2  # 2 members a group of 2 devices


def test_traffic_is_counted_by_hand():
    def over(**mesh):
        return analytic.step(config(mesh=mesh), MODEL, parse("v5e:2x2"), WORK).traffic

    size = MATRICES + NORMS
    assert over(order=4, fsdp=1) == {}  # nothing crosses the members
    # 4 members, half of everything: bfloat16 gathered forward, backward and again, and the gradients
    assert over(order=1, fsdp=2, data=2)["fsdp"] == 4 * (3 * 2 + 2) * size / 2
    assert over(order=1, fsdp=2, data=2)["data"] == 4 * 2 * 4 * (size / 2) / 2
    # 6 sums a layer of 64 tokens on each of 2 groups, 2 (n - 1) / n of their size
    assert over(order=1, fsdp=2, tensor=2)["tensor"] == 4 * 2 * 6 * 64 * 8 * 2


def test_times_are_those_of_the_data_sheet():
    step = analytic.step(config(mesh={"order": 1, "fsdp": 4}), MODEL, parse("v5e:2x2"), WORK)
    assert step.times["products"] == step.executed / (0.65 * 197e12)
    assert step.times["memory"] == step.moved / (0.8 * 819e9)
    assert step.times["exchanges"] == step.traffic["fsdp"] / (
        0.8 * 200e9
    )  # both sides of the square
    longest = max(step.times.values())
    assert step.seconds == pytest.approx(longest + 0.2 * (sum(step.times.values()) - longest))
    nodes = parse("h100:2x2")
    across = config(mesh={"order": 1, "fsdp": 4, "dcn": {"fsdp": 2}})
    slow = analytic.step(across, MODEL, nodes, WORK)
    assert slow.times["exchanges"] == slow.traffic["fsdp"] / (0.8 * 50e9)


def test_on_devices_without_a_data_sheet_there_are_no_times():
    step = analytic.step(config(), MODEL, parse("cpu:4"), WORK)
    assert step.times is None
    assert step.seconds is None
    assert np.isfinite(step.memory.total)


def test_the_best_weights_of_each_member_are_one_more_copy():
    keeping = config(training={"checkpoint": "best"}, data={"validation_examples": 4})
    kept, last = (
        analytic.state(one, MODEL, analytic.abstract_mesh(one, parse("v5e:2x2")))
        for one in (keeping, config())
    )
    assert kept == last | {"parameters": 2 * last["parameters"]}
