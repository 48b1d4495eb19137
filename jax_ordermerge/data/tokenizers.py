"""The tokenizer of a base model, from its directory."""

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from jax_ordermerge.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For packages that may not import transformers. As text, since that import takes seconds.
Tokenizer: TypeAlias = "PreTrainedTokenizerBase"


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
    """Let transformers be imported without torch, for which a tokenizer has no use.

    Where torch is installed, the import of it takes two seconds. For processes that run no model of
    transformers: it will not look for torch again.
    """
    if {"transformers", "torch"} & set(sys.modules):
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]  # its import fails
    try:
        yield
    finally:
        del sys.modules["torch"]


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a Hugging Face directory from local files, without running its code.

    Raises:
        UserError: the directory or its tokenizer is absent or cannot be read.
    """
    # its import warns where torch is absent, which no tokenizer needs
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # slow to import

    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(
            f"tokenizer directory {directory} not found; give the Hugging Face directory of the"
            " base model"
        )
    # transformers asks for tiktoken, which does not read this file either
    only_model = (folder / "tokenizer.model").is_file() and not (
        (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    )
    if only_model and importlib.util.find_spec("sentencepiece") is None:
        raise UserError(
            f"{directory} has only tokenizer.model, which needs sentencepiece; install it, or copy"
            " the tokenizer.json of the base model"
        )
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / name).is_file() for name in files):
        raise UserError(
            f"{directory} has no tokenizer (tokenizer.json, tokenizer.model or vocab.json);"
            " copy that of the base model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises errors of many kinds on a broken file
        raise UserError(
            f"the tokenizer in {directory} cannot be read: {first_line(error)}"
        ) from error
    return tokenizer
