"""The trained members of a run, read from its last checkpoint: always as dense models, whatever was trained."""

from pathlib import Path

from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources import lora, storage
from jax_ordermerge.tree import Tree, unflatten


def restore_members(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    *,
    dtype: str = "float32",
    directory: Path | None = None,
) -> Tree:
    """Return the trained population [M, ...] from the last checkpoint of a run, cast to `dtype`.

    With `training.ema` these are the averages, with `training.checkpoint = best` what was best of each member.

    Of adapters, that is base + s B A, with the base read from its files, in float32 and rounded once.

    Raises:
        UserError: there is no checkpoint, or the training has not come to its end.
    """
    checkpoints, kept = _last(config, directory)
    numbers = kept.members
    if config.lora is not None:
        return storage.load(
            [_adapted(config, checkpoints, kept, number) for number in numbers], mesh, dtype=dtype
        )
    abstract = convert.abstract_params(model, mesh, members=len(numbers), dtype=dtype)
    return _inside(orbax.restore(checkpoints, kept.step, _under(kept, abstract)), kept)


def restore_member(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    number: int,
    *,
    dtype: str = "float32",
    directory: Path | None = None,
) -> Tree:
    """Return one member, with the bits that it has in `restore_members`; the others are not read.

    Raises:
        UserError: as `restore_members`, and if the member was not trained.
    """
    checkpoints, kept = _last(config, directory)
    place = _place(kept, number, checkpoints)
    if config.lora is not None:
        return storage.load(_adapted(config, checkpoints, kept, number), mesh, dtype=dtype)
    abstract = convert.abstract_params(model, mesh, dtype=dtype)
    return _inside(
        orbax.restore_member(checkpoints, kept.step, place, _under(kept, abstract)), kept
    )


def restore_adapter(
    config: Config, model: ModelConfig, number: int, *, directory: Path | None = None
) -> Tree:
    """Return the adapter of one member of a run with `lora`, float32 on the default device.

    Raises:
        UserError: as `restore_member`, and if the run has no adapters.
    """
    if config.lora is None:
        raise UserError(
            f"{config.directory} has no adapters: it was trained with lora: null; convert its members --to hf"
        )
    checkpoints, kept = _last(config, directory)
    abstract = convert.abstract_tensors(lora.table(model, config.lora))
    place = _place(kept, number, checkpoints)
    return _inside(
        orbax.restore_member(checkpoints, kept.step, place, _under(kept, abstract)), kept
    )


def _last(config: Config, directory: Path | None) -> tuple[Path, storage.FinalCheckpoint]:
    checkpoints = (directory or config.directory) / "checkpoints"
    return checkpoints, storage.final_checkpoint(checkpoints)


def _place(kept: storage.FinalCheckpoint, number: int, checkpoints: Path) -> int:
    if number not in kept.members:
        raise UserError(
            f"member {number} is not in {checkpoints}; it has the members {', '.join(map(str, kept.members))}"
        )
    return kept.members.index(number)


def _adapted(
    config: Config, checkpoints: Path, kept: storage.FinalCheckpoint, number: int
) -> storage.Source:
    assert config.lora is not None
    base = storage.Directory(
        convert.resolve(config.model.base), ignore=config.model.ignore_config_keys
    )
    label = f"{checkpoints.parent}/member_{number}"
    index = kept.members.index(number)
    return lora.open_member(base, checkpoints, index, config.lora, label=label, branch=kept.branch)


def _under(kept: storage.FinalCheckpoint, leaves: Tree) -> Tree:
    return unflatten({kept.branch: leaves})


def _inside(found: Tree, kept: storage.FinalCheckpoint) -> Tree:
    for name in kept.branch.split("/"):
        found = found[name]
    return found
