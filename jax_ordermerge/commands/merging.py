"""Merging models outside a run: from a recipe or from names on the command line, with a plan to look at first."""

import io
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table
import yaml

from jax_ordermerge.checkpoint import atomic, remote, shards
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources import references


def is_recipe(path: Path) -> bool:
    """Return whether a file is a merge recipe and not the config of an experiment."""
    return (
        path.suffix in (".yml", ".yaml")
        and (local := remote.fetch(path)).is_file()
        and planner.is_recipe(local)
    )


def plan_recipe(path: Path) -> plan.Plan:
    """Read a recipe; see `merge.recipe`.

    Raises:
        UserError: whatever in it cannot be done, by name.
    """
    return planner.plan_recipe(remote.fetch(path))


def plan_models(
    models: Sequence[str],
    *,
    base: str | None,
    method: str,
    parameters: Mapping[str, Any],
    weights: Sequence[float] | None,
    seed: int,
    dtype: str | None,
) -> plan.Plan:
    """Plan a merge of models of one architecture by one method.

    Raises:
        UserError: bad input.
    """
    if dtype is not None and dtype not in plan.DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(plan.DTYPES)}")
    members = [references.open_model(one) for one in models]
    known = None if base is None else references.open_model(base)
    return plan.uniform(
        members,
        known,
        method=method,
        seed=seed,
        weights=weights,
        parameters=parameters,
        dtype=dtype,
    )


def read_parameters(items: Sequence[str]) -> dict[str, Any]:
    """Return what `--param KEY=VALUE` sets, values as YAML.

    Raises:
        UserError: an item of another form.

    Example:
        >>> read_parameters(["resample=exhaustive", "density=0.5"])
        {'resample': 'exhaustive', 'density': 0.5}
    """
    pairs = [item.partition("=") for item in items]
    for (name, sign, _), item in zip(pairs, items, strict=True):
        if not (name and sign):
            raise UserError(f"--param {item}: expected KEY=VALUE, e.g. --param resample=exhaustive")
    return {name: yaml.safe_load(value) for name, _, value in pairs}


def read_weights(text: str) -> tuple[float, ...]:
    """Return the weights that `--weights` gives, one a model.

    Raises:
        UserError: they are not numbers.

    Example:
        >>> read_weights("0.5,0.25,0.25")
        (0.5, 0.25, 0.25)
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--weights {text}: expected numbers separated by commas, e.g. --weights 0.5,0.25,0.25"
        ) from error


def describe_plan(made: plan.Plan) -> str:
    """Return a table of what a merge will do: models, tensors, bytes, memory and time, the last two from trying one tensor."""
    memory, seconds = engine.estimate(made)
    names = sorted({output.method for output in made.outputs})
    table = rich.table.Table(show_header=False, box=None)
    table.add_row("methods", ", ".join(names))
    for source in made.sources:
        table.add_row("model", source.label)
    table.add_row("tensors", f"{len(made.outputs)}, {made.out_dtype.name}")
    table.add_row("read at least", f"{made.input_bytes / 1e9:.3f} GB")
    table.add_row("write", f"{made.output_bytes / 1e9:.3f} GB")
    table.add_row("memory about", f"{memory / 1e9:.2f} GB")
    table.add_row("time about", f"{seconds:.1f} s, and what the disk takes beyond that")
    text = io.StringIO()
    rich.console.Console(file=text, width=120).print(table)
    return text.getvalue()


def merge_models(
    made: plan.Plan,
    out: Path,
    *,
    to: str = "hf",
    workers: int | None = None,
    shard_bytes: int = shards.SHARD_BYTES,
) -> dict[str, Any]:
    """Carry out a plan, with progress on a terminal.

    Args:
        made: the plan.
        out: directory to write, or its address; it must not exist or be empty.
        to: "hf", or "orbax" for a checkpoint of the parameters, by way of an HF directory beside it.
        workers: threads.
        shard_bytes: largest size of a file.

    Returns:
        What `merge.json` holds.

    Raises:
        UserError: bad input; nothing has been left under `out` then.
    """
    if to not in ("hf", "orbax"):
        raise UserError(f"--to {to}: expected hf or orbax")
    with remote.new_directory(out) as target:
        return _merge(made, target, to, workers, shard_bytes)


def _merge(
    made: plan.Plan, out: Path, to: str, workers: int | None, shard_bytes: int
) -> dict[str, Any]:
    with _progress() as progress:
        if to == "hf":
            return engine.merge_plan(
                made, out, workers=workers, shard_bytes=shard_bytes, progress=progress
            )
        atomic.check_vacant(out)
        between = out.with_name(f"{out.name}.hf")
        report = engine.merge_plan(
            made, between, workers=workers, shard_bytes=shard_bytes, progress=progress
        )
    from jax_ordermerge.commands import (
        checkpoints,  # brings in training and evaluation, which a merge has no use for
    )

    checkpoints.convert_checkpoint(between, out, to="orbax", member=None, dtype=None)
    shutil.rmtree(between)
    return report


@contextmanager
def _progress() -> Iterator[engine.Progress | None]:
    """Yield a progress bar, or None where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    columns = (*rich.progress.Progress.get_default_columns(), rich.progress.TimeElapsedColumn())
    with rich.progress.Progress(*columns, console=rich.console.Console(stderr=True)) as bar:
        task = bar.add_task("merging")
        yield lambda done, count, name: bar.update(
            task, completed=done, total=count, description=name
        )
