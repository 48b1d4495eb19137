r"""The two regimes of configs/regimes: effects of position, `auto` against a dense lambda sweep.

    ordermerge run configs/regimes/underfitted.yaml \
        --set model.base=BASE --set data.train=TRAIN.jsonl --set data.test=TEST.jsonl
    python benchmarks/regimes.py runs/underfitted runs/overfitted
    python benchmarks/regimes.py --choices runs/short-1 runs/short-2   # runs that only searched

For each run the test loss of base + lambda x mean task vector is measured in device memory for
lambda 0.40 to 2.00 in steps of 0.05. That is more than the search was allowed to try, on the split
that it did not see. Prints a table in Markdown.
"""

import argparse
import pathlib
from typing import Any

import numpy as np

from jax_ordermerge.analysis.paired import Claim, Difference
from jax_ordermerge.data import pack
from jax_ordermerge.evaluate import scoring
from jax_ordermerge.experiment import models, run_config
from jax_ordermerge.experiment.context import open_run
from jax_ordermerge.layout import RunLayout, read_json, read_search
from jax_ordermerge.report.formatting import interval
from jax_ordermerge.report.search_findings import worse_measures
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
    "its test loss",
    "mean member",
    "average",
    "best member by loss",
    "the same at its own lambda",
    "chosen less best member, test",
    "chosen less that at its own lambda",
    "what helps",
    "worse on test",
)
HELPS = {
    (True, True): "merging, length",
    (True, False): "merging",
    (False, True): "length",
    (False, False): "neither is shown",
}


def sweep(run: pathlib.Path) -> tuple[float, float]:
    """Return the lowest test loss of the sweep, and its lambda."""
    ctx = open_run(run_config.read_config(run), lambda text: None)
    population, test, config = models.load_population(ctx), ctx.splits["test"], ctx.config
    settings: dict[str, Any] = {
        "batch": config.analysis.batch,
        "lengths": pack.bucket_lengths(test.longest, config.data.buckets),
        "dtype": config.model.compute_dtype,
    }
    losses = []
    for scale in LAMBDAS:
        params = population.build(Candidate("task_arithmetic", {"scale": float(scale)}))
        sums, tokens = scoring.losses(ctx.model, params, test, mesh=ctx.mesh, **settings)
        losses.append((float(sums.astype(np.float64).sum() / tokens.sum()), float(scale)))
    return min(losses)


def regime_row(run: pathlib.Path) -> list[str]:
    """Return the cells of a run."""
    files, config = RunLayout(run), run_config.read_config(run)
    first, *_, last = read_json(files.analysis)["fixed_effects"]["coefficients"]
    average = next(row for row in read_json(files.controls)["rows"] if row["name"] == "average")
    search = read_json(files.search.results)
    loss, against = search["claim"]["loss"]["winner"], search["claim"]["against"]
    lowest, scale = sweep(run)
    return [
        f"{config.name}, seed {config.seed}",
        *(f"{row['estimate']:+.4f} (z {row['z']:.1f})" for row in (first, last)),
        str(interval(Difference(**average["against"]["mean_member"]))),
        search["candidates"][search["winner"]]["name"],
        f"{loss:.4f}",
        f"{lowest:.4f} at {scale:.2f}",
        f"{loss - lowest:+.4f}",
        str(interval(Claim(**against["best_member"]))) if "best_member" in against else "the same",
    ]


def choice_row(run: pathlib.Path) -> list[str]:
    """Return the cells of a search."""
    search = read_search(RunLayout(run).search)
    assert search is not None
    candidates, claim, guard = search["candidates"], search["claim"], search["guard"]
    loss, against = claim["loss"], claim["against"]

    def gap(rival: str) -> str:
        # a rival with the winner's losses is the winner, and was not tested
        return str(interval(Claim(**against[rival]))) if rival in against else "the same model"

    chosen = candidates[search["winner"]]["name"]
    if guard["worse"]:
        refused = candidates[guard["leader"]]["name"]
        chosen += f" (refused: {refused}, worse in {', '.join(guard['worse'])})"
    scaled = candidates[search["scaled_member"]]["name"]
    return [
        run.name,
        chosen,
        *(f"{loss[part]:.4f}" for part in ("winner", "mean_member", "average", "best_member")),
        f"{loss['scaled_member']:.4f} ({scaled})",
        gap("best_member"),
        gap("scaled_member"),
        HELPS[claim["merging_helps"], claim["length_helps"]],
        ", ".join(worse_measures(search)) or "–",
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
        help="what searches chose, and its loss on the test split",
    )
    options = parser.parse_args()
    header, row = (CHOICES, choice_row) if options.choices else (REGIMES, regime_row)
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for run in options.runs:
        print("| " + " | ".join(row(run)) + " |", flush=True)


if __name__ == "__main__":
    main()
