"""Controls of a run: the models that its merges have to be compared with, and their losses."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import merge_name, unmerged_controls
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.experiment import losses, models, subset_scores, waves
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout, read_json, read_npz, write_json, write_npz
from jax_ordermerge.search import controls, subsets
from jax_ordermerge.search.candidates import Candidate, Population
from jax_ordermerge.train import members
from jax_ordermerge.tree import Tree

# The losses of one model on any examples. A function instead of parameters, because the ensemble
# has the parameters of all members and is measured by another program.
LossFunction = Callable[[Examples], losses.Losses]


def measure_controls(ctx: RunContext, evaluated: Mapping[str, Json]) -> None:
    """Measure the controls of the config; write their losses and their paired differences.

    Args:
        ctx: of the run.
        evaluated: the results of the evaluation by name of the model. Controls among them are not
            measured again.
    """
    config = ctx.config
    use_test = "test" in ctx.splits and config.evaluation.loss
    split = "test" if use_test else "validation"
    examples, validation = ctx.splits.get(split), ctx.splits.get("validation")
    if not config.merge.controls:
        return
    if examples is None or len(examples) < 2:  # paired differences need a standard error
        ctx.log("  controls are not measured: they need two test or validation examples")
        return
    # not before it is needed: the evaluation needs the memory for other models
    population = functools.cache(lambda: models.load_population(ctx))
    selections = _selections(config)
    listed = controls.make_controls(
        config.merge.controls, config.population.members, selections, config.seed
    )
    of_subsets = []
    if config.population.members > 1:  # of the first selection, or of a plain one
        drawn = next(iter(selections.values()), Candidate("selection", seed=config.seed))
        of_subsets = subsets.make_controls(config.population.members, drawn, config.seed)
    if subsets.GROUP in config.merge.controls:
        listed += of_subsets

    def measure(loss_function: LossFunction, validate: bool = True) -> controls.ControlLosses:
        means = loss_function(examples).means
        return controls.ControlLosses(
            means, loss_function(validation).mean if validate and validation is not None else None
        )

    def measure_params(params: Tree, validate: bool) -> controls.ControlLosses:
        return measure(functools.partial(losses.example_losses, ctx, params), validate)

    tokens = examples.loss_counts
    before = _measured_before(ctx.layout, split, listed)
    reused = before | (_evaluated_controls(config, evaluated, listed) if use_test else {})
    measured: dict[str, controls.ControlLosses] = {}
    # Nothing is chosen among subsets, and they are as many as all other controls: no validation.
    candidates = [control for control in listed if control.group != subsets.GROUP]
    for part, validate in ((candidates, True), (listed[len(candidates) :], False)):
        if all(control.name in reused for control in part):
            measured |= {control.name: reused[control.name] for control in part}
        else:
            of_params = functools.partial(measure_params, validate=validate)
            measured |= controls.measure(population(), part, reused, of_params, ctx.log)
    # last, since a single run is trained for as long as the whole population
    for name, make in _unmerged(ctx).items():
        if name in before:
            measured[name] = before[name]
            continue
        population.cache_clear()  # the training of a single run needs the memory
        measured[name] = measure(make(population))
        mean = float((measured[name].losses * tokens).sum() / tokens.sum())
        ctx.log(f"  {name}: {mean:.4f}")
    means = {name: control.losses for name, control in measured.items()}
    bootstrap = {"resamples": config.evaluation.bootstrap, "seed": config.seed}
    compared = controls.compare(listed, measured, tokens, choose=use_test, **bootstrap)
    curves = subsets.curves(listed, means, tokens, **bootstrap)
    scores = {}
    if subsets.SCORES in config.merge.controls:
        asked = [control for control in listed if control.group == "anchor"] + of_subsets
        answers = subset_scores.measure(ctx, population, asked, evaluated)
        scores = subset_scores.curves(config, asked, answers)
    arrays = {
        "names": np.array(list(measured)),
        "ids": examples.ids,
        "losses": np.stack([control.losses for control in measured.values()]),
        "tokens": tokens,
    }
    # json last: its existence says that the controls are complete
    write_npz(ctx.layout.control_losses, arrays)
    by_size = {subsets.GROUP: asdict(curves), subsets.SCORES: asdict(scores)}
    write_json(ctx.layout.controls, {"split": split, **compared, **by_size})


def _measured_before(
    layout: RunLayout, split: str, listed: Sequence[controls.Control]
) -> dict[str, controls.ControlLosses]:
    """Return the losses on a split that an earlier evaluation has measured, by name.

    A control of another candidate than before is left out: merges of subsets are named by their
    members, and have the seed and the parameters of the first selection of the config.
    """
    before = read_json(layout.controls)
    if before is None or before["split"] != split or not layout.control_losses.is_file():
        return {}
    arrays = read_npz(layout.control_losses)
    by_name = dict(zip(arrays["names"].tolist(), arrays["losses"], strict=True))
    # as JSON, which has no tuples; what is no merge has no candidate
    candidates = {control.name: json.loads(control.candidate.key) for control in listed}
    return {
        row["name"]: controls.ControlLosses(by_name[row["name"]], row["validation_loss"])
        for row in before["rows"]
        if row["candidate"] == candidates.get(row["name"])
    }


def _selections(config: Config) -> dict[str, Candidate]:
    """Return the selections of the config by the name of the merge."""
    return {
        merge_name(spec): Candidate(
            spec.method,
            dict(spec.parameters),
            spec.weights,
            config.seed if spec.seed is None else spec.seed,
        )
        for spec in config.merge.methods
        if spec.method == "selection" and spec.checkpoints is None
    }


def _evaluated_controls(
    config: Config, evaluated: Mapping[str, Json], listed: Sequence[controls.Control]
) -> dict[str, controls.ControlLosses]:
    """Return the losses of the controls that the evaluation has measured.

    These are the base, the members, the selections at lambda 1, and the average where it is among
    the merges of the config: with equal weights, under whatever name it was exported. Its files
    have the bits of the control.
    """
    average = subset_scores.plain_average(config)
    measured = {}
    for control in listed:
        if control.group == "anchor" and control.candidate.kind != "merge":
            name = control.name  # base and members have the same names everywhere
        elif (
            control.group == "lambda_selections"
            and control.line
            and not control.candidate.is_scaled
        ):
            name = control.line
        elif control.name == "average" and average:
            name = average
        else:
            continue
        result = evaluated[name]
        measured[control.name] = controls.ControlLosses(
            np.asarray(result["losses"], np.float64), result["summary"]["validation_loss"]
        )
    return measured


def _unmerged(ctx: RunContext) -> dict[str, Callable[[Callable[[], Population]], LossFunction]]:
    """Return the controls of the config that are not merges, by name."""

    def ensemble(load: Callable[[], Population]) -> LossFunction:
        return functools.partial(losses.example_losses, ctx, load().members, members="ensemble")

    def single(load: Callable[[], Population]) -> LossFunction:
        return functools.partial(losses.example_losses, ctx, train_single(ctx))

    makers = {"ensemble": ensemble, "single": single}
    names = unmerged_controls(ctx.config.population.members)
    return {names[x]: makers[x] for x in ctx.config.merge.controls if x in makers}


def train_single(ctx: RunContext) -> Tree:
    """Return a model trained at the cost of the whole population: k times the epochs in one run."""
    # It tells whether k orders and a merge are better spent compute than training on.
    groups = ctx.mesh.shape["order"]
    # one such run for each population, in the orders of its first member, trained together
    member = ctx.population * groups
    config = _single_config(ctx.config, groups)
    ctx = dataclasses.replace(ctx, config=config, on_checkpoint=None, population=0)
    if not ctx.layout.training_state.is_file():
        ctx.log(f"  training of one run of {config.training.epochs} epochs")
        waves.train(ctx, functools.partial(models.training_base, ctx))
    layout = waves.member_layout(ctx.layout, member)
    return members.restore_member(
        ctx.training, ctx.model, ctx.mesh, layout, member, dtype=ctx.export_dtype
    )


def _single_config(config: Config, groups: int) -> Config:
    population = config.population
    # A mesh trains at least one member per device group, and the first of them is the control.
    # Mixing is off: it would make the others take part in it.
    # Populations have one such run each. No more of them together than members of a wave.
    wave = population.wave
    if wave is not None and wave >= groups * population.replicates:
        wave = None
    members = population.model_copy(update={"members": groups, "wave": wave})
    training = config.training.model_copy(
        update={"epochs": population.members * config.training.epochs, "mixing": None}
    )
    output = str(RunLayout(config.directory).single.root)
    return config.model_copy(update={"output": output, "population": members, "training": training})
