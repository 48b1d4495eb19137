r"""Forgetting: what one more epoch on other data costs a member, a merge and a long run.

    python benchmarks/stability.py runs/alpaca configs/small/dolly.yaml --out runs/stability \
        --set data.train=dolly.json --neutral runs/shakespeare

RUN is a finished run with `population.replicates` and the control `single`. From each of its
populations four models go on: the first member, the average, the first selection, and the one run
of k times the epochs. Each is trained for one epoch on the data of CONFIG, in two orders that are
the same for all models. Their losses are measured before and after, on the test examples of RUN
(forgetting), of CONFIG (learning) and of the run with neutral text, which none was trained on.

What is asked was written down before it was run:

- S1: the average forgets less than the member (one-sided, 5 %).
- Reported, not tested: forgetting of selection and single run less that of the member; selection
  less average; the same for learning, for neutral text, and for the loss on RUN after it all.

The unit is the population: a number is the mean over two orders, an interval is Student's t over
populations. Interrupted, it continues where it was. Prints tables in Markdown.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge.analysis.populations import population_contrast
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import merge_name
from jax_ordermerge.experiment import (
    build_merges,
    controls,
    losses,
    models,
    pipeline,
    run_config,
)
from jax_ordermerge.experiment.context import RunContext, open_run
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import member_name, read_json, write_json
from jax_ordermerge.tree import Tree

ORDERS = 2
PARTS = ("trained first", "trained last", "neutral")
CONTRASTS = (
    ("average", "member"),
    ("selection", "member"),
    ("single", "member"),
    ("selection", "average"),
)


def starts(ctx: RunContext) -> dict[str, Callable[[], Tree]]:
    """Return what loads the models of a population that go on, by what they are."""
    population = functools.cache(lambda: models.load_population(ctx))

    def load(name: str) -> Tree:
        return build_merges.rebuild(ctx, population(), name)

    names = {spec.method: merge_name(spec) for spec in reversed(ctx.config.merge.methods)}
    return {
        "member": lambda: next(models.load_models(ctx, ["member_0"]))[1],
        "average": lambda: load(names["average"]),
        "selection": lambda: load(names["selection"]),
        "single": lambda: controls.train_single(ctx),
    }


def go_on(config: Config, base: Path, out: Path) -> RunContext:
    """Train a model for one more epoch in two orders, and return the run."""
    changes = {
        "output": str(out),
        "model": config.model.model_copy(update={"base": str(base)}),
        "population": config.population.model_copy(
            update={"members": ORDERS, "replicates": 1, "wave": None}
        ),
        "training": config.training.model_copy(update={"epochs": 1}),
    }
    config = config.model_copy(update=changes)
    pipeline.run(config, through="train", log=lambda text: None)
    return open_run(run_config.read_config(out), lambda text: None)


def measure(
    first: RunContext, last: Config, neutral: RunContext, load: Callable[[], Tree], out: Path
) -> Json:
    """Return the losses of a model before and after one more epoch, by `PARTS`."""
    result = read_json(out.with_suffix(".json"))
    if result is not None:
        return result
    params, base = load(), out.with_name(f"{out.name}-start")
    if not (base / "config.json").is_file():
        convert.export(params, first.model, base, dtype="float32", source=first.base_dir)
    after = go_on(last, base, out)
    contexts = dict(zip(PARTS, (first, after, neutral), strict=True))

    def test_losses(params: Tree) -> dict[str, float]:
        return {
            part: losses.example_losses(ctx, params, ctx.splits["test"]).mean
            for part, ctx in contexts.items()
        }

    names = [member_name(order) for order in range(ORDERS)]
    ends = [test_losses(params) for _, params in models.load_models(after, names)]
    result = {"before": test_losses(params), "after": ends}
    write_json(out.with_suffix(".json"), result)
    return result


def table(title: str, values: dict[str, list[float]]) -> None:
    """Print the mean of each model and the contrasts between them.

    Args:
        title: what the numbers are.
        values: by model, one for each population.
    """
    means = ", ".join(f"{name} {np.mean(values[name]):+.4f}" for name in values)
    print(f"\n{title}: {means}\n\n| less | difference | 95 % | p | populations |")
    print("|---|---|---|---|---|")
    for name, rival in CONTRASTS:
        gaps = np.subtract(values[name], values[rival])
        row = population_contrast(gaps)
        each = ", ".join(f"{gap:+.4f}" for gap in gaps)
        print(
            f"| {name} less {rival} | {row.estimate:+.4f} | [{row.low:+.4f}, {row.high:+.4f}] |"
            f" {row.p:.2g} | {each} |"
        )


def main() -> None:
    """Train what is missing, and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--neutral", type=Path, required=True, metavar="RUN")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    first, neutral = (
        open_run(run_config.read_config(run), lambda text: None)
        for run in (options.run, options.neutral)
    )
    fixed = [f"model.base={first.config.model.base}", f"output={options.out}"]
    last = schema.load_config(options.config, [*fixed, *options.set])
    results: dict[str, list[Json]] = {}
    for number in range(first.config.population.replicates):
        ctx = dataclasses.replace(first, population=number)
        for name, load in starts(ctx).items():
            out = options.out / f"{name}_{number}"
            results.setdefault(name, []).append(measure(ctx, last, neutral, load, out))
            print(f"{name} of population {number} is done", file=sys.stderr, flush=True)
    for part, word in zip(PARTS, ("forgetting", "learning", "neutral text"), strict=True):
        before = {name: [row["before"][part] for row in rows] for name, rows in results.items()}
        after = {
            name: [float(np.mean([end[part] for end in row["after"]])) for row in rows]
            for name, rows in results.items()
        }
        change = {name: np.subtract(after[name], before[name]).tolist() for name in results}
        table(f"{word}, change of the loss on what was {part}", change)
        table(f"{word}, loss after", after)
        if part == PARTS[0]:
            gaps = np.subtract(change["average"], change["member"])
            p = population_contrast(gaps, alternative="less").p
            print(f"\nS1, the average forgets less than the member: p = {p:.2g}, one-sided")


if __name__ == "__main__":
    main()
