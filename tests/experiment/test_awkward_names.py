"""Directories with awkward names go through every command and give the bits of a plain one."""

import pathlib
import shutil

import pytest
import yaml

from jax_ordermerge.layout import RunLayout
from tests.commands.test_cli import call
from tests.experiment import tiny

# What a URL, a pattern, YAML, a shell, a command line, HTML or this package reads as something else.
# What one of them reads in any place is in one name; a name of its own is for what counts alone.
SAMPLE = ["run #2"]
NAMES = [
    *("a+b c%20d", "[x]*a?b{a}", "a|b\\c,d=e", '$HOME "x"\n<b>'),
    *("2026-11-29", "007", "1.10", "yes", "null"),
    *("a:b", "@x", "~", "-x", "--help", ".hidden", "x" * 230, "cafe\u0301 😀 "),
]
TASKS = {"evaluation": {"batch": 8, "tasks": [{"name": "swap", "max_new_tokens": 4}]}}


def make_inputs(folder, place, name):
    """Copy base and data below directories of a name, and write a config that names them."""
    shutil.copytree(folder / "base", place / "models" / name)
    (place / "data" / name).mkdir(parents=True)
    tiny.make_config(place / "data" / name)
    (place / "data" / name / "tiny.yaml").rename(place / "config.yml")
    raw = yaml.safe_load((place / "config.yml").read_text())
    raw["output"] = name
    raw["model"]["base"] = f"models/{name}"
    raw["data"] |= {"train": f"data/{name}/train.jsonl", "test": f"data/{name}/test.jsonl"}
    (place / "config.yml").write_text(yaml.safe_dump(raw))
    tasks = TASKS | {"data": {"test": f"data/{name}/test.jsonl", "template": "plain"}}
    (place / "tasks.yml").write_text(yaml.safe_dump(tasks))
    return {"config.yml", "tasks.yml", "models", "data"}


def go_through(name):
    """Run every command on directories of a name and return the bytes of what they made."""
    run = RunLayout(pathlib.Path(name))
    assert call("train", "config.yml") == 0
    # as if the process had been killed after the last but one checkpoint
    steps = sorted(int(path.name) for path in run.checkpoints.iterdir())
    shutil.rmtree(run.checkpoints / str(steps[-1]))
    run.training_state.unlink()
    assert call("run", "--", name) == 0
    run.report_html.unlink()
    for command in ("report", "evaluate", "merge", "run"):
        assert call(command, "--", name) == 0
    assert call("inspect", "--", f"{name}/member_0") == 0
    members = [f"{name}/member_0", f"{name}/member_1"]
    assert call("merge", "--method", "average", "--out", f"merged/{name}", "--", *members) == 0
    assert call("convert", "--member", 0, "--", name, f"hf/{name}") == 0
    assert call("convert", "--to", "orbax", "--", f"hf/{name}", f"orbax/{name}") == 0
    assert call("convert", "--", f"orbax/{name}", f"back/{name}") == 0
    options = ("--config", "tasks.yml", "--out", f"results/{name}")
    assert call("evaluate", *options, "--", f"back/{name}") == 0
    asked = ("--prompt", "a plus b is ?", "--max-new-tokens", 4)
    assert call("generate", *asked, "--", f"merged/{name}") == 0
    files = [
        *(run.merged(merge) / "model.safetensors" for merge in ("average", "selection")),
        *(pathlib.Path(kind) / name / "model.safetensors" for kind in ("merged", "hf", "back")),
        pathlib.Path("results") / name / "swap.json",
    ]
    return [path.read_bytes() for path in files]


@pytest.fixture(scope="module")
def plain(folder, tmp_path_factory):
    """The results of a run in a directory with a plain name."""
    place = tmp_path_factory.mktemp("plain")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        make_inputs(folder, place, "plain")
        return go_through("plain")


@pytest.mark.parametrize(
    "name", [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES)]
)
def test_every_command_takes_the_name_literally(folder, tmp_path, monkeypatch, plain, name):
    monkeypatch.chdir(tmp_path)
    inputs = make_inputs(folder, tmp_path, name)
    assert go_through(name) == plain
    # nothing was written beside the directories of that name
    outputs = {"merged", "hf", "orbax", "back", "results"}
    assert {path.name for path in tmp_path.iterdir()} == inputs | outputs | {name}
    for kind in outputs | {"models", "data"}:
        assert [path.name for path in (tmp_path / kind).iterdir()] == [name]


@pytest.mark.parametrize("name", ["x" * 256, "b\udcff"])
def test_names_that_no_file_can_have_are_refused(folder, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    config = tiny.make_config(tmp_path, output=name, model={"base": str(folder / "base")})
    before = sorted(path.name for path in tmp_path.iterdir())
    assert call("run", config) == 2
    assert call("report", name) == 2
    assert call("merge", folder / "base", folder / "base", "--out", name) == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    assert all(line.startswith("error: ") for line in errors.splitlines())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
