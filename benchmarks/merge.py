"""Merging speed and memory. Each program runs in a fresh process and is measured from outside.

    # 1.1 B parameters, three members; builds 8.8 GB under --work once
    python benchmarks/merge.py --mergekit ENV/bin/mergekit-yaml
    # a quick look
    python benchmarks/merge.py --layers 2 --hidden 256 --intermediate 704 --vocabulary 4000 \\
        --methods average,ties

1. The floor: a plain single-threaded loop of numpy that reads all members, averages in float32,
   writes bfloat16 and syncs.
2. Ours, by the command line.
3. mergekit, by its command line: as it comes, and with the flags that made it fastest here.

Every round runs all programs one after another, and medians are shown. Wall time runs from the
start of the process to its end. CPU time is that of the process and its children, user and system.
Memory is the largest resident set of any one process, pages of mapped files included. Before each
program starts, the output of the last one is removed, the disks are synced, and all models are read
once: after a program that takes 12 GB, or on a system that reclaims idle pages, the next one would
otherwise find a cold page cache.

The checkpoints are random, in the shape of TinyLlama by default. About 60 % of the elements of a
member are exactly those of the base, as after fine-tuning in bfloat16. Appends a table to
benchmarks/RESULTS.md.
"""

import argparse
import contextlib
import datetime as dt
import json
import math
import mmap
import os
import pathlib
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from typing import Any, NamedTuple

# numpy and the project are imported in the workers: memory of the parent would count as memory of
# its children

METHODS = (
    "average,average:base=no,task_arithmetic,selection:resample=exhaustive,ties:density=0.2,"
    "dare_linear:density=0.5,dare_ties:density=0.5,slerp:models=2,karcher,model_stock,"
    "della:density=0.5,breadcrumbs:density=0.9"
)
BEST_FLAGS = ("--async-write", "--write-threads", "2", "--out-shard-size", "500M", "-j", "2")
CHUNK = 1 << 20  # elements at a time
SIGMA = 4e-5  # of the members' deltas: 60 % of them vanish in bfloat16 beside weights of 0.02
FLOOR, OURS, THEIRS, BEST = "floor", "jax_ordermerge", "mergekit", "mergekit, best flags"


class Method(NamedTuple):
    """An item of --methods: `name[:key=value...]`.

    The keys `base` (no) and `models` (how many) are not parameters.
    """

    text: str
    name: str
    parameters: dict[str, str]
    base: bool
    models: int


class Usage(NamedTuple):
    """What a process took: seconds, seconds of processors, bytes."""

    wall: float
    cpu: float
    peak: float


# ---------------------------------------------------------------- in the workers


def build(directory: pathlib.Path, shape: dict[str, Any], members: int) -> None:
    """Write the base and the members that are absent."""
    import ml_dtypes
    import numpy as np

    from jax_ordermerge import arch
    from jax_ordermerge.checkpoint import convert, safetensors

    config = arch.ModelConfig(**shape, bos_token_id=1, eos_token_ids=(2,))
    table = [(name, spec.hf_shape) for name, spec, _ in arch.hf_tensors(config)]
    normal = np.random.Generator.standard_normal

    def base() -> Iterator[tuple[str, np.ndarray]]:
        for number, (name, extents) in enumerate(table):
            generator = np.random.Generator(np.random.SFC64([0, number]))
            out = np.empty(math.prod(extents), ml_dtypes.bfloat16)
            for start in range(0, out.size, CHUNK):
                part = out[start : start + CHUNK]
                part[:] = 0.02 * normal(generator, part.size, np.float32) + (len(extents) == 1)
            yield name, out.reshape(extents)

    def member(which: int, reader: safetensors.Reader) -> Iterator[tuple[str, np.ndarray]]:
        for number, (name, extents) in enumerate(table):
            generator = np.random.Generator(np.random.SFC64([1 + which, number]))
            out = reader.read(name).reshape(-1).copy()
            for start in range(0, out.size, CHUNK):
                part = out[start : start + CHUNK]
                part[:] = part.astype(np.float32) + np.float32(SIGMA) * normal(
                    generator, part.size, np.float32
                )
            yield name, out.reshape(extents)

    # a tokenizer, since without one mergekit looks for it long; one file, which the floor counts on
    tokenizer = convert.resolve("embedded:quickstart")
    options: dict[str, Any] = {
        "config": config,
        "dtype": "bfloat16",
        "tokenizer_from": tokenizer,
        "shard_bytes": 1 << 62,
    }
    if not (directory / "base").exists():
        safetensors.write(directory / "base", base(), **options)
    for which in range(members):
        if not (directory / f"member{which}").exists():
            safetensors.write(
                directory / f"member{which}",
                member(which, safetensors.Reader(directory / "base")),
                **options,
            )


def average(out: pathlib.Path, members: list[pathlib.Path]) -> None:
    """Do what every averaging of files must: read, add, divide, round, write, sync.

    Uses nothing of the project.
    """
    import ml_dtypes
    import numpy as np

    headers, maps = [], []
    for directory in members:
        with (directory / "model.safetensors").open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            headers.append((8 + length, json.loads(file.read(length))))
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    out.mkdir()
    with (out / "model.safetensors").open("wb") as file:
        file.write(maps[0][: headers[0][0]])
        tensors = {name: entry for name, entry in headers[0][1].items() if name != "__metadata__"}
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            starts = [begin + header[name]["data_offsets"][0] for begin, header in headers]
            elements = math.prod(entry["shape"])
            for start in range(0, elements, CHUNK):
                count = min(CHUNK, elements - start)
                parts = [
                    np.frombuffer(m, ml_dtypes.bfloat16, count, at + 2 * start)
                    for m, at in zip(maps, starts, strict=True)
                ]
                total = parts[0].astype(np.float32)
                for part in parts[1:]:
                    total += part.astype(np.float32)
                total /= np.float32(len(parts))
                file.write(total.astype(ml_dtypes.bfloat16).view(np.uint16).data)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- in the parent


def parse_method(text: str) -> Method:
    """Read an item of --methods."""
    name, *pairs = text.split(":")
    keys = dict(pair.split("=", 1) for pair in pairs)
    base, models = keys.pop("base", "yes") == "yes", int(keys.pop("models", 0))
    return Method(text, name, keys, base, models)


def our_command(
    method: Method, base: pathlib.Path, members: list[pathlib.Path], out: pathlib.Path
) -> list[str]:
    """Return the command of ours."""
    parameters = [
        part for key, value in method.parameters.items() for part in ("--param", f"{key}={value}")
    ]
    base_option = ["--base", str(base)] if method.base else []
    command = [
        sys.executable,
        "-m",
        "jax_ordermerge",
        "merge",
        "--method",
        method.name,
        *parameters,
        *base_option,
    ]
    return [*command, "--out", str(out), *map(str, members)]


def their_config(
    method: Method, base: pathlib.Path, members: list[pathlib.Path]
) -> dict[str, Any] | None:
    """Return the config of mergekit that means the same, or None if it has no such method."""
    name = {"average": "linear"}.get(method.name, method.name)
    plain = ("linear", "slerp", "karcher", "model_stock")
    if name not in (
        *plain,
        "task_arithmetic",
        "ties",
        "dare_linear",
        "dare_ties",
        "della",
        "della_linear",
        "breadcrumbs",
        "breadcrumbs_ties",
    ):
        return None
    each: dict[str, float] = {key: float(value) for key, value in method.parameters.items()}
    if name == "linear" or name not in plain:
        each["weight"] = 1.0 if name == "linear" else 1 / len(members)
    config: dict[str, Any] = {
        "merge_method": name,
        "dtype": "bfloat16",
        "models": [
            {"model": str(member), **({"parameters": each} if each else {})} for member in members
        ],
    }
    if name == "slerp":
        config |= {"base_model": str(members[0]), "parameters": {"t": 0.5}}
    elif name not in ("linear", "karcher"):
        config["base_model"] = str(base)
    return config


def measure(command: list[str], log: pathlib.Path) -> Usage | str:
    """Run a command; return what it took, or the last line it printed if it failed."""
    os.sync()
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with log.open("wb") as file:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        lines = log.read_text(errors="replace").strip().splitlines() or ["(it printed nothing)"]
        return f"exit code {process.returncode}: {lines[-1][:200]}"
    return Usage(
        wall,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
    )


def programs(
    arguments: argparse.Namespace, models: pathlib.Path
) -> dict[tuple[str, str], list[str]]:
    """Return the command of every (method, program); all write into `--work/out`."""
    out, base = arguments.work / "out", models / "base"
    members = [models / f"member{which}" for which in range(arguments.members)]
    commands = {
        ("average", FLOOR): [sys.executable, __file__, "--floor", str(out), *map(str, members)]
    }
    for method in map(parse_method, arguments.methods.split(",")):
        chosen = members[: method.models or len(members)]
        commands[method.text, OURS] = our_command(method, base, chosen, out)
        config = their_config(method, base, chosen)
        if arguments.mergekit is None or config is None or not method.base:
            continue
        file = arguments.work / f"{method.text.replace(':', '-')}.yaml"
        file.write_text(json.dumps(config, indent=1))  # JSON is YAML
        commands[method.text, THEIRS] = [str(arguments.mergekit), str(file), str(out)]
        if not arguments.plain:
            commands[method.text, BEST] = [*commands[method.text, THEIRS], *BEST_FLAGS]
    return commands


def run(
    arguments: argparse.Namespace, models: pathlib.Path
) -> dict[tuple[str, str], list[Usage] | str]:
    """Measure all programs in turns; one that failed is not tried again."""
    out, log = arguments.work / "out", arguments.work / "log.txt"
    results: dict[tuple[str, str], list[Usage] | str] = {}
    for number in range(arguments.rounds):
        for key, command in programs(arguments, models).items():
            if isinstance(results.get(key), str):
                continue
            shutil.rmtree(out, ignore_errors=True)
            warm(models)
            usage = measure(command, log)
            shutil.rmtree(out, ignore_errors=True)
            if isinstance(usage, str):
                results[key] = usage
                print(f"round {number + 1}  {key[0]}  {key[1]}  {usage}", flush=True)
                continue
            results.setdefault(key, []).append(usage)  # type: ignore[union-attr]
            shown = f"{usage.wall:8.2f} s wall  {usage.cpu:8.2f} s CPU  {usage.peak / 1e9:6.2f} GB"
            print(f"round {number + 1}  {key[0]:32}  {key[1]:22}  {shown}", flush=True)
    return results


def warm(models: pathlib.Path) -> None:
    """Have the files of all models in the page cache."""
    buffer = bytearray(CHUNK)
    for path in sorted(models.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def median(usages: list[Usage]) -> Usage:
    """Return the medians of each number."""
    return Usage(*(statistics.median(column) for column in zip(*usages, strict=True)))


def row(key: tuple[str, str], results: dict[tuple[str, str], list[Usage] | str]) -> str:
    """Return a row of the table."""
    usages, floor = results[key], results["average", FLOOR]
    if isinstance(usages, str):
        return f"| {key[0]} | {key[1]} | {usages.replace('|', '/')} | | | | | |"
    ours = median(usages)
    walls = [usage.wall for usage in usages]
    cells = [
        f"{ours.wall:.1f} ({min(walls):.1f} to {max(walls):.1f})",
        f"{ours.cpu:.1f}",
        f"{ours.peak / 1e9:.2f}",
    ]
    cells.append(
        ""
        if isinstance(floor, str)
        else f"{ours.wall / median(floor).wall:.2f} / {ours.cpu / median(floor).cpu:.2f}"
    )
    for program in (THEIRS, BEST):
        theirs = results.get((key[0].replace(":base=no", ""), program), "")
        compared = key[1] == OURS and not isinstance(theirs, str)
        cells.append(
            f"{median(theirs).wall / ours.wall:.2f} / {median(theirs).cpu / ours.cpu:.2f}"
            if compared
            else ""
        )  # type: ignore[arg-type]
    return f"| {key[0]} | {key[1]} | " + " | ".join(cells) + " |"


def machine() -> str:
    """Return the processors and the memory of this machine."""
    model = platform.machine()
    with contextlib.suppress(OSError):
        names = [
            line.partition(":")[2].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} x {model}, {memory:.0f} GiB"


def versions(mergekit: pathlib.Path | None) -> str:
    """Return the versions of both sides."""
    packages = [f"{name} {metadata.version(name)}" for name in ("jax", "numpy")]
    if mergekit is not None:
        code = (
            "from importlib.metadata import version as v; "
            "print(f\"mergekit {v('mergekit')}, torch {v('torch')}\")"
        )
        asked = subprocess.run(
            [str(mergekit.parent / "python"), "-c", code], capture_output=True, text=True
        )
        packages.append(asked.stdout.strip() or f"mergekit at {mergekit}")
    return f"Python {platform.python_version()}, " + ", ".join(packages)


def report(
    arguments: argparse.Namespace,
    parameters: int,
    results: dict[tuple[str, str], list[Usage] | str],
    load: float,
) -> str:
    """Return the section for RESULTS.md."""
    size = 2 * parameters / 1e9
    return "\n".join(
        [
            f"\n## Merging, {dt.date.today()}, {machine()}",
            "",
            f"`python benchmarks/merge.py {shlex.join(sys.argv[1:])}`: {parameters / 1e6:,.0f} M"
            f" parameters, bfloat16 ({size:.2f} GB per model), base + {arguments.members} members;"
            f" {versions(arguments.mergekit)}; medians of {arguments.rounds} rounds, page cache"
            f" warm; load average {load:.2f} at the start. Ratios are wall / CPU. mergekit does not"
            " sync its output to the disk; the floor and ours do."
            f" Best flags: `{' '.join(BEST_FLAGS)}`.",
            "",
            "| method | program | wall s | CPU s | peak GB | times the floor | mergekit over ours"
            " | its best over ours |",
            "|---|---|---|---|---|---|---|---|",
            *(row(key, results) for key in results),
            "",
        ]
    )


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("layers", 22),
        ("hidden", 2048),
        ("intermediate", 5632),
        ("heads", 32),
        ("kv-heads", 4),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--methods",
        default=METHODS,
        help="NAME[:KEY=VALUE...],... with base=no and models=N as keys; default %(default)s",
    )
    parser.add_argument("--mergekit", type=pathlib.Path, help="path of mergekit-yaml")
    parser.add_argument(
        "--plain", action="store_true", help="mergekit as it comes only, not with its best flags"
    )
    parser.add_argument(
        "--work",
        type=pathlib.Path,
        default=pathlib.Path("/tmp/merge_benchmark"),
        help="checkpoints are kept there",
    )
    parser.add_argument("--build-only", action="store_true", help="write the checkpoints and stop")
    parser.add_argument("--build", nargs=2, help=argparse.SUPPRESS)  # workers
    parser.add_argument("--floor", nargs="+", type=pathlib.Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Build what is absent, measure, and append to RESULTS.md."""
    arguments = parse()
    shape: dict[str, Any] = {
        "vocab_size": arguments.vocabulary,
        "hidden_size": arguments.hidden,
        "intermediate_size": arguments.intermediate,
        "num_layers": arguments.layers,
        "num_heads": arguments.heads,
        "num_kv_heads": arguments.kv_heads,
    }
    if arguments.floor is not None:
        average(arguments.floor[0], arguments.floor[1:])
        return
    if arguments.build is not None:
        build(pathlib.Path(arguments.build[0]), json.loads(arguments.build[1]), arguments.members)
        return
    models = arguments.work / "-".join(map(str, shape.values()))
    models.mkdir(parents=True, exist_ok=True)
    worker = [
        sys.executable,
        __file__,
        "--build",
        str(models),
        json.dumps(shape),
        "--members",
        str(arguments.members),
    ]
    subprocess.run(worker, check=True)
    if arguments.build_only:
        return
    load = os.getloadavg()[0]
    results = run(arguments, models)
    from jax_ordermerge import arch

    text = report(arguments, arch.parameter_count(arch.ModelConfig(**shape)), results, load)
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
