"""The run directory: which config made it, what is in it, and whole files only."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import atomic, remote
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError

# A run may continue on other hardware or elsewhere; everything else decides its result.
_FREE_TO_CHANGE = (
    "mesh",
    "distributed",
    "output",
    "tracking",
    "samples",
    "compilation_cache",
    "training.log_every",
    "training.keep_checkpoints",
    "training.spike",
)


def read_config(target: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config, or the resolved config of a run directory, either also by its address in a bucket.

    Raises:
        UserError: the file is absent or not valid, or the directory is no run directory.
    """
    url = remote.address(target)
    if url is not None and not url.endswith((".yaml", ".yml")):
        return schema.load_config(remote.fetch(f"{url}/config.yaml"), [*overrides, f"output={url}"])
    path = remote.fetch(target)
    if not path.is_dir():
        return schema.load_config(path, overrides)
    if not (path / "config.yaml").is_file():
        raise UserError(
            f"{path} is not a run directory (it has no config.yaml); give a config file or a run directory"
        )
    return schema.load_config(path / "config.yaml", [*overrides, f"output={path}"])


def model_names(config: Config) -> dict[str, str]:
    """Return `{name: kind}` of every model of an experiment, in the order of the report.

    Example:
        >>> model_names(Config())
        {'base': 'base', 'member_0': 'member', 'member_1': 'member', 'member_2': 'member', 'member_3': 'member',
         'average': 'merge', 'selection': 'merge'}
    """
    names = {"base": "base"} | {f"member_{m}": "member" for m in range(config.population.members)}
    return names | dict.fromkeys(config.merge_names, "merge")


def difference(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `"key: old -> new"` for every key that decides the result and differs.

    Example:
        >>> difference({"seed": 0, "mesh": {"fsdp": 1}}, {"seed": 1, "mesh": {"fsdp": 2}})
        ['seed: 0 -> 1']
    """

    def flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(node, dict):
            for key, value in node.items():
                yield from flat(value, f"{prefix}.{key}" if prefix else key)
        else:
            yield prefix, node

    before, after = dict(flat(old)), dict(flat(new))
    changed = [key for key in sorted(before | after) if before.get(key) != after.get(key)]
    return [
        f"{k}: {before.get(k)} -> {after.get(k)}"
        for k in changed
        if not k.startswith(_FREE_TO_CHANGE)
    ]


def check_same_config(config: Config) -> None:
    """Refuse a run directory that was made with another config.

    Raises:
        UserError: the differences.
    """
    file = config.directory / "config.yaml"
    if not file.is_file():
        return
    changed = difference(yaml.safe_load(file.read_text()), schema.to_dict(config))
    if changed:
        raise UserError(
            f"{config.directory} was made with another config ({'; '.join(changed)});"
            " restore it, or choose another directory with --set output=DIRECTORY"
        )


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path` and rename it when whole. Only process 0 writes.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.json"
        >>> write_json(file, {"x": 1})
        >>> file.read_text()
        '{\\n "x": 1\\n}'
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False))


def write_text(path: Path, text: str) -> None:
    """Write text beside `path` and rename it when whole. Only process 0 writes."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes beside `path` and rename them when whole. Only process 0 writes."""
    import jax

    if jax.process_index() == 0:
        atomic.replace(path, content)


def read_json(path: Path) -> Any:
    """Return the parsed file, or None when it is absent."""
    return json.loads(path.read_text()) if path.is_file() else None
