"""Two processes of four devices load, save, restore and export as one process of eight does."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from jax_ordermerge.checkpoint.safetensors import Reader

PROGRAM = """
import sys
import jax
from jax_ordermerge import mesh, processes
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.errors import UserError

port, index, source, out = sys.argv[1:]
processes.start_distributed(f"127.0.0.1:{port}", 2, int(index), 60)
grid = mesh.make_mesh(2, 2, 2)
config, population = convert.load_params(source, grid, members=2)
assert not jax.tree.leaves(population)[0].is_fully_addressable
with orbax.Checkpoints(out + "/orbax", keep=1) as checkpoints:
    checkpoints.save(1, {"params": population}, {"k": 2})
    checkpoints.save(2, {"params": population}, {"k": 2})
    checkpoints.wait()
    assert checkpoints.latest() == 2
    abstract = convert.abstract_params(config, mesh.make_mesh(1, 8, 1), members=2)
    restored = checkpoints.restore(2, {"params": abstract})
abstract = {"params": convert.abstract_params(config, grid)}
member = orbax.restore_member(out + "/orbax", 2, 1, abstract)
convert.export(population, config, out + "/direct", dtype="float32", member=1)
convert.export(restored["params"], config, out + "/restored", dtype="float32", member=0)
convert.export(member["params"], config, out + "/member", dtype="float32")
try:
    convert.export(member["params"], config, source, dtype="float32")
except UserError:
    print("refused on", index)
"""


@pytest.mark.slow
def test_two_processes(make_directory, tmp_path):
    directory, _, arrays = make_directory("untied", "float32", 2)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    root = pathlib.Path(__file__).parents[2]
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                PROGRAM,
                port,
                str(index),
                str(directory),
                str(tmp_path / "out"),
            ],
            env=environment,
            cwd=root,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for index in range(2)
    ]
    try:
        for index, process in enumerate(running):
            stdout, stderr = process.communicate(timeout=240)
            assert process.returncode == 0, stderr[-3000:]
            assert f"refused on {index}" in stdout
    finally:
        for process in running:
            process.kill()
    for name in ("direct", "restored", "member"):
        reader = Reader(tmp_path / "out" / name)
        assert {n: reader.read(n).tobytes() for n in reader.names} == {
            n: a.tobytes() for n, a in arrays.items()
        }
