"""The training step beside MaxText's, compiled for TPUs and GPUs that need not be here.

    python benchmarks/compiled.py OUT --maxtext PYTHON               # all rows; hours on two cores
    python benchmarks/compiled.py OUT --maxtext PYTHON --rows "7B v5p:4x4x2"   # about 8 minutes

Each program is compiled in a process of its own, one at a time (up to 3 GB of memory for 7B on 32
chips), and lies in OUT as text (`NAME.hlo`), with its memory and the versions that compiled it in
`NAME.json`. A program that is there, of the same code and settings, is not compiled again: take
another OUT for another environment. The table is printed and written to OUT/table.md, from all rows
that are there; docs/compiled_steps.md has it.

Both sides have one model, batch and topology: rows of 2,048 tokens, 4 rows per chip, FSDP over all
chips, full rematerialization, float32 masters and moments of AdamW, products in bfloat16. PYTHON is
that of an environment with MaxText 0.2.5, whose own functions compile its step (`train_compile`).
Ratios mean something only where both have the same compiler, so this command should run in that
environment, which needs jax_ordermerge's dependencies besides:

    pip install "jax[tpu]==0.11.2" jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2
    pip install --no-deps maxtext==0.2.5

Mcycles are the sum of libtpu's `estimated_cycles` times trip counts, without attention kernels and
collectives: an estimate of the compiler, not a time. Exchanges of tables are all collectives of
arrays with as many rows as the vocabulary: the head, the embedding and their gradients.
"""

import argparse
import collections
import datetime as dt
import hashlib
import importlib.metadata
import inspect
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from jax_ordermerge import hardware
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ARCHITECTURES
from jax_ordermerge.plan import devices, hlo
from jax_ordermerge.plan.collectives import array_bytes, list_exchanges

ROOT = pathlib.Path(__file__).parents[1]
LENGTH, ROWS_PER_CHIP = 2048, 4
VERSIONS = ("jax", "libtpu", "jax-cuda13-plugin")
# What decides the program of a training step: a change elsewhere compiles nothing again.
SOURCES = ("arch", "model", "train", "mesh.py")


class Model(NamedTuple):
    """Names of an architecture, here and in MaxText."""

    ours: str
    maxtext: str


MODELS = {
    "7B": Model("llama-2-7b", "llama2-7b"),
    "8B": Model("llama-3.1-8b", "llama3.1-8b"),
    "70B": Model("llama-2-70b", "llama2-70b"),
}


class Row(NamedTuple):
    """A model on a topology, and which of our programs are compiled for it."""

    model: str
    topology: str
    programs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name in the table and of `--rows`."""
        return f"{self.model} {self.topology}"


# Settings of a program of ours besides those that it shares with MaxText.
PROGRAMS: dict[str, dict[str, Any]] = {
    "one member": {},
    "four members": {"population": {"members": 4}},
    "one member, no_windowed_einsum": {"model": {"compiler_preset": "no_windowed_einsum"}},
    "four members, async_collectives": {
        "population": {"members": 4},
        "model": {"compiler_preset": "async_collectives"},
    },
}
TPU = ("one member", "four members", "one member, no_windowed_einsum")
GPU = ("one member", "four members", "four members, async_collectives")
ROWS = (
    Row("7B", "v5p:4x4x2", TPU),
    Row("7B", "v6e:8x8", TPU),
    Row("7B", "h100:8", GPU),
    Row("7B", "h100:8x2", GPU),
    Row("8B", "v5p:4x4x2", TPU[::2]),
    Row("70B", "v5p:8x8x8", TPU[::2]),
)
MAXTEXT = "MaxText"

# ---------------------------------------------------------------- in the workers


def compile_ours(row: Row, program: str) -> jax.stages.Compiled:
    """Compile our training step."""
    # Not at the top: the environment of MaxText need not have what these import.
    from jax_ordermerge.config import make_config
    from jax_ordermerge.experiment.specs import training_spec
    from jax_ordermerge.plan import compiled
    from jax_ordermerge.train import batches
    from jax_ordermerge.train.programs import Programs

    topology = hardware.parse(row.topology)
    mesh = meshes.make_mesh(devices=devices.topology_devices(topology), fsdp=topology.size)
    settings: dict[str, dict[str, Any]] = {
        "model": {"remat": "full", "compute_dtype": "bfloat16"},
        "mesh": {"fsdp": topology.size},
        "data": {"max_length": LENGTH},
        "population": {"members": 1},
        "training": {"batch": ROWS_PER_CHIP * topology.size},
    }
    if not topology.tpu:
        # neither side has cuDNN's attention, which is compiled where the library is
        settings["model"]["attention"] = "xla"
    for section, values in PROGRAMS[program].items():
        settings[section] |= values
    spec = training_spec(make_config(settings))
    examples = compiled.longest_examples(spec)
    plan = batches.make_plan(spec, examples, spec.first_wave, mesh=mesh)
    return Programs(ARCHITECTURES[MODELS[row.model].ours], plan, mesh).compile_step()


def compile_maxtext(row: Row) -> jax.stages.Compiled:
    """Compile MaxText's training step by its own `train_compile`."""
    from maxtext.configs import pyconfig  # type: ignore[import-not-found]
    from maxtext.trainers.pre_train import train_compile  # type: ignore[import-not-found]

    topology = hardware.parse(row.topology)
    described = devices.topology_devices(topology)
    if not topology.tpu:
        # MaxText describes absent TPUs only
        def mesh_of(config: Any) -> Mesh:
            # as MaxText does for TPUs, before it traces anything
            jax.config.update(
                "jax_remove_size_one_mesh_axis_from_type",
                config.remove_size_one_mesh_axis_from_type,
            )
            names = config.mesh_axes
            shape = [topology.size if name == "fsdp" else 1 for name in names]
            types = (AxisType.Auto,) * len(names)
            return Mesh(np.array(described).reshape(shape), names, axis_types=types)

        train_compile.get_topology_mesh = mesh_of
    programs: list[jax.stages.Compiled] = []
    jit_and_compile = train_compile.jit_and_compile

    def keep(*args: Any, **kwargs: Any) -> jax.stages.Compiled:
        programs.append(jit_and_compile(*args, **kwargs))
        return programs[-1]

    train_compile.jit_and_compile = keep
    base = pathlib.Path(pyconfig.__file__).with_name("base.yml")
    # a described GPU has no name in MaxText: v5p:... only counts the devices, see mesh_of
    known = row.topology if topology.tpu else "v5p:2x2x2"
    arguments = {
        "run_name": "compiled",
        "base_output_directory": "out",
        "enable_checkpointing": False,
        "dataset_type": "synthetic",
        "skip_jax_distributed_system": True,
        "override_model_config": True,
        "hardware": "tpu",
        "internal_compile": True,
        "internal_compile_num_devices": topology.size,
        "compile_topology": known,
        "compile_topology_num_slices": 1,
        "ici_fsdp_parallelism": -1,
        "model_name": MODELS[row.model].maxtext,
        "per_device_batch_size": ROWS_PER_CHIP,
        "max_target_length": LENGTH,
        "remat_policy": "full",
        "scan_layers": True,
        "weight_dtype": "float32",
        "mu_dtype": "float32",
        "dtype": "bfloat16",
    }
    if not topology.tpu:
        arguments["attention"] = "dot_product"
    train_compile.main(["", str(base), *(f"{name}={value}" for name, value in arguments.items())])
    return programs[0]


def work(row: Row, program: str, path: pathlib.Path) -> None:
    """Compile one program and write its text and its memory."""
    # described devices need no other platform, which may be there
    jax.config.update("jax_platforms", "cpu")
    digest = identity(row, program)  # before the code may change on the disk
    start, cpu = time.monotonic(), time.process_time()
    compiled = compile_maxtext(row) if program == MAXTEXT else compile_ours(row, program)
    memory = compiled.memory_analysis()
    path.with_suffix(".hlo").write_text(compiled.as_text())
    facts = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        "seconds": time.monotonic() - start,
        "cpu_seconds": time.process_time() - cpu,
        "date": dt.date.today().isoformat(),
        "versions": versions(),
        "of": digest,
    }
    # after the text: a file of facts says that the text is complete
    path.write_text(json.dumps(facts, indent=1))


def versions() -> dict[str, str]:
    """Return the versions of the compilers of this environment."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def identity(row: Row, program: str) -> str:
    """Return a digest of what decides the text of a program, besides versions."""
    compiles = compile_maxtext if program == MAXTEXT else compile_ours
    facts = (*row[:2], LENGTH, ROWS_PER_CHIP, program, PROGRAMS.get(program))
    digest = hashlib.sha256(f"{facts}{inspect.getsource(compiles)}".encode())
    for source in SOURCES if program != MAXTEXT else ():
        path = ROOT / "jax_ordermerge" / source
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- what a program does

# An instruction: `%name = f32[2]{0} opcode(...)`, its shape may be a tuple.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([\w-]+)\(")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CALLED = re.compile(r"\bcalls=%?([\w.-]+)")
# A fusion of nothing else is a copy.
_MOVES = {"parameter", "copy", "transpose", "bitcast", "constant", "reshape"}


class Counts(NamedTuple):
    """What one execution of a program does, per device.

    Attributes:
        received: bytes by kind of collective.
        synchronous: collectives during which nothing else runs, and their bytes.
        tables: collectives of arrays with a row per token of the vocabulary, and their bytes.
        copies: bytes of arrays that are written again in another layout.
        cycles: estimated by libtpu; 0 for GPUs.
    """

    received: dict[str, float]
    synchronous: tuple[float, float]
    tables: tuple[float, float]
    copies: float
    cycles: float


def count(text: str, chips: int, vocab_size: int) -> Counts:
    """Return what a program does.

    Args:
        text: HLO after compilation.
        chips: devices, all on one axis.
        vocab_size: rows of a table.
    """
    exchanges = list_exchanges(text, AbstractMesh((chips,), ("fsdp",)))
    received: dict[str, float] = collections.defaultdict(float)
    sums = np.zeros((2, 2))
    for exchange in exchanges:
        amount = np.array([exchange.executions, exchange.executions * exchange.received])
        received[exchange.kind] += amount[1]
        is_table = re.search(rf"[\[,]{vocab_size}[\],]", exchange.shape) is not None
        sums += np.outer([exchange.is_synchronous, is_table], amount)
    copies, cycles = _copies_and_cycles(hlo.read_computations(text))
    synchronous, tables = (tuple(row) for row in sums.tolist())
    return Counts(received, synchronous, tables, copies, cycles)


def _copies_and_cycles(computations: list[hlo.Computation]) -> tuple[float, float]:
    opcodes = {
        computation.name: {m[2] for m in map(_INSTRUCTION.match, computation.lines) if m}
        for computation in computations
    }
    copies = cycles = 0.0
    for computation in computations:
        # what is fused is written by its fusion, which has the cycles of all of it
        if any(" fusion(" in line or " async-start(" in line for line in computation.callers):
            continue
        for line in computation.lines:
            if not (instruction := _INSTRUCTION.match(line)):
                continue
            if estimated := _CYCLES.search(line):
                cycles += computation.executions * int(estimated[1])
            shape, opcode = instruction.groups()
            called = opcodes.get(match[1], set()) if (match := _CALLED.search(line)) else set()
            if opcode in ("copy", "transpose") or (
                opcode == "fusion" and called <= _MOVES and called & {"copy", "transpose"}
            ):
                copies += computation.executions * array_bytes(shape)
    return copies, cycles


# ---------------------------------------------------------------- the table

HEADER = (
    "program",
    "temporaries, GiB",
    "received, GiB",
    "all-gather / reduce-scatter / all-reduce / all-to-all / permute",
    "synchronous: n, GiB",
    "tables: n, GiB",
    "copies, GiB",
    "Mcycles",
)
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
GIB = 2**30


class Result(NamedTuple):
    """A compiled program and what it does.

    Attributes:
        temporaries: bytes per device.
        counts: see `Counts`.
        compiler: its versions; ratios are of equal ones.
    """

    temporaries: float
    counts: Counts
    compiler: str = ""

    @property
    def figures(self) -> tuple[float, float, float, float]:
        """What is compared: temporaries, received bytes, copies, cycles."""
        counts = self.counts
        return self.temporaries, sum(counts.received.values()), counts.copies, counts.cycles


def cells(result: Result) -> list[str]:
    """Return the figures of a program."""
    temporaries, received, copies, cycles = result.figures
    counts = result.counts
    kinds = " / ".join(f"{counts.received.get(kind, 0) / GIB:.1f}" for kind in KINDS)
    pairs = (f"{n:.0f}, {size / GIB:.1f}" for n, size in (counts.synchronous, counts.tables))
    return [
        f"{temporaries / GIB:.2f}",
        f"{received / GIB:.1f}",
        kinds,
        *pairs,
        f"{copies / GIB:.1f}",
        f"{cycles / 1e6:.0f}" if cycles else "-",
    ]


def ratio_cells(ours: Result, theirs: Result, members: int) -> list[str]:
    """Return the cells of the ratios to as many steps of MaxText as there are members."""
    # members run one after another: work adds up, temporaries do not
    factors = (1, members, members, members)
    temporaries, received, copies, cycles = (
        f"{x / (factor * y):.2f}" if y else "-"
        for x, y, factor in zip(ours.figures, theirs.figures, factors, strict=True)
    )
    return [temporaries, received, "", "", "", copies, cycles]


def table(results: dict[tuple[Row, str], Result]) -> str:
    """Return the table in Markdown."""
    lines = [HEADER, ("---",) * len(HEADER)]
    for row in ROWS:
        theirs = results.get((row, MAXTEXT))
        for program in (MAXTEXT, *row.programs):
            if not (result := results.get((row, program))):
                continue
            lines.append((f"{row.name}: {program}", *cells(result)))
            if program != MAXTEXT and theirs and theirs.compiler == result.compiler:
                members = PROGRAMS[program].get("population", {}).get("members", 1)
                label = "ratio to MaxText" if members == 1 else f"ratio to {members} x MaxText"
                lines.append((label, *ratio_cells(result, theirs, members)))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---------------------------------------------------------------- the command


def compile_all(
    rows: list[Row], programs: list[str], out: pathlib.Path, maxtext: str | None
) -> int:
    """Compile what is missing in `out`, one program at a time; return how many failed."""
    out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for row in rows:
        for program in (MAXTEXT, *row.programs):
            python = maxtext if program == MAXTEXT else sys.executable
            path = path_of(out, row, program)
            if program not in programs or python is None or is_complete(path, row, program):
                continue
            print(f"{row.name}: {program} ...", file=sys.stderr, flush=True)
            path.unlink(missing_ok=True)
            command = [python, __file__, str(path), "--worker", row.name, program]
            log = path.with_suffix(".log")
            with log.open("w") as file:
                environment = os.environ | {"PYTHONPATH": str(ROOT)}
                process = subprocess.run(
                    command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
                )
            if process.returncode:
                print(f"  failed, see {log}", file=sys.stderr, flush=True)
                failed += 1
    return failed


def path_of(out: pathlib.Path, row: Row, program: str) -> pathlib.Path:
    """Return the path of the facts of a program."""
    name = re.sub(r"\W+", "-", f"{row.name} {program}")
    return out / f"{name}.json"


def is_complete(path: pathlib.Path, row: Row, program: str) -> bool:
    """Return whether a program lies in the directory as this code would compile it."""
    return path.is_file() and json.loads(path.read_text())["of"] == identity(row, program)


def main() -> None:
    """Compile, count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=pathlib.Path, help="directory of the compiled programs")
    parser.add_argument("--maxtext", metavar="PYTHON", help="of an environment with MaxText")
    parser.add_argument(
        "--rows", nargs="+", choices=[row.name for row in ROWS], help="by default all"
    )
    programs = [MAXTEXT, *PROGRAMS]
    parser.add_argument(
        "--programs", nargs="+", choices=programs, default=programs, help="by default all"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    by_name = {row.name: row for row in ROWS}
    if options.worker:
        row, program = options.worker
        work(by_name[row], program, options.out)
        return
    rows = [by_name[name] for name in options.rows or by_name]
    if options.maxtext and not shutil.which(options.maxtext):
        parser.error(f"--maxtext {options.maxtext}: no such program; give the Python of MaxText")
    failed = compile_all(rows, options.programs, options.out, options.maxtext)
    results = load(options.out)
    compilers = sorted({result.compiler for result in results.values()})
    page = "\n\n".join(["; ".join(compilers), table(results)]) + "\n"
    (options.out / "table.md").write_text(page)
    print(page)
    if failed:
        raise SystemExit(1)


def load(out: pathlib.Path) -> dict[tuple[Row, str], Result]:
    """Return what the programs do that lie in a directory, of all rows."""
    results = {}
    for row in ROWS:
        vocab_size = ARCHITECTURES[MODELS[row.model].ours].vocab_size
        chips = hardware.parse(row.topology).size
        for program in (MAXTEXT, *row.programs):
            path = path_of(out, row, program)
            if not is_complete(path, row, program):
                continue
            facts = json.loads(path.read_text())
            counts = count(path.with_suffix(".hlo").read_text(), chips, vocab_size)
            compiler = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
            results[row, program] = Result(facts["temporaries"], counts, compiler)
    return results


if __name__ == "__main__":
    main()
