"""The main path: stages that read the run directory and the config, each skipped when complete."""

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_ordermerge import config as schema
from jax_ordermerge import processes
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import Merge, Search, checkpoint_averages
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight, run_lock, waves
from jax_ordermerge.experiment import search as searching
from jax_ordermerge.experiment.context import (
    Log,
    RunContext,
    Stage,
    load_context,
    open_run,
    start_devices,
)
from jax_ordermerge.experiment.dpo_reference import add_reference_logprobs
from jax_ordermerge.experiment.remote_run import BucketCopy, local_run
from jax_ordermerge.experiment.run_config import write_config
from jax_ordermerge.experiment.stages import analyze, evaluate, merge, report, train
from jax_ordermerge.layout import RunLayout, SearchLayout
from jax_ordermerge.record import Record, difference, stored_config
from jax_ordermerge.report import run_report
from jax_ordermerge.train.benchmark import StepTiming

STAGES = (train.STAGE, merge.STAGE, analyze.STAGE, evaluate.STAGE, report.STAGE)


def find_stage(name: str) -> Stage:
    """Return a stage by name.

    Example:
        >>> find_stage("merge").name
        'merge'
    """
    return next(stage for stage in STAGES if stage.name == name)


def run(config: Config, *, through: str = "report", log: Log = print) -> Path:
    """Run the stages up to `through` and skip what is complete.

    Args:
        config: a resolved config (`load_config`).
        through: name of the last stage.
        log: receives one-line messages.

    Returns:
        the run directory, or its local copy where it is in a bucket.

    Raises:
        UserError: bad input; nothing has been written then.

    Example:
        >>> from jax_ordermerge.config import load_config
        >>> config = load_config("configs/quickstart.yaml", ["output=runs/two"])  # doctest: +SKIP
        >>> run(config, through="train")  # doctest: +SKIP
        PosixPath('runs/two')
    """
    stages = STAGES[: STAGES.index(find_stage(through)) + 1]
    with local_run(config, log) as (local, copy):
        layout = RunLayout(local.directory)
        location = _location(config)
        if through == "report":
            location = f"{location}/{layout.report_html.name}"
        # decided before anything is loaded, so that a complete run reads a few files and no more
        todo = _plan(local, stages)
        if todo.unlisted:
            log(f"the run keeps what this config does not list: {', '.join(todo.unlisted)}")
        if not todo.stages and not todo.config_changes:
            log(f"everything is done: {location}")
            return layout.root
        _check_unlocked(local, log)
        # Order matters: open_run may refuse, and must leave no trace then.
        ctx = _open_run(todo.config, log, copy.try_save) if todo.stages else None
        start_devices(local)  # the lock needs the processes to be connected
        with run_lock.hold(layout, log):
            # again: another run may have had the lock until now
            todo = _plan(local, stages)
            # that run may also have been broken off, and left stages to do where there were none
            if ctx is None and todo.stages:
                ctx = _open_run(todo.config, log, copy.try_save)
            # The config is the first file, because it makes the directory a run. It names the
            # bucket, not the local copy, so that the run continues on another machine.
            resolved = todo.config
            if ctx is not None:
                resolved = resolved.with_export_dtype(ctx.export_dtype)
                ctx = dataclasses.replace(ctx, config=resolved)
            write_config(resolved, layout, output=config.output)
            if ctx is not None:
                _run_stages(ctx, stages, todo.stages, copy)
            copy.save()
        log(f"done: {location}")
        return layout.root


class _Todo(NamedTuple):
    """What is left to do in a run directory.

    Attributes:
        config: that was given, and what the run has already.
        stages: names of the stages that are not complete with it.
        config_changes: how it differs from the config of the run.
        unlisted: merges, tasks and controls that the run has and the given config does not list.
    """

    config: Config
    stages: list[str]
    config_changes: list[str]
    unlisted: list[str]


def _plan(config: Config, stages: Sequence[Stage]) -> _Todo:
    """Compare a config with what is in its run directory.

    Raises:
        UserError: they contradict each other.
    """
    layout = RunLayout(config.directory)
    # The record says what results rest on; config.yaml also has settings for stages to come.
    record, stored = Record(layout), stored_config(layout)
    config = _with_stored_dtype(config, stored)
    extended, unlisted = record.extended(config)
    missing = [
        stage.name
        for stage in stages
        if not (record.is_current(stage.name, extended) and stage.is_complete(extended))
    ]
    changes = [] if stored is None else difference(*map(schema.fixed_settings, (stored, extended)))
    return _Todo(extended, missing, changes, unlisted)


def _with_stored_dtype(config: Config, stored: Config | None) -> Config:
    # Where the user names none, a run goes on in the dtype that it began with: the base, which
    # decided it, is not read to compare configs.
    return config if stored is None else config.with_export_dtype(stored.merge.dtype)


def _open_run(config: Config, log: Log, on_checkpoint: Callable[[], None]) -> RunContext:
    ctx = open_run(config, log, on_checkpoint)
    waves.check_checkpoints(ctx, checkpoint_averages(config.merge))
    return ctx


def _check_unlocked(config: Config, log: Log) -> None:
    """Refuse a run that another process writes, before model and data are loaded."""
    # of several processes one has the lock, and none may be refused while the others go on
    if config.distributed.coordinator is None:
        run_lock.check_free(RunLayout(config.directory), log)


def _run_stages(
    ctx: RunContext, stages: Sequence[Stage], missing: Sequence[str], copy: BucketCopy
) -> None:
    record = Record(ctx.layout)
    ctx = add_reference_logprobs(ctx)
    for number, stage in enumerate(stages, start=1):
        # Numbered by their place among all stages, also where earlier ones are skipped.
        if stage.name in missing:
            ctx.log(f"[{number}/{len(STAGES)}] {stage.name}")
            if stage is not train.STAGE:
                # only training stops at a step; elsewhere SIGTERM must not be swallowed
                processes.let_sigterm_end()
            _run_stage(ctx, stage, record)
            copy.save()  # per stage: a lost machine then costs one stage at most


def _run_stage(ctx: RunContext, stage: Stage, record: Record) -> None:
    # Begun before it writes and ended when it is complete: of a stage that is broken off, the
    # record has the settings of what lies there.
    record.begin(stage.name, ctx.config, base=ctx.base_digest)
    replicates = ctx.config.population.replicates if stage.by_population else 1
    for number in range(replicates):
        if replicates > 1:
            ctx.log(f"  population {number} of 0 to {replicates - 1}")
        stage.run(dataclasses.replace(ctx, population=number))
    record.end(stage.name)


def search(
    config: Config,
    space: Search,
    *,
    out: Path | None = None,
    validation: Path | None = None,
    export: bool = True,
    log: Log = print,
) -> Path:
    """Choose a merge of a run's members on validation examples; train the members if necessary.

    Args:
        config: a resolved config.
        space: what to choose among, and how.
        out: directory of the results; by default `search` in the run directory. The same call
            again continues, or reports what was found.
        validation: file of examples to choose on, by default those that
            `data.validation_examples` sets aside.
        export: write the winner as a Hugging Face directory `winner` in `out`.
        log: receives one-line messages.

    Returns:
        the path of search.html.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    if out is not None and remote.address(out) is not None:
        raise UserError(
            f"--out {out}: a search appends to a file line by line; give a directory on a disk"
        )
    with local_run(config, log) as (local, copy):
        todo = _plan(local, [train.STAGE])
        _check_unlocked(local, log)
        ctx = _open_run(todo.config, log, copy.try_save)
        if validation is not None:
            ctx = searching.with_validation_file(ctx, validation)
        # before a training of hours; open_run has checked only the search of the config
        preflight.check_search(
            ctx.config, ctx.model, ctx.tokenizer, ctx.splits, ctx.overlaps, space
        )
        waves.check_checkpoints(ctx, checkpoint_averages(Merge(methods=(), auto=space)))
        if (replicates := ctx.config.population.replicates) > 1:
            log(f"the members are those of population 0 of 0 to {replicates - 1}")
        with run_lock.hold(ctx.layout, log):
            todo = _plan(local, [train.STAGE])
            if todo.stages:
                # a trained run has its config already; a search adds to it and leaves it unchanged
                resolved = todo.config.with_export_dtype(ctx.export_dtype)
                write_config(resolved, ctx.layout, output=config.output)
            ctx = add_reference_logprobs(ctx)
            if todo.stages:
                log(train.STAGE.name)
                _run_stage(ctx, train.STAGE, Record(ctx.layout))
                copy.save()
            layout = SearchLayout(out) if out else ctx.layout.search
            searching.choose_merge(ctx, space, layout, target=layout.winner if export else None)
            page = run_report.write_search(ctx.layout.root, layout.root)
        copy.save()
        return page


def benchmark(
    config: Config, *, steps: int, profile: Path | None = None, log: Log = print
) -> StepTiming:
    """Take the first steps of a training and return how fast they are.

    The run directory is neither read nor written.

    Args:
        config: a resolved config.
        steps: how many.
        profile: directory for a trace of the last of them.
        log: receives one-line messages.
    """
    # opened before the scratch directory enters the config: processes compare their configs, and
    # each has a scratch directory of its own
    ctx = load_context(config, log)
    with tempfile.TemporaryDirectory(prefix="ordermerge-") as scratch:
        ctx = dataclasses.replace(ctx, config=ctx.config.model_copy(update={"output": scratch}))
        return train.benchmark(add_reference_logprobs(ctx), steps, profile)


def write_report(config: Config) -> str:
    """Write the report of a run from the stages that are complete, and return its location.

    Raises:
        UserError: the config is not that of the run, which a report cannot change.
    """
    with local_run(config, lambda message: None) as (local, copy):
        stored = stored_config(RunLayout(local.directory))
        local = _with_stored_dtype(local, stored)
        changes = [] if stored is None else difference(*map(schema.fixed_settings, (stored, local)))
        if changes:
            raise UserError(
                f"a report shows what {_location(config)} has; it was asked for something else"
                f" ({'; '.join(changes)}): ordermerge run computes that first"
            )
        page = run_report.write(local.directory)
        copy.save()
        return f"{_location(config)}/{page.name}"


def _location(config: Config) -> str:
    return remote.address(config.location) or str(config.directory)
