"""The commands as a new user reads them, and the options that all of them have."""

import ast
import json
import pathlib
import re

import click
import pytest
import typer

import jax_ordermerge
from jax_ordermerge import console
from jax_ordermerge.cli import app
from tests.commands.test_cli import call

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = typer.main.get_command(app).commands


def test_no_command_of_the_list_is_cut_off(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert call("--help") == 0
    listed = capsys.readouterr().out.split("Commands:")[1].split("\n\n")[0].strip()
    assert len(listed.splitlines()) >= 20
    assert not [line for line in listed.splitlines() if line.endswith("...")]


# Commands whose result is files, which JSON on the screen would only repeat.
WRITE_FILES = {
    "init": "a config",
    "analyze": "analysis.json",
    "report": "report.html, report.md",
    "compare": "pages",
    "results": "a page",
    "convert": "a model",
}


def options_of(name: str) -> dict[str, click.Parameter]:
    return {flag: option for option in COMMANDS[name].params for flag in option.opts}


@pytest.mark.parametrize("name", COMMANDS)
def test_options_that_every_command_has(name):
    options = options_of(name)
    quiet = options["--quiet"]
    assert quiet is options["-q"]
    assert quiet.help == options_of("run")["--quiet"].help
    assert ("--json" in options) != (name in WRITE_FILES), (
        f"{name}: print its result by console.print_json with --json, or list the files it writes"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_all_arguments_and_options(name):
    for parameter in COMMANDS[name].params:
        assert parameter.help.endswith("."), parameter.name
        if parameter.param_type_name == "argument":
            # as docs/reference/cli.md spells them
            assert parameter.metavar, parameter.name
            assert re.search("[A-Z]", parameter.metavar)


def test_everything_is_printed_by_the_console():
    """What is printed elsewhere neither `--quiet` nor `--json` knows of."""
    package = pathlib.Path(jax_ordermerge.__file__).parent
    calls = []
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                is_printed = called in ("print", "rich.print", "typer.echo", "sys.stdout.write")
                if is_printed or called.startswith("rich.progress."):
                    calls.append(f"{path.relative_to(package)}:{node.lineno} {called}")
    assert {call.split(":")[0] for call in calls} == {"console.py"}, calls


def test_exit_codes_of_the_help_are_documented():
    page = (ROOT / "docs" / "reference" / "exit_codes.md").read_text()
    documented = set(re.findall(r"^\| (\d+) \|", page, re.MULTILINE))
    named = set(re.findall(r"\b(\d+)\b(?= {2,}\w| by )", app.info.epilog))
    assert named == documented - {"137"} == {"0", "1", "2", "130", "134", "143"}  # 137 is a kill -9


@pytest.mark.parametrize(
    "arguments",
    [
        ["configs"],
        ["config", "training.epochs"],
        ["launch", "quickstart", "--target", "slurm", "--options"],
        ["doctor", "--versions"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_json_is_all_of_the_output(arguments, capsys):
    assert call(*arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    "line", ["launch quickstart --target slurm", "train quickstart", "merge a/x b/y --out c"]
)
def test_json_that_a_mode_has_not(line, capsys):
    assert call(*line.split(), "--json") == 2
    assert "--json would be ignored" in capsys.readouterr().err


def test_messages_beside_json_are_on_stderr(capsys):
    console.set_json(True)
    console.print_message("step 1")
    console.print_json([1])
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("[\n 1\n]\n", "step 1\n")


def test_a_quiet_command_that_writes_a_file_prints_nothing(capsys, tmp_path):
    assert call("init", "quickstart", tmp_path / "mine.yaml", "-q") == 0
    assert (tmp_path / "mine.yaml").is_file()
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
