import os
import subprocess
import sys

import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import DEVICES, find, parse


@pytest.mark.parametrize(
    ("text", "slices", "size", "name"),
    [
        ("v5p:4x4x2", 1, 32, "v5p:4x4x2"),
        ("v6e:16x16", 2, 512, "2 x v6e:16x16"),
        ("H100:8", 1, 8, "h100:8"),
        ("h200:8x4", 1, 32, "h200:8x4"),
        ("cpu:8", 1, 8, "cpu:8"),
    ],
)
def test_topologies(text, slices, size, name):
    topology = parse(text, slices)
    assert (topology.size, topology.name) == (size, name)


@pytest.mark.parametrize(
    ("text", "slices", "message"),
    [
        ("v5p", 1, "expected DEVICE:SIZES, such as v5p:4x4x2"),
        ("v5p:4by4", 1, "expected DEVICE:SIZES"),
        ("v5:4x4", 1, r"unknown device v5 \(did you mean 'v5"),
        ("h10:8", 1, r"unknown device h10 \(did you mean 'h100'\?\)"),
        ("v5p:4x4", 1, "a slice of v5p has 3 sides, as in v5p:4x4x4"),
        ("v5e:4x4x4", 1, "a slice of v5e has 2 sides, as in v5e:4x4"),
        ("h100:8x2x2", 1, "expected GPUs per node and nodes, as in h200:8x4"),
        ("cpu:2x4", 1, "expected a number of devices, as in cpu:8"),
        ("v5e:0x4", 1, "sizes are at least 1"),
        ("v5e:4x4", 0, "sizes are at least 1"),
        ("h100:8", 2, "only TPUs have slices; give nodes as the second size, as in h200:8x2"),
    ],
)
def test_names_that_are_none(text, slices, message):
    with pytest.raises(UserError, match=message) as error:
        parse(text, slices)
    assert "\n" not in str(error.value)


def test_every_device_is_found_by_its_kinds():
    for device in DEVICES:
        for kind in device.kinds:
            assert find(f"NVIDIA {kind}" if not device.sides else kind) is device


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA GH200 480GB", "gh200"),
        ("NVIDIA H200", "h200"),
        ("TPU v5 lite", "v5e"),
        ("TPU v6 lite", "v6e"),
        ("TPU v5", "v5p"),
    ],
)
def test_names_that_drivers_give(kind, name):
    assert find(kind).name == name


def test_links_of_a_group_are_those_along_the_sides_it_needs():
    torus = parse("v5p:2x4x8")
    assert [
        torus.speed(size) / torus.device.link for size in (1, 8, 9, 32, 33, 64)
    ] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3, 1, 1])


def test_the_command_line_lets_jax_take_what_a_plan_counts_with():
    """Before jax starts; a share that the user chose stays. jax itself reads it."""
    code = """
import sys
from jax_ordermerge import cli
sys.argv = ["ordermerge", "--version"]
try:
    cli.main()
except SystemExit:
    assert "jax" not in sys.modules
from jaxlib import xla_client
print(xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"])
"""
    names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    bare = {key: value for key, value in os.environ.items() if key not in names}
    for chosen, expected in (({}, 0.92), *(({name: "0.4"}, 0.4) for name in names)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=bare | chosen,
            capture_output=True,
            text=True,
            check=True,
        )
        assert float(done.stdout.split()[-1]) == expected
