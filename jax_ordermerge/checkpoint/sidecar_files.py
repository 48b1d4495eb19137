"""Files beside the tensors of a Hugging Face directory: configs, tokenizer files, model card."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError

Json = dict[str, Any]

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",  # fast tokenizers
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",  # byte-level BPE, with merges.txt
    "vocab.txt",  # WordPiece
    "merges.txt",
    "tokenizer.model",  # SentencePiece, which llama.cpp reads
)


def write(
    directory: Path,
    config: ModelConfig,
    dtype: str,
    *,
    tokenizer_from: str | Path | None = None,
    card: str | None = None,
    recipe: str | None = None,
) -> None:
    """Write all files but the tensors into a directory.

    Args:
        directory: an existing directory.
        config: written as `config.json` and `generation_config.json`, with the same
            end-of-sequence tokens in both.
        dtype: dtype of the tensors, e.g. `"bfloat16"`.
        tokenizer_from: directory to copy tokenizer files from.
        card: text of `README.md`.
        recipe: text of `merge_config.yaml`.
    """
    # written from the config, not copied: keys of the source that are not understood would lie
    raw = config.to_hf(dtype)
    # servers use sampling values of this file as their defaults, so it holds token ids only
    generation = {
        key: raw[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if raw[key] is not None
    }
    _write_json(directory / "config.json", raw)
    _write_json(directory / "generation_config.json", generation)
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), directory)
    atomic.write_text(directory / "README.md", model_card() if card is None else card)
    if recipe is not None:
        atomic.write_text(directory / "merge_config.yaml", recipe)


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy tokenizer files byte for byte, except for what a server could not read.

    `tokenizer_class: TokenizersBackend`, unknown before transformers 5, becomes
    `PreTrainedTokenizerFast`. The chat template is written both to its own file and to
    `tokenizer_config.json`, and its `{% generation %}` marks, for training only, become plain
    blocks.

    Raises:
        UserError: the source is not a directory, or its `tokenizer_config.json` is not a JSON
            object.
    """
    if not source.is_dir():
        raise UserError(f"directory {source}, to copy the tokenizer from, does not exist")
    # byte for byte: a tokenizer that is parsed and written again may differ in its details
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            atomic.write_bytes(directory / name, (source / name).read_bytes())
    config_path, template_path = source / TOKENIZER_CONFIG, source / CHAT_TEMPLATE
    # read as bytes: text mode would change line ends, which the model sees
    template = template_path.read_bytes().decode() if template_path.is_file() else None
    if config_path.is_file():
        content = config_path.read_bytes()
        try:
            config = json.loads(content)
        except ValueError as error:
            raise UserError(f"{config_path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise UserError(f"{config_path}: expected a JSON object, got {type(config).__name__}")
        served = _served_tokenizer_config(config, template)
        # unchanged files keep their bytes, order and spaces included
        if served == config:
            atomic.write_bytes(directory / TOKENIZER_CONFIG, content)
        else:
            _write_json(directory / TOKENIZER_CONFIG, served)
        if isinstance(served.get("chat_template"), str):
            template = served["chat_template"]
    # a directory without a chat template is a base model and stays one
    if template is not None:
        atomic.write_text(directory / CHAT_TEMPLATE, inference_template(template))


def write_chat_template(directory: Path, template: str) -> None:
    """Write a chat template in place of the one that a directory has, if any."""
    template = inference_template(template)
    atomic.write_text(directory / CHAT_TEMPLATE, template)
    path = directory / TOKENIZER_CONFIG
    if path.is_file():
        _write_json(path, {**json.loads(path.read_bytes()), "chat_template": template})


def inference_template(template: str) -> str:
    """Return a chat template without `{% generation %}`, which plain jinja2 refuses.

    The text that it renders is unchanged.

    Example:
        >>> inference_template("a {%- generation %} b {%- endgeneration %}")
        'a {%- if true %} b {%- endif %}'
    """
    # replaced by another block and not removed, because tags control the whitespace around them
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)


def model_card(
    title: str = "Model",
    text: str = "",
    *,
    base_model: str | None = None,
    relation: Literal["merge", "finetune", "adapter"] = "finetune",
    tags: Sequence[str] = (),
) -> str:
    """Return the text of a model card with the metadata that hubs read.

    Args:
        title: the heading.
        text: Markdown below it.
        base_model: hub name of the base; a local path would not help a reader.
        relation: relation of the model to its base.
        tags: tags besides `jax_ordermerge`.

    Example:
        >>> base = "meta-llama/Llama-2-7b-hf"
        >>> card = model_card("Merge of 4", base_model=base, relation="merge", tags=["merge"])
        >>> print(card)
        ---
        base_model: meta-llama/Llama-2-7b-hf
        library_name: transformers
        pipeline_tag: text-generation
        tags:
        - merge
        - jax_ordermerge
        base_model_relation: merge
        ---
        <BLANKLINE>
        # Merge of 4
        <BLANKLINE>
    """
    from huggingface_hub import ModelCardData

    # ModelCardData takes keys that it does not know, and writes them last
    relations = {"base_model_relation": relation} if base_model else {}
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if relation == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "jax_ordermerge"],
        **relations,  # type: ignore[arg-type]
    )
    body = "\n\n".join(part for part in (f"# {title}", text.strip()) if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _served_tokenizer_config(config: Json, template: str | None) -> Json:
    """Return a tokenizer config that older readers take, with the chat template in it."""
    served = dict(config)
    if served.get("tokenizer_class") == "TokenizersBackend":
        served["tokenizer_class"] = "PreTrainedTokenizerFast"
        extra = served.get("extra_special_tokens")
        # transformers 4 expects a dict under this name, and the list under another
        if isinstance(extra, list):
            del served["extra_special_tokens"]
            if extra:
                served["additional_special_tokens"] = extra
    # newer readers prefer the file, older ones know the config only: both must be the same
    template = served.get("chat_template") if template is None else template
    if isinstance(template, str):
        served["chat_template"] = inference_template(template)
    return served


def _write_json(path: Path, value: Json) -> None:
    atomic.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
