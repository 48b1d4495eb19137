"""Peak memory of merging models of 7B, by method, number of layers and number of members.

    python benchmarks/merge_memory.py                 # 7B with 8 members; takes little disk
    python benchmarks/merge_memory.py --layers 2,8 --members 2,8 --methods ties:density=0.2

The checkpoints have the shapes and headers of Llama 2 7B in bfloat16. Their files are sparse: the
first elements of each tensor are random, all others are holes, which are read as zeros. The merged
tensors are computed and not written, since pages that wait to be written are no memory of the
process; `--write` writes them, 13.5 GB for 32 layers.

Each merge runs in a fresh process. Its peak resident memory should be what the process has before,
and a buffer that depends on neither layers nor the sizes of tensors:

    workers * slab * (members + base + sample of the base + result) + memory for loaded tensors

The second term counts for methods that measure a tensor first. Beside the buffer there is what the
compiled programs need within a slab: float32 copies for methods that do not fuse into one loop.
Appends a table to benchmarks/RESULTS.md.
"""

import argparse
import datetime as dt
import json
import os
import pathlib
import resource
import shlex
import shutil
import sys
import tempfile
import time
from unittest import mock

from merge import Usage, machine, measure, parse_method

# numpy and the project are imported in the workers: memory of the parent would count as memory of
# its children

METHODS = "average,selection:resample=exhaustive,ties:density=0.2,della:density=0.5"
FILLED = 1 << 17  # elements of each tensor that are no holes
GB = 1e9


def build(directory: pathlib.Path, layers: int, seed: int) -> None:
    """Write a sparse checkpoint. Seed 0 is the base, the others are members near it."""
    import dataclasses

    import ml_dtypes
    import numpy as np

    from jax_ordermerge import arch
    from jax_ordermerge.checkpoint import shards

    config = dataclasses.replace(arch.ARCHITECTURES["llama-2-7b"], num_layers=layers)
    table = {name: spec.hf_shape for name, spec, _ in arch.hf_tensors(config)}
    directory.mkdir(parents=True)
    values = 0.02 * np.random.default_rng(0).standard_normal(FILLED, np.float32)
    if seed:
        values = values.astype(ml_dtypes.bfloat16).astype(np.float32)
        values += np.float32(4e-5) * np.random.default_rng(seed).standard_normal(FILLED, np.float32)
    files = shards.ShardFiles(directory, table, "bfloat16")
    # holes where `create` would reserve space
    with mock.patch.object(shards, "_allocate", os.ftruncate), files:
        files.create()
        for name, shape in table.items():
            files.write(name, 0, values.astype(ml_dtypes.bfloat16)[: int(np.prod(shape))])
    (directory / "config.json").write_text(json.dumps(config.to_hf("bfloat16")))


def merge(method_text: str, models: pathlib.Path, members: int, *, write: bool) -> None:
    """Merge in this process, and print its memory before in bytes, and the buffer in bytes."""
    import contextlib

    from jax_ordermerge.checkpoint import shards
    from jax_ordermerge.merge import engine, plan
    from jax_ordermerge.merge.methods import table
    from jax_ordermerge.merge.sources.storage import Directory

    method = parse_method(method_text)
    parameters = {key: _number(value) for key, value in method.parameters.items()}
    merge_plan = plan.uniform(
        [Directory(models / str(number)) for number in range(1, members + 1)],
        Directory(models / "0"),
        method=method.name,
        parameters=parameters,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    workers = len(os.sched_getaffinity(0)) + 1
    # the result, and the sample of the base, which has a sixteenth of the elements
    slabs = members + 1 + 1 + 1 / 16
    buffer = workers * engine.SLAB_ELEMENTS * slabs * merge_plan.dtype.itemsize
    measured = [
        output for output in merge_plan.outputs if output.method in ("ties", "karcher", "slerp")
    ]
    buffer += engine.LOADED_BYTES if measured else 0
    assert table.METHODS[method.name].workspace(members) == 0, "needs memory of its own"
    discard = mock.patch.object(shards.os, "pwrite", lambda handle, view, position: len(view))
    holes = mock.patch.object(shards, "_allocate", os.ftruncate)
    with contextlib.ExitStack() as stack:
        if not write:
            stack.enter_context(discard)
            stack.enter_context(holes)
        engine.merge_plan(merge_plan, models / "out", workers=workers)
    print(json.dumps([before, buffer]))


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def row(arguments: argparse.Namespace, method: str, layers: int, members: int) -> str:
    """Merge in a fresh process, and return a row of the table."""
    models = arguments.work / str(layers)
    out, log = models / "out", arguments.work / "log.txt"
    shutil.rmtree(out, ignore_errors=True)
    worker = [method, str(models), str(members), str(int(arguments.write))]
    usage = measure([sys.executable, __file__, "--merge", *worker], log)
    shutil.rmtree(out, ignore_errors=True)
    if not isinstance(usage, Usage):
        return f"| {method} | {layers} | {members} | {usage.replace('|', '/')} | | | | |"
    before, buffer = json.loads(log.read_text().strip().splitlines()[-1])
    size = sum(path.stat().st_size for path in (models / "0").glob("*.safetensors"))
    numbers = (size, usage.peak, usage.peak - before, buffer)
    cells = " | ".join(f"{number / GB:.2f}" for number in numbers)
    return f"| {method} | {layers} | {members} | {cells} | {usage.wall:.0f} |"


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", default="2,8,32", help="default %(default)s")
    parser.add_argument("--members", default="2,8", help="default %(default)s")
    parser.add_argument("--methods", default=METHODS, help="default %(default)s")
    parser.add_argument("--write", action="store_true", help="write the merged tensors")
    parser.add_argument("--work", type=pathlib.Path, help="by default a temporary directory")
    parser.add_argument("--build", nargs=3, help=argparse.SUPPRESS)  # workers
    parser.add_argument("--merge", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure_all(arguments: argparse.Namespace) -> list[str]:
    """Build what is absent, and return the rows of the table."""
    members = [int(count) for count in arguments.members.split(",")]
    rows = []
    for layers in map(int, arguments.layers.split(",")):
        for seed in range(max(members) + 1):
            directory = arguments.work / str(layers) / str(seed)
            if not directory.exists():
                worker = [str(directory), str(layers), str(seed)]
                log = arguments.work / "log.txt"
                built = measure([sys.executable, __file__, "--build", *worker], log)
                assert isinstance(built, Usage), built
        for method in arguments.methods.split(","):
            for count in members:
                rows.append(row(arguments, method, layers, count))
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Measure, and append to RESULTS.md."""
    arguments = parse()
    if arguments.build is not None:
        directory, layers, seed = arguments.build
        build(pathlib.Path(directory), int(layers), int(seed))
        return
    if arguments.merge is not None:
        method, models, count, write = arguments.merge
        merge(method, pathlib.Path(models), int(count), write=bool(int(write)))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        arguments.work = arguments.work or pathlib.Path(temporary)
        arguments.work.mkdir(parents=True, exist_ok=True)
        rows = measure_all(arguments)
    written = "written" if arguments.write else "not written"
    text = "\n".join(
        [
            f"\n## Memory of merging, {dt.date.today()}, {machine()}",
            "",
            f"`python benchmarks/merge_memory.py {shlex.join(sys.argv[1:])}`: sparse files in the"
            f" shape of Llama 2 7B in bfloat16, with a base; the output is {written};"
            f" {time.perf_counter() - start:.0f} s in all.",
            "",
            "| method | layers | members | GB per model | peak GB | over the start GB"
            " | stated buffer GB | wall s |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
