"""Scores of merges of subsets of the members on the tasks of a run."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_ordermerge.analysis.subset_curve import SubsetCurve
from jax_ordermerge.config import Config
from jax_ordermerge.config.evaluation import TASK_KINDS
from jax_ordermerge.config.merge import merge_name
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import models
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import read_json, write_json
from jax_ordermerge.search import subsets
from jax_ordermerge.search.candidates import Population
from jax_ordermerge.search.controls import Control

# by task and name of the model: whether each item is answered rightly
Answers = dict[str, dict[str, list[bool]]]


def plain_average(config: Config) -> str | None:
    """Return the name of the merge that is the average of all members with equal weights."""
    averages = [
        merge_name(spec)
        for spec in config.merge.methods
        if spec.method == "average"
        and spec.weights is None
        and not spec.parameters
        and spec.checkpoints is None
    ]
    return averages[0] if averages else None


def measure(
    ctx: RunContext,
    population: Callable[[], Population],
    controls: Sequence[Control],
    evaluated: Mapping[str, Json],
) -> Answers:
    """Return which items members, average and merges of subsets answer rightly; write them.

    What an earlier evaluation has measured is read, and so is what the run evaluates anyway. The
    file has answers by candidate: a name says nothing of the seed and the parameters of a
    selection, which differ once the run grows by another. Tasks that the config does not list keep
    theirs.

    Args:
        ctx: of the run.
        population: returns the members and their base; called where a model must be built.
        controls: models, built one at a time in device memory. The base is left out.
        evaluated: the results of the evaluation by name of the model.
    """
    config, file = ctx.config, ctx.layout.subset_answers
    stored = read_json(file) or {}  # by task and key of the candidate
    # perplexities and answers for a judge say of no item whether it is right
    tasks = [x for x in config.evaluation.tasks if TASK_KINDS[x.kind].result == "accuracy"]
    if not tasks or all(control.group != subsets.GROUP for control in controls):
        ctx.log(
            f"  {subsets.SCORES} are not measured: they need two members and a task whose answers"
            " are right or wrong"
        )
        return {}
    answers: Answers = {task.name: {} for task in tasks}
    for control in controls:
        if control.candidate.kind == "base":
            continue
        result = None
        if control.group == "anchor":
            # a merge may be called average and be another
            name = plain_average(config) if control.name == "average" else control.name
            result = evaluated.get(name or "")
        missing = []
        for task in tasks:
            before = stored.get(task.name, {}).get(control.candidate.key)
            if result is not None:
                before = [item["correct"] for item in result["tasks"][task.name]]
            if before is None:
                missing.append(task)
            else:
                answers[task.name][control.name] = before
        if not missing:
            continue
        with population().build_temporarily(control.candidate) as params:
            model = models.make_eval_model(
                config, ctx.model, params, ctx.tokenizer, ctx.mesh, name=control.name
            )
            for task in missing:
                items = harness.run(
                    task, model, config.data, test=ctx.splits.get("test"), seed=config.seed
                ).items
                correct = [item["correct"] for item in items]
                answers[task.name][control.name] = correct
                stored.setdefault(task.name, {})[control.candidate.key] = correct
        shares = [
            f"{task.name} {np.mean(answers[task.name][control.name]):.1%}" for task in missing
        ]
        ctx.log(f"  {control.name}: {', '.join(shares)}")
        write_json(file, stored)  # by model: what is broken off repeats one of them at most
    return answers


def curves(
    config: Config, controls: Sequence[Control], answers: Answers
) -> dict[str, dict[str, SubsetCurve]]:
    """Return the share of right answers by number of members, of each task and method.

    Args:
        config: of the run.
        controls, answers: of `measure`.
    """
    bootstrap = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    result = {}
    for task, rows in answers.items():
        values = {name: np.asarray(row, np.float64) for name, row in rows.items()}
        items = len(next(iter(values.values())))
        result[task] = subsets.curves(controls, values, np.ones(items), **bootstrap)
    return result
