"""Evaluation of one model outside a run: on the tasks of a config, or of lm-evaluation-harness."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge import config as schema
from jax_ordermerge import mesh as meshes
from jax_ordermerge.checkpoint import convert, gguf_files, remote
from jax_ordermerge.checkpoint.resolve import is_on_hub
from jax_ordermerge.config import Config, shipped
from jax_ordermerge.config.evaluation import RESULTS, TASK_KINDS
from jax_ordermerge.data import dates, tokenizers
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness
from jax_ordermerge.evaluate.eval_model import EvalModel, NotFiniteError
from jax_ordermerge.evaluate.metrics import percent_and_error
from jax_ordermerge.experiment import models
from jax_ordermerge.experiment.context import Log, start_devices
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import CONFIG, RunLayout, write_json
from jax_ordermerge.merge.sources import references, storage


class HarnessOptions(NamedTuple):
    """Options of `--harness`.

    Attributes:
        include: directory with further tasks, as YAML.
        shots: solved examples before each item; None for those of the task.
        limit: use only the first so many items per task; also of the tasks of a config.
        chat: use the chat template of the model.
    """

    include: Path | None = None
    shots: int | None = None
    limit: int | None = None
    chat: bool = False


def check_options(
    target: Path,
    config: Path | None,
    harness_tasks: str | None,
    harness_options: HarnessOptions,
    out: Path | None,
    *,
    ignore: Collection[str] = (),
    allow_bin: bool = False,
) -> None:
    """Check that the options of `ordermerge evaluate` go with its target and with each other.

    Raises:
        UserError: an option would have no effect.
    """
    # An option without an effect is an error: a user who gives --shots expects shots.
    include, shots, limit, chat = harness_options
    harness_only = {"--harness-include": include, "--shots": shots, "--chat": chat or None}
    model_only = {
        "--config": config,
        "--harness": harness_tasks,
        "--out": out,
        "--limit": limit,
        "--ignore-config-keys": ignore or None,
        "--allow-bin": allow_bin or None,
        **harness_only,
    }
    # `is not None`, because 0 and False are given values; a flag that is off is made None above
    unused = [option for option, value in model_only.items() if value is not None]
    if unused and not is_model(target):
        raise UserError(
            f"{unused[0]} goes with a model, {target} is a config or run; its tasks are those of"
            " evaluation.tasks"
        )
    unused = [option for option, value in harness_only.items() if value is not None]
    if unused and harness_tasks is None:
        raise UserError(
            f"{unused[0]} goes with --harness TASK,...; tasks of a config have their own settings"
        )


def is_model(target: Path) -> bool:
    """Return whether the target of `ordermerge evaluate` is neither a config file nor a run.

    Example:
        >>> is_model(Path("configs/quickstart.yaml")), is_model(Path("embedded:quickstart"))
        (False, True)
    """
    # A hub name or embedded:NAME is no file, so a model is what is neither config nor run.
    is_config = target.suffix in (".yaml", ".yml") and not target.is_dir()
    # small/alpaca may be a model of the hub; a bare name of a config of the package is none
    is_config |= "/" not in str(target) and shipped.find(target) is not None
    return not is_config and not RunLayout(target).is_run


def check_model(model: str) -> None:
    """Refuse what is on this disk and is no model, before tasks are asked for.

    Raises:
        UserError: a file, or a directory without config.json.
    """
    path = remote.expand(model)
    if path.is_file() and path.suffix != gguf_files.SUFFIX:
        raise UserError(f"{model} is a file, and no YAML by its name; give a config, run or model")
    is_model = (path / "config.json").is_file() or references.is_composed(model)
    if path.is_dir() and not is_model:
        raise UserError(
            f"{model} is neither a run (it has no {CONFIG}) nor a model (it has no config.json)"
        )


def model_config(
    model: str, path: Path | None, overrides: Sequence[str] = (), ignore: Collection[str] = ()
) -> Config:
    """Return the config that evaluates one model: of a file, or the defaults, with it as base.

    Args:
        model: the model.
        path: of the file, if any.
        overrides: `KEY=VALUE` each.
        ignore: unknown keys of `config.json` to ignore, besides those of the file.

    Raises:
        UserError: the config is not valid, or an override names another model.

    Example:
        >>> model_config("embedded:quickstart", None, ["evaluation.batch=8"]).evaluation.batch
        8
    """
    check_model(model)
    for item in overrides:
        if item.partition("=")[0].strip() == "model.base":
            raise UserError(
                f"--set {item} would be ignored: the model is {model}; give one of them"
            )
    # the model of the command line is the base, whatever the file says
    config = schema.load_config(path, overrides, {"model.base": model})
    if not ignore:
        return config
    keys = [*config.model.ignore_config_keys, *ignore]
    values = {"model.base": model, "model.ignore_config_keys": keys}
    return schema.load_config(path, overrides, values)


def evaluate_tasks(
    config: Config,
    out: Path | None,
    log: Log,
    limit: int | None = None,
    *,
    allow_bin: bool = False,
    on_result: Log | None = print,
) -> Json:
    """Evaluate the model `model.base` on the tasks of the config.

    Args:
        config: see `model_config`.
        out: directory for `results.json` and a file of items per task; answers for a judge need it.
        log: receives messages: an item of each task as the model is asked.
        limit: of the items of each task, where its own is not lower.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.
        on_result: receives one line per task, if any.

    Returns:
        the content of `results.json`: `model`, `dtype`, `limit` where there is one, and under
        `tasks` the summary of each.

    Raises:
        UserError: there are no tasks, or a task does not fit its data.
    """
    # refused before the model is loaded
    tasks = config.evaluation.tasks
    if not tasks:
        raise UserError(
            f"{config.model.base} is no config or run here, so it is taken for a model, and there"
            " are no tasks to evaluate it on: give --config FILE with evaluation.tasks,"
            " or --harness TASK,..."
        )
    judged = [task.kind for task in tasks if TASK_KINDS[task.kind].result == "outputs"]
    if out is None and judged:
        raise UserError(
            f"a task of kind {judged[0]} writes a file for a judge; say where with --out DIRECTORY"
        )
    name = config.model.base
    if is_on_hub(name) and not references.is_composed(name):
        _check_tasks(config)
    model = load_model(config, log, allow_bin=allow_bin)
    summaries: Json = {}
    # The dtype belongs to the result: the same model in float32 and bfloat16 gives other answers.
    results: Json = {"model": config.model.base, "dtype": config.model.compute_dtype}
    if limit is not None:
        # in the file: numbers of the first items do not compare with those of all
        results["limit"] = limit
        tasks = tuple(
            task.model_copy(update={"limit": min(limit, task.limit or limit)}) for task in tasks
        )
    results["tasks"] = summaries
    for task in tasks:
        result = harness.run(task, model, config.data, seed=config.seed)
        summaries[task.name], items = result.summary, result.items
        if result.example is not None:
            log(harness.format_example(result.example, model, task.name))
        if on_result is not None:
            on_result(f"{task.name}: {format_summary(summaries[task.name])}")
        # per task, so that an interrupted evaluation leaves the items of the tasks before
        if out is not None:
            if task.kind in judged:
                # AlpacaEval's files name the model that wrote each answer
                generator = Path(config.model.base).name
                items = [{**item, "generator": generator} for item in items]
            write_json(out / f"{task.name}.json", items)
    if out is not None:
        write_json(out / f"{RESULTS}.json", results)
    return results


def evaluate_harness(
    config: Config,
    tasks: str,
    out: Path | None,
    log: Log,
    options: HarnessOptions,
    *,
    allow_bin: bool = False,
    on_result: Log | None = print,
) -> Json:
    """Evaluate the model `model.base` on tasks of lm-evaluation-harness.

    Args:
        config: see `model_config`.
        tasks: names of tasks or groups, separated by commas.
        out: directory for `results.json` and the items of each task.
        log: receives messages.
        options: of the harness.
        allow_bin: read `.bin` files of PyTorch where there are no safetensors.
        on_result: receives the table of results, if any.

    Returns:
        the content of `results.json`.

    Raises:
        UserError: lm-evaluation-harness is not installed, or refuses a task.
    """
    from jax_ordermerge.evaluate import adapter

    adapter.check()  # the package is optional: say so before a model is loaded
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    model = load_model(config, log, allow_bin=allow_bin)
    try:
        results, table = adapter.run(model, names, seed=config.seed, **options._asdict())
    except NotFiniteError as error:
        raise error.named(model=model.name) from error
    # items are large: they have files of their own, and results.json stays readable
    samples = results.pop("samples")
    results = {"model": config.model.base, "dtype": config.model.compute_dtype, **results}
    if out is not None:
        for name, items in samples.items():
            # names of the harness are free, and may hold a slash
            stem = name.replace("/", "_")
            stem += "_items" if stem.casefold() == RESULTS else ""
            write_json(out / f"{stem}.json", items)
        write_json(out / f"{RESULTS}.json", results)
    if on_result is not None:
        on_result(table)
    return results


def format_summary(summary: Json) -> str:
    """Return the result of a task on one line.

    Example:
        >>> format_summary({"accuracy": 0.5, "se": 0.25, "n": 4, "acc": 0.75, "acc_se": 0.2})
        'accuracy 50.0 % +- 25.0, acc 75.0 %, n 4'
        >>> format_summary({"word_perplexity": 12.345678, "bits_per_byte": 1.5, "se": 0.1, "n": 2})
        'word_perplexity 12.346, bits_per_byte 1.500 +- 0.100, n 2'
    """
    parts = []
    for name, value in summary.items():
        if name == "accuracy":
            parts.append(f"accuracy {percent_and_error(value, summary['se'])}")
        elif name == "bits_per_byte":
            error = "undefined" if summary["se"] is None else f"{summary['se']:.3f}"
            parts.append(f"bits_per_byte {value:.3f} +- {error}")
        # A share has its error beside it, which pass@k, an estimate over samples, has not.
        elif f"{name}_se" in summary or "pass@" in name:
            parts.append(f"{name} {100 * value:.1f} %")
        elif name.endswith("_perplexity"):
            parts.append(f"{name} {value:.3f}")
        elif name == "isolation" or name.endswith("_undecided"):
            parts.append(f"{name} {value}")
        elif name == "note":
            parts.append(value)
    return ", ".join([*parts, f"n {summary['n']}"])


def _check_tasks(config: Config) -> None:
    """Check tasks and their data before the weights of a model are downloaded."""
    directory = convert.resolve(config.model.base, weights=False)
    model = convert.load_config(directory, config.model.ignore_config_keys)
    tokenizer = tokenizers.load_tokenizer(directory)
    for task in config.evaluation.tasks:
        harness.check(task, model, tokenizer, config.data, seed=config.seed)


def load_model(config: Config, log: Log = print, *, allow_bin: bool = False) -> EvalModel:
    """Start the processes, build the mesh and load the model `model.base` onto it.

    The model has any name that `references.open_model` takes. A member of a run is rounded to the
    dtype of its export, as in the evaluation of the run.

    A chat template that prints today's date prints `data.date`, or that of this moment all along.
    """
    start_devices(config)  # sets the number of CPU devices: nothing may use jax before
    mesh = meshes.make_mesh(**config.mesh.model_dump())
    name = config.model.base
    source = references.open_model(
        name, ignore=config.model.ignore_config_keys, allow_bin=allow_bin
    )
    if source.directory is None:
        raise UserError(f"{name} has no tokenizer files; convert it to a directory that has them")
    tokenizer = tokenizers.load_tokenizer(source.directory)
    form = source.prompt_format
    if form.chat_template is not None:
        # a model is asked in the template of its training, whatever its tokenizer files have
        tokenizer.chat_template = form.chat_template
    # a member reads the date that it was trained with
    date = dates.pin_date(tokenizer, config.data.date, recorded=form.date)
    if date is not None:
        log(f"the chat template prints {date} as today's date (data.date)")
    dtype = source.export_dtype or config.model.compute_dtype
    params = storage.load(source, mesh, dtype=dtype)
    return models.make_eval_model(config, source.config, params, tokenizer, mesh, name=name)
