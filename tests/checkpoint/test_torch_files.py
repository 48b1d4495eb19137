"""Weights of PyTorch: the values that PyTorch reads, on request, and no code of theirs is run."""

import collections
import json
import pickle
import sys

import numpy as np
import pytest

from jax_ordermerge.checkpoint import convert, torch_files
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from tests.commands.test_cli import call
from tests.merge.recipe_models import make

torch = pytest.importorskip("torch", reason="needs the extra parity")

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8)


def to_torch(directory):
    """Return the tensors of a safetensors directory as PyTorch reads them."""
    import safetensors.torch

    return safetensors.torch.load_file(directory / "model.safetensors")


def bits(values):
    return np.ascontiguousarray(values).view(np.uint8).tobytes()


@pytest.fixture
def model(tmp_path):
    """A model, and the same with its weights in one file of PyTorch."""
    make(tmp_path / "model", 2, 3)
    tensors = to_torch(tmp_path / "model")
    (tmp_path / "bin").mkdir()
    content = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "bin" / "config.json").write_text(content)
    torch.save(collections.OrderedDict(tensors), tmp_path / "bin" / torch_files.SINGLE)
    return tmp_path


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_those_of_torch(tmp_path, dtype, legacy):
    values = (torch.arange(24).reshape(4, 6) * 3.7 - 11).abs().to(dtype)
    tensors = {
        "rows": values,
        "columns": values.T,
        "strided": values[::2, 1:],
        "scalar": values[1, 1],
        "empty": values[:0],
        "parameter": torch.nn.Parameter(values, requires_grad=False),
    }
    path = tmp_path / "weights.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    reader = torch_files.open_tensors(path, allow_bin=True)
    assert set(reader.names) == set(tensors)
    for name, tensor in tensors.items():
        info = reader.info(name)
        assert (f"torch.{info.dtype.name}", info.shape) == (str(dtype), tuple(tensor.shape))
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert bits(reader.read(name)) == raw.tobytes()
        assert reader.read(name).astype(np.float64).tolist() == tensor.double().tolist()
        if tensor.numel() > 4:
            part = np.empty(3, info.dtype)
            reader.read_into(name, 1, part)
            assert bits(part) == bits(reader.read(name).reshape(-1)[1:4])


class Hostile:
    """Unpickling it without protection would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w')",)


def write_tasks(folder):
    (folder / "rows.jsonl").write_text('{"page": "a b"}\n')
    config = folder / "tasks.yaml"
    task = {"name": "p", "kind": "perplexity", "data": str(folder / "rows.jsonl")}
    config.write_text(json.dumps({"evaluation": {"tasks": [{**task, "text": "{{page}}"}]}}))
    return config


COMMANDS = {
    # commands that read a model -> their arguments for `bin` in a folder
    "inspect": lambda folder: [folder / "bin"],
    "diff": lambda folder: [folder / "model", folder / "bin"],
    "convert": lambda folder: [folder / "bin", folder / "out"],
    "merge": lambda folder: [folder / "bin", folder / "model", "--out", folder / "out"],
    "generate": lambda folder: [folder / "bin", "--prompt", "a"],
    "evaluate": lambda folder: [folder / "bin", "--config", write_tasks(folder)],
}


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("command", COMMANDS)
def test_code_in_a_file_does_not_run(model, capsys, command, form):
    mark = model / "it ran"
    content = {"model.norm.weight": torch.ones(2), "other": Hostile(mark)}
    path = model / "bin" / torch_files.SINGLE
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    assert call(command, *COMMANDS[command](model), "--allow-bin") == 2
    error = capsys.readouterr().err.strip()
    assert "is not read: it holds" in error or (
        form == "pickle" and "is damaged or no file" in error
    )
    assert "\n" not in error
    assert not mark.exists()
    assert not (model / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_names_the_option(model, capsys, command):
    assert call(command, *COMMANDS[command](model)) == 2
    error = capsys.readouterr().err.strip()
    assert "pytorch_model.bin is a pickle of PyTorch" in error
    assert "--allow-bin" in error
    assert "\n" not in error
    assert not (model / "out").exists()


def test_a_model_of_one_file_is_the_model(model, capsys):
    assert call("diff", model / "model", model / "bin", "--allow-bin") == 0
    assert call("convert", model / "bin", model / "out", "--allow-bin") == 0
    assert (model / "out" / "model.safetensors").read_bytes() == (
        model / "model" / "model.safetensors"
    ).read_bytes()
    recipe = f"merge_method: linear\nmodels: [{{model: {model}/bin}}]\nparameters: {{weight: 1}}\n"
    (model / "recipe.yml").write_text(recipe)
    assert call("merge", model / "recipe.yml", model / "merged", "--allow-bin") == 0
    assert call("diff", model / "model", model / "merged") == 0
    capsys.readouterr()
    assert call("inspect", model / "bin", "--allow-bin", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["tensors"]
    assert {row["name"] for row in listed} == {*to_torch(model / "model")}


def shard(model):
    """Spread the weights over two files with an index; return the index as a dict."""
    directory = model / "bin"
    tensors = to_torch(model / "model")
    (directory / torch_files.SINGLE).unlink()
    weight_map = {
        name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(tensors)
    }
    for file in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == file}
        torch.save(part, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / torch_files.INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_one_model(model):
    shard(model)
    assert call("convert", model / "bin", model / "out", "--allow-bin") == 0
    expected, actual = Reader(model / "model"), Reader(model / "out")
    assert actual.names == expected.names
    for name in expected.names:
        assert bits(actual.read(name)) == bits(expected.read(name))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index, names: index.update(weight_map={}), "weight_map must name the file"),
        (lambda index, names: index["weight_map"].update(x="../a.bin"), "is not the plain name"),
        (lambda index, names: index["weight_map"].update(x=3), "weight_map must name the file"),
        (lambda index, names: index["weight_map"].update(x=[3]), "weight_map must name the file"),
        (lambda index, names: index["weight_map"].update(x="a.bin"), "names the shard a.bin"),
        (lambda index, names: index["weight_map"].pop(names[0]), "is not placed there by"),
        (lambda index, names: index["weight_map"].update(x=index["weight_map"][names[0]]), "x is"),
    ],
    ids=range(7),
)
def test_an_index_that_contradicts_its_files(model, change, message):
    index = shard(model)
    change(index, list(index["weight_map"]))
    (model / "bin" / torch_files.INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=message):
        torch_files.open_tensors(model / "bin", allow_bin=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged or no file of PyTorch"),
        (b"GGUF" + bytes(100), "is not read|damaged or no file"),
        (b"PK\x03\x04" + bytes(100), "is not read|damaged or no file"),
        ([torch.ones(2)], "no mapping of names to tensors"),
        ({"model": {"a": torch.ones(2)}, "step": 3}, "no mapping of names to tensors"),
        ({"a": torch.ones(2).to_sparse()}, "a is not a plain tensor"),
    ],
    ids=range(6),
)
def test_files_that_are_no_weights(tmp_path, content, message):
    path = tmp_path / "pytorch_model.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as error:
        torch_files.open_tensors(path, allow_bin=True)
    assert "\n" not in str(error.value)


def test_a_cut_file_is_damaged(model):
    path = model / "bin" / torch_files.SINGLE
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"pytorch_model\.bin is (damaged|not read)"):
        torch_files.open_tensors(model / "bin", allow_bin=True)


def test_safetensors_go_first(model):
    make(model / "second", 2, 4)
    torch.save(to_torch(model / "second"), model / "model" / torch_files.SINGLE)
    assert isinstance(torch_files.open_tensors(model / "model", allow_bin=True), Reader)
    assert call("convert", model / "model", model / "out", "--allow-bin") == 0
    assert call("diff", model / "model", model / "out") == 0


def test_torch_is_asked_for_by_name_and_must_be_safe(model, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.5.1+cu121")
    with pytest.raises(UserError, match=r"not read with PyTorch 2\.5\.1.* install 2\.6 or later"):
        torch_files.open_tensors(model / "bin", allow_bin=True)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"takes PyTorch to read, which is not installed"):
        torch_files.open_tensors(model / "bin", allow_bin=True)


def test_bin_files_of_the_hub_are_downloaded_on_request_alone(model, monkeypatch):
    import fnmatch
    import shutil

    import huggingface_hub

    calls = []

    def download(name, allow_patterns, ignore_patterns):
        calls.append(allow_patterns)
        cache = model / "cache"
        cache.mkdir(exist_ok=True)
        for path in (model / "bin").iterdir():
            if any(fnmatch.fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert call("convert", "some/model", model / "none") == 2
    assert not list((model / "cache").glob("*.bin"))
    assert call("convert", "some/model", model / "out", "--allow-bin") == 0
    assert call("diff", model / "model", model / "out") == 0
    # safetensors are all that is downloaded where there are any
    calls.clear()
    (model / "cache" / "model.safetensors").write_bytes(
        (model / "model" / "model.safetensors").read_bytes()
    )
    convert.resolve("some/model", allow_bin=True)
    assert not any("bin" in pattern for patterns in calls for pattern in patterns)
