"""The pipeline of stages. Each reads the run directory and the config, and is skipped when its output is complete."""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml

from jax_ordermerge import config as schema
from jax_ordermerge.config import Config
from jax_ordermerge.experiment.run_directory import check_same_config, model_names, read_json, write_text
from jax_ordermerge.merge_config import Search

STAGES = ("train", "merge", "analyze", "evaluate", "report")

Say = Callable[[str], None]


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


def run(config: Config, *, through: str = "report", say: Say = print) -> Path:
    """Run the stages up to `through`, skipping what is complete, and return the run directory.

    Args:
        config: a resolved config (`load_config`).
        through: the last stage, one of `STAGES`.
        say: where one-line messages go.

    Raises:
        UserError: bad input; nothing has been written then.
    """
    check_same_config(config)
    missing = [stage for stage in STAGES[: STAGES.index(through) + 1] if not complete(stage, config)]
    last = config.directory / "report.html" if through == "report" else config.directory
    if not missing:
        say(f"everything is done: {last}")
        return config.directory
    from jax_ordermerge import processes
    from jax_ordermerge.experiment import stages

    workshop = stages.prepare(config, say)
    write_text(config.directory / "config.yaml", yaml.safe_dump(schema.to_dict(config), sort_keys=False))
    workshop = stages.refer(workshop)
    for number, stage in enumerate(STAGES[: STAGES.index(through) + 1], start=1):
        if stage in missing:
            say(f"[{number}/{len(STAGES)}] {stage}")
            if stage != "train":
                processes.let_sigterm_end()
            getattr(stages, stage)(workshop)
    say(f"done: {last}")
    return config.directory


def search(
    config: Config,
    space: Search,
    *,
    out: Path | None = None,
    validation: Path | None = None,
    export: bool = True,
    say: Say = print,
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
    from jax_ordermerge import report
    from jax_ordermerge.experiment import choosing, stages

    check_same_config(config)
    workshop = stages.prepare(config, say)
    if validation is not None:
        workshop = stages.with_validation(workshop, validation)
    choosing.check(config, workshop.splits, space, workshop.model)
    trained = complete("train", config)
    if not trained:
        write_text(config.directory / "config.yaml", yaml.safe_dump(schema.to_dict(config), sort_keys=False))
    workshop = stages.refer(workshop)
    if not trained:
        say("train")
        stages.train(workshop)
    directory = out or config.directory / "search"
    stages.search(workshop, space, directory, target=directory / "winner" if export else None)
    return report.write_search(config.directory, directory)


def look(config: Config, *, steps: int, profile: Path | None = None, say: Say = print) -> None:
    """Take the first steps of a training and say how fast they are. The run directory is neither read nor written.

    Args:
        config: a resolved config.
        steps: how many.
        profile: directory for a trace of the last of them.
        say: where one-line messages go.
    """
    from jax_ordermerge.experiment import stages

    workshop = stages.prepare(config, say)  # where processes compare what they were given: each has a scratch directory of its own
    with tempfile.TemporaryDirectory(prefix="ordermerge-") as scratch:
        workshop = dataclasses.replace(workshop, config=config.model_copy(update={"output": scratch}))
        stages.look(stages.refer(workshop), steps, profile)
