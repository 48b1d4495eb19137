"""What a name of a model stands for: a directory, a hub name, RUN/member_3, an Orbax directory, or one of these with `+ADAPTER`."""

import re
from collections.abc import Callable
from pathlib import Path

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import convert, orbax, remote
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources import lora, storage
from jax_ordermerge.merge.sources.storage import Source

Resolve = Callable[[str], Path]
_MEMBER = re.compile(r"member_(\d+)")


def open_model(
    name: str, adapter: str | None = None, *, resolve: Resolve = convert.resolve
) -> Source:
    """Open the model that a name stands for, with everything about it checked that can be checked without reading its tensors.

    Args:
        name: a Hugging Face directory or hub name; `RUN/member_3`, a member of a run of this project; an Orbax directory made by
            `ordermerge convert --to orbax`; or one of these and an adapter, `NAME+ADAPTER`. A name that exists is taken as it is.
        adapter: a LoRA adapter, directory or hub name, where it is not part of the name.
        resolve: finds the directory of a name, by default as `convert.resolve`.

    Raises:
        UserError: there is no such model, or it is not complete.

    Example:
        >>> open_model("embedded:quickstart").config.num_layers
        3
    """
    if adapter is None and "+" in name and not Path(name).expanduser().exists():
        name, _, adapter = name.partition("+")
        if not name or not adapter or "+" in adapter:
            raise UserError(
                f"model {name}+{adapter}: expected MODEL or MODEL+ADAPTER, with one adapter"
            )
    if adapter is None:
        return _open_base(name, resolve)
    return lora.LoRA(_open_base(name, resolve), resolve(adapter), f"{name}+{adapter}")


def _open_base(name: str, resolve: Resolve) -> Source:
    path = Path(name).expanduser()
    member = _MEMBER.fullmatch(path.name)
    in_bucket = remote.address(name) is not None
    if in_bucket:
        path = remote.fetch(path.parent) / path.name if member else remote.fetch(path)
    if member and not path.exists() and (path.parent / "config.yaml").is_file():
        return _open_member(path.parent, int(member[1]), name)
    if "@" in name and not path.exists():
        raise UserError(
            f"model {name}: a revision (@) is not offered; download it and give the directory"
        )
    path = path if in_bucket else resolve(name)
    if (path / "config.yaml").is_file() and (path / "checkpoints").is_dir():
        raise UserError(f"{name} is a run; name one of its members, as in {name}/member_0")
    if lora.is_adapter(path):
        raise UserError(
            f"{name} is an adapter; give the model that it belongs to as well, BASE+{name}"
        )
    if not (path / "config.json").is_file() and orbax.latest(path) is not None:
        return storage.Orbax(path, name)
    return storage.Directory(path, name)


def _open_member(run: Path, number: int, label: str) -> Source:
    """Open a member of a run whose training has come to its end."""
    settings = schema.load_config(run / "config.yaml", [f"output={run}"])
    checkpoints = _checkpoints(run, number)
    kept = storage.finished(checkpoints, label)
    if number not in kept.members:
        raise UserError(
            f"{label} does not exist; the run has the members {', '.join(map(str, kept.members))}"
        )
    base = convert.resolve(settings.model.base)
    place, branch = kept.members.index(number), kept.branch
    if settings.lora is not None:
        held = storage.Directory(base, ignore=settings.model.ignore_config_keys)
        return lora.Trained(held, checkpoints, place, settings.lora, label, branch)
    config = convert.load_config(base, settings.model.ignore_config_keys)
    return storage.Member(checkpoints, place, config, tokenizer=base, label=label, branch=branch)


def _checkpoints(run: Path, number: int) -> Path:
    """Return the checkpoints that hold a member: a population may have been trained in waves."""
    for one in sorted((run / "waves").glob("*/checkpoints")):
        step = orbax.latest(one)
        if step is not None and number in orbax.metadata(one, step).get("members", ()):
            return one
    return run / "checkpoints"
