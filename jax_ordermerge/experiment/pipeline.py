"""The pipeline of stages. Each reads the run directory and the config, and is skipped when its output is complete."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import Stopped, UserError
from jax_ordermerge.experiment.layout import check_same_config, model_names, read_json, write_text

STAGES = ("train", "merge", "analyze", "evaluate", "report")

Log = Callable[[str], None]


def complete(stage: str, config: Config) -> bool:
    """Say whether a stage's output is whole. Looks at files only, so that a second call costs nothing."""
    directory, names = config.directory, model_names(config)
    if stage == "train":
        return (directory / "metrics" / "state.json").is_file()
    if stage == "merge":
        merged = [name for name, kind in names.items() if kind == "merge"]
        return (directory / "merge.json").is_file() and all(
            (directory / "merged" / name / "config.json").is_file() for name in merged
        )
    if stage == "analyze":
        return (directory / "analysis.json").is_file()
    if stage == "evaluate":
        found = read_json(directory / "evaluations.json") or {"models": []}
        return [model["name"] for model in found["models"]] == list(names)
    return (directory / "report.html").is_file() and (directory / "report.md").is_file()


def run(config: Config, *, through: str = "report", log: Log = print) -> Path:
    """Run the stages up to `through`, skipping what is complete, and return the run directory, or its copy if it is in a bucket.

    Args:
        config: a resolved config (`load_config`).
        through: the last stage, one of `STAGES`.
        say: where one-line messages go.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    with on_disk(config, log) as (local, save):
        check_same_config(local)
        missing = [
            stage for stage in STAGES[: STAGES.index(through) + 1] if not complete(stage, local)
        ]
        home = remote.address(config.location) or str(config.directory)
        last = f"{home}/report.html" if through == "report" else home
        if not missing:
            log(f"everything is done: {last}")
            return local.directory
        from jax_ordermerge import processes
        from jax_ordermerge.experiment import stages

        workshop = dataclasses.replace(stages.prepare(local, log), saved=save.in_passing)
        write_text(
            local.directory / "config.yaml", yaml.safe_dump(schema.to_dict(config), sort_keys=False)
        )
        workshop = stages.add_reference_logprobs(workshop)
        for number, stage in enumerate(STAGES[: STAGES.index(through) + 1], start=1):
            if stage in missing:
                log(f"[{number}/{len(STAGES)}] {stage}")
                if stage != "train":
                    processes.let_sigterm_end()
                getattr(stages, stage)(workshop)
                save()
        log(f"done: {last}")
        return local.directory


def report(config: Config) -> str:
    """Write report.html and report.md of a run, with whatever stages are complete, and return where."""
    from jax_ordermerge.report import run_report

    with on_disk(config, lambda message: None) as (local, save):
        page = run_report.write(local.directory)
        save()
        return f"{remote.address(config.location) or config.directory}/{page.name}"


class Saving:
    """Copies a run directory to its bucket; does nothing where it is in none."""

    def __init__(self, mirror: remote.Mirror | None, log: Log, *, several: bool = False) -> None:
        self._mirror, self._say, self._several = mirror, log, several

    def __call__(self) -> None:
        """Copy what is whole. All processes call it."""
        if self._several:
            from jax_ordermerge import processes

            with processes.barrier("copy the run directory to its bucket"):
                self._copy()
        else:
            self._copy()

    def in_passing(self) -> None:
        """The same while a stage goes on, by one process alone: what fails is said and left to the next time."""
        try:
            self._copy()
        except UserError as error:
            self._say(f"{error}; the run goes on, and this is tried again when more of it is whole")

    def _copy(self) -> None:
        if self._mirror is not None:
            self._mirror.save()


@contextlib.contextmanager
def on_disk(config: Config, log: Log) -> Iterator[tuple[Config, Saving]]:
    """Yield the config with a run directory on a disk that all processes see, and what copies it to its bucket.

    Raises:
        UserError: the bucket cannot be read or written, or the processes do not see the same copy.
    """
    url, several = remote.address(config.location), config.distributed.coordinator is not None
    if url is None:
        yield config, Saving(None, log)
        return
    mirror = remote.Mirror(url)
    if several:
        first = _open_together(config, mirror)
    else:
        first = True
        if mirror.open():
            log(f"{url} is copied to {mirror.local}")
    save = Saving(mirror if first else None, log, several=several)
    try:
        yield config.model_copy(update={"output": str(mirror.local)}), save
    except Stopped:
        save()
        raise


def _open_together(config: Config, mirror: remote.Mirror) -> bool:
    """Open a copy by process 0, check that the others see it, and say whether this is process 0."""
    import jax

    from jax_ordermerge import processes
    from jax_ordermerge.experiment import stages

    stages.start(config)
    with processes.barrier(f"read {mirror.url}"):
        if jax.process_index() == 0:
            mirror.open()
    try:
        processes.check_alike({"the copy of the run": mirror.record})
    except UserError as error:
        raise UserError(
            f"{mirror.url}: its copy {mirror.local} is not seen by all processes ({str(error).split(';')[0]}); set ORDERMERGE_CACHE to"
            " a directory on a file system that they share"
        ) from error
    return jax.process_index() == 0


def search(
    config: Config,
    space: Search,
    *,
    out: Path | None = None,
    validation: Path | None = None,
    export: bool = True,
    log: Log = print,
) -> Path:
    """Choose a merge of a run's members on validation examples, training them first where they are not there yet.

    Args:
        config: a resolved config.
        space: what to choose among, and how.
        out: directory for journal.jsonl, results.json, search.html and search.md; by default `search` in the run directory. The same
            call again continues, or says what was found.
        validation: file of examples to choose on, by default those that `data.validation_examples` sets aside.
        export: write the winner, as a Hugging Face directory `winner` in `out`.
        say: where one-line messages go.

    Returns:
        the path of search.html.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    from jax_ordermerge.experiment import search as search_stage
    from jax_ordermerge.experiment import stages
    from jax_ordermerge.report import run_report

    if out is not None and remote.address(out) is not None:
        raise UserError(
            f"--out {out}: a search writes a journal line by line; give a directory on a disk"
        )
    with on_disk(config, log) as (local, save):
        check_same_config(local)
        workshop = dataclasses.replace(stages.prepare(local, log), saved=save.in_passing)
        if validation is not None:
            workshop = stages.with_validation(workshop, validation)
        search_stage.check(local, workshop.splits, space, workshop.model)
        trained = complete("train", local)
        if not trained:
            write_text(
                local.directory / "config.yaml",
                yaml.safe_dump(schema.to_dict(config), sort_keys=False),
            )
        workshop = stages.add_reference_logprobs(workshop)
        if not trained:
            log("train")
            stages.train(workshop)
            save()
        directory = out or local.directory / "search"
        stages.search_merge(
            workshop, space, directory, target=directory / "winner" if export else None
        )
        page = run_report.write_search(local.directory, directory)
        save()
        return page


def look(config: Config, *, steps: int, profile: Path | None = None, log: Log = print) -> None:
    """Take the first steps of a training and say how fast they are. The run directory is neither read nor written.

    Args:
        config: a resolved config.
        steps: how many.
        profile: directory for a trace of the last of them.
        say: where one-line messages go.
    """
    from jax_ordermerge.experiment import stages

    workshop = stages.prepare(
        config, log
    )  # where processes compare what they were given: each has a scratch directory of its own
    with tempfile.TemporaryDirectory(prefix="ordermerge-") as scratch:
        workshop = dataclasses.replace(
            workshop, config=config.model_copy(update={"output": scratch})
        )
        stages.look(stages.add_reference_logprobs(workshop), steps, profile)
