"""The main path: stages that read the run directory and the config, each skipped when complete."""

import dataclasses
import tempfile
from pathlib import Path

from jax_ordermerge import processes
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment import search as searching
from jax_ordermerge.experiment.context import Log, Stage, load_context, open_run
from jax_ordermerge.experiment.dpo_reference import add_reference_logprobs
from jax_ordermerge.experiment.remote_run import local_run
from jax_ordermerge.experiment.run_config import check_same_config, write_config
from jax_ordermerge.experiment.stages import analyze, evaluate, merge, report, train
from jax_ordermerge.layout import RunLayout, SearchLayout
from jax_ordermerge.report import run_report

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
    """
    stages = STAGES[: STAGES.index(find_stage(through)) + 1]
    with local_run(config, log) as (local, copy):
        check_same_config(local)
        layout = RunLayout(local.directory)
        location = _location(config)
        if through == "report":
            location = f"{location}/{layout.report_html.name}"
        # decided before anything is loaded, so that a complete run costs a look at some files
        missing = [stage for stage in stages if not stage.is_complete(local)]
        if not missing:
            log(f"everything is done: {location}")
            return layout.root
        # Order matters: open_run may refuse, and must leave no trace then. The config is the first
        # file, because it makes the directory a run and guards it against another config. It names
        # the bucket, not the local copy, so that the run continues on another machine.
        ctx = open_run(local, log, copy.try_save)
        write_config(config, layout)
        ctx = add_reference_logprobs(ctx)
        for number, stage in enumerate(stages, start=1):
            if stage in missing:
                log(f"[{number}/{len(STAGES)}] {stage.name}")
                if stage is not train.STAGE:
                    # only training stops at a step; elsewhere SIGTERM must not be swallowed
                    processes.let_sigterm_end()
                stage.run(ctx)
                copy.save()  # per stage: a lost machine then costs one stage at most
        log(f"done: {location}")
        return layout.root


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
        check_same_config(local)
        ctx = open_run(local, log, copy.try_save)
        if validation is not None:
            ctx = searching.with_validation_file(ctx, validation)
        # before a training of hours; open_run has checked only the search of the config
        preflight.check_search(local, ctx.model, ctx.splits, space)
        trained = train.STAGE.is_complete(local)
        if not trained:
            # a trained run has its config already; a search adds to it and leaves it unchanged
            write_config(config, ctx.layout)
        ctx = add_reference_logprobs(ctx)
        if not trained:
            log(train.STAGE.name)
            train.STAGE.run(ctx)
            copy.save()
        layout = SearchLayout(out) if out else ctx.layout.search
        searching.choose_merge(ctx, space, layout, target=layout.winner if export else None)
        page = run_report.write_search(ctx.layout.root, layout.root)
        copy.save()
        return page


def benchmark(config: Config, *, steps: int, profile: Path | None = None, log: Log = print) -> None:
    """Take the first steps of a training and log how fast they are.

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
        ctx = dataclasses.replace(ctx, config=config.model_copy(update={"output": scratch}))
        train.benchmark(add_reference_logprobs(ctx), steps, profile)


def write_report(config: Config) -> str:
    """Write the report of a run from the stages that are complete, and return its location."""
    with local_run(config, lambda message: None) as (local, copy):
        page = run_report.write(local.directory)
        copy.save()
        return f"{_location(config)}/{page.name}"


def _location(config: Config) -> str:
    return remote.address(config.location) or str(config.directory)
