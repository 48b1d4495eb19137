"""The stage that fine-tunes the members."""

import functools
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from jax_ordermerge import layout as layouts
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.config import Config
from jax_ordermerge.data import preview
from jax_ordermerge.experiment import models, sample_generations, splits, waves
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.layout import RunLayout, write_json
from jax_ordermerge.model import lora
from jax_ordermerge.train import batches
from jax_ordermerge.train.benchmark import StepTiming
from jax_ordermerge.tree import Tree


def run(ctx: RunContext) -> None:
    """Describe the data, then fine-tune the members, each in its own order."""
    config = ctx.config
    # written before the training, so that a run that is stopped early still says what it read
    descriptions = splits.describe(ctx.splits, ctx.overlaps)
    descriptions["train"] |= ctx.prompt_format.to_json()
    if config.data.packing != "none":
        # made again by the training: packing is a function of the same inputs
        plan = batches.make_plan(ctx.training, ctx.splits["train"])
        descriptions["train"]["packing"] = plan.packing
    write_json(ctx.layout.data, descriptions)
    for line in splits.count_lines(descriptions):
        ctx.log(f"  {line}")
    for name, description in descriptions.items():
        for line in splits.source_lines(description["sources"]):
            ctx.log(f"    {line}")
        for other_split, overlap in description.get("overlaps", {}).items():
            ctx.log(
                f"  {name}: overlapping, not held out: {overlap['examples']} of"
                f" {description['examples']} examples are {other_split} examples too"
            )
        if "packing" in description:
            ctx.log(
                "  {kind}: up to {examples} examples in a row of {length} tokens,"
                " {filled:.1%} no padding".format(**description["packing"])
            )
    for note in ctx.prompt_format.notes:
        ctx.log(f"  {note}")
    example = preview.show_example(
        ctx.splits["train"], 0, ctx.tokenizer, preview.choose_marks(sys.stdout), shorten=True
    )
    ctx.log(f"  the first example, what is learned is marked:\n{textwrap.indent(example, '    ')}")
    if config.lora is not None:
        adapter, dense = (
            sum(math.prod(spec.shape) for spec in table)
            for table in (lora.table(ctx.model, config.lora), tensor_table(ctx.model))
        )
        blocks = f", blocks of {config.lora.block}" if config.lora.quantizes else ""
        ctx.log(
            f"  lora: {adapter:,} parameters per member are trained, {dense:,} of the base are"
            f" shared in {config.base_dtype}{blocks}"
        )
    sample = sample_generations.sampler(config, ctx.model, ctx.tokenizer, ctx.mesh, ctx.splits)
    waves.train(ctx, _base_loader(ctx), sample)


def is_complete(config: Config) -> bool:
    """Whether the training has ended, and its logs are whole."""
    run = RunLayout(config.directory)
    # the totals are the last file that it writes
    return run.training_state.is_file() and not any(
        layouts.is_cut_off(log) for log in (run.training_log, run.generated_samples)
    )


def benchmark(ctx: RunContext, steps: int, profile: Path | None) -> StepTiming:
    """Return how fast the first steps of the training are. Only the profile is written."""
    return waves.measure_steps(ctx, _base_loader(ctx), count=steps, profile=profile)


def _base_loader(ctx: RunContext) -> Callable[[], Tree]:
    # a function: full fine-tuning that resumes reads its checkpoint and does not load the base
    return functools.partial(models.training_base, ctx)


STAGE = Stage("train", run, is_complete)
