"""Two processes of four devices load, save, restore and export as one process of eight does."""

import json
import os
import socket

import pytest

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from tests import preloaded

PROGRAM = """
import json
import mmap
import os
import sys
import jax
from jax_ordermerge import mesh, processes
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.data import example_cache, shares
from jax_ordermerge.errors import UserError
from pathlib import Path

port, index, source, out = sys.argv[1:]
processes.start_distributed(f"127.0.0.1:{port}", 2, int(index), 60)
grid = mesh.make_mesh(2, 2, 2)
counts = {"read": 0, "written": 0}
preadv, pwrite, mapped = os.preadv, os.pwrite, mmap.mmap

def counted_read(handle, buffers, offset):
    count = preadv(handle, buffers, offset)
    counts["read"] += count
    return count

def counted_write(handle, data, offset):
    counts["written"] += len(data)
    return pwrite(handle, data, offset)

os.preadv, mmap.mmap = counted_read, None  # a mapped file would be read by pages
config, population = convert.load_params(source, grid, members=2)
os.preadv, mmap.mmap = preadv, mapped
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
os.pwrite = counted_write
convert.export(population, config, out + "/counted", dtype="float32", member=1)
os.pwrite = pwrite
convert.export(restored["params"], config, out + "/restored", dtype="float32", member=0)
convert.export(member["params"], config, out + "/member", dtype="float32")
try:
    convert.export(member["params"], config, source, dtype="float32")
except UserError:
    print("refused on", index)
try:
    convert.export(member["params"], config, out + "/overflow", dtype="float16")
except UserError as error:
    print("overflow on", index, error)
entry, other = (example_cache.Entry(Path(name), {}) for name in ("a.examples", f"{index}.examples"))
agreed = [
    shares.agree(entry, False),  # all have the same to do
    shares.agree(entry, True),  # all have it
    shares.agree(entry, index == "0"),  # cache directories of two machines
    shares.agree(other, False),  # other data, or code
    shares.agree(None if index == "0" else entry, False),  # no cache on one
]
assert agreed == [(Path("a.examples"), int(index), 2), None, None, None, None], agreed
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_two_processes(make_directory, tmp_path):
    directory, config, arrays = make_directory("untied", "float32", 2)
    size = sum(array.nbytes for array in arrays.values())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
    }
    running = [
        preloaded.Command([port, index, directory, tmp_path / "out"], code=PROGRAM, env=environment)
        for index in range(2)
    ]
    counts = []
    try:
        for index, process in enumerate(running):
            stdout, stderr = process.communicate(timeout=240)
            assert process.returncode == 0, stderr[-3000:]
            assert f"refused on {index}" in stdout
            assert f"overflow on {index}" in stdout
            counts.append(json.loads(stdout.splitlines()[-1]))
    finally:
        for process in running:
            process.kill()
    # each byte of the tensors is read once, by one of the two, and written by one of them
    assert sum(count["read"] for count in counts) == size
    assert abs(counts[0]["read"] - size / 2) < size / 20
    assert sum(count["written"] for count in counts) == size
    # so that an export bound by the disks of its hosts takes 1 / 1.9 of the time that one host takes
    assert abs(counts[0]["written"] - size / 2) < size / 20
    assert not (tmp_path / "out" / "overflow").exists()
    assert not list((tmp_path / "out").glob("*.partial-*"))
    _, params = convert.load_params(directory)
    convert.export(params, config, tmp_path / "one", dtype="float32")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    for name in ("direct", "counted"):
        written = (tmp_path / "out" / name).iterdir()
        assert {path.name: path.read_bytes() for path in written} == files
    for name in ("direct", "restored", "member"):
        reader = Reader(tmp_path / "out" / name)
        assert {n: reader.read(n).tobytes() for n in reader.names} == {
            n: a.tobytes() for n, a in arrays.items()
        }
