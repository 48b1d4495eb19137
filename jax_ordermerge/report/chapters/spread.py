"""Table: how much the members differ from each other, and how much the merges do."""

from collections.abc import Sequence

import numpy as np

from jax_ordermerge.analysis.result import Missing, or_missing
from jax_ordermerge.analysis.spread import agreement, spread
from jax_ordermerge.report import formatting
from jax_ordermerge.report.document import Cell, Interval, Table
from jax_ordermerge.report.run import Run

# what `population.vary` lets members differ in, as a table says it
DIFFER_IN = {"order": "order", "init": "initialization", "all": "order and initialization"}


def table(runs: Sequence[Run]) -> Table | None:
    """Return a row per run for its members, and one for its merges; None without results.

    With several runs the rows are named by run, so that the spread from one cause stands beside
    that from another.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    rows: list[list[Cell]] = []
    for run in runs:
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        vary = run.config.get("population", {}).get("vary", "order")
        members = f"{prefix}members (differ in {DIFFER_IN[vary]})"
        for label, kind in ((members, "member"), (f"{prefix}merges", "merge")):
            names = [model["name"] for model in run.models if model["kind"] == kind]
            names = [name for name in names if name in run.items]
            if len(names) > 1:
                rows.append([label, str(len(names)), *_losses(run, names)])
                rows[-1] += [_answers(run, names, task) for task in tasks]
    if not rows:
        return None
    header = ["models", "number", f"sd of the loss ({runs[0].loss_unit})"]
    header += ["sd of an item's loss", "sd between items"]
    header += [f"{task}: agreement, % (kappa)" for task in tasks]
    caption = (
        "Between models on the test examples. Sd of an item's loss: root of the mean variance "
        "between models; beside it how much the items differ. Agreement: items on which two models "
        "are both right or both wrong, mean over pairs; kappa: beyond chance."
    )
    return Table(header, rows, caption)


def _losses(run: Run, names: Sequence[str]) -> list[Cell]:
    items = [run.items[name] for name in names]
    empty: list[Cell] = ["–", "–", "–"]
    # models that saw different items differ by these, too
    if not items[0].get("losses") or any(item["ids"] != items[0]["ids"] for item in items):
        return empty
    values = np.array([item["losses"] for item in items], np.float64)
    tokens = items[0].get("tokens")
    weights = None if tokens is None else np.array(tokens, np.float64)
    result = or_missing(spread, values, weights)
    if isinstance(result, Missing):
        return empty
    return [
        Interval(f"{result.sd:.4f}", f"[{result.low:.4f}, {result.high:.4f}]"),
        formatting.number(result.item_sd, 4),
        formatting.number(result.difficulty_sd, 4),
    ]


def _answers(run: Run, names: Sequence[str], task: str) -> str:
    rows = [run.items[name].get("tasks", {}).get(task, []) for name in names]
    ids = [[row["id"] for row in of_model] for of_model in rows]
    if any(model_ids != ids[0] for model_ids in ids):
        return "–"
    result = or_missing(agreement, np.array([[row["correct"] for row in part] for part in rows]))
    if isinstance(result, Missing):
        return "–"
    return f"{100 * result.share:.1f} ({formatting.number(result.kappa, 2)})"
