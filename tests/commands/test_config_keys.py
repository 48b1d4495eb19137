"""Unknown keys of config.json and mixed dtypes, in every command that reads a model."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.cli import app
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources import references
from jax_ordermerge.merge.sources.storage import Directory
from tests.merge.recipe_models import make


def call(*arguments):
    """Return the output of a command; its error is raised."""
    return CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """`noted` and `noted2`, whose configs have a key of their own; `plain` without."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("noted", "noted2", "plain")):
        make(tmp_path / name, 2, seed)
    for name in ("noted", "noted2"):
        path = tmp_path / name / "config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"my_note": 3, "other.note": "x"})
        )
    (tmp_path / "recipe.yml").write_text(
        "merge_method: linear\nmodels: [{model: noted, parameters: {weight: 1}}]\n"
    )
    return tmp_path


COMMANDS = {
    "merge": ["merge", "noted", "plain", "--method", "average", "--out", "out"],
    "base": ["merge", "plain", "--base", "noted2", "--method", "average", "--out", "out"],
    "recipe": ["merge", "recipe.yml", "out"],
    "plan": ["merge", "recipe.yml", "--dry-run"],
    "to hf": ["convert", "noted", "out"],
    "to orbax": ["convert", "noted", "out", "--to", "orbax"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_unknown_keys_are_refused_and_passed_over_on_request(directory, name):
    with pytest.raises(UserError, match=r"^.*noted2?/config.json: unknown keys my_note = 3, other"):
        call(*COMMANDS[name])
    assert not (directory / "out").exists()
    with pytest.raises(UserError, match=r"unknown key other.note = 'x'"):
        call(*COMMANDS[name], "--ignore-config-keys", "my_note")
    # in one text or in two
    assert call(*COMMANDS[name], "--ignore-config-keys", "my_note, other.note").exit_code == 0
    shutil.rmtree("out", ignore_errors=True)
    keys = "--ignore-config-keys", "my_note", "--ignore-config-keys", "other.note"
    assert call(*COMMANDS[name], *keys).exit_code == 0


def test_an_evaluation_passes_them_over_besides_those_of_its_config(directory, monkeypatch):
    from jax_ordermerge.commands import evaluate

    seen = []
    monkeypatch.setattr(
        evaluate, "evaluate_tasks", lambda config, *_, **__: seen.append(config.model)
    )
    (directory / "tasks.yaml").write_text("model: {ignore_config_keys: [my_note]}\n")
    call("evaluate", "noted", "--config", "tasks.yaml", "--ignore-config-keys", "other.note")
    call("evaluate", "noted", "--config", "tasks.yaml")
    assert [model.ignore_config_keys for model in seen] == [("my_note", "other.note"), ("my_note",)]
    with pytest.raises(UserError, match="--ignore-config-keys goes with a model"):
        call("evaluate", "tasks.yaml", "--ignore-config-keys", "other.note")


def test_a_completion_passes_them_over(tmp_path):
    shutil.copytree(convert.resolve("embedded:quickstart"), tmp_path / "noted")
    path = tmp_path / "noted" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"my_note": 3}))
    arguments = "generate", tmp_path / "noted", "--prompt", "a", "--max-new-tokens", "1"
    with pytest.raises(UserError, match=r"noted/config.json: unknown key my_note = 3"):
        call(*arguments)
    assert call(*arguments, "--ignore-config-keys", "my_note").exit_code == 0


@pytest.mark.parametrize("command", [["inspect", "noted+a"], ["diff", "noted+a", "noted+a"]])
def test_models_with_adapters_are_listed_and_compared(directory, command, monkeypatch):
    seen = []

    def open_model(name, *, ignore, allow_bin):
        seen.append((name, ignore))
        return Directory(directory / "noted", ignore=ignore)

    monkeypatch.setattr(references, "open_model", open_model)
    assert call(*command, "--ignore-config-keys", "my_note, other.note").exit_code == 0
    assert set(seen) == {("noted+a", ("my_note", "other.note"))}


def test_it_is_refused_where_no_config_json_is_read(directory):
    call("convert", "plain", "orbax", "--to", "orbax")
    with pytest.raises(UserError, match="--ignore-config-keys goes with an HF directory"):
        call("convert", "orbax", "out", "--ignore-config-keys", "my_note")


# ---------------------------------------------------------------------------- dtypes


def store(directory, dtype_of):
    """Store each tensor of a model in a dtype by its name, one file for each dtype."""
    reader = Reader(directory)
    arrays = {name: reader.read(name).astype(dtype_of(name)) for name in reader.names}
    (directory / "model.safetensors").unlink()
    files = {}
    for dtype in {array.dtype for array in arrays.values()}:
        part = {name: array for name, array in arrays.items() if array.dtype == dtype}
        file = f"model-{len(files)}.safetensors"
        save_file(part, directory / file, metadata={"format": "pt"})
        files |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": files}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return arrays


@pytest.mark.parametrize(
    "dtype_of",
    [
        lambda name: np.float32 if "norm" in name else ml_dtypes.bfloat16,
        lambda name: ml_dtypes.bfloat16 if name == "lm_head.weight" else np.float32,
        lambda name: np.float16 if ".1." in name else np.float32,
    ],
    ids=["norms wide", "head narrow", "a layer"],
)
@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_mixed_dtypes_are_not_rounded_to_the_first(directory, dtype_of, to):
    arrays = store(directory / "plain", dtype_of)
    with pytest.raises(UserError, match=r"plain is stored in .*32 .*; choose one of .* --dtype"):
        call("convert", "plain", "out", "--to", to)
    assert not (directory / "out").exists()
    call("convert", "plain", "out", "--to", to, "--dtype", "float32")
    if to == "orbax":
        call("convert", "out", "back")
    reader = Reader("back" if to == "orbax" else "out")
    for name, array in arrays.items():
        np.testing.assert_array_equal(reader.read(name), array.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_one_dtype_is_kept(directory, dtype):
    arrays = store(directory / "plain", lambda name: dtype)
    call("convert", "plain", "out")
    reader = Reader("out")
    for name, array in arrays.items():
        assert reader.info(name).dtype == dtype
        assert reader.read(name).tobytes() == array.tobytes()
    assert convert.load_config("out") == convert.load_config("plain")


def test_a_dtype_that_is_not_written_is_refused(directory):
    store(directory / "plain", lambda name: np.float64)
    with pytest.raises(UserError, match="plain is stored in float64"):
        call("convert", "plain", "out")


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_values_that_overflow_are_refused(directory, to):
    reader = Reader(directory / "plain")
    arrays = {name: np.array(reader.read(name)) for name in reader.names}
    arrays["model.norm.weight"][1] = 1e5
    save_file(arrays, directory / "plain" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that overflow float16"):
        call("convert", "plain", "out", "--to", to, "--dtype", "float16")
    assert not (directory / "out").exists()
