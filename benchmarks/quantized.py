r"""What a quantized base of adapters saves, and what it costs in loss.

    python benchmarks/quantized.py --base MODEL --train TRAIN --test TEST --out runs/quantized
    python benchmarks/quantized.py --plan    # the table of docs/planning.md; --analytic: no compiler

1. Memory per device of the frozen base, with `mesh.fsdp` as given.
2. Loss of the base on 32 test problems, nats per token.
3. Loss of 50 steps of adapters of rank 16 on the base, less that on the base of bfloat16: the same
   examples in the same order. Matmuls in float32.
4. Whether the members have the bits that their adapters give on the base of bfloat16.

Each training is a run in OUT, so an interrupted benchmark continues. Appends a section to
benchmarks/RESULTS.md.
"""

import argparse
import datetime as dt
import math
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge import layout
from jax_ordermerge.config import Config
from jax_ordermerge.experiment import losses, models, pipeline, run_config
from jax_ordermerge.experiment.context import RunContext, open_run
from jax_ordermerge.experiment.specs import plan_spec, training_spec
from jax_ordermerge.json_types import Json
from jax_ordermerge.plan import planner
from jax_ordermerge.plan.analytic import bytes_per_device
from jax_ordermerge.train import members

MIB, GIB = 2**20, 2**30
PROBLEMS, LAST = 32, 10  # test problems; steps at the end whose losses are averaged
PLANNED = ("h100:8", "h100:1", "v5e:8x8", "v5e:4x4")

# settings of the table of plans
SHOWN = (
    *("mesh.order", "mesh.fsdp", "mesh.tensor", "training.microbatch", "model.remat"),
    "population.wave",
)


class Base(NamedTuple):
    """A way to store the frozen base: `lora.base_dtype` and `lora.base_block`."""

    dtype: str
    block: int | None = None

    @property
    def name(self) -> str:
        """As it is shown."""
        return self.dtype if self.block is None else f"{self.dtype}, blocks of {self.block}"

    @property
    def settings(self) -> Json:
        """The settings of the config."""
        return {"base_dtype": self.dtype, "base_block": self.block}


BASES = (
    Base("bfloat16"),
    Base("int8", 64),
    Base("int4", 64),
    Base("nf4", 64),
    Base("int4", 32),
    Base("nf4", 32),
)


# ---------------------------------------------------------------------------------- measuring


def make_config(base: Base, options: argparse.Namespace) -> Config:
    """Return the config of a training on a base."""
    return schema.make_config(
        {
            "name": "quantized",
            "output": str(options.out / f"{base.dtype}-{base.block}"),
            "model": {"base": options.base, "compute_dtype": "float32"},
            "data": {
                "train": str(options.train),
                "test": str(options.test),
                "format": "question_answer",
                "template": "gsm8k",
                "max_length": 320,
                "buckets": [192, 256],
                "limit": 2 * options.steps,
                "test_limit": PROBLEMS,
            },
            "population": {"members": 1},
            "mesh": {"order": 1, "fsdp": options.fsdp},
            "training": {
                "epochs": 1,
                "batch": 2,
                "learning_rate": 2e-4,
                "log_every": 1,
                "keep_checkpoints": 1,
            },
            "lora": {"rank": 16, "alpha": 32, **base.settings},
            "analysis": {"batch": 4},
            "merge": {"dtype": "bfloat16", "methods": []},
        }
    )


def measure(base: Base, options: argparse.Namespace) -> Json:
    """Train on a base, and measure it."""
    pipeline.run(make_config(base, options), through="train", log=print)
    directory = make_config(base, options).directory
    ctx = open_run(run_config.read_config(directory), lambda text: None)
    stored = directory / "benchmark.json"
    measured = layout.read_json(stored)
    if measured is None:
        params = models.training_base(ctx)
        measured = {
            "bytes": bytes_per_device(params),
            "layers": bytes_per_device(params["layers"]),
            "loss": losses.sequence_losses(ctx, params, ctx.splits["test"]).mean,
        }
        layout.write_json(stored, measured)
    rows = layout.read_jsonl(ctx.training_layout.training_log)
    return measured | {
        "losses": [row["loss"][0] for row in rows],
        "same_bits": same_bits(ctx, make_config(Base("bfloat16"), options)),
    }


def same_bits(ctx: RunContext, plain: Config) -> bool:
    """Whether the members of a run are those of a run on a base of bfloat16, given its adapters."""
    ours, theirs = (
        jax.device_get(
            members.restore_members(
                spec, ctx.model, ctx.mesh, ctx.training_layout, dtype="bfloat16"
            )
        )
        for spec in (ctx.training, training_spec(plain))
    )
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return all(x.tobytes() == y.tobytes() for x, y in pairs)


def table(results: dict[Base, Json]) -> Iterator[str]:
    """Yield the lines of the table."""
    plain = next(iter(results.values()))
    yield (
        "| base | MiB per device | of it layers | loss of the base | less bfloat16 |"
        f" loss of the last {LAST} steps less bfloat16 | largest difference of a step |"
        " members as from bfloat16, bit for bit |"
    )
    yield "|---" * 8 + "|"
    for base, result in results.items():
        gaps = np.subtract(result["losses"], plain["losses"])
        yield (
            f"| {base.name} | {result['bytes'] / MIB:.1f} | {result['layers'] / MIB:.1f} |"
            f" {result['loss']:.4f} | {result['loss'] - plain['loss']:+.4f} |"
            f" {gaps[-LAST:].mean():+.4f} | {np.abs(gaps).max():.4f} |"
            f" {'yes' if result['same_bits'] else 'NO'} |"
        )


# ---------------------------------------------------------------------------------- planning


def plan_lines(analytic: bool) -> Iterator[str]:
    """Yield the lines of the table of docs/planning.md: what fits, and how fast it would be."""
    yield (
        "| devices | base | settings | base, GiB per device | total, GiB | received per step, GiB |"
        " s per step of 4 members | memory by |"
    )
    yield "|---" * 8 + "|"
    for topology in PLANNED:
        for base in (Base("bfloat16"), Base("int8", 64), Base("nf4", 64)):
            config = schema.make_config(
                {
                    "model": {"remat": "full"},
                    "data": {"max_length": 2048},
                    "population": {"members": 4},
                    "training": {"batch": 64},
                    "lora": {"rank": 16, "alpha": 32, **base.settings},
                }
            )
            plan = planner.plan_experiment(
                plan_spec(config),
                topology,
                architecture="llama-3.1-70b",
                examples=7473,
                analytic_only=analytic,
                log=print,
            )
            option = plan.recommended or plan.configured
            if not option.fits:
                yield f"| {topology} | {base.name} | nothing | | | | | {option.source} |"
                continue
            memory, seconds = option.step.memory, option.population_step_seconds
            assert seconds is not None
            # of all members, which several waves may train
            waves = option.spec.population.total / option.members
            received = waves * math.fsum(option.step.traffic.values())
            settings = {
                name.split(".")[1]: value
                for name, value in option.settings.items()
                if name in SHOWN and value not in (None, 1)
            }
            shown = ", ".join(f"{name} {value}" for name, value in settings.items())
            yield (
                f"| {topology} | {base.name} | {shown} | {memory.base / GIB:.1f} |"
                f" {memory.total / GIB:.1f} | {received / GIB:.0f} |"
                f" {seconds:.0f} | {option.source} |"
            )


# ---------------------------------------------------------------------------------- command


def main() -> None:
    """Measure and append to RESULTS.md, or print the table of plans."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="embedded:smollm2", help="a model")
    parser.add_argument("--train", type=Path, help="train.jsonl of GSM8K")
    parser.add_argument("--test", type=Path, help="its test.jsonl")
    parser.add_argument("--out", type=Path, help="directory of the trainings")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--fsdp", type=int, default=1, help="devices that divide the base")
    parser.add_argument(
        "--dtypes", nargs="+", default=["int8", "int4", "nf4"], help="beside bfloat16"
    )
    parser.add_argument("--plan", action="store_true", help="print the table of plans instead")
    parser.add_argument("--analytic", action="store_true", help="plan without a compiler")
    options = parser.parse_args()
    if options.plan:
        print("\n".join(plan_lines(options.analytic)))
        return
    if None in (options.train, options.test, options.out):
        parser.error("give --train, --test and --out, or --plan")
    chosen = [base for base in BASES if base.dtype in ("bfloat16", *options.dtypes)]
    results = {base: measure(base, options) for base in chosen}
    machine = f"{os.cpu_count()} x {platform.machine()} {jax.devices()[0].device_kind}"
    lines = [
        f"\n## Quantized bases, {dt.date.today()}, {machine}, jax {jax.__version__}",
        "",
        f"`python benchmarks/quantized.py --steps {options.steps} --fsdp {options.fsdp}`:"
        f" {options.base}, GSM8K, adapters of rank 16, batch 2, matmuls in float32; losses in nats"
        f" per token, of the base on {PROBLEMS} test problems.",
        "",
        *table(results),
        "",
    ]
    text = "\n".join(lines)
    print(text)
    with (Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
