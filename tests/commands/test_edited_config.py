"""The config of a run that was edited by hand is refused by every command that reads the run."""

import shutil

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.record import READS
from tests.commands.test_cli import call

COMMANDS = {
    "run": ["run", "RUN"],
    "plan": ["plan", "RUN", "--analytic"],
    "train": ["train", "RUN"],
    "benchmark": ["train", "RUN", "--steps", "2"],
    "analyze": ["analyze", "RUN"],
    "merge": ["merge", "RUN"],
    "merge of members": ["merge", "RUN/member_0", "RUN/member_1", "--out", "OUT"],
    "merge of merges": ["merge", "RUN/merged/average", "embedded:quickstart", "--out", "OUT"],
    "evaluate": ["evaluate", "RUN"],
    "evaluate of a merge": ["evaluate", "RUN/merged/average", "--config", "CONFIG"],
    "report": ["report", "RUN"],
    "compare": ["compare", "RUN", "RUN", "--out", "OUT"],
    "results": ["results", "RUN"],
    "search": ["search", "RUN"],
    "convert": ["convert", "RUN", "OUT", "--member", "0"],
    "convert of a merge": ["convert", "RUN/merged/average", "OUT"],
    "inspect": ["inspect", "RUN/merged/average"],
    "diff": ["diff", "RUN/merged/average", "embedded:quickstart"],
    "generate": ["generate", "RUN/merged/average", "--prompt", "a plus b is ?"],
    "doctor": ["doctor", "RUN"],
    "launch": ["launch", "RUN", "--target", "slurm"],
}


@pytest.fixture(scope="module")
def edited(folder, tmp_path_factory):
    """A run whose learning rate was changed in its config.yaml."""
    run = tmp_path_factory.mktemp("edited") / "run"
    config = load_config(
        folder / "tiny.yaml", [f"output={run}", "merge.methods=[{method: average}]"]
    )
    pipeline.run(config, through="merge", log=lambda line: None)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("learning_rate: 0.003", "learning_rate: 0.001"))
    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_an_edited_config_is_refused(edited, folder, tmp_path, capsys, command):
    places = {"RUN": edited, "OUT": tmp_path / "out", "CONFIG": folder / "tiny.yaml"}
    arguments = []
    for argument in COMMANDS[command]:
        name, slash, rest = argument.partition("/")
        arguments.append(f"{places.get(name, name)}{slash}{rest}")
    files = {path: path.stat().st_mtime_ns for path in edited.rglob("*")}
    assert call(*arguments) == 2
    assert capsys.readouterr().err == (
        f"error: {edited}/config.yaml was changed after the run had read it"
        " (training.learning_rate: 0.003 -> 0.001); restore it\n"
    )
    assert not (tmp_path / "out").exists()
    assert {path: path.stat().st_mtime_ns for path in edited.rglob("*")} == files


def test_every_stage_says_what_it_reads():
    assert list(READS) == [stage.name for stage in pipeline.STAGES]


def test_a_damaged_record_is_one_line(edited, tmp_path, capsys):
    shutil.copytree(edited, tmp_path / "run")
    (tmp_path / "run" / "stages.json").write_text('{"train": {')
    assert call("report", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/run/stages.json is not valid JSON (")
    assert error.count("\n") == 1
