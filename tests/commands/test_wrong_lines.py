"""Wrong command lines: one clear line that says what was given and expected, and nothing written."""

import json
import shutil

import pytest

from tests.commands.test_cli import call
from tests.experiment import tiny

RECIPE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
LAYERS = "slices: [{sources: [{model: a, layer_range: [0, 5]}]}]\nmerge_method: passthrough\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with models, an adapter, a finished run, a recipe, a config, and other files."""
    folder = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("base", "a", "b")):
        tiny.make_base(folder / name, seed=seed)
    tiny.make_config(
        folder,
        model={"base": "base"},
        output="run",
        training={"epochs": 1, "checkpoint_every": 100},
        evaluation={"tasks": []},
        merge={"methods": [{"method": "average"}]},
    )
    (folder / "empty").mkdir()
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    # not by its tensors is it told from a model
    empty = (2).to_bytes(8, "little") + b"{}"
    (folder / "adapter/adapter_model.safetensors").write_bytes(empty)
    for name, text in {
        "notes.txt": "hello\n",
        "data.json": "{}",
        "list.yaml": "- 1\n",
        "recipe.yml": RECIPE,
        "layers.yml": LAYERS,
        "wrong.yml": RECIPE.replace("linear", "liner"),
    }.items():
        (folder / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call("merge", "tiny.yaml") == 0
    return folder


# the command line -> parts of its error
WRONG = {
    "merge nofile.yml out": "nofile.yml not found; give a recipe or the config",
    "merge out recipe.yml": "a recipe comes first, as in ordermerge merge recipe.yml MERGED",
    "merge notes.txt out": "notes.txt is a file, and no YAML by its name; give models",
    "merge data.json out": "data.json is a file, and no YAML by its name",
    "merge a notes.txt --out out": "notes.txt is a file, and no YAML by its name",
    "merge empty": "empty is neither a run (it has no config.yaml) nor a model",
    "merge empty --out out": "empty is neither a run (it has no config.yaml) nor a model",
    "merge run/merged --out out": "run/merged is neither a run",
    "merge a empty --out out": "empty has neither model.safetensors nor",
    "merge run a --out out": "run is a run; name one of its members, as in run/member_0",
    "merge run/member_9 a --out out": "the run has the members 0, 1",
    "merge run/merged/averag a --out out": "(did you mean 'run/merged/average'?)",
    "merge adapter a --out out": "adapter is an adapter; give the model that it belongs to",
    "merge a+b b --out out": "b in a+b is no adapter (it has no adapter_config.json",
    "merge a b --base tiny.yaml --out out": "tiny.yaml is a file; a model is a directory",
    "merge a b --out a": "a is not empty; give a new directory",
    "merge a b --out notes.txt": "notes.txt is a file; give a new directory",
    "merge a b --out notes.txt/out": "notes.txt/out lies below notes.txt, which is a file",
    "merge recipe.yml notes.txt/out": "notes.txt/out lies below notes.txt, which is a file",
    "merge a b --out out --to gguf": "--to gguf: expected hf or orbax",
    "merge a b --out out --method avrage": "(did you mean 'average'?)",
    "merge wrong.yml out": "unknown merge_method 'liner' (did you mean 'linear'?)",
    "merge list.yaml out": "list.yaml is no recipe",
    "merge layers.yml out": "layer_range [0, 5] of a, which has 2 layers",
    "run a": "a is a model, and not a run directory (it has no config.yaml)",
    "run empty": "empty is not a run directory (it has no config.yaml)",
    "run recipe.yml": "recipe.yml is the recipe of a merge, and no config of an experiment",
    "report recipe.yml": "give it to ordermerge merge recipe.yml MERGED",
    "analyze nowhere": "nowhere not found; give a config file, a run directory, or a name",
    "run tiny.yaml --set training.lr=1": "unknown key training.lr (did you mean 'learning_rate'?)",
    "run tiny.yaml --set lr=1": "unknown key lr (did you mean 'training.learning_rate'?)",
    "run tiny.yaml --set max_length=9": "(did you mean 'data.max_length'?)",
    "run tiny.yaml --set output=a": "output a is a model (it has config.json)",
    "run tiny.yaml --set output=notes.txt/run": "notes.txt is a file; give another path",
    "train a --steps 2": "a is a model, and not a run directory",
    "data a": "a is a model, and not a run directory",
    "plan a": "a is a model, and not a run directory",
    "doctor a": "a is a model, and not a run directory",
    "launch a --target slurm": "a is a model, and not a run directory",
    "search run --space a": "space file a not found",
    "evaluate runs/nope": "runs/nope is no config or run here, so it is taken for a model",
    "evaluate empty": "empty is neither a run (it has no config.yaml) nor a model",
    "evaluate notes.txt": "notes.txt is a file, and no YAML by its name",
    "evaluate run --config tiny.yaml": "--config goes with a model",
    "convert notes.txt out": "notes.txt is a file; a model is a directory",
    "convert run out": "run is a run; name one of its members, as in run/member_0",
    "convert run/checkpoints out": "is not an Orbax directory made by `ordermerge convert`",
    "convert a b": "b exists already; give a new directory",
    "convert a notes.txt/out": "notes.txt, which is a file; give a new directory",
    "inspect run": "run is a run; name one of its members",
    "diff a adapter": "adapter is an adapter; give the model that it belongs to",
    "diff a run": "run is a run; name one of its members",
    "generate run --prompt x": "run is a run; name one of its members",
    "generate tiny.yaml --prompt x": "tiny.yaml is a file; a model is a directory",
    "compare run a": "a is not a run directory (it has no config.yaml)",
    "results run --out empty": "empty is a directory; give a file",
    "judge a b --endpoint http://localhost:1/v1 --model m": "a is no file of outputs",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_is_told_in_one_line_and_writes_nothing(place, monkeypatch, capsys, line):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert call(*line.split()) == 2
    error = capsys.readouterr().err
    assert WRONG[line] in error
    assert error.startswith("error: ")
    assert len(error.splitlines()) == 1
    assert sorted(place.rglob("*")) == before


def test_a_near_name_is_looked_for_beside_a_missing_one(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    shutil.copytree("a", "SmolLM2-135M")
    assert call("inspect", "./SmolLM-135M") == 2
    assert "(did you mean 'SmolLM2-135M'?)" in capsys.readouterr().err


def test_one_member_of_a_run_is_a_model_and_not_a_run(place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    assert call("merge", "run/member_0", "--out", tmp_path / "out") == 0


def test_without_a_method_models_are_averaged_and_that_is_told(
    place, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(place)
    assert call("merge", "a", "b", "--out", tmp_path / "out") == 0
    assert "note: merging by average; choose another with --method" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert report["recipe"]["merge_method"] == "average"
