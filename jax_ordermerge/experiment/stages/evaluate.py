"""The stage that measures every model on held-out data, and the controls beside them."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax_ordermerge import console
from jax_ordermerge.config import PREFERENCES, Config, Task
from jax_ordermerge.config.evaluation import TASK_KINDS
from jax_ordermerge.evaluate import generation, harness
from jax_ordermerge.evaluate.eval_model import TextGenerator
from jax_ordermerge.evaluate.metrics import percent_and_error, perplexity
from jax_ordermerge.experiment import controls, dpo_reference, losses, models, stack_models
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.experiment.run_config import model_names, result_layouts
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json, write_json
from jax_ordermerge.tree import Tree


class Missing(NamedTuple):
    """What a model has not been evaluated on.

    Attributes:
        losses: whether its losses are missing.
        tasks: names of tasks.
    """

    losses: bool
    tasks: tuple[str, ...]


def run(ctx: RunContext) -> None:
    """Measure loss, perplexity and tasks of every model, then the controls."""
    kinds, run = model_names(ctx.config), ctx.layout
    # one file per model, so that an interrupted stage repeats one model at most
    results = {
        name: read_json(run.evaluation(name)) or _no_results(name, kind)
        for name, kind in kinds.items()
    }
    if ctx.population:  # the base is the same in all of them
        results["base"] = read_json(ctx.training_layout.evaluation("base"))
    # models with the same missing tasks generate in one program
    groups: dict[Missing, list[str]] = {}
    for name, result in results.items():
        missing = _find_missing(ctx, result)
        # A model without tasks and losses still has a file: the report lists every model.
        if missing.losses or missing.tasks or not run.evaluation(name).is_file():
            groups.setdefault(missing, []).append(name)
    for missing, names in groups.items():
        tasks = [task for task in ctx.config.evaluation.tasks if task.name in missing.tasks]
        loaded = _load_with_generators(ctx, names, tasks)
        for name, params, generate in console.track(loaded, len(names), "evaluate", "models"):
            if missing.losses:
                _measure_losses(ctx, results[name], params)
            # one item of each task, of the first model: how models are asked shows in the log
            show = name == names[0]
            _run_tasks(ctx, results[name], params, generate, tasks, show=show)
            write_json(run.evaluation(name), results[name])
            _log_summary(ctx, results[name]["summary"])
    # before the summary, which marks the stage as complete
    controls.measure_controls(ctx, results)
    summaries = [results[name]["summary"] for name in kinds]
    write_json(run.evaluations, {"split": "test", "models": summaries})


def is_complete(config: Config) -> bool:
    """Whether the summary holds every model of the config, and its files by item are there."""
    names, tasks = list(model_names(config)), config.evaluation.tasks
    answered = [task.name for task in tasks if TASK_KINDS[task.kind].result == "outputs"]

    def is_evaluated(run: RunLayout) -> bool:
        summaries = (read_json(run.evaluations) or {"models": []})["models"]
        files = [run.evaluation(name) for name in names]
        files += [run.outputs(task, name) for task in answered for name in names]
        return [model["name"] for model in summaries] == names and all(
            file.is_file() for file in files
        )

    return all(map(is_evaluated, result_layouts(config)))


def _no_results(name: str, kind: str) -> Json:
    """Return results of a model that has none: a summary, and losses and answers by item."""
    losses = {"loss": None, "loss_se": None, "perplexity": None, "tokens": 0}
    summary = {"name": name, "kind": kind, **losses, "validation_loss": None}
    return {
        "summary": summary | {"tasks": {}, "texts": {}},
        "ids": [],
        "losses": [],
        "tokens": [],
        "tasks": {},
        "texts": {},
    }


def _find_missing(ctx: RunContext, result: Json) -> Missing:
    """Compare the results of a model with what the config asks for."""
    summary, evaluation = result["summary"], ctx.config.evaluation
    test = "test" in ctx.splits and evaluation.loss and summary["loss"] is None
    validation = "validation" in ctx.splits and summary["validation_loss"] is None
    # Outputs for a judge have no metrics, so their files say that they are done.
    done = {*summary["tasks"], *summary["texts"]}
    return Missing(
        test or validation,
        tuple(
            task.name
            for task in evaluation.tasks
            if task.name not in done
            and not ctx.layout.outputs(task.name, summary["name"]).is_file()
        ),
    )


def _load_with_generators(
    ctx: RunContext, names: Sequence[str], tasks: Sequence[Task]
) -> Iterator[tuple[str, Tree, TextGenerator | None]]:
    """Yield models with their generators, where one of the tasks generates.

    As many models as fit the devices are stacked, so that one program generates for all of them.
    """
    config, dtype = ctx.config, ctx.export_dtype
    if not any(task.new_tokens for task in tasks):
        yield from ((name, params, None) for name, params in models.load_models(ctx, names))
        return
    members = config.population.members
    size = stack_models.fitting(len(names), members, ctx.model, ctx.mesh, dtype)
    for start in range(0, len(names), size):
        batch = names[start : start + size]
        loaded = (params for _, params in models.load_models(ctx, batch))
        stacked = stack_models.stack(loaded, len(batch), ctx.model, ctx.mesh, dtype)
        generators = generation.make_generators(
            ctx.model,
            stacked,
            ctx.tokenizer,
            batch=config.evaluation.batch,
            dtype=config.model.compute_dtype,
            mesh=ctx.mesh,
        )
        for index, name in enumerate(batch):
            # from the stack, which is on the devices already
            params = stack_models.take(stacked, index, ctx.model, ctx.mesh, dtype)
            yield name, params, generators[index]


def _measure_losses(ctx: RunContext, result: Json, params: Tree) -> None:
    """Add the losses of a model on the splits to its results."""
    test, validation = ctx.splits.get("test"), ctx.splits.get("validation")
    summary = result["summary"]
    # The test split is summarized with its standard error; the validation split has one number,
    # which chooses the best member and is not reported as a result.
    if test is not None and ctx.config.evaluation.loss:
        sequences = losses.sequence_losses(ctx, params, test)
        losses.require_finite(sequences, test, summary["name"])
        measured = losses.objective_losses(ctx, test, sequences)
        summary |= {"loss": measured.mean, "loss_se": measured.standard_error}
        if by_source := measured.by_source(test):
            summary["sources"] = by_source
        if test.rejected is None:
            summary["perplexity"] = perplexity(measured.mean)
            summary["tokens"] = int(measured.counts.sum())
        elif summary["kind"] != "base":
            # the base is the reference of the rewards: under it they are all 0
            summary["tasks"][PREFERENCES], result["tasks"][PREFERENCES] = dpo_reference.choices(
                test, sequences.sums
            )
        result |= {
            "ids": test.ids.tolist(),
            "losses": measured.means.tolist(),
            "tokens": measured.counts.tolist(),
        }
    if validation is not None:
        measured = losses.example_losses(ctx, params, validation)
        losses.require_finite(measured, validation, summary["name"])
        summary["validation_loss"] = measured.mean
        if by_source := measured.by_source(validation):
            summary["validation_sources"] = by_source


def _run_tasks(
    ctx: RunContext,
    result: Json,
    params: Tree,
    generate: TextGenerator | None,
    tasks: Sequence[Task],
    *,
    show: bool,
) -> None:
    """Add the results of a model on tasks to its results."""
    config, summary = ctx.config, result["summary"]
    eval_model = models.make_eval_model(
        config, ctx.model, params, ctx.tokenizer, ctx.mesh, name=summary["name"], generate=generate
    )
    for task in tasks:
        task_summary, items, example = harness.run(
            task, eval_model, config.data, test=ctx.splits.get("test"), seed=config.seed
        )
        if show and example is not None:
            ctx.log(harness.format_example(example, eval_model, task.name))
        result_kind = TASK_KINDS[task.kind].result
        if result_kind == "outputs":
            # AlpacaEval's files name the model that wrote each answer
            population = f"/population {ctx.population}" if ctx.population else ""
            author = f"{config.name}{population}/{summary['name']}"
            signed = [{**item, "generator": author} for item in items]
            write_json(ctx.layout.outputs(task.name, summary["name"]), signed)
        else:
            # Apart, because tables compare accuracies with each other and not with perplexities.
            group = "texts" if result_kind == "perplexity" else "tasks"
            summary[group][task.name], result[group][task.name] = task_summary, items


def _log_summary(ctx: RunContext, summary: Json) -> None:
    loss = [] if summary["loss"] is None else [f"loss {summary['loss']:.4f}"]
    tasks = [
        f"{task} {percent_and_error(row['accuracy'], row['se'])}"
        for task, row in summary["tasks"].items()
    ]
    ctx.log(f"  {summary['name']}: {', '.join([*loss, *tasks])}")


STAGE = Stage("evaluate", run, is_complete, by_population=True)
