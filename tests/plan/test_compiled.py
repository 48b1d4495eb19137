"""Programs compiled for devices that are here, and for some that are not."""

import importlib.util
import json
import subprocess
import sys

import pytest

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.plan import compiled

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}
SECTIONS = {"population": {"members": 4}, "data": {"max_length": 32}, "training": {"batch": 8}}
MODEL, CONFIG = ModelConfig(**SIZES), make_config(SECTIONS)


def test_what_the_compiler_says_of_a_program_that_is_too_large():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    assert compiled.TooLarge(said).bytes == int(20.5 * 2**30)
    assert compiled.TooLarge("RESOURCE_EXHAUSTED: no").bytes is None


def test_more_cpu_devices_than_there_are():
    with pytest.raises(
        UserError, match=r"64 CPU devices are asked for and \d+ are there; set XLA_FLAGS"
    ):
        compiled.devices(parse("cpu:64"))


@pytest.mark.parametrize(
    "method",
    ["average", "selection", "ties", "dare_ties", "karcher", "model_stock", "breadcrumbs", "sce"],
)
def test_merges_are_compiled_from_descriptions(method):
    base = {"density": 0.5} if method in ("ties", "dare_ties") else {}
    config = make_config(
        SECTIONS
        | {"merge": {"dtype": "float32", "methods": [{"method": method, "parameters": base}]}}
    )
    needs = compiled.merge(config, MODEL, make_mesh(2, 4))
    held = 4 * parameter_count(MODEL)
    assert (
        needs.arguments > (4 / 2 + 1) * held / 4 * 0.9
    )  # two members and the base, a quarter of each; norms whole
    assert needs.temporaries > held / 4
    assert {axis for _, axes in needs.exchanges for axis in axes} <= {"order", "fsdp"}


@pytest.mark.slow
def test_a_training_step_is_measured_and_nothing_crosses_the_members():
    mesh = make_mesh(2, 2, 2)
    needs = compiled.step(training_spec(CONFIG), MODEL, mesh)
    # 4 members on 2 groups of 4 devices; parameters and two moments in float32, norms on all devices; batch and counters are small
    state = 3 * 4 * parameter_count(MODEL) * 2 / 4
    assert state < needs.arguments < 1.2 * state
    assert needs.temporaries > 0
    assert needs.bytes == needs.arguments + needs.temporaries
    crossed = {axis for _, axes in needs.exchanges for axis in axes}
    assert crossed == {"fsdp", "tensor"}
    alone = compiled.step(training_spec(CONFIG), MODEL, make_mesh(2))
    assert alone.exchanges == {}


@pytest.mark.slow
def test_the_other_programs_of_a_run():
    mesh = make_mesh(2, 2, 2)
    losses, new = (
        compiled.losses(CONFIG, MODEL, mesh, 32),
        compiled.generation(CONFIG, MODEL, mesh, 16, 8),
    )
    held = 2 * parameter_count(MODEL) / 4  # bfloat16, over fsdp and tensor
    assert held < losses.arguments
    assert held < new.arguments
    assert not any("order" in axes for _, axes in losses.exchanges)


@pytest.mark.slow
def test_a_step_for_a_tpu_that_is_not_here():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is not installed")
    code = f"""
import json
from jax_ordermerge import arch, config, hardware, mesh
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.plan import compiled
config = training_spec(config.make_config({SECTIONS!r}))
devices = compiled.devices(hardware.parse("v5e:4x4", slices=2))
placed = mesh.make_mesh(2, -1, devices=devices)
needs = compiled.step(config, arch.ModelConfig(**{SIZES!r}), placed)
slices = sorted([sorted({{d.slice_index for d in group.flat}}) for group in placed.devices])
print(json.dumps([slices, needs.bytes, sorted({{axis for _, axes in needs.exchanges for axis in axes}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    slices, size, crossed = json.loads(done.stdout.splitlines()[-1])
    assert slices == [[0], [1]]
    assert crossed == ["fsdp"]
    assert size > 12 * parameter_count(MODEL) * 2 / 16
