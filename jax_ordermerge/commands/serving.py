"""How an exported model is served by the engines that people use: the commands, and what it lacks.

None of them is run here. An engine that cannot load a directory says so after minutes; what it
looks for is looked for before.
"""

import json
import re
import shlex
from pathlib import Path

from jax_ordermerge import console
from jax_ordermerge.checkpoint import gguf_files, gguf_metadata, gguf_tokenizer, sidecar_files
from jax_ordermerge.checkpoint.convert import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

# Files of which one is enough for an engine to turn text into tokens.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_QUICKLY_COMPARED = 2**18  # bytes of a tokenizer
# Classes whose directories `ollama create` converts itself. It takes all others as GGUF files.
_OLLAMA = {
    "LlamaForCausalLM",
    "MixtralForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Olmo3ForCausalLM",
    "CohereForCausalLM",
}


def print_commands(out: Path) -> None:
    """Print `serving_lines` of an export on stderr, beside what a script reads, unless quiet."""
    for line in serving_lines(out):
        console.print_note(line)


def serving_lines(directory: Path) -> list[str]:
    """Return the commands that serve a model, or why no engine can; empty for what writes no text.

    Args:
        directory: where something was exported: a Hugging Face directory of a decoder, or what it
            may be besides (an adapter, an Orbax checkpoint, an encoder, a diffusion model). Or a
            GGUF file.

    Example:
        >>> serving_lines(Path("nowhere"))
        []
    """
    if directory.suffix == gguf_files.SUFFIX and directory.is_file():
        create = _ollama(directory, directory.stem)
        return ["To serve it, one of:", f"  llama-server -m {shlex.quote(str(directory))}", create]
    if not _writes_text(directory):
        return []
    lacking = _lacking(directory)
    if lacking:
        return [f"no engine can serve {directory}: {', '.join(lacking)}"]
    path, name = shlex.quote(str(directory)), directory.resolve().name
    gguf, config = shlex.quote(f"{name}.gguf"), _read(directory / "config.json")
    is_ours = config.get("model_type") in gguf_metadata.ARCHITECTURES
    if is_ours:
        convert = f"ordermerge convert {path} {gguf} --to gguf"
    else:
        # a script of its repository, not of a package
        convert = f"python llama.cpp/convert_hf_to_gguf.py {path} --outfile {gguf}"
    create = _ollama(directory, name)
    if not _OLLAMA.intersection(config["architectures"]):
        create = f"  {convert} && {_ollama(Path(f'{name}.gguf'), name).strip()}"
    lines = [
        "To serve it, one of:",
        f"  vllm serve {path}",
        f"  python -m sglang.launch_server --model-path {path}",
        f"  transformers serve {path}",
    ]
    if not is_ours or _has_gguf_tokenizer(directory):
        lines += [f"  {convert} && llama-server -m {gguf}", create]
    else:
        lines.append("llama.cpp and Ollama cannot serve it: GGUF has no tokenizer like its own.")
    if not has_chat_template(directory):
        lines.append(
            "It has no chat template: ask under /v1/completions, not /v1/chat/completions."
        )
    return lines


def _has_gguf_tokenizer(directory: Path) -> bool:
    """Return whether GGUF can hold a tokenizer, as far as that is quickly known."""
    file = directory / sidecar_files.TOKENIZER
    # One of many tokens takes seconds to compare. Those are mostly published, and GGUF has them.
    if not file.is_file() or file.stat().st_size > _QUICKLY_COMPARED:
        return True
    try:
        gguf_tokenizer.tokenizer_metadata(directory, load_config(directory))
    except UserError:
        return False
    return True


def _ollama(path: Path, name: str) -> str:
    """Return the command that makes a model of Ollama from a directory or GGUF file."""
    modelfile = shlex.quote(f"{name}.Modelfile")
    # ollama takes no other characters in the name of a model
    tag = re.sub(r"[^a-z0-9_.]+", "-", name.lower()).strip("-.") or "merged"
    # absolute: Ollama reads it from the Modelfile, wherever that lies
    base = shlex.quote(f"FROM {path.absolute()}")
    return f"  echo {base} > {modelfile} && ollama create {tag} -f {modelfile}"


def has_chat_template(directory: Path) -> bool:
    """Return whether the tokenizer of a directory has a chat template.

    Example:
        >>> has_chat_template(Path("nowhere"))
        False
    """
    # newer versions of transformers write it to a file of its own
    if (directory / "chat_template.jinja").is_file():
        return True
    settings = directory / "tokenizer_config.json"
    return settings.is_file() and bool(_read(settings).get("chat_template"))


def _writes_text(directory: Path) -> bool:
    # by the class and not by the type: an encoder and a decoder may share the type
    config = directory / "config.json"
    if not config.is_file():
        return False
    return any("ForCausalLM" in name for name in _read(config).get("architectures") or ())


def _read(file: Path) -> Json:
    return dict(json.loads(file.read_text()))


def _lacking(directory: Path) -> list[str]:
    # an interrupted copy or upload has some of the files, and a config that says nothing of it
    lacking = []
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({*_read(index)["weight_map"].values()})
        lacking += [f"no {file}" for file in files if not (directory / file).is_file()]
    elif not any(directory.glob("*.safetensors")):
        lacking.append("no *.safetensors")
    if not any((directory / file).is_file() for file in _TOKENIZERS):
        lacking.append("no tokenizer (tokenizer.json or tokenizer.model)")
    return lacking
