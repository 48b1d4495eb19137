"""What `ordermerge run` ends with: five lines about the models, and the next command to type."""

import shlex
from collections.abc import Sequence

import jax
from rich.table import Table

from jax_ordermerge import console
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.commands import tables
from jax_ordermerge.config import Config
from jax_ordermerge.evaluate.metrics import percent_and_error
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json


def print_outcome(config: Config, run: RunLayout, *, as_json: bool) -> None:
    """Print the models of a run on the test split, and the next command; on one process.

    Args:
        config: of the run.
        run: layout of its directory on this machine.
        as_json: print JSON, with all that was measured of each model.
    """
    # of a run that is complete no process has been started
    if config.distributed.coordinator is not None and jax.process_index() != 0:
        return
    models = _read_models(run)
    if as_json:
        console.print_json({"run": _place(config), "models": models})
        return
    if table := describe(models):
        console.print_result(f"\n{table}")
    if command := _next_command(config, run, models):
        console.print_message(f"\nnext: {command}")


def describe(models: Sequence[Json]) -> str:
    """Return a table of base, members, average and merges on the test split, if measured.

    Args:
        models: those of `evaluations.json`.
    """
    return tables.to_text(_table(models)).rstrip("\n") if any(map(_is_measured, models)) else ""


def _read_models(run: RunLayout) -> list[Json]:
    return list((read_json(run.evaluations) or {"models": []})["models"])


def _place(config: Config) -> str:
    return remote.address(config.location) or str(config.directory)


def _next_command(config: Config, run: RunLayout, models: Sequence[Json]) -> str | None:
    merges = [model["name"] for model in models if model["kind"] == "merge"]
    name = "average" if "average" in merges else next(iter(merges), "member_0")
    if merges and not run.is_merged(name):
        return None
    model = shlex.quote(f"{_place(config)}/{name}")
    return f"ordermerge generate {model} --prompt 'YOUR PROMPT'"


def _table(models: Sequence[Json]) -> Table:
    members = [model for model in models if model["kind"] == "member"]
    merges = [model for model in models if model["kind"] == "merge"]
    average = [model for model in merges if model["name"] == "average"]
    tasks = list(dict.fromkeys(task for model in models for task in model["tasks"]))
    rows = [_row(model["name"], model, tasks) for model in models if model["kind"] == "base"]
    if members:
        rows.append([f"{len(members)} members, mean", *_means(members, tasks)])
        best = _best(members)
        rows.append(_row(f"lowest loss, members: {best['name']}", best, tasks))
    rows += [_row("average of the members", model, tasks) for model in average]
    # chosen by what it is measured on, as the label says: the report corrects for that
    if merges and (best := _best(merges)) not in average:
        rows.append(_row(f"lowest loss, {len(merges)} merges: {best['name']}", best, tasks))
    return tables.text_table(["on the test examples", "loss", *tasks], rows)


def _is_measured(model: Json) -> bool:
    return model["loss"] is not None or bool(model["tasks"])


def _best(models: Sequence[Json]) -> Json:
    """Return the model of the lowest loss; without losses that of the most right answers."""

    def rank(model: Json) -> tuple[float, float]:
        right = sum(task["accuracy"] for task in model["tasks"].values())
        return (model["loss"] if model["loss"] is not None else 0.0, -right)

    return min(models, key=rank)


def _row(label: str, model: Json, tasks: Sequence[str]) -> list[str]:
    loss = "" if model["loss"] is None else f"{model['loss']:.4f}"
    cells = [model["tasks"].get(task) for task in tasks]
    return [
        label,
        loss,
        *(
            "" if cell is None else percent_and_error(cell["accuracy"], cell["se"])
            for cell in cells
        ),
    ]


def _means(models: Sequence[Json], tasks: Sequence[str]) -> list[str]:
    loss = _mean([model["loss"] for model in models])
    cells = ["" if loss is None else f"{loss:.4f}"]
    for task in tasks:
        share = _mean([model["tasks"].get(task, {}).get("accuracy") for model in models])
        cells.append("" if share is None else f"{100 * share:.1f} %")
    return cells


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of values, all of which are there."""
    numbers = [value for value in values if value is not None]
    return sum(numbers) / len(numbers) if len(numbers) == len(values) else None
