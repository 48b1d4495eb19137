"""The README against the code: files exist, commands parse, and the first one works."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
ORDERMERGE = [sys.executable, "-m", "jax_ordermerge"]


def test_files_that_it_names_exist():
    linked = {name for name in re.findall(r"\]\(([^)#]+)\)", TEXT) if not name.startswith("http")}
    named = set(re.findall(r"(configs/\w+\.yaml)", TEXT))
    assert linked >= {"docs/architecture.md", "CHANGELOG.md"}
    assert not [name for name in linked | named if not (ROOT / name).exists()]


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120


def test_every_command_of_the_table_has_help():
    commands = sorted(set(re.findall(r"`ordermerge (\w+)", TEXT)))
    assert len(commands) >= 8
    for command in commands:
        done = subprocess.run(
            [*ORDERMERGE, command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Usage:" in done.stdout


def test_ci_runs_the_test_command_that_it_prints():
    printed = re.search(r"^    (pip install .*\[test\].*)$", TEXT, re.MULTILINE).group(1)
    assert printed == 'pip install -e ".[test]" && pytest'
    ci = (ROOT / ".ci" / "run").read_text()
    assert 'pip install --quiet -e ".[test]"' in ci
    assert "\nexport PYTEST_ADDOPTS=--slow\npytest\n" in ci


@pytest.mark.slow
def test_quickstart_killed_and_called_again(tmp_path):
    """The first command of the README, with and without a SIGKILL: the same bits.

    What a SIGKILL would leave is copied while the process stands still, instead of trained again.
    """
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }

    def command(name, *arguments):
        return [
            *ORDERMERGE,
            *arguments,
            "configs/quickstart.yaml",
            "--set",
            f"output={tmp_path / name}",
        ]

    with subprocess.Popen(command("whole", "run"), cwd=ROOT, env=environment) as process:
        log = tmp_path / "whole" / "metrics" / "train.jsonl"
        deadline = time.monotonic() + 600
        while not log.exists() or len(log.read_text().splitlines()) < 11:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        shutil.copytree(tmp_path / "whole", tmp_path / "killed")
        process.send_signal(signal.SIGCONT)
    assert process.returncode == 0
    models = {
        model["name"]: model
        for model in json.loads((tmp_path / "whole" / "evaluations.json").read_text())["models"]
    }
    accuracy = {name: model["tasks"]["problems"]["accuracy"] for name, model in models.items()}
    assert accuracy["base"] < 0.05
    assert all(0.2 < accuracy[f"member_{m}"] < 0.95 for m in range(4))
    assert (tmp_path / "whole" / "report.html").stat().st_size < 400_000

    assert not (tmp_path / "killed" / "metrics" / "state.json").exists()
    again = subprocess.run(
        command("killed", "merge"),
        check=True,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "continuing from step" in again.stdout + again.stderr
    for name in ("average", "selection", "dare_linear"):
        file = pathlib.Path("merged") / name / "model.safetensors"
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
