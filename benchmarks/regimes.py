"""The two regimes of configs/regimes: what each run found, and how near `auto` comes to the best of a dense lambda sweep.

    ordermerge run configs/regimes/underfitted.yaml --set model.base=BASE --set data.train=TRAIN.jsonl --set data.test=TEST.jsonl
    python benchmarks/regimes.py runs/underfitted runs/overfitted
    python benchmarks/regimes.py --choices runs/short-1 runs/short-2      # of runs that were searched alone: what was chosen

For each run the test loss of base + lambda x mean task vector is measured in device memory for lambda 0.40 to 2.00 in steps of 0.05,
which is more than the search was allowed to look at, and on the split that it did not see. Prints a table in Markdown.
"""

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from jax_ordermerge.data import pack
from jax_ordermerge.evaluate import scoring
from jax_ordermerge.experiment import models, run_config
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.report import formatting
from jax_ordermerge.search.candidates import Candidate

LAMBDAS = np.arange(8, 41) / 20
REGIMES = (
    "run",
    "slope of epoch 1",
    "slope of the last epoch",
    "average less mean member",
    "auto",
    "its test loss",
    "best of the sweep",
    "auto less that",
    "auto less best member",
)
CHOICES = (
    "run",
    "chosen",
    "its validation loss",
    "of the best member",
    "its test loss",
    "best member",
    "mean member",
    "average",
    "chosen less best member, test",
)


def sweep(run: pathlib.Path) -> tuple[float, float]:
    """Return the lowest test loss of the sweep, and its lambda."""
    ctx = open_run(run_config.read_config(run), lambda text: None)
    population, test, config = models.load_population(ctx), ctx.splits["test"], ctx.config
    lengths = pack.bucket_lengths(test.longest, config.data.buckets)
    settings: dict[str, Any] = {
        "batch": config.analysis.batch,
        "lengths": lengths,
        "dtype": config.model.compute_dtype,
    }
    found = []
    for scale in LAMBDAS:
        params = population.build(Candidate("task_arithmetic", {"scale": float(scale)}))
        sums, tokens = scoring.losses(ctx.model, params, test, mesh=ctx.mesh, **settings)
        found.append((float(sums.astype(np.float64).sum() / tokens.sum()), float(scale)))
    return min(found)


def row(run: pathlib.Path) -> list[str]:
    """Return the cells of a run."""
    config, analysis, search, controls = (
        json.loads((run / name).read_text())
        if name.endswith("json")
        else run_config.read_config(run)
        for name in ("config.yaml", "analysis.json", "search/results.json", "controls.json")
    )
    first, *_, last = analysis["fixed_effects"]["coefficients"]
    average = next(one for one in controls["rows"] if one["name"] == "average")
    claim = search["claim"]
    lowest, scale = sweep(run)
    against = claim["against"].get("best_member")
    return [
        f"{config.name}, seed {config.seed}",
        *(f"{one['estimate']:+.4f} (z {one['z']:.1f})" for one in (first, last)),
        formatting.interval(average["against"]["mean_member"], 1, 4),
        search["candidates"][search["winner"]]["name"],
        f"{claim['loss']['winner']:.4f}",
        f"{lowest:.4f} at {scale:.2f}",
        f"{claim['loss']['winner'] - lowest:+.4f}",
        "the same" if against is None else formatting.interval(against, 1, 4),
    ]


def choice(run: pathlib.Path) -> list[str]:
    """Return the cells of a search."""
    found = json.loads((run / "search" / "results.json").read_text())
    candidates, claim = found["candidates"], found["claim"]
    loss, against = claim["loss"], claim["against"].get("best_member")
    best = loss["winner"] if against is None else loss["best_member"]
    rest = [
        f"{loss[name]:.4f}" if name in loss else "chosen" for name in ("mean_member", "average")
    ]
    return [
        run.name,
        candidates[found["winner"]]["name"],
        *(f"{candidates[found[name]]['loss']:.4f}" for name in ("winner", "best_member")),
        *(f"{one:.4f}" for one in (loss["winner"], best)),
        *rest,
        "the same model" if against is None else formatting.interval(against, 1, 4),
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    parser.add_argument(
        "--choices",
        action="store_true",
        help="what searches chose, and how it did on the test split",
    )
    given = parser.parse_args()
    header, cells = (CHOICES, choice) if given.choices else (REGIMES, row)
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for run in given.runs:
        print("| " + " | ".join(cells(run)) + " |", flush=True)


if __name__ == "__main__":
    main()
