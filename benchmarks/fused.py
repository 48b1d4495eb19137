"""Adapters of four members as one program (`lora.fused`) against one member after another.

    python benchmarks/fused.py --model DIR           # two idle CPU cores, about 25 minutes
    python benchmarks/fused.py --plan h100:8 v5e:8x8     # a table for docs/planning.md

1. Four adapters on one base, the exact path and the fused one: seconds per step and peak memory by
   microbatch. Against PEFT on transformers and torch: one fine-tune, and four one after another.
   DIR is a model of Hugging Face, SmolLM2-135M in the results. Full rows of random tokens, rank 8
   on all linear layers, AdamW, float32. Each program is in a process of its own, which is idle
   while another one works; rounds alternate, medians are shown. Appends to benchmarks/RESULTS.md.
2. The training step of both paths compiled for devices that need not be here (extras plan-tpu,
   plan-gpu): bytes received, temporaries, and the planner's seconds per step.
"""

import argparse
import contextlib
import datetime as dt
import functools
import importlib.util
import os
import pathlib
import platform
import resource
import statistics
from typing import Any, NamedTuple

import jax
import numpy as np
from train import Worker

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import parameter_count
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import make_config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.experiment.specs import plan_spec, training_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.plan import planner
from jax_ordermerge.plan.results import OptionPlan
from jax_ordermerge.train import batches
from jax_ordermerge.train.programs import Programs

MEMBERS, LENGTH, RANK, ALPHA, RATE = 4, 128, 8, 16.0, 1e-4
MICROBATCHES = (1, 2, 4, 8)
GIB = 2**30

# ---------------------------------------------------------------- in the workers


def peak() -> float:
    """Return the largest memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Ours:
    """A population of adapters."""

    def __init__(self, directory: str, microbatch: int, *, members: int, fused: bool) -> None:
        # a second row than the microbatch would only repeat what is measured
        settings = {
            "model": {"base": directory, "compute_dtype": "float32"},
            "data": {"max_length": LENGTH},
            "population": {"members": members},
            "training": {
                "batch": microbatch,
                "epochs": 1,
                "learning_rate": RATE,
                "schedule": "constant",
                "warmup": 0,
            },
            "lora": {"rank": RANK, "alpha": ALPHA, "fused": fused},
        }
        spec, mesh = training_spec(make_config(settings)), meshes.make_mesh()
        model = convert.load_config(directory)
        random, count = np.random.default_rng(0), 4 * microbatch
        rows = random.integers(1, model.vocab_size, (count, LENGTH))
        answers = Ragged.of([np.ones(LENGTH)] * count, np.bool_)
        examples = Examples(Ragged.of(list(rows), np.int32), answers, np.arange(count))
        programs = Programs(model, batches.make_plan(spec, examples, mesh=mesh), mesh)

        def load() -> Any:
            return convert.load_params(directory, mesh)[1]

        self.program: Any = programs.compile_step()
        memory = self.program.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes / 1e9
        self.frozen = programs.load_frozen(load)
        self.state = programs.initial_state(load)
        self.batch = batches.device_batch(programs.plan, 0, programs.batch)
        self.parameters = parameter_count(model)

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the table says besides times, after the first step."""
        kind = jax.devices()[0].device_kind
        return {
            "peak": peak(),
            "temporaries": self.temporaries,
            "device": kind,
            "parameters": self.parameters,
        }

    def step(self) -> None:
        """Run one step of all members and wait for it."""
        self.state, metrics = self.program(self.state, self.batch, self.frozen)
        jax.block_until_ready((self.state, metrics))


class Theirs:
    """One adapter of PEFT on transformers and torch."""

    def __init__(self, directory: str, microbatch: int) -> None:
        import peft
        import torch
        import transformers

        base = transformers.AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear"
        )
        self.model = peft.get_peft_model(base, settings)
        self.trained = [x for x in self.model.parameters() if x.requires_grad]
        self.adam = torch.optim.AdamW(self.trained, lr=RATE, weight_decay=0.0)
        rows = np.random.default_rng(0).integers(1, base.config.vocab_size, (microbatch, LENGTH))
        self.tokens = torch.from_numpy(rows)
        self.clip = torch.nn.utils.clip_grad_norm_
        self.version = f"peft {peft.__version__} on torch {torch.__version__}"

    @property
    def facts(self) -> dict[str, Any]:
        """Return what the table says besides times, after the first step."""
        return {"peak": peak(), "version": self.version}

    def step(self) -> None:
        """Run one step."""
        self.adam.zero_grad(set_to_none=True)
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.clip(self.trained, 1.0)  # the default of Training
        self.adam.step()


# ---------------------------------------------------------------- in the parent


class Measured(NamedTuple):
    """A row of the table: seconds per step of four members, by program, and the facts of each."""

    microbatch: int
    seconds: dict[str, list[float]]
    facts: dict[str, dict[str, Any]]

    def cells(self) -> list[str]:
        """Return the cells of the table."""
        seconds = {name: statistics.median(times) for name, times in self.seconds.items()}
        tokens = MEMBERS * self.microbatch * LENGTH

        def ratio(over: str, under: str) -> str:
            if over not in self.seconds:
                return "–"
            pairs = zip(self.seconds[over], self.seconds[under], strict=True)
            return f"{statistics.median(a / b for a, b in pairs):.2f}"

        def rate(name: str) -> str:
            return f"{tokens / seconds[name]:,.0f}" if name in seconds else "–"

        def memory(key: str, *names: str) -> str:
            values = (self.facts.get(name, {}).get(key) for name in names)
            return " / ".join("–" if value is None else f"{value:.2f}" for value in values)

        return [
            str(self.microbatch),
            *(f"{seconds[name]:.3f}" for name in ("exact", "fused")),
            ratio("exact", "fused"),
            memory("temporaries", "exact", "fused"),
            memory("peak", "exact", "fused", "peft"),
            *map(rate, ("exact", "fused", "peft")),
            ratio("peft", "fused"),
        ]


HEADER = (
    "microbatch",
    "exact, s",
    "fused, s",
    "exact / fused",
    "temporaries, GB: exact / fused",
    "peak, GB: exact / fused / PEFT",
    "tokens/s: exact",
    "fused",
    "PEFT, one after another",
    "PEFT / fused, time",
)


def measure(directory: str, microbatch: int, rounds: int) -> Measured:
    """Measure alternating steps of all programs at one microbatch."""
    ours = functools.partial(Ours, directory, microbatch, members=MEMBERS)
    with contextlib.ExitStack() as stack:

        def start(build: Any) -> Worker:
            return stack.enter_context(contextlib.closing(Worker(build)))

        workers = {
            "exact": start(functools.partial(ours, fused=False)),
            "fused": start(functools.partial(ours, fused=True)),
        }
        if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
            workers["peft"] = start(functools.partial(Theirs, directory, microbatch))
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(rounds):
            # the order alternates too, so that none always follows the same other one
            for name in sorted(workers, reverse=bool(number % 2)):
                # four fine-tunes of PEFT are four steps one after another
                steps = MEMBERS if name == "peft" else 1
                seconds[name].append(sum(workers[name].step() for _ in range(steps)))
        return Measured(
            microbatch, seconds, {name: worker.facts for name, worker in workers.items()}
        )


def report(rows: list[Measured], command: str) -> str:
    """Return the section of RESULTS.md."""
    facts = rows[0].facts
    machine = f"{os.cpu_count()} x {platform.machine()} {facts['exact']['device']}"
    theirs = facts.get("peft", {}).get("version", "PEFT is not installed")
    lines = [
        f"\n## Fused adapters, {dt.date.today()}, {machine}, jax {jax.__version__}",
        "",
        f"`{command}`: {MEMBERS} adapters of rank {RANK} on all linear layers of a model of"
        f" {facts['exact']['parameters'] / 1e6:.1f} M parameters, rows of {LENGTH} tokens, float32,"
        f" AdamW; {theirs}. Seconds are of a step of all {MEMBERS}: of PEFT {MEMBERS} steps one"
        " after another. Medians, those of ratios by round; each program in its own process.",
        "",
        *markdown(HEADER, [row.cells() for row in rows]),
        "",
    ]
    return "\n".join(lines)


def markdown(header: tuple[str, ...], rows: list[list[str]]) -> list[str]:
    """Return the lines of a table."""
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


# ---------------------------------------------------------------- compiled

PLAN_HEADER = (
    "program",
    "rows per device and member",
    "received over fsdp, GiB",
    "ratio",
    "temporaries, GiB",
    "matmuls / memory / collectives, s",
    "step, s",
)


def plan(name: str, architecture: str, rows: int, length: int) -> list[list[str]]:
    """Compile both paths for a topology; return two rows of the table."""
    topology = parse(name)
    options: dict[str, OptionPlan] = {}
    for path in ("exact", "fused"):
        settings: dict[str, Any] = {
            "model": {"remat": "full", "compute_dtype": "bfloat16"},
            "mesh": {"fsdp": topology.size},
            "data": {"max_length": length},
            "population": {"members": MEMBERS},
            "training": {"batch": rows * topology.size},
            "lora": {"rank": RANK, "alpha": ALPHA, "fused": path == "fused"},
        }
        spec = plan_spec(make_config(settings))
        options[path] = planner.plan_training_step(
            spec,
            topology,
            architecture,
        )
    before = options["exact"].step.traffic["fsdp"]
    return [
        [
            f"{architecture} {name}: {path}",
            str(rows),
            f"{option.step.traffic['fsdp'] / GIB:.1f}",
            f"{option.step.traffic['fsdp'] / before:.2f}",
            f"{option.step.memory.temporaries / GIB:.2f}",
            " / ".join(f"{seconds:.3f}" for seconds in (option.step.times or {}).values()),
            f"{option.step.seconds:.3f}",
        ]
        for path, option in options.items()
    ]


def main() -> None:
    """Measure and append to RESULTS.md, or print the table of compiled steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", metavar="DIR", help="directory of the base")
    parser.add_argument("--rounds", type=int, default=9, help="repetitions; medians are shown")
    parser.add_argument("--microbatches", type=int, nargs="+", default=MICROBATCHES)
    parser.add_argument("--plan", nargs="+", metavar="TOPOLOGY", help="compile in place of running")
    parser.add_argument("--architecture", default="llama-2-7b", help="of the compiled steps")
    parser.add_argument("--rows", type=int, default=1, help="per device and member, compiled")
    parser.add_argument("--length", type=int, default=2048, help="of compiled rows")
    options = parser.parse_args()
    if options.plan:
        rows = [
            row
            for name in options.plan
            for row in plan(name, options.architecture, options.rows, options.length)
        ]
        print("\n".join(markdown(PLAN_HEADER, rows)))
        return
    if not options.model:
        parser.error("give --model DIR, a model of Hugging Face, or --plan TOPOLOGY")
    measured = [measure(options.model, size, options.rounds) for size in options.microbatches]
    command = f"python benchmarks/fused.py --model DIR --rounds {options.rounds}"
    if options.microbatches != MICROBATCHES:
        command += f" --microbatches {' '.join(map(str, options.microbatches))}"
    text = report(measured, command)
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
