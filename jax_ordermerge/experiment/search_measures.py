"""The measures of a search: the loss, and the tasks that validation examples can be asked."""

import functools
from collections.abc import Mapping

import numpy as np

from jax_ordermerge.config import Task
from jax_ordermerge.config.merge import LOSS
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import losses, models, preflight
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.search.measures import Measure
from jax_ordermerge.tree import Tree


def make_measures(ctx: RunContext) -> tuple[dict[str, Measure], dict[str, str]]:
    """Return the measures of a run by name, and why the other tasks are none.

    A task is one where its items are the examples of the test split, as the run was trained to be
    asked: the validation examples can then stand in for them. Nothing is chosen on test items.

    Args:
        ctx: of a run with validation examples.
    """
    measures, unmeasured, validation = {LOSS: _loss(ctx)}, {}, ctx.splits["validation"]
    for task in ctx.config.evaluation.tasks:
        if reason := preflight.reason_against(
            ctx.config, ctx.model, ctx.tokenizer, validation, task
        ):
            unmeasured[task.name] = reason
        else:
            measures[task.name] = Measure(
                functools.partial(_wrong_answers, ctx, task),
                lambda examples: np.ones(len(examples)),
            )
    return measures, unmeasured


def task_settings(ctx: RunContext, measures: Mapping[str, Measure]) -> list[Json]:
    """Return the settings of the tasks among measures: what their answers depend on, as JSON."""
    return [
        task.model_dump(mode="json")
        for task in ctx.config.evaluation.tasks
        if task.name in measures
    ]


def _loss(ctx: RunContext) -> Measure:
    sequences = 1 if ctx.splits["validation"].rejected is None else 2  # of an example
    return Measure(
        lambda params, examples: losses.example_losses(ctx, params, examples).sums,
        lambda examples: examples.loss_counts,
        batch=ctx.config.analysis.batch // sequences,
    )


def _wrong_answers(ctx: RunContext, task: Task, params: Tree, examples: Examples) -> np.ndarray:
    """Return 1 for each example that a model answers wrongly, float64[n]."""
    config = ctx.config
    model = models.make_eval_model(
        config, ctx.model, params, ctx.tokenizer, ctx.mesh, name="a candidate"
    )
    data = config.data.model_copy(update={"test": None})
    result = harness.run(
        preflight.of_all_examples(task), model, data, test=examples, seed=config.seed
    )
    return np.array([not item["correct"] for item in result.items], np.float64)
