"""What is printed after an export: how engines serve it, and what they would not find."""

import json
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from jax_ordermerge.commands.serving import serving_lines
from tests.commands.test_cli import call
from tests.experiment import tiny


@pytest.fixture
def model(tmp_path):
    """A model whose tokenizer has bytes, as GGUF can hold them."""
    return tiny.make_base(tmp_path / "my model", **tiny.byte_tokenizer())


def test_a_tokenizer_that_gguf_cannot_hold_is_told_in_place_of_commands(tmp_path):
    lines = serving_lines(tiny.make_base(tmp_path / "words"))
    assert "llama.cpp and Ollama cannot serve it" in lines[4]
    assert not any("--to gguf" in line or "ollama create" in line for line in lines)


def test_commands_name_the_directory(model):
    first, *commands = serving_lines(model)
    assert first == "To serve it, one of:"
    words = [shlex.split(command) for command in commands[:5]]
    assert words[0] == ["vllm", "serve", str(model)]
    assert words[1] == ["python", "-m", "sglang.launch_server", "--model-path", str(model)]
    assert words[2] == ["transformers", "serve", str(model)]
    assert words[3][:5] == ["ordermerge", "convert", str(model), "my model.gguf", "--to"]
    assert words[3][-3:] == ["llama-server", "-m", "my model.gguf"]
    # the shell writes a Modelfile that names the model by its whole path
    line = commands[4].partition(" && ")[0].strip()
    subprocess.run(["sh", "-c", line], check=True, cwd=model)
    assert (model / "my model.Modelfile").read_text() == f"FROM {model}\n"
    # ollama refuses a name with a space
    assert commands[4].endswith("&& ollama create my-model -f 'my model.Modelfile'")


def test_a_model_without_a_template_is_asked_for_completions(model):
    assert serving_lines(model)[-1].startswith("It has no chat template: ask under /v1/completions")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert len(serving_lines(model)) == 6


def test_a_gguf_file_is_served_as_it_is(tmp_path):
    file = tmp_path / "my model.gguf"
    file.touch()
    _, server, ollama = serving_lines(file)
    assert shlex.split(server) == ["llama-server", "-m", str(file)]
    subprocess.run(["sh", "-c", ollama.partition(" && ")[0]], check=True, cwd=tmp_path)
    assert (tmp_path / "my model.Modelfile").read_text() == f"FROM {file}\n"


def test_a_family_that_only_llama_cpp_converts_goes_through_its_script(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    (line,) = (line for line in serving_lines(model) if "llama-server" in line)
    assert "llama.cpp/convert_hf_to_gguf.py" in line


def test_ollama_takes_a_gguf_file_of_what_it_does_not_convert_itself(model):
    config = json.loads((model / "config.json").read_text())
    change = {"model_type": "granite", "architectures": ["GraniteForCausalLM"]}
    (model / "config.json").write_text(json.dumps(config | change))
    (line,) = (line for line in serving_lines(model) if "ollama create" in line)
    convert, modelfile, create = line.split(" && ")
    assert shlex.split(convert)[-2:] == ["--outfile", "my model.gguf"]
    subprocess.run(["sh", "-c", modelfile], check=True, cwd=model)
    file = pathlib.Path("my model.gguf").absolute()
    assert (model / "my model.Modelfile").read_text() == f"FROM {file}\n"
    assert create == "ollama create my-model -f 'my model.Modelfile'"


def test_what_no_engine_would_find_is_named(model):
    for file in model.glob("tokenizer*"):
        file.unlink()
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (line,) = serving_lines(model)
    assert line == (
        f"no engine can serve {model}: no model-1.safetensors, no model-2.safetensors, no tokenizer"
        " (tokenizer.json or tokenizer.model)"
    )


def test_what_writes_no_text_has_no_commands(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    assert serving_lines(model) == []


@pytest.mark.slow
def test_transformers_takes_the_directory_as_written():
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", "--help"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "[FORCE_MODEL]" in printed


def test_a_merge_ends_with_them(model, capsys):
    out, other = model.with_name("merged"), shutil.copytree(model, model.with_name("other"))
    assert call("merge", "--method", "linear", "--out", out, model, other) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"wrote {out}"
    assert f"  vllm serve {out}" in printed.err.splitlines()
