"""Merging checkpoints outside a run: from a recipe, or from models named on the command line."""

import functools
import io
import math
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

from rich.console import Console
from rich.table import Table

from jax_ordermerge import console
from jax_ordermerge.arch import UnlistedConfig
from jax_ordermerge.checkpoint import atomic, convert, remote
from jax_ordermerge.commands import serving
from jax_ordermerge.config import shipped
from jax_ordermerge.config.merge import canonical_method
from jax_ordermerge.config.section import read_value
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import CONFIG, RunLayout
from jax_ordermerge.merge import engine, plan, unlisted
from jax_ordermerge.merge.recipe import planner, schema
from jax_ordermerge.merge.sources import references
from jax_ordermerge.merge.sources.storage import Source

# Of models named on the command line. In docs/results.md `selection` is worse than the average on
# all five data sets. Another length may be better, but takes validation data to choose.
DEFAULT_METHOD = "average"
_WEIGHTS = (".safetensors", ".gguf")
_WIDTH = 120  # characters of the table of a plan

# Of a plan and the directory to write, which is None where the plan is only shown.
Write = Callable[[plan.Plan, Path | None], None]
Kind = Literal["run", "recipe", "models"]
_WRITING = (
    "out",
    "to",
    "workers",
    "shard_gb",
    "dry_run",
    "as_json",
    "ignore_config_keys",
    "allow_nan",
    "allow_bin",
)
# What a merge is made from -> why its options are refused, and the options that it reads.
MODES: dict[Kind, tuple[str, tuple[str, ...]]] = {
    "run": (
        "the config of the run says how its members are merged, see --set",
        ("overrides",),
    ),
    "recipe": ("the recipe says how its models are merged", _WRITING),
    "models": (
        "it goes with a config or run",
        (*_WRITING, "base", "method", "parameters", "weights", "seed", "dtype"),
    ),
}


def kind_of(sources: Sequence[Path]) -> Kind:
    """Return what the arguments of `ordermerge merge` are, by what they are on disk.

    Raises:
        UserError: a YAML file is absent, is not valid, or is a config beside other arguments; or
            an argument is another file, or a directory of something else.
    """
    first = sources[0]
    # by the name first: a model in a bucket must not be fetched to see whether it is a recipe
    if shipped.find(first) is not None and len(sources) == 1:
        return "run"
    if first.suffix in (".yml", ".yaml") and not first.is_dir():
        local = remote.fetch(first)
        if not local.is_file():
            raise UserError(f"{first} not found; give a recipe or the config of an experiment")
        # Configs of experiments are YAML, too; the keys tell them apart.
        if schema.is_recipe(local):
            return "recipe"
        if len(sources) > 1:
            raise UserError(
                f"{first} is no recipe (it has none of {', '.join(schema.KEYS)}), and the config of"
                f" an experiment takes no other argument; what is {sources[1]}?"
            )
        return "run"
    for path in sources[1:]:
        if path.suffix in (".yml", ".yaml") and path.is_file():
            raise UserError(
                f"{path} is a YAML file and stands behind {first}; a recipe comes first, as in"
                " ordermerge merge recipe.yml MERGED"
            )
    for path in sources:
        if path.is_file() and path.suffix not in _WEIGHTS:
            raise UserError(
                f"{path} is a file, and no YAML by its name; give models (directories, hub names,"
                f" {' and '.join(_WEIGHTS)} files), or a recipe or config that ends in .yml or"
                " .yaml"
            )
    if len(sources) > 1 or _is_model(first):
        return "models"
    if first.is_dir() and not RunLayout(first).is_run:
        raise UserError(
            f"{first} is neither a run (it has no {CONFIG}) nor a model (it has no config.json);"
            " give a run, a recipe, or models"
        )
    return "run"


def _is_model(path: Path) -> bool:
    is_file = path.is_file() and path.suffix in _WEIGHTS
    return is_file or (path / "config.json").is_file() or references.is_composed(str(path))


def find_target(sources: Sequence[Path], out: Path | None, kind: Kind) -> Path | None:
    """Return the directory to write: `--out`, or what stands behind a recipe; None for neither.

    Raises:
        UserError: there are too many arguments behind a recipe.
    """
    if kind == "models":
        return out
    # `merge recipe.yml MERGED` is the form of mergekit-yaml, so that its users type what they know
    if len(sources) > (2 if out is None else 1):
        raise UserError(
            f"{sources[0]} is a recipe: give it and one directory to write,"
            " as in ordermerge merge recipe.yml MERGED"
        )
    return sources[1] if len(sources) > 1 else out


def check_output(out: Path | None, to: str, kind: Kind, *, is_written: bool = True) -> None:
    """Check format and directory of an output, before models are opened.

    Args:
        out: directory; None where none was given.
        to: format.
        kind: what is merged.
        is_written: False of a dry run, which needs no directory.

    Raises:
        UserError: the format is not offered, or there is no directory, or it is not empty.
    """
    if out is None and is_written:
        place = ", or one behind the recipe" if kind == "recipe" else ""
        raise UserError(f"a merge needs a directory to write: --out DIRECTORY{place}")
    if to not in ("hf", "orbax"):
        raise UserError(f"--to {to}: expected hf or orbax")
    if out is not None and is_written and remote.address(out) is None:
        atomic.check_vacant(out)


def merge_recipe(
    recipe: Path,
    out: Path | None,
    write: Write,
    ignore: Collection[str] = (),
    *,
    allow_bin: bool = False,
) -> None:
    """Merge by a recipe, or by several that stand in one file and refer to each other.

    Results that only later recipes need lie beside the output until it is complete.

    Args:
        recipe: YAML file.
        out: directory to write; None where `write` only shows a plan.
        write: `merge_models` or `print_plan`.
        ignore: unknown keys of `config.json` to ignore.
        allow_bin: read `.bin` files of PyTorch where a model has no safetensors.

    Raises:
        UserError: bad input; nothing is left at `out` then.
    """
    *stages, last = schema.load(remote.fetch(recipe))
    plan_recipe = functools.partial(planner.plan_recipe, ignore=ignore, allow_bin=allow_bin)
    if not stages:
        carry_out(plan_recipe(last, where=str(recipe)), out, write)
        return
    names = [str(stage["name"]) for stage in stages]
    # all of them before the first is merged, which may take an hour
    for number, stage in enumerate([*stages, last]):
        where = f"{recipe}: {[*names, 'the last recipe'][number]}"
        for reference in planner.check_recipe(stage, where).references():
            if reference.name in names[number:]:
                raise UserError(f"{where} takes {reference.name}, which is not merged before it")
    if out is None:
        # what later recipes start from is not there to be planned with
        first = plan_recipe(stages[0], where=f"{recipe}: {names[0]}")
        console.print_message(
            f"{names[0]}, the first of {len(names) + 1} recipes; the others start from results:"
        )
        carry_out(first, None, write)
        return
    beside = None if remote.address(out) is not None else out.absolute()
    if beside is not None:
        beside.parent.mkdir(parents=True, exist_ok=True)
    # a name of its own: nothing that others wrote may be removed with it
    with tempfile.TemporaryDirectory(
        prefix="ordermerge-stages-" if beside is None else f"{beside.name}.stages-",
        dir=None if beside is None else beside.parent,
    ) as directory:
        results: dict[str, Path] = {}

        def resolve(name: str) -> Path:
            # a stage goes before a directory of the same name: the recipe is what names it
            return results.get(name) or convert.resolve(name, allow_bin=allow_bin)

        for number, (name, stage) in enumerate(zip(names, stages, strict=True)):
            stage_plan = plan_recipe(stage, where=f"{recipe}: {name}", resolve=resolve)
            # by number: a name may be a path, also one that leads out of the directory
            stage_out = Path(directory, str(number))
            carry_out(stage_plan, stage_out, write, label=name)
            results[name] = stage_out
        where = f"{recipe}: the last recipe"
        carry_out(plan_recipe(last, where=where, resolve=resolve), out, write)


def carry_out(
    merge_plan: plan.Plan, out: Path | None, write: Write, *, label: str | None = None
) -> None:
    """Print the notes of a plan, and write the merge or show the plan.

    Args:
        merge_plan: the plan.
        out: directory to write; None where `write` only shows the plan.
        write: `merge_models` or `print_plan`.
        label: of the result in the last line; by default the directory.
    """
    for note in merge_plan.notes:
        console.print_note(f"note: {note}")
    write(merge_plan, out)
    if out is not None:
        console.print_message(f"wrote {label or remote.address(out) or out}")
    # of the last of several recipes; the others are gone at the end
    if out is not None and label is None and remote.address(out) is None:
        serving.print_commands(out)


def plan_models(
    models: Sequence[str],
    *,
    base: str | None,
    method: str | None,
    parameters: Sequence[str],
    weights: str | None,
    seed: int,
    dtype: str | None,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> plan.Plan:
    """Plan a merge of models of one architecture by one method.

    Args:
        models: any names that `references.open_model` takes.
        base: the same, of the base; None where the method needs none.
        method: a name of the table of methods; None is `DEFAULT_METHOD`, with a note.
        parameters: `KEY=VALUE` each; see `read_parameters`.
        weights: see `read_weights`; equal by default.
        seed: of the methods that draw.
        dtype: of the result; that of the models by default.
        ignore: unknown keys of `config.json` to ignore.
        allow_bin: read `.bin` files of PyTorch where a model has no safetensors.

    Raises:
        UserError: bad input.
    """
    if dtype is not None and dtype not in plan.DTYPES:
        raise UserError(f"--dtype {dtype}: expected one of {', '.join(plan.DTYPES)}")
    # before the models are opened: a model in a bucket or on a hub is fetched first
    method_parameters = read_parameters(parameters)
    method_weights = None if weights is None else read_weights(weights)
    chosen = canonical_method(method or DEFAULT_METHOD)
    plan.check_settings(
        chosen, method_parameters, method_weights, len(models), has_base=base is not None
    )
    names = [*models, *([] if base is None else [base])]
    # those on this machine first: a mistake in one of them costs no download
    opened = {
        name: references.open_any(name, dtype=dtype, ignore=ignore, allow_bin=allow_bin)
        for name in sorted(names, key=references.is_downloaded)
    }
    members = [opened[name] for name in models]
    base_model = None if base is None else opened[base]
    options: Json = {
        "method": chosen,
        "seed": seed,
        "weights": method_weights,
        "parameters": method_parameters,
        "dtype": dtype,
    }
    if any(map(unlisted.is_unlisted, opened.values())):
        merge_plan = unlisted.uniform(members, base_model, **options, allow_bin=allow_bin)
    else:
        listed = [cast(Source, member) for member in members]
        merge_plan = plan.uniform(listed, cast(Source | None, base_model), **options)
    if method is None:
        console.print_note(f"note: merging by {DEFAULT_METHOD}; choose another with --method")
    return merge_plan


def read_parameters(items: Sequence[str]) -> Json:
    """Return the parameters of `--param KEY=VALUE`, values read as YAML.

    Raises:
        UserError: an item has another form, its value is not YAML, or a key is given twice.

    Example:
        >>> read_parameters(["resample=exhaustive", "density=0.5"])
        {'resample': 'exhaustive', 'density': 0.5}
    """
    parameters = {}
    for item in items:
        name, sign, value = item.partition("=")
        if not (name and sign):
            raise UserError(f"--param {item}: expected KEY=VALUE, e.g. --param resample=exhaustive")
        if name in parameters:
            raise UserError(f"--param {name} is given twice; give it once")
        # the types that a recipe has: 0.5, true, [1, 2]
        parameters[name] = read_value(value, f"--param {item}")
    return parameters


def read_shard_size(gigabytes: float) -> int:
    """Return the bytes of `--shard-gb`.

    Raises:
        UserError: it is no size.

    Example:
        >>> read_shard_size(0.5)
        500000000
    """
    if not (math.isfinite(gigabytes) and gigabytes * 1e9 >= 1):
        raise UserError(f"--shard-gb {gigabytes:g}: expected a size above 0, e.g. --shard-gb 5")
    return int(gigabytes * 1e9)


def read_weights(text: str) -> tuple[float, ...]:
    """Return the weights of `--weights`, one per model.

    Raises:
        UserError: they are not numbers.

    Example:
        >>> read_weights("0.5,0.25,0.25")
        (0.5, 0.25, 0.25)
    """
    try:
        # Not normalized here: whether weights must sum to 1 is up to the method.
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"--weights {text}: expected numbers separated by commas, e.g. --weights 0.5,0.25,0.25"
        ) from error


def print_plan(
    merge_plan: plan.Plan,
    out: None = None,
    *,
    workers: int | None = None,
    as_json: bool = False,
) -> None:
    """Print a plan: models, tensors, bytes, memory and time.

    Memory and time are extrapolated from the merge of one tensor.

    Args:
        merge_plan: the plan.
        out: nothing is written.
        workers: number of threads; one per core by default.
        as_json: print JSON in place of a table.
    """
    memory, seconds = engine.estimate(merge_plan, workers)
    # a recipe may name another method for each tensor
    methods = sorted({output.method for output in merge_plan.outputs})
    dtypes = sorted({merge_plan.out_dtype_of(output).name for output in merge_plan.outputs})
    if as_json:
        console.print_json(
            {
                "methods": methods,
                "models": [source.label for source in merge_plan.sources],
                "tensors": len(merge_plan.outputs),
                "dtypes": dtypes,
                "read_bytes": merge_plan.input_bytes,
                "write_bytes": merge_plan.output_bytes,
                "memory_bytes": memory,
                "seconds": seconds,
                "notes": merge_plan.notes,
            }
        )
        return
    table = Table(show_header=False, box=None)
    table.add_row("methods", ", ".join(methods))
    for source in merge_plan.sources:
        table.add_row("model", source.label)
    table.add_row("tensors", f"{len(merge_plan.outputs)}, {' and '.join(dtypes)}")
    table.add_row("read at least", f"{merge_plan.input_bytes / 1e9:.3f} GB")
    table.add_row("write", f"{merge_plan.output_bytes / 1e9:.3f} GB")
    table.add_row("memory about", f"{memory / 1e9:.2f} GB")
    table.add_row("time about", f"{seconds:.1f} s, plus the time of the disk beyond that")
    text = io.StringIO()
    # Into a text and of a fixed width, so that it depends neither on the terminal nor on a pipe.
    Console(file=text, width=_WIDTH).print(table)
    console.print_result(text.getvalue(), end="")


def merge_models(
    merge_plan: plan.Plan,
    out: Path,
    *,
    to: str,
    workers: int | None,
    shard_bytes: int,
    allow_nan: bool = False,
) -> None:
    """Carry out a plan and show its progress on a terminal.

    Args:
        merge_plan: the plan.
        out: directory to write, or its address in a bucket; it must be absent or empty.
        to: "hf", or "orbax" for a checkpoint of the parameters, by way of an HF directory.
        workers: number of threads; one per core by default.
        shard_bytes: largest size of a file.
        allow_nan: whether models may have NaN and infinities; they are counted in a note.

    Raises:
        UserError: bad input; nothing is left at `out` then.
    """
    if to != "hf" and isinstance(merge_plan.config, UnlistedConfig):
        raise UserError(
            f"--to {to} is for architectures in the table; {merge_plan.config.kind} is written as"
            " it was read: leave --to out"
        )
    with remote.new_directory(out) as target:
        # the engine writes safetensors only: an Orbax checkpoint is made of a finished HF directory
        hf_dir = target
        if to == "orbax":
            atomic.check_vacant(target)
            # beside the target, so on the same disk, which must hold both for a moment
            hf_dir = target.absolute().with_name(f"{target.absolute().name}.hf")
        with _progress_bar() as progress:
            report = engine.merge_plan(
                merge_plan,
                hf_dir,
                workers=workers,
                shard_bytes=shard_bytes,
                allow_nan=allow_nan,
                progress=progress,
            )
        # what only the merge itself could see; the other notes were printed before it
        for note in report["notes"][len(merge_plan.notes) :]:
            console.print_note(f"note: {note}")
        if to == "orbax":
            # imports training and evaluation, which a merge of files does not need
            from jax_ordermerge.commands.convert import convert_checkpoint

            convert_checkpoint(str(hf_dir), target, to="orbax")
            shutil.rmtree(hf_dir)


@contextmanager
def _progress_bar() -> Iterator[engine.Progress | None]:
    """Yield a progress bar, or None where stderr is not a terminal or nothing is to be shown."""
    terminal = console.progress_console()
    if not terminal.is_terminal or terminal.quiet:
        yield None
        return
    with console.make_bar(terminal) as bar:
        task = bar.add_task("merging")
        yield lambda done, count, name: bar.update(
            task, completed=done, total=count, description=name
        )
