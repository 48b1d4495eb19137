"""Programs compiled for present devices, and for absent ones."""

import importlib.util
import json
import subprocess
import sys

import pytest

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.plan import compiled, devices

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
}
SECTIONS = {"population": {"members": 4}, "data": {"max_length": 32}, "training": {"batch": 8}}
MODEL, SPEC = ModelConfig(**SIZES), plan_spec(make_config(SECTIONS))


def test_the_bytes_of_a_program_that_the_compiler_refuses():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
        " Exceeded hbm capacity by 4.75G."
    )
    assert compiled.TooLarge(message).bytes == int(20.5 * 2**30)
    assert compiled.TooLarge("RESOURCE_EXHAUSTED: no").bytes is None


def test_more_cpu_devices_than_the_process_has():
    message = r"the topology has 64 CPU devices, this process has \d+; set XLA_FLAGS"
    with pytest.raises(UserError, match=message):
        devices.topology_devices(parse("cpu:64"))


def test_a_compiler_whose_package_is_absent_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_plugins", None)
    assert not devices.has_compiler(parse("h100:8"))
    assert devices.has_compiler(parse("cpu:8"))


@pytest.mark.parametrize(
    "method",
    ["average", "selection", "ties", "dare_ties", "karcher", "model_stock", "breadcrumbs", "sce"],
)
def test_merges_are_compiled_from_descriptions(method):
    parameters = {"density": 0.5} if method in ("ties", "dare_ties") else {}
    methods = [{"method": method, "parameters": parameters}]
    spec = plan_spec(make_config(SECTIONS | {"merge": {"dtype": "float32", "methods": methods}}))
    needs = compiled.merge_requirements(spec, MODEL, make_mesh(2, 4))
    model_bytes = 4 * parameter_count(MODEL)
    # two members and the base, a quarter of each; norms are not divided
    assert needs.arguments > (4 / 2 + 1) * model_bytes / 4 * 0.9
    assert needs.temporaries > model_bytes / 4
    assert {axis for _, axes in needs.collectives for axis in axes} <= {"order", "fsdp"}


@pytest.mark.slow
def test_a_training_step_is_measured_and_nothing_crosses_the_members():
    needs = compiled.step_requirements(SPEC, MODEL, make_mesh(2, 2, 2))
    # 4 members on 2 groups of 4 devices; parameters and two moments in float32, norms on all
    # devices; batch and counters are small
    state = 3 * 4 * parameter_count(MODEL) * 2 / 4
    assert state < needs.arguments < 1.2 * state
    assert needs.temporaries > 0
    assert needs.bytes == needs.arguments + needs.temporaries
    assert {axis for _, axes in needs.collectives for axis in axes} == {"fsdp", "tensor"}
    assert compiled.step_requirements(SPEC, MODEL, make_mesh(2)).collectives == {}


@pytest.mark.slow
def test_the_other_programs_of_a_run():
    mesh = make_mesh(2, 2, 2)
    losses = compiled.losses_requirements(SPEC, MODEL, mesh, 32)
    generation = compiled.generation_requirements(SPEC, MODEL, mesh, 16, 8)
    model_bytes = 2 * parameter_count(MODEL) / 4  # bfloat16, over fsdp and tensor
    assert model_bytes < losses.arguments
    assert model_bytes < generation.arguments
    assert not any("order" in axes for _, axes in losses.collectives)


@pytest.mark.slow
def test_a_step_for_a_tpu_that_is_absent():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is not installed")
    code = f"""
import json
from jax_ordermerge import arch, config, hardware, mesh
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.plan import compiled, devices
spec = plan_spec(config.make_config({SECTIONS!r}))
targets = devices.topology_devices(hardware.parse("v5e:4x4", slices=2))
placed = mesh.make_mesh(2, -1, devices=targets)
needs = compiled.step_requirements(spec, arch.ModelConfig(**{SIZES!r}), placed)
slices = sorted([sorted({{d.slice_index for d in group.flat}}) for group in placed.devices])
crossed = sorted({{axis for _, axes in needs.collectives for axis in axes}})
print(json.dumps([slices, needs.bytes, crossed]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    slices, size, crossed = json.loads(done.stdout.splitlines()[-1])
    assert slices == [[0], [1]]
    assert crossed == ["fsdp"]
    assert size > 12 * parameter_count(MODEL) * 2 / 16
