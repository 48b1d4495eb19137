"""The analytic estimate against numbers counted by hand for a tiny model."""

import dataclasses

import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.train import flops

# D 8, F 16, V 32, 2 layers, 2 heads of 4, untied; per layer 4 x 64 + 3 x 128 weights, 2 x 8 norms
MODEL = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
MATRICES, NORMS = 2 * (4 * 64 + 3 * 128) + 2 * 32 * 8, 2 * 2 * 8 + 8
WORK = Workload(rows=8, length=16, tokens=100.0, flops=1e6, steps=10)


def make_spec(**sections):
    defaults = {
        "population": {"members": 4},
        "training": {"batch": 8},
        "data": {"max_length": 16},
        "model": {"remat": "full"},
    }
    return plan_spec(make_config(defaults | sections))


def estimate(topology, **sections):
    return analytic.estimate_step(make_spec(**sections), MODEL, parse(topology), WORK)


def test_state_between_steps_equals_the_count_by_hand():
    # 2 members per device, matrices over fsdp and tensor, norms everywhere; two moments, and two
    # counters of int32
    memory = estimate("v5e:2x4", mesh={"order": 2, "fsdp": 2, "tensor": 2}).memory
    parameters = 2 * 4 * (MATRICES / 4 + NORMS)
    assert memory.parameters == parameters
    assert 2 * parameters < memory.optimizer <= 2 * parameters + 2 * 4 * 4
    assert memory.base == 0
    assert memory.batch == 2 * 8 * (5 * 4 * 16 + 8) / 2
    state = memory.parameters + memory.optimizer + memory.base
    assert memory.total == state + memory.batch + memory.temporaries


def test_adapters_hold_the_base_once():
    lora = {"rank": 2, "targets": ["q"]}
    memory = estimate("v5e:2x4", mesh={"order": 2, "fsdp": 4}, lora=lora).memory
    # of 2 layers A [2, 8], divided over fsdp, and B [8, 2], which has no axis that is divided
    assert memory.parameters == 2 * 4 * 2 * (2 * 8 / 4 + 8 * 2)
    assert memory.base == 2 * (MATRICES / 4 + NORMS)  # bfloat16, once


def test_fused_members_gather_the_base_once_and_hold_all_activations():
    lora, mesh = {"rank": 2, "targets": ["q"]}, {"order": 1, "fsdp": 8}
    exact, fused = (
        estimate("v5e:2x4", mesh=mesh, lora={**lora, "fused": fused}) for fused in (False, True)
    )
    # 4 members; the base is gathered in bfloat16 forward, backward and recomputed, 7/8 are remote
    adapters = 2 * 2 * (8 * 2 + 2 * 8)
    assert exact.traffic["fsdp"] == 4 * 7 / 8 * (3 * 2 * (MATRICES + NORMS) + adapters)
    assert fused.traffic["fsdp"] == 7 / 8 * (3 * 2 * (MATRICES + NORMS) + 4 * adapters)
    # a row of 16 tokens per member and device; gathered weights of the base are there once
    per_token = 2 * (2 * 8) + 2 * (6 * 8 + (3 * 8 + 3 * 8 + 5 * 16)) + 4 * 2 * 8
    gradients = 4 * (adapters / 2) / 8
    growth = fused.memory.temporaries - exact.memory.temporaries
    assert growth == 3 * (gradients + 16 * per_token)
    assert fused.memory.base == exact.memory.base
    assert fused.flops == exact.flops
    assert fused.moved < exact.moved


def test_a_quantized_base_has_codes_and_scales():
    lora = {"rank": 2, "targets": ["q"], "base_dtype": "nf4", "base_block": 2}
    sections = {"mesh": {"order": 2, "fsdp": 4}}
    step = estimate("v5e:2x4", lora=lora, **sections)
    layers = 2 * (4 * 64 + 3 * 128)
    # half a byte per weight and four per two of them; embedding and head in bfloat16
    stored = layers * (1 / 2 + 4 / 2) / 4 + 2 * (2 * 32 * 8 / 4 + NORMS)
    assert step.memory.base == stored
    # gathered twice and once more for `full`, as stored
    trained = 2 * (2 * (2 * 8 + 8 * 2))  # A and B of q in two layers, bfloat16
    fraction, passes, members = 3 / 4, 3, 2
    weights = layers * (1 / 2 + 4 / 2) + 2 * (2 * 32 * 8 + NORMS)
    assert step.traffic["fsdp"] == members * fraction * (passes * weights + trained)
    with pytest.raises(UserError, match=r"lora.base_block = 64 does not divide the 2 inputs of"):
        estimate("v5e:2x4", lora={"base_dtype": "nf4"}, **sections)


@pytest.mark.parametrize(
    ("topology", "mesh", "dtype", "head"),
    [
        # the gathered head, 2 or 4 bytes, and the whole gradient in float32
        ("v5e:2x2", {"fsdp": 4}, "bfloat16", 6),
        ("v5e:2x2", {"fsdp": 4}, "float32", 8),
        ("v5e:2x2", {"fsdp": 2, "tensor": 2}, "bfloat16", 6 / 2),
        ("v5e:2x2", {"fsdp": 1, "data": 4}, "bfloat16", 6),
        # the table of the lookup, whose columns `tensor` does not divide: more than 6 / 8
        ("v5e:4x4", {"fsdp": 2, "tensor": 8}, "bfloat16", 4 / 2),
        # on CPU gathered tables and their gradients, and a gradient of the head that is divided
        ("cpu:4", {"fsdp": 4}, "float32", 2 * 4 + 4 / 4),
    ],
)
def test_the_gradient_of_the_head_is_whole_until_it_is_reduced(topology, mesh, dtype, head):
    spec = make_spec(mesh={"order": 1, **mesh}, model={"remat": "full", "compute_dtype": dtype})
    small, large = (
        analytic.estimate_step(
            spec,
            dataclasses.replace(MODEL, vocab_size=size),
            parse(topology),
            dataclasses.replace(WORK, length=1),
        ).memory.temporaries
        for size in (1024, 2048)
    )
    tensor, devices = mesh.get("tensor", 1), mesh["fsdp"] * mesh.get("tensor", 1)
    # of embedding and head: float32 gradients and bfloat16 copies
    states = 2 * (6 if dtype == "bfloat16" else 4) / devices
    rows = 8 / (mesh["fsdp"] * mesh.get("data", 1))
    logits = 0 if tensor == 8 else 2 * 4 * rows / tensor
    assert large - small == 1024 * (8 * (states + head) + logits)


def test_a_wave_holds_its_members_only():
    population, half = (
        estimate("v5e:1x1", population={"members": 4, "wave": wave}) for wave in (None, 2)
    )
    assert half.memory.parameters == population.memory.parameters / 2
    assert half.memory.temporaries == population.memory.temporaries
    assert half.seconds == pytest.approx(population.seconds / 2)


def test_memory_of_the_host_takes_none_of_the_device():
    device, host = (
        estimate(
            "v5e:1x1",
            population={"members": 4},
            model={"remat": remat},
            training={"optimizer_memory": memory},
        ).memory
        for remat, memory in (("full", "device"), ("offload", "host"))
    )
    assert host.optimizer == device.optimizer / 4  # that of the member which is updated
    # the inputs of two layers: 8 rows of 16 tokens, D 8, bfloat16
    assert device.temporaries - host.temporaries == 2 * 8 * 16 * 8 * 2


def count_flops(remat, recomputed):
    """Count multiplications and additions.

    Layers take 3 passes and those recomputed, the head 3; attention of one block of 16 queries
    takes 4 H per pair and pass.
    """
    tokens, pairs = 8 * 16, 8 * 16 * 16
    layers, head = MATRICES - 2 * 32 * 8, 32 * 8
    matmuls = 2 * tokens * ((3 + recomputed) * layers + 3 * head)
    return matmuls + 2 * (8 + 2 * recomputed) * 2 * 8 * pairs


@pytest.mark.parametrize(
    ("remat", "recomputed"), [("none", 0), ("dots", 0), ("full", 1), ("offload", 1)]
)
def test_executed_flops_equal_the_count_by_hand(remat, recomputed):
    expected = count_flops(remat, recomputed)
    assert flops.executed_flops(MODEL, 8, 16, remat=remat) == expected
    step = estimate(
        "v5e:2x2", model={"remat": remat, "attention": "xla"}, mesh={"order": 2, "fsdp": 2}
    )
    assert step.flops == 2 * expected / 2  # 2 members per group of 2 devices


def test_traffic_equals_the_count_by_hand():
    def traffic(**mesh):
        return estimate("v5e:2x2", mesh=mesh).traffic

    size = MATRICES + NORMS
    assert traffic(order=4, fsdp=1) == {}  # nothing crosses the members
    # 4 members, half of everything: bfloat16 gathered forward, backward and recomputed, and the
    # gradients
    assert traffic(order=1, fsdp=2, data=2)["fsdp"] == 4 * (3 * 2 + 2) * size / 2
    assert traffic(order=1, fsdp=2, data=2)["data"] == 4 * 2 * 4 * (size / 2) / 2
    # 6 all-reduces per layer of 64 tokens on each of 2 groups, 2 (n - 1) / n of their size
    assert traffic(order=1, fsdp=2, tensor=2)["tensor"] == 4 * 2 * 6 * 64 * 8 * 2


def test_times_follow_from_the_data_sheet():
    step = estimate("v5e:2x2", mesh={"order": 1, "fsdp": 4})
    assert step.times["matmuls"] == step.flops / (0.65 * 197e12)
    assert step.times["memory"] == step.moved / (0.8 * 819e9)
    # both sides of the square
    assert step.times["collectives"] == step.traffic["fsdp"] / (0.8 * 200e9)
    longest = max(step.times.values())
    assert step.seconds == pytest.approx(longest + 0.2 * (sum(step.times.values()) - longest))
    nodes = estimate("h100:2x2", mesh={"order": 1, "fsdp": 4, "dcn": {"fsdp": 2}})
    assert nodes.times["collectives"] == nodes.traffic["fsdp"] / (0.8 * 50e9)


def test_devices_without_a_data_sheet_have_no_times():
    step = estimate("cpu:4")
    assert step.times is None
    assert step.seconds is None
    assert np.isfinite(step.memory.total)


def test_the_best_weights_of_each_member_are_one_more_copy():
    def state(**sections):
        spec = make_spec(**sections)
        mesh = analytic.abstract_mesh(spec, parse("v5e:2x2"))
        return analytic.state_bytes(spec, MODEL, mesh)

    last = state()
    best = state(training={"checkpoint": "best"}, data={"validation_examples": 4})
    assert best == last | {"parameters": 2 * last["parameters"]}
