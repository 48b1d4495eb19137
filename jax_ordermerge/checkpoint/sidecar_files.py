"""Files beside the tensors of a Hugging Face directory: configs, tokenizer files, model card."""

import contextlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic, json_files
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json

GENERATION, CARD, RECIPE = "generation_config.json", "README.md", "merge_config.yaml"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
CHAT_TEMPLATE, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
# Inside a directory of Orbax checkpoints, beside the directories of the steps.
CHECKPOINT_TOKENIZER = "tokenizer"
TOKENIZER_FILES = (
    TOKENIZER,  # fast tokenizers
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
    chat_template: str | None = None,
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
        chat_template: text that replaces that of the tokenizer.
        card: text of `README.md`.
        recipe: text of `merge_config.yaml`.
    """
    # written from the config, not copied: keys of the source that are not understood would lie
    json_files.write_json(directory / "config.json", config.to_hf(dtype))
    write_generation_config(directory, config)
    if tokenizer_from is not None:
        copy_tokenizer(Path(tokenizer_from), directory, chat_template)
    atomic.write_text(directory / CARD, model_card() if card is None else card)
    if recipe is not None:
        atomic.write_text(directory / RECIPE, recipe)


def write_generation_config(directory: Path, config: ModelConfig) -> None:
    """Write `generation_config.json`, with the special tokens of a config alone."""
    # servers use sampling values of this file as their defaults, so it holds token ids only
    tokens = {
        key: value
        for key, value in config.to_hf("float32").items()
        if key in ("bos_token_id", "eos_token_id", "pad_token_id") and value is not None
    }
    json_files.write_json(directory / GENERATION, tokens)


def generation_stops(directory: str | Path) -> tuple[int, ...]:
    """Return the end-of-sequence tokens in the `generation_config.json` of a directory, if any.

    Raises:
        UserError: the file is not a JSON object.

    Example:
        >>> generation_stops("nowhere")
        ()
    """
    path = Path(directory) / GENERATION
    eos = json_files.read_json(path).get("eos_token_id") if path.is_file() else None
    # one id is written as an int, several as a list
    return () if eos is None else tuple(eos) if isinstance(eos, list) else (eos,)


def copy_tokenizer(source: Path, directory: Path, chat_template: str | None = None) -> None:
    """Copy tokenizer files byte for byte, except for what a server could not read.

    `tokenizer_class: TokenizersBackend`, unknown before transformers 5, becomes
    `PreTrainedTokenizerFast`. Chat templates are written both to their own files and to
    `tokenizer_config.json`, and their `{% generation %}` marks, for training only, become plain
    blocks.

    Args:
        source: directory with the files of a tokenizer.
        directory: an existing directory.
        chat_template: text that replaces the default chat template of the source.

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
    # a directory without a chat template is a base model and stays one
    templates = {
        name: inference_template(text) for name, text in read_chat_templates(source).items()
    }
    if (source / TOKENIZER_CONFIG).is_file():
        content = (source / TOKENIZER_CONFIG).read_bytes()
        config = json_files.read_json(source / TOKENIZER_CONFIG)
        served = _served_tokenizer_config(config, templates)
        # unchanged files keep their bytes, order and spaces included
        if served == config:
            atomic.write_bytes(directory / TOKENIZER_CONFIG, content)
        else:
            json_files.write_json(directory / TOKENIZER_CONFIG, served)
    _write_template_files(directory, templates)
    if chat_template is not None:
        write_chat_template(directory, chat_template)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has files of a tokenizer."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def tokenizer_in_checkpoint(checkpoints: str | Path) -> Path | None:
    """Return the directory of the tokenizer files inside a directory of Orbax checkpoints, if any.

    `ordermerge convert --to orbax` writes it, so that a checkpoint can be moved.

    Example:
        >>> tokenizer_in_checkpoint("nowhere") is None
        True
    """
    directory = Path(checkpoints) / CHECKPOINT_TOKENIZER
    return directory if directory.is_dir() else None


def add_tokens(directory: Path, entries: Sequence[Json]) -> None:
    """Add tokens to the tokenizer of a directory, in each file that lists added tokens.

    Which of the files a tokenizer reads depends on its class and on the version of transformers:
    Llama's and Qwen2's read `added_tokens_decoder` of `tokenizer_config.json`.

    Args:
        directory: a directory with `tokenizer.json`.
        entries: as in `added_tokens` of `tokenizer.json`, with `id` and `content`.
    """
    path = directory / TOKENIZER
    tokenizer = json_files.read_json(path)
    json_files.write_json(
        path, {**tokenizer, "added_tokens": [*(tokenizer.get("added_tokens") or ()), *entries]}
    )
    path = directory / "added_tokens.json"
    if path.is_file():
        json_files.write_json(
            path, json_files.read_json(path) | {entry["content"]: entry["id"] for entry in entries}
        )
    special = [entry["content"] for entry in entries if entry.get("special")]
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json"):
        path = directory / name
        if not path.is_file():
            continue
        content = json_files.read_json(path)
        # Only where the file has the list: one that lacks it takes added tokens from
        # `tokenizer.json`.
        if "added_tokens_decoder" in content:
            content["added_tokens_decoder"] |= {
                str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
                for entry in entries
            }
        # The first is the name in transformers 4, the second in 5.
        for key in ("additional_special_tokens", "extra_special_tokens"):
            if isinstance(content.get(key), list):
                content[key] = [*content[key], *special]
        json_files.write_json(path, content)


def read_chat_templates(directory: Path) -> dict[str, str]:
    """Return the chat templates of a directory by name, `default` first; empty where it has none.

    As in transformers, templates in files of their own replace those in `tokenizer_config.json`.

    Raises:
        UserError: `tokenizer_config.json` is not a JSON object, or its templates have another form.
    """
    files = {"default": directory / CHAT_TEMPLATE} | {
        path.name.removesuffix(".jinja"): path
        for path in sorted((directory / MORE_TEMPLATES).glob("*.jinja"))
    }
    # read as bytes: text mode would change line ends, which the model sees
    templates = {name: path.read_bytes().decode() for name, path in files.items() if path.is_file()}
    path = directory / TOKENIZER_CONFIG
    if templates or not path.is_file():
        return templates
    entry = json_files.read_json(path).get("chat_template")
    if isinstance(entry, list):
        with contextlib.suppress(KeyError, TypeError):
            entry = {part["name"]: part["template"] for part in entry}
    elif isinstance(entry, str):
        entry = {"default": entry}
    if entry is None:
        return {}
    if not isinstance(entry, dict) or not all(isinstance(text, str) for text in entry.values()):
        raise UserError(
            f"{path}: chat_template is neither a text nor a list of objects with name and template"
        )
    # It becomes the name of a file: `../x` must not lead out of the directory.
    if unusable := [name for name in entry if not re.fullmatch(r"[\w.-]+", name)]:
        raise UserError(f"{path}: {unusable[0]!r} names a chat template and cannot name a file")
    return dict(sorted(entry.items(), key=lambda item: item[0] != "default"))


def write_chat_template(directory: Path, template: str) -> None:
    """Write a chat template in place of the default one that a directory has, if any."""
    default = {"default": inference_template(template)}
    # Twice: first for its place, since `default` comes first, and last for its text.
    templates = default | read_chat_templates(directory) | default
    _write_template_files(directory, templates)
    path = directory / TOKENIZER_CONFIG
    if path.is_file():
        json_files.write_json(path, _served_tokenizer_config(json_files.read_json(path), templates))


def _write_template_files(directory: Path, templates: Mapping[str, str]) -> None:
    for name, text in templates.items():
        if name == "default":
            atomic.write_text(directory / CHAT_TEMPLATE, text)
        else:
            (directory / MORE_TEMPLATES).mkdir(exist_ok=True)
            atomic.write_text(directory / MORE_TEMPLATES / f"{name}.jinja", text)


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
    base_model: str | Sequence[str] | None = None,
    relation: Literal["merge", "finetune", "adapter"] | None = "finetune",
    tags: Sequence[str] = (),
    library: str = "transformers",
    task: str | None = "text-generation",
) -> str:
    """Return the text of a model card with the metadata that hubs read.

    Args:
        title: the heading.
        text: Markdown below it.
        base_model: name of the base, or names of the models that were merged. Paths of this
            machine do not belong here, see `merge.sources.public_names`.
        relation: relation of the model to its base, None where it is only another format.
        tags: tags besides `jax_ordermerge`.
        library: that reads a model which is no adapter.
        task: what the model does, in the words of the hub.

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
    relations = {"base_model_relation": relation} if base_model and relation else {}
    base = base_model if isinstance(base_model, str) else list(base_model or ())
    data = ModelCardData(
        base_model=base or None,
        library_name="peft" if relation == "adapter" else library,
        pipeline_tag=task,
        tags=[*tags, "jax_ordermerge"],
        **relations,  # type: ignore[arg-type]
    )
    body = "\n\n".join(part for part in (f"# {title}", text.strip()) if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _served_tokenizer_config(config: Json, templates: Mapping[str, str]) -> Json:
    """Return a tokenizer config that older readers take, with the chat templates in it."""
    served = dict(config)
    if served.get("tokenizer_class") == "TokenizersBackend":
        served["tokenizer_class"] = "PreTrainedTokenizerFast"
        extra = served.get("extra_special_tokens")
        # transformers 4 expects a dict under this name, and the list under another
        if isinstance(extra, list):
            del served["extra_special_tokens"]
            if extra:
                served["additional_special_tokens"] = extra
    # newer readers prefer the files, older ones know the config only: both must be the same
    if list(templates) == ["default"]:
        served["chat_template"] = templates["default"]
    elif templates:
        served["chat_template"] = [
            {"name": name, "template": text} for name, text in templates.items()
        ]
    return served
