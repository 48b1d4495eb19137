"""The stage that measures every model on held-out data, and the controls beside them."""

import math
from collections.abc import Iterator, Sequence

from jax_ordermerge.config import PREFERENCES, Config
from jax_ordermerge.config.evaluation import TASK_KINDS
from jax_ordermerge.evaluate import generation, harness
from jax_ordermerge.evaluate.eval_model import TextGenerator
from jax_ordermerge.experiment import controls, dpo_reference, losses, models, stack_models
from jax_ordermerge.experiment.context import RunContext, Stage
from jax_ordermerge.experiment.run_config import model_names
from jax_ordermerge.layout import Json, RunLayout, read_json, write_json
from jax_ordermerge.tree import Tree

_LARGEST_LOG = 700.0  # exp of more overflows float64


def run(ctx: RunContext) -> None:
    """Measure loss, perplexity and tasks of every model, then the controls."""
    kinds, run = model_names(ctx.config), ctx.layout
    results = {name: read_json(run.evaluation(name)) for name in kinds}
    # one file per model, so that an interrupted stage repeats one model at most
    missing = [name for name, result in results.items() if result is None]
    for name, params, generate in _load_with_generators(ctx, missing):
        results[name] = _evaluate_model(ctx, name, kinds[name], params, generate)
        write_json(run.evaluation(name), results[name])
        _log_summary(ctx, results[name]["summary"])
    # before the summary, which marks the stage as complete
    controls.measure_controls(ctx, results)
    summaries = [results[name]["summary"] for name in kinds]
    write_json(run.evaluations, {"split": "test", "models": summaries})


def is_complete(config: Config) -> bool:
    """Whether the summary holds every model of the config."""
    evaluations = read_json(RunLayout(config.directory).evaluations) or {"models": []}
    return [model["name"] for model in evaluations["models"]] == list(model_names(config))


def _load_with_generators(
    ctx: RunContext, names: Sequence[str]
) -> Iterator[tuple[str, Tree, TextGenerator | None]]:
    """Yield models with their generators, where a task generates.

    As many models as fit the devices are stacked, so that one program generates for all of them.
    """
    config, dtype = ctx.config, ctx.config.merge.dtype
    if not any(task.new_tokens for task in config.evaluation.tasks):
        yield from ((name, params, None) for name, params in models.load_models(ctx, names))
        return
    size = stack_models.fitting(config.population.members, ctx.model, ctx.mesh, dtype)
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
            params = stack_models.take(stacked, index, ctx.model, ctx.mesh, dtype)
            yield name, params, generators[index]


def _evaluate_model(
    ctx: RunContext, name: str, kind: str, params: Tree, generate: TextGenerator | None
) -> Json:
    """Return the results of one model: a summary, and losses and answers by item."""
    config, test, validation = ctx.config, ctx.splits.get("test"), ctx.splits.get("validation")
    summary: Json = {"name": name, "kind": kind, "loss": None, "loss_se": None}
    summary |= {"perplexity": None, "tokens": 0}
    result: Json = {"ids": [], "losses": []}
    tasks: Json = {}
    task_items: Json = {}
    texts: Json = {}
    text_items: Json = {}

    # -------------------------------------------------------------- losses of the splits
    # The test split is summarized with its standard error; the validation split has one number,
    # which chooses the best member and is not reported as a result.
    if test is not None and config.evaluation.loss:
        sequences = losses.require_finite(losses.sequence_losses(ctx, params, test), test, name)
        measured = losses.objective_losses(ctx, test, sequences)
        summary |= {"loss": measured.mean, "loss_se": measured.standard_error}
        if by_source := measured.by_source(test):
            summary["sources"] = by_source
        if test.rejected is None:
            summary["perplexity"] = math.exp(min(measured.mean, _LARGEST_LOG))
            summary["tokens"] = int(measured.counts.sum())
        elif kind != "base":
            # the base is the reference of the rewards: under it they are all 0
            tasks[PREFERENCES], task_items[PREFERENCES] = dpo_reference.choices(
                test, sequences.sums
            )
        result = {
            "ids": test.ids.tolist(),
            "losses": measured.means.tolist(),
            "tokens": measured.counts.tolist(),
        }
    summary["validation_loss"] = None
    if validation is not None:
        measured = losses.example_losses(ctx, params, validation)
        summary["validation_loss"] = losses.require_finite(measured, validation, name).mean
        if by_source := measured.by_source(validation):
            summary["validation_sources"] = by_source

    # -------------------------------------------------------------- tasks
    eval_model = models.make_eval_model(
        config, ctx.model, params, ctx.tokenizer, ctx.mesh, name=name, generate=generate
    )
    for task in config.evaluation.tasks:
        task_summary, items = harness.run(
            task, eval_model, config.data, test=test, seed=config.seed
        )
        result_kind = TASK_KINDS[task.kind].result
        if result_kind == "outputs":
            # AlpacaEval's files name the model that wrote each answer
            signed = [{**item, "generator": f"{config.name}/{name}"} for item in items]
            write_json(ctx.layout.outputs(task.name, name), signed)
        elif result_kind == "perplexity":
            texts[task.name], text_items[task.name] = task_summary, items
        else:
            tasks[task.name], task_items[task.name] = task_summary, items
    summary |= {"tasks": tasks, "texts": texts}
    return {"summary": summary, **result, "tasks": task_items, "texts": text_items}


def _log_summary(ctx: RunContext, summary: Json) -> None:
    loss = [] if summary["loss"] is None else [f"loss {summary['loss']:.4f}"]
    tasks = [
        f"{task} {100 * row['accuracy']:.1f} % +- {100 * row['se']:.1f}"
        for task, row in summary["tasks"].items()
    ]
    ctx.log(f"  {summary['name']}: {', '.join([*loss, *tasks])}")


STAGE = Stage("evaluate", run, is_complete)
