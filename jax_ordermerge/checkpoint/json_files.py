"""JSON files of model directories: configs, tokenizers, indices."""

import json
from pathlib import Path

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json


def read_json(path: Path) -> Json:
    """Return the object in a JSON file of a model directory.

    Raises:
        UserError: the file is absent, not JSON, or not an object.
    """
    try:
        # Bytes, since `json` knows UTF-16 and a byte order mark of UTF-8 by them.
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a complete Hugging Face directory"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def write_json(path: Path, value: Json) -> None:
    """Write an object through to the disk, for use inside `atomic.new_directory`.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(file, {"vocab_size": 3})
        >>> read_json(file)
        {'vocab_size': 3}
    """
    # indented as in transformers, but not escaped: tokens stay readable
    atomic.write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
