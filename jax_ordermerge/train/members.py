"""The trained members of a run, read from its last checkpoint: always as dense models, whatever was trained."""

from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import lora, sources
from jax_ordermerge.tree import Tree, unflatten


def restore_members(
    config: Config, model: ModelConfig, mesh: Mesh, *, dtype: str = "float32", directory: Path | None = None
) -> Tree:
    """Return the trained population [M, ...] from the last checkpoint of a run, cast to `dtype`; with `training.ema`, the averages.

    Of adapters, that is base + s B A, with the base read from its files, in float32 and rounded once.

    Raises:
        UserError: there is no checkpoint, or the training has not come to its end.
    """
    checkpoints, step, kept = _finished(config, directory)
    numbers = kept["members"]
    if config.lora is not None:
        return sources.load([_adapted(config, checkpoints, kept, number) for number in numbers], mesh, dtype=dtype)
    abstract = convert.abstract_params(model, mesh, members=len(numbers), dtype=dtype)
    return _inside(orbax.restore(checkpoints, step, _under(kept, abstract)), kept)


def restore_member(
    config: Config, model: ModelConfig, mesh: Mesh, number: int, *, dtype: str = "float32", directory: Path | None = None
) -> Tree:
    """Return one member, with the bits that it has in `restore_members`; the others are not read.

    Raises:
        UserError: as `restore_members`, and if the member was not trained.
    """
    checkpoints, step, kept = _finished(config, directory)
    place = _place(kept, number, checkpoints)
    if config.lora is not None:
        return sources.load(_adapted(config, checkpoints, kept, number), mesh, dtype=dtype)
    abstract = convert.abstract_params(model, mesh, dtype=dtype)
    return _inside(orbax.restore_member(checkpoints, step, place, _under(kept, abstract)), kept)


def restore_adapter(config: Config, model: ModelConfig, number: int, *, directory: Path | None = None) -> Tree:
    """Return the adapter of one member of a run with `lora`, float32 on the default device.

    Raises:
        UserError: as `restore_member`, and if the run has no adapters.
    """
    if config.lora is None:
        raise UserError(f"{config.directory} has no adapters: it was trained with lora: null; convert its members --to hf")
    checkpoints, step, kept = _finished(config, directory)
    abstract = convert.abstract_tensors(lora.table(model, config.lora))
    place = _place(kept, number, checkpoints)
    return _inside(orbax.restore_member(checkpoints, step, place, _under(kept, abstract)), kept)


def _finished(config: Config, directory: Path | None) -> tuple[Path, int, dict[str, Any]]:
    checkpoints = (directory or config.directory) / "checkpoints"
    step = orbax.latest(checkpoints)
    if step is None:
        raise UserError(f"no checkpoint in {checkpoints}; run the training first")
    kept = orbax.metadata(checkpoints, step)
    if step < kept["steps"]:
        raise UserError(f"the training in {checkpoints} stands at step {step} of {kept['steps']}; run it again to continue")
    return checkpoints, step, kept


def _place(kept: dict[str, Any], number: int, checkpoints: Path) -> int:
    if number not in kept["members"]:
        known = ", ".join(map(str, kept["members"]))
        raise UserError(f"member {number} is not in {checkpoints}; it has the members {known}")
    return kept["members"].index(number)


def _adapted(config: Config, checkpoints: Path, kept: dict[str, Any], number: int) -> sources.Source:
    assert config.lora is not None
    base = sources.Directory(convert.resolve(config.model.base), ignore=config.model.ignore_config_keys)
    label = f"{checkpoints.parent}/member_{number}"
    return lora.Trained(base, checkpoints, kept["members"].index(number), config.lora, label, _branch(kept))


def _branch(kept: dict[str, Any]) -> str:
    """Return where in the checkpoint the members lie: the averages, where the training kept them."""
    return kept.get("weights", "params")


def _under(kept: dict[str, Any], leaves: Tree) -> Tree:
    return unflatten({_branch(kept): leaves})


def _inside(found: Tree, kept: dict[str, Any]) -> Tree:
    for name in _branch(kept).split("/"):
        found = found[name]
    return found
