"""How many bytes several processes read from disk to load a model of 70B together.

The checkpoint has the shapes and the headers of Llama 2 70B in bfloat16. Its files are sparse, so that they take no
disk; `--random` fills them, and then what the disk itself gave is counted, too. `--read-only` reads all rows
and exchanges none: the whole model needs no memory.

    python benchmarks/load.py --layers 80 --read-only
    python benchmarks/load.py --layers 1 --random
"""

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np

from jax_ordermerge import arch, mesh, processes
from jax_ordermerge.checkpoint import convert, exchange, shards
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.mesh_shape import AXES

CHUNK = 2**26


def make_checkpoint(directory: Path, config: arch.ModelConfig, *, random: bool) -> None:
    """Write a checkpoint whose tensors are holes, or random bytes that are not in memory."""
    table = {name: spec.hf_shape for name, spec, _ in arch.hf_tensors(config)}
    files = shards.ShardFiles(directory, table, "bfloat16")
    # holes where `create` would reserve space
    truncate = mock.patch.object(shards, "_allocate", os.ftruncate)
    with contextlib.nullcontext() if random else truncate:
        files.create()
    (directory / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))
    if not random:
        return
    values = np.random.default_rng(0).integers(0, 2**15, CHUNK // 2, np.uint16).view("bfloat16")
    with files:
        for name, shape in table.items():
            size = int(np.prod(shape)) * 2
            for start in range(0, size, CHUNK):
                files.write(name, start, values[: min(CHUNK, size - start) // 2])
    for name in files.names:
        handle = os.open(directory / name, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_counters() -> dict[str, int]:
    """Return what this process has read: by calls, and from the disk (also by mapped pages)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    values = dict(line.split(": ") for line in lines)
    return {"calls": int(values["rchar"]), "disk": int(values["read_bytes"])}


def read_rows(directory: Path, index: int, count: int) -> None:
    """Read the rows of one of several processes with a device each, and drop them."""
    config = convert.load_config(directory)
    reader = Reader(directory, read_ahead=False)
    grid = jax.sharding.AbstractMesh(tuple(count if name == "fsdp" else 1 for name in AXES), AXES)
    for name, spec, _ in arch.hf_tensors(config):
        axes = spec.axes[1:] if spec.stacked else spec.axes
        placed = mesh.partition(axes, spec.hf_shape, grid)
        first, last = exchange.stage(spec.hf_shape, placed, grid).rows(index)
        row = int(np.prod(spec.hf_shape[1:]))
        reader.read_into(name, first * row, np.empty((last - first) * row, "bfloat16"))


def work(options: argparse.Namespace) -> None:
    """Load as one of the processes, and print what was read."""
    if not options.read_only:
        address = f"127.0.0.1:{options.port}"
        processes.start_distributed(address, options.processes, options.index)
        grid = mesh.make_mesh(fsdp=options.processes)
        processes.broadcast(0)  # all have started
    before, began = read_counters(), time.monotonic()
    if options.read_only:
        read_rows(options.directory, options.index, options.processes)
    else:
        _, params = convert.load_params(options.directory, grid, dtype="bfloat16")
        jax.block_until_ready(params)
    seconds = time.monotonic() - began
    after = read_counters()
    print(json.dumps({name: after[name] - before[name] for name in after} | {"seconds": seconds}))


def main() -> None:
    """Make the checkpoint, start the processes and print the table row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--directory", type=Path, help="of a process: the checkpoint")
    parser.add_argument("--index", type=int, help="of a process: its number")
    parser.add_argument("--port", type=int, help="of a process: where process 0 listens")
    options = parser.parse_args()
    if options.index is not None:
        work(options)
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        directory = Path(name)
        config = dataclasses.replace(arch.ARCHITECTURES["llama-2-70b"], num_layers=options.layers)
        make_checkpoint(directory, config, random=options.random)
        size = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, *sys.argv, f"--directory={directory}", f"--port={port}"]
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        }
        running = [
            subprocess.Popen(
                [*command, f"--index={index}"], env=environment, stdout=subprocess.PIPE, text=True
            )
            for index in range(options.processes)
        ]
        counts = [json.loads(process.communicate()[0].splitlines()[-1]) for process in running]
    calls, disk = (sum(count[key] for count in counts) for key in ("calls", "disk"))
    seconds = max(count["seconds"] for count in counts)
    print(
        f"{size / 1e9:.2f} GB, {options.processes} processes: read {calls / size:.4f} of it by calls"
        f" ({min(c['calls'] for c in counts) / 1e9:.2f} to"
        f" {max(c['calls'] for c in counts) / 1e9:.2f} GB each), {disk / size:.4f} from disk,"
        f" {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
