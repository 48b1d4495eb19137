"""What the arguments of a command are is decided by what they are, and no option is ignored."""

import json

import pytest

from jax_ordermerge.merge import engine
from tests.commands.test_cli import call
from tests.merge.recipe_models import make

RECIPE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for seed, name in enumerate(("base", "a", "b")):
        make(tmp_path / name, 1, seed)
    (tmp_path / "recipe.yml").write_text(RECIPE)
    (tmp_path / "broken.yml").write_text(RECIPE.replace("1}", "1"))
    (tmp_path / "config.yaml").write_text("training: {epochs: 1}\n")
    (tmp_path / "complete.yaml").write_text(
        "model: {base: base}\ndata: {train: generated:quickstart}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


REFUSED = {
    "merge recipe.yml out --dtype bfloat16": "--dtype would be ignored",
    "merge recipe.yml out --method ties": "--method would be ignored",
    "merge recipe.yml out --base base": "--base would be ignored",
    "merge recipe.yml out --seed 0": "--seed would be ignored",
    "merge recipe.yml out --param density=1": "--param would be ignored",
    "merge recipe.yml out --set seed=1": "--set would be ignored",
    "merge config.yaml --out out": "--out would be ignored",
    "merge config.yaml --workers 2": "--workers would be ignored",
    "merge a b --out out --set nonsense=1": "--set would be ignored",
    "merge broken.yml out": "broken.yml is not valid YAML",
    "merge nofile.yml out": "nofile.yml not found",
    "merge config.yaml out": "config.yaml is no recipe",
    "merge out recipe.yml": "a recipe comes first",
    "merge recipe.yml out extra": "give it and one directory to write",
    "merge recipe.yml": "needs a directory to write: --out DIRECTORY, or one behind the recipe\n",
    "merge a b": "needs a directory to write: --out DIRECTORY\n",
    "merge a b --out out/..": "out/.. ends in ..; give the directory by its name",
    "merge recipe.yml out/..": "out/.. ends in ..",
    "convert a out/..": "out/.. ends in ..",
    "convert a out/.. --to orbax": "out/.. ends in ..",
    "merge a ./a --out out --method average": "is given twice",
    "merge a b base --base ./base --out out": "model base is the base",
    "train config.yaml --profile trace": "--profile would be ignored",
    "doctor --set seed=1": "--set would be ignored",
    "doctor config.yaml --versions": "config.yaml would be ignored",
    "doctor --versions --set seed=1": "--set would be ignored",
    "launch config.yaml --target slurm --options --submit": "--submit would be ignored",
    "launch config.yaml --target slurm --options nodes=2": "nodes=2 would be ignored",
    "launch complete.yaml --target slurm nodes=2 nodes=3": "nodes is given twice",
    "launch complete.yaml --target slurm --out a": "--out a cannot be written (Is a directory)",
    "generate base --prompt x --seed 3": "--seed would be ignored",
    "plan complete.yaml --slices 4": "--slices would be ignored",
    "data complete.yaml --row 3 --rows 5": "--rows would be ignored",
    "merge a b --out out --param density=1 --param density=0.5": "--param density is given twice",
    "merge a b --out out --param density=[": "--param density=[: the value is not valid YAML",
    "merge a b --out out --shard-gb nan": "--shard-gb nan: expected a size above 0",
    "merge a b --out out --shard-gb 0": "--shard-gb 0: expected a size above 0",
    "merge a b --out out --shard-gb inf": "--shard-gb inf: expected a size above 0",
}


@pytest.mark.parametrize("line", REFUSED)
def test_an_argument_that_would_be_ignored_is_refused(folder, capsys, line):
    assert call(*line.split()) == 2
    captured = capsys.readouterr()
    assert REFUSED[line] in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    "line",
    [
        "merge recipe.yml out --to hf --workers 1",
        "merge recipe.yml --out out",
        "merge a b --out out --method average --seed 3 --dtype float32",
        # one model is merged with itself alone
        "merge a --out out --method average",
    ],
)
def test_options_of_the_mode_are_read(folder, line):
    assert call(*line.split()) == 0
    assert json.loads((folder / "out" / "merge.json").read_text())["recipe"]["dtype"] == "float32"


@pytest.mark.parametrize("models", [["recipe.yml"], ["a", "b", "--method", "average"]])
def test_a_dry_run_estimates_for_the_threads_that_were_asked_for(
    models, folder, monkeypatch, capsys
):
    asked = []
    monkeypatch.setattr(
        engine, "estimate", lambda plan, workers=None: asked.append(workers) or (1e9, 2.0)
    )
    assert call("merge", *models, "--dry-run", "--workers", "3") == 0
    assert "2.0 s" in capsys.readouterr().out
    assert call("merge", *models, "--dry-run", "--json") == 0
    assert asked == [3, None]
    plan = json.loads(capsys.readouterr().out)
    assert (plan["memory_bytes"], plan["seconds"]) == (1e9, 2.0)
    assert plan["methods"] == ["average"]
