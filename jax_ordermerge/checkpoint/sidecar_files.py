"""What stands beside the tensors in a Hugging Face directory: configs, tokenizer files, model card."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError

TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
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
    """Write every file but the tensors into an existing directory.

    Args:
        directory: an existing directory.
        config: becomes `config.json` and `generation_config.json`, which name the same end-of-sequence tokens.
        dtype: dtype of the tensors, e.g. `"bfloat16"`.
        tokenizer_from: directory to copy tokenizer files from.
        card: text of `README.md`.
        recipe: text of `merge_config.yaml`.
    """
    raw = config.to_hf(dtype)
    # Servers take the sampling values of generation_config.json as their defaults, so it holds token ids only.
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
    """Copy tokenizer files byte for byte, except where a server could not read them.

    `tokenizer_class: TokenizersBackend` (unknown before transformers 5) becomes `PreTrainedTokenizerFast`, the chat template is put
    both in its own file and in `tokenizer_config.json`, and its `{% generation %}` marks (training only) become plain blocks.

    Raises:
        UserError: the source is no directory, or its `tokenizer_config.json` is not a JSON object.
    """
    if not source.is_dir():
        raise UserError(f"directory {source}, to copy the tokenizer from, does not exist")
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            atomic.write_bytes(directory / name, (source / name).read_bytes())
    own, beside = source / TOKENIZER_CONFIG, source / CHAT_TEMPLATE
    template = beside.read_bytes().decode() if beside.is_file() else None
    if own.is_file():
        content = own.read_bytes()
        try:
            given = json.loads(content)
        except ValueError as error:
            raise UserError(f"{own} is not valid JSON: {error}") from error
        if not isinstance(given, dict):
            raise UserError(f"{own}: expected a JSON object, got {type(given).__name__}")
        served = _served_tokenizer_config(given, template)
        if served == given:
            atomic.write_bytes(directory / TOKENIZER_CONFIG, content)
        else:
            _write_json(directory / TOKENIZER_CONFIG, served)
        if isinstance(served.get("chat_template"), str):
            template = served["chat_template"]
    if template is not None:
        atomic.write_bytes(directory / CHAT_TEMPLATE, inference_template(template).encode())


def write_chat_template(directory: Path, template: str) -> None:
    """Put a chat template in place of the one that the tokenizer files of a directory have, if any."""
    atomic.write_bytes(directory / CHAT_TEMPLATE, inference_template(template).encode())
    own = directory / TOKENIZER_CONFIG
    if own.is_file():
        _write_json(
            own, {**json.loads(own.read_bytes()), "chat_template": inference_template(template)}
        )


def inference_template(template: str) -> str:
    """Return a chat template without `{% generation %}`, which plain jinja2 refuses; the text it renders is unchanged.

    Example:
        >>> inference_template("a {%- generation %} b {%- endgeneration %}")
        'a {%- if true %} b {%- endif %}'
    """
    # another block in its place, not nothing: tags steer the whitespace around them
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
        base_model: hub name of the base; leave out a path of this machine.
        relation: what the model is to its base.
        tags: besides `jax_ordermerge`.

    Example:
        >>> print(
        ...     model_card(
        ...         "Merge of 4",
        ...         "By average.",
        ...         base_model="meta-llama/Llama-2-7b-hf",
        ...         relation="merge",
        ...         tags=["merge"],
        ...     )
        ... )
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
        By average.
        <BLANKLINE>
    """
    from huggingface_hub import ModelCardData

    more: dict[str, Any] = {"base_model_relation": relation} if base_model else {}
    data = ModelCardData(
        base_model=base_model,
        library_name="peft" if relation == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=[*tags, "jax_ordermerge"],
        **more,
    )
    body = "\n\n".join(part for part in (f"# {title}", text.strip()) if part)
    return f"---\n{data.to_yaml()}\n---\n\n{body}\n"


def _served_tokenizer_config(given: dict[str, Any], template: str | None) -> dict[str, Any]:
    out = dict(given)
    if out.get("tokenizer_class") == "TokenizersBackend":
        out["tokenizer_class"] = "PreTrainedTokenizerFast"
        extra = out.get("extra_special_tokens")
        if isinstance(
            extra, list
        ):  # transformers 4 takes a dict under this name and the list under the other
            del out["extra_special_tokens"]
            if extra:
                out["additional_special_tokens"] = extra
    if (
        template is not None
    ):  # the file is what newer readers prefer, so older ones must find the same
        out["chat_template"] = template
    if isinstance(out.get("chat_template"), str):
        out["chat_template"] = inference_template(out["chat_template"])
    return out


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
