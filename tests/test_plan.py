"""Planning: what is read from compiled programs, on devices that are here and for some that are not."""

import importlib.util
import json
import subprocess
import sys

import pytest

from jax_ordermerge import plan
from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.config import make_config
from jax_ordermerge.mesh import make_mesh

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
SECTIONS = {"population": {"members": 4}, "data": {"max_length": 32}, "training": {"batch": 8}}
MODEL, CONFIG = ModelConfig(**SIZES), make_config(SECTIONS)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("%a = f32[8,4]{1,0} all-reduce(f32[8,4] %x), replica_groups={{0,1},{2,3},{4,5},{6,7}}", ("all-reduce", ("tensor",), 128)),
        ("%a = bf16[3]{0} all-gather(bf16[1] %x), replica_groups=[4,2]<=[2,2,2]T(0,2,1), dims={0}", ("all-gather", ("fsdp",), 6)),
        ("%a = f32[] all-reduce(f32[] %x), replica_groups=[1,8]<=[8]", ("all-reduce", ("order", "fsdp", "tensor"), 4)),
        ("%a = f32[2] all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={0}", ("all-gather", ("fsdp",), 8)),
        ("%a = f32[2] all-gather(%x), replica_groups=mesh['a'=2,'b'=2,'c'=2] {'c','a'}", ("all-gather", ("order", "tensor"), 8)),
        ("%a = f32[2] all-gather(%x), replica_groups=mesh['a'=8] {'a':(2)2}, dimensions={0}", ("all-gather", ("fsdp",), 8)),
        ("%a = f32[] all-reduce(f32[] %x), replica_groups={}, to_apply=%add", ("all-reduce", ("order", "fsdp", "tensor"), 4)),
        ("%a = s8[6]{0} collective-permute(s8[6] %x), source_target_pairs={{0,4},{4,0}}", ("collective-permute", ("order",), 6)),
        ("%a = (f32[2]{0}, pred[3]{0}) all-to-all(%x, %y), replica_groups=[4,2]<=[8]", ("all-to-all", ("tensor",), 11)),
        ("%a = (f32[1]{0}, f32[2]{0}) all-gather-start(%x), replica_groups=[4,2]<=[8]", ("all-gather", ("tensor",), 12)),
    ],
)
def test_collectives_are_read(line, expected):
    kind, axes, size = expected
    assert plan.collectives(f"  {line}", make_mesh(2, 2, 2)) == {(kind, axes): (1, size)}


def test_other_lines_are_no_collectives():
    text = (
        "%all-reduce.1 = f32[2] get-tuple-element(%x), index=0\n%b = f32[2] all-gather-done(%a)\n%c = f32[2] add(%all-reduce.1, %b)"
    )
    assert plan.collectives(text, make_mesh(2, 2, 2)) == {}


@pytest.mark.slow
def test_a_training_step_is_measured_and_nothing_crosses_the_members():
    mesh = make_mesh(2, 2, 2)
    needs = plan.measure(CONFIG, MODEL, mesh)
    # 4 members on 2 groups of 4 devices; parameters and two moments in float32, norms on all devices; batch and counters are small
    state = 3 * 4 * parameter_count(MODEL) * 2 / 4
    assert state < needs.arguments < 1.2 * state
    assert needs.temporaries > 0
    assert needs.bytes == needs.arguments + needs.temporaries
    crossed = {axis for _, axes in needs.collectives for axis in axes}
    assert crossed == {"fsdp", "tensor"}
    alone = plan.measure(CONFIG, MODEL, make_mesh(2))
    assert alone.collectives == {}


@pytest.mark.slow
def test_a_step_for_a_tpu_that_is_not_here():
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the compiler for TPUs, is not installed")
    code = f"""
import json
from jax_ordermerge import arch, config, mesh, plan
config = config.make_config({SECTIONS!r})
devices = plan.tpu_devices("v5e:4x4", slices=2)
placed = mesh.make_mesh(2, -1, devices=devices)
needs = plan.measure(config, arch.ModelConfig(**{SIZES!r}), placed)
slices = sorted([sorted({{d.slice_index for d in group.flat}}) for group in placed.devices])
print(json.dumps([slices, needs.bytes, sorted({{axis for _, axes in needs.collectives for axis in axes}})]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    slices, size, crossed = json.loads(done.stdout.splitlines()[-1])
    assert slices == [[0], [1]]
    assert crossed == ["fsdp"]
    assert size > 12 * parameter_count(MODEL) * 2 / 16
