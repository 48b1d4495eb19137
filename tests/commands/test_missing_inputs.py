"""A config that names no base, or no training examples, does not train the toy of the package."""

import pytest
import yaml

from tests.commands.test_cli import call

COMMANDS = {
    "run": [],
    "train": [],
    "benchmark": ["--steps", "2"],
    "data": [],
    "plan": ["--analytic"],
    "merge": [],
    "analyze": [],
    "evaluate": [],
    "search": [],
    "launch": ["--target", "slurm", "nodes=1", "gpus=1"],
}


@pytest.mark.parametrize("key", ["model.base", "data.train"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_input_is_one_line(folder, tmp_path, capsys, command, key):
    raw = yaml.safe_load((folder / "tiny.yaml").read_text())
    section, name = key.split(".")
    del raw[section][name]
    raw["output"] = str(tmp_path / "run")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    first = "train" if command == "benchmark" else command
    assert call(first, tmp_path / "config.yaml", *COMMANDS[command]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {key} is missing; give a ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_plan_takes_them_from_its_options(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("training: {batch: 32}\n")
    options = ["--architecture", "llama-2-7b", "--examples", "640", "--topology", "v5p:2x2x2"]
    assert call("plan", tmp_path / "config.yaml", "--analytic", "--no-search", *options) == 0
    assert "llama-2-7b" in capsys.readouterr().out
