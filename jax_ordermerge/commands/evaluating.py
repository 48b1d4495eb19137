"""One model put to tasks outside a run, those of a config or of lm-evaluation-harness; and what tasks see of a model anywhere."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_ordermerge import config as schema
from jax_ordermerge import mesh as meshes
from jax_ordermerge import processes, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.config.evaluation import OUTPUTS
from jax_ordermerge.data import source
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import harness, scoring
from jax_ordermerge.evaluate.likelihood import Pair
from jax_ordermerge.experiment.layout import write_json
from jax_ordermerge.model import kernels

Log = Callable[[str], None]


def subject(
    config: Config,
    model: ModelConfig,
    params: tree.Tree,
    tokenizer: Any,
    mesh: Mesh,
    generate: harness.Generate | None = None,
) -> harness.Subject:
    """Return a model as tasks see it.

    Args:
        config: its `evaluation.batch` and section `model` say how the model is computed.
        model: its architecture.
        params: its parameters, on the mesh.
        tokenizer: of the model.
        mesh: where the parameters are.
        generate: what lets it write, where that is known already; see `harness.generator`.
    """
    batch, dtype = config.evaluation.batch, config.model.compute_dtype
    kernel = kernels.choose(config.model.attention, model, mesh, dtype=dtype)

    def score(pairs: Sequence[Pair]) -> tuple[list[float], list[bool]]:
        found = scoring.score(
            model, params, pairs, batch=batch, dtype=dtype, mesh=mesh, kernel=kernel
        )
        return found.logps[0].tolist(), found.greedy[0].tolist()

    generate = generate or harness.generator(model, params, tokenizer, batch=batch, dtype=dtype)
    return harness.Subject(tokenizer, generate, score, model.max_position_embeddings)


def is_model(target: Path) -> bool:
    """Say whether the target of `ordermerge evaluate` is a model: neither a config file nor a run directory.

    Example:
        >>> is_model(Path("configs/quickstart.yaml")), is_model(Path("embedded:quickstart"))
        (False, True)
    """
    return target.suffix not in (".yaml", ".yml") and not (target / "config.yaml").is_file()


def read_config(model: str, file: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the config of an evaluation of one model: that of a file, or the defaults, with the model as its base.

    Example:
        >>> read_config("embedded:quickstart", None, ["evaluation.batch=8"]).evaluation.batch
        8
    """
    return schema.load_config(file, [*overrides, f"model.base={json.dumps(model)}"])


def evaluate_tasks(config: Config, out: Path | None, log: Log) -> dict[str, Any]:
    """Put the model `model.base` to the tasks of the config.

    Args:
        config: of `read_config`.
        out: directory for `results.json` and a file of items for each task; answers for a judge need it.
        say: is told the result of each task.

    Returns:
        what is in `results.json`: `model`, `dtype`, and under `tasks` the summary of each.

    Raises:
        UserError: no tasks, or what `harness.run` refuses.
    """
    tasks = config.evaluation.tasks
    if not tasks:
        raise UserError(
            "no tasks to evaluate on: give --config FILE with evaluation.tasks, or --harness TASK,..."
        )
    if out is None and any(task.kind == OUTPUTS for task in tasks):
        raise UserError(
            f"a task of kind {OUTPUTS} writes a file for a judge; say where with --out DIRECTORY"
        )
    model = load(config)
    found: dict[str, Any] = {
        "model": config.model.base,
        "dtype": config.model.compute_dtype,
        "tasks": {},
    }
    for task in tasks:
        summary, items = harness.run(task, model, config.data, seed=config.seed)
        found["tasks"][task.name] = summary
        log(f"{task.name}: {told(summary)}")
        if out is not None:
            if task.kind == OUTPUTS:
                items = signed(items, Path(config.model.base).name)
            write_json(out / f"{task.name}.json", items)
    if out is not None:
        write_json(out / "results.json", found)
    return found


def evaluate_harness(
    config: Config, names: list[str], out: Path | None, log: Log, **options: Any
) -> dict[str, Any]:
    """Put the model `model.base` to tasks of lm-evaluation-harness.

    Args:
        config: of `read_config`.
        names: of tasks or groups.
        out: directory for `results.json` and the items of each task.
        say: is told the table of results.
        options: see `evaluate.adapter.run`.

    Raises:
        UserError: lm-evaluation-harness is not installed, or refuses a task.
    """
    from jax_ordermerge.evaluate import adapter

    adapter.check()
    found, table = adapter.run(load(config), names, seed=config.seed, **options)
    if out is not None:
        for name, items in found.pop("samples").items():
            write_json(out / f"{name}.json", items)
        write_json(
            out / "results.json",
            {"model": config.model.base, "dtype": config.model.compute_dtype, **found},
        )
    log(table)
    return found


def signed(items: list[dict[str, Any]], generator: str) -> list[dict[str, Any]]:
    """Return outputs with the name of what wrote them, as AlpacaEval's files have it.

    Example:
        >>> signed([{"instruction": "Greet.", "output": "Hi"}], "average")
        [{'instruction': 'Greet.', 'output': 'Hi', 'generator': 'average'}]
    """
    return [{**item, "generator": generator} for item in items]


def told(summary: dict[str, Any]) -> str:
    """Return the result of a task in a line.

    Example:
        >>> told({"accuracy": 0.5, "se": 0.25, "n": 4, "acc_norm": 0.75})
        'accuracy 50.0 % +- 25.0, acc_norm 75.0 %, n 4'
        >>> told({"word_perplexity": 12.345678, "bits_per_byte": 1.5, "se": 0.1, "n": 2})
        'word_perplexity 12.346, bits_per_byte 1.500 +- 0.100, n 2'
    """
    parts = []
    for name, value in summary.items():
        if name in ("accuracy", "bits_per_byte"):
            scale, unit, digits = (100, " %", 1) if name == "accuracy" else (1, "", 3)
            parts.append(
                f"{name} {scale * value:.{digits}f}{unit} +- {scale * summary['se']:.{digits}f}"
            )
        elif name == "flexible" or (
            name.startswith(("acc_", "pass@")) and not name.endswith("_se")
        ):
            parts.append(f"{name} {100 * value:.1f} %")
        elif name.endswith("_perplexity"):
            parts.append(f"{name} {value:.3f}")
        elif name == "isolation":
            parts.append(f"isolation {value}")
    return ", ".join([*parts, f"n {summary['n']}"])


def load(config: Config) -> harness.Subject:
    """Start the processes, make the mesh and load the model onto it."""
    if config.compilation_cache:
        meshes.keep_programs(config.compilation_cache)
    if config.distributed.coordinator is None:
        meshes.provide_cpu_devices(config.mesh.sizes.values())
    processes.start_distributed(**config.distributed.model_dump())
    mesh = meshes.make_mesh(**config.mesh.model_dump())
    directory = convert.resolve(config.model.base)
    tokenizer = source.load_tokenizer(directory)
    model, params = convert.load_params(
        directory, mesh, dtype=config.model.compute_dtype, ignore=config.model.ignore_config_keys
    )
    return subject(config, model, params, tokenizer, mesh)
