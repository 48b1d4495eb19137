"""Several runs side by side: differing settings, imbalance and merges, as one page."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from scipy import stats

from jax_ordermerge.analysis.equivalence import equivalence
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.report import contrasts, document, formatting
from jax_ordermerge.report.chapters import spread
from jax_ordermerge.report.differences import MEAN_MEMBER, MergeComparison
from jax_ordermerge.report.document import (
    Block,
    Bullets,
    Cell,
    Heading,
    Interval,
    Paragraph,
    Picture,
    Table,
)
from jax_ordermerge.report.plots import imbalance as plots
from jax_ordermerge.report.run import Run, compare_models, loss_name, percentages, read_runs

_IDENTITY = ("name", "output")  # settings that differ between any two runs


def write(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Compare runs: write comparison.html, comparison.md and its picture into a directory.

    Args:
        directories: two or more run directories; the others are compared with the first.
        out: created if absent.

    Returns:
        The path of comparison.html.

    Raises:
        UserError: fewer than two runs, no run directory, runs of the same name, or of objectives
            whose losses differ in kind.
    """
    if len(directories) < 2:
        raise UserError(
            f"{len(directories)} run was given; a comparison takes two or more run directories"
        )
    runs = read_runs(directories)
    compare_models(runs, "compare")
    page = Path(out) / "comparison.html"
    title = f"Comparison: {', '.join(run.name for run in runs)}"
    document.publish(page, title, build(runs), pictures=".")
    return page


def build(runs: Sequence[Run]) -> list[Block]:
    """Return the blocks of the comparison."""
    # a comparison is useful while a run is still under way
    absent = [
        f"{run.name} has no {file.name} yet"
        for run in runs
        for file, content in (
            (run.layout.analysis, run.analysis),
            (run.layout.evaluations, run.evaluations),
        )
        if not content
    ]
    blocks: list[Block] = [Heading("What differs"), _settings(runs)]
    if absent:
        blocks.append(Bullets(absent))
    # chapters of those runs that have the stage: one that is under way does not hide the rest
    if analyzed := [run for run in runs if run.coefficients]:
        blocks += [Heading("Imbalance: slope of the final loss by position"), *_imbalance(analyzed)]
    if evaluated := [run for run in runs if run.evaluations]:
        blocks += [Heading("Members and merges"), _models(evaluated)]
        if spreads := spread.table(evaluated):
            blocks.append(spreads)
    if len(evaluated) > 1:
        blocks += contrasts.over_runs(evaluated)
    return blocks


def _settings(runs: Sequence[Run]) -> Block:
    configs = [_flatten(run.config) for run in runs]
    rows = []
    for key in dict.fromkeys(key for config in configs for key in config):
        values = [str(config.get(key, "–")) for config in configs]
        if key not in _IDENTITY and len(set(values)) > 1:
            rows.append([key, *values])
    # the same path may hold other data
    digests = [str((run.data or {}).get("train", {}).get("digest", "–")) for run in runs]
    if len(set(digests)) > 1:
        rows.append(["digest of the training data", *digests])
    if not rows:
        return Paragraph("The configs are the same but for their names.")
    header = ["setting", *(run.name for run in runs)]
    return Table(header, rows, "All other settings are the same.", text=range(len(header)))


def _flatten(config: Json, prefix: str = "") -> Json:
    """Return a nested config as `{"training.epochs": 3}`."""
    flat: Json = {}
    for key, value in config.items():
        # lists stay whole: the merges of two runs have no common numbering
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _imbalance(runs: Sequence[Run]) -> list[Block]:
    # by epochs: a run that never reshuffles has one slope for several
    first = {tuple(row["epochs"]): row for row in runs[0].coefficients}
    rows = []
    for run in runs:
        for row in run.coefficients:
            reference = None if run is runs[0] else first.get(tuple(row["epochs"]))
            rows.append(
                [
                    f"{run.name}, epoch {formatting.epochs(row)}",
                    formatting.gap_or_reason(row),
                    "" if reference is None else _difference(row, reference),
                ]
            )
    unit = runs[0].loss_unit
    picture = plots.slopes({run.name: run.coefficients for run in runs}, unit)
    caption = (
        f"In {unit} from the first to the last place; below 0: samples seen early end with the "
        "higher loss. Difference: slope less that of the first run. The errors are added in "
        "quadrature, as of independent runs. Equivalent: by two one-sided tests at 5 %, the margin "
        "half the slope of the first run. Detectable: a difference that is found in 80 of 100 such "
        "comparisons. p is not corrected."
    )
    return [
        Picture("slopes", picture, "Slopes of every run by epoch, with 95 % intervals."),
        Table(["run, epoch", "slope", "difference"], rows, caption),
    ]


def _difference(row: Json, reference: Json) -> Cell:
    # Taken as independent: the runs may share their samples, but the fixed effects have taken
    # the difficulty of samples out.
    gap, se = row["estimate"] - reference["estimate"], math.hypot(row["se"], reference["se"])
    p = float(2 * stats.norm.sf(abs(gap) / se)) if se > 0 else 1.0
    text = formatting.undetected(p, se, math.inf).removeprefix(", ")
    if se > 0 and (margin := abs(reference["estimate"]) / 2) > 0:
        # a difference that is not distinguishable is no equality: that has a test of its own
        test = equivalence(gap, se, math.inf, margin=margin)
        outcome = "equivalent" if test.holds else "not shown to be equivalent"
        text += f"{'; ' if text else ''}{outcome} within {margin:.4f} ({formatting.p_text(test.p)})"
    bounds = formatting.normal_bounds(gap, se)
    return Interval(f"{gap:+.4f}", bounds, formatting.p_value(p), note=text)


def _models(runs: Sequence[Run]) -> Table:
    rows: list[list[Cell]] = []
    strong = []
    for run in runs:
        strong.append(len(rows))
        shares = (
            f"{task} {formatting.mean_sd(percentages(run.members, task), 1)} %"
            for task in run.tasks
        )
        rows.append(
            [
                f"{run.name}: mean member (sd)",
                formatting.mean_sd([member.get("loss") for member in run.members], 4),
                "",
                formatting.number(run.mean_cosine, 3),
                "; ".join(shares),
            ]
        )
        for name, merge in run.comparison.merges.items():
            rows.append([f"{run.name}: {name}", *_merge_cells(run, merge)])
    header = ["model", "loss", "against the mean member", "cosine of members", "tasks"]
    caption = (
        f"{loss_name(runs).capitalize()} in {runs[0].loss_unit}. "
        "Difference: merge less the mean member of its own run, 95 % by a "
        "studentized bootstrap; of several merge seeds their "
        "mean (sd). Cosine: mean over pairs of the members' task vectors; the closer to 1, the "
        "more alike the members."
    )
    return Table(header, rows, caption, text=(0, 4), strong=strong)


def _merge_cells(run: Run, merge: MergeComparison) -> list[Cell]:
    seeds = [model for model in run.models if model["name"] in merge.names]
    loss = formatting.plus_minus(seeds[0].get("loss"), seeds[0].get("loss_se"), 4)
    if len(seeds) > 1:
        loss = formatting.mean_sd([model.get("loss") for model in seeds], 4)
    gap: Cell = "" if merge.loss is None else formatting.interval(merge.loss.gaps[MEAN_MEMBER])
    shares = {task: percentages(seeds, task) for task in run.tasks}
    means = (f"{task} {fmean(values):.1f} %" for task, values in shares.items() if values)
    return [loss, gap, "", "; ".join(means)]
