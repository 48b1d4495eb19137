"""The trained members of a run, read from its last checkpoint.

They are dense models, whatever was trained. Averages of the weights (`training.ema`) or the best
weights (`training.checkpoint = best`) are the members where the training stored them.
"""

import functools
import operator

from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout, member_name
from jax_ordermerge.merge.sources import lora, storage
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.tree import Tree, unflatten


def restore_members(
    spec: TrainingSpec,
    model: ModelConfig,
    mesh: Mesh,
    layout: RunLayout,
    *,
    dtype: str = "float32",
    step: int | None = None,
) -> Tree:
    """Return the trained population [M, ...] of a run, cast to `dtype`.

    A member with adapters is base + s B A, with the base read from its files.

    Args:
        spec, model, mesh, layout: of the run.
        dtype: of the population.
        step: of an earlier checkpoint of the complete training; None is the last.

    Raises:
        UserError: there is no checkpoint, the training has not come to its end, or the earlier
            checkpoint was not kept.
    """
    final = storage.final_checkpoint(layout.checkpoints, step=step)
    # Through the same reader as a merge of files: base and adapter are added on the host in float32
    # and rounded once, so a member has the same bits in memory and in files.
    if spec.lora is not None:
        sources = [_adapted(spec, spec.lora, layout, final, m) for m in final.members]
        return storage.load(sources, mesh, dtype=dtype)
    members = len(final.members)
    abstract = convert.abstract_params(model, mesh, members=members, dtype=dtype)
    # Only the branch of the members: the moments of the optimizer take twice their memory.
    checkpoint = orbax.restore(layout.checkpoints, final.step, unflatten({final.branch: abstract}))
    return _branch(checkpoint, final)


def restore_member(
    spec: TrainingSpec,
    model: ModelConfig,
    mesh: Mesh,
    layout: RunLayout,
    member: int,
    *,
    dtype: str = "float32",
) -> Tree:
    """Return one member, with the bits that it has in `restore_members`. No other one is read.

    Raises:
        UserError: as `restore_members`, and if the member was not trained.
    """
    # with adapters the base is read too, through the same reader as in `restore_members`
    if spec.lora is not None:
        final = storage.final_checkpoint(layout.checkpoints)
        return storage.load(_adapted(spec, spec.lora, layout, final, member), mesh, dtype=dtype)
    return _read_member(layout, member, convert.abstract_params(model, mesh, dtype=dtype))


def restore_adapter(
    spec: TrainingSpec,
    model: ModelConfig,
    layout: RunLayout,
    member: int,
    *,
    step: int | None = None,
) -> Tree:
    """Return the adapter of one member of a run with `lora`, float32 on the default device.

    Raises:
        UserError: as `restore_members`, if the member was not trained, and if the run has no
            adapters.
    """
    if spec.lora is None:
        raise UserError(
            f"{layout.root} has no adapters: it was trained with lora: null;"
            " convert its members --to hf"
        )
    abstract = convert.abstract_tensors(lora.table(model, spec.lora))
    return _read_member(layout, member, abstract, step)


def _read_member(layout: RunLayout, member: int, abstract: Tree, step: int | None = None) -> Tree:
    # A member is a row of every array of the checkpoint; Orbax reads the chunks of that row alone.
    final = storage.final_checkpoint(layout.checkpoints, step=step)
    checkpoint = orbax.restore_member(
        layout.checkpoints,
        final.step,
        _index(final, member, layout),
        unflatten({final.branch: abstract}),
    )
    return _branch(checkpoint, final)


def _adapted(
    spec: TrainingSpec,
    settings: Lora,
    layout: RunLayout,
    final: storage.FinalCheckpoint,
    member: int,
) -> storage.Source:
    base = storage.Directory(convert.resolve(spec.model.base), ignore=spec.model.ignore_config_keys)
    label = f"{layout.root}/{member_name(member)}"
    index = _index(final, member, layout)
    return lora.open_member(
        base,
        layout.checkpoints,
        index,
        settings,
        label=label,
        branch=final.branch,
        step=final.step,
    )


def _index(final: storage.FinalCheckpoint, member: int, layout: RunLayout) -> int:
    if member not in final.members:
        raise UserError(
            f"member {member} is not in {layout.checkpoints}; it has the members"
            f" {', '.join(map(str, final.members))}"
        )
    return final.members.index(member)


def _branch(checkpoint: Tree, final: storage.FinalCheckpoint) -> Tree:
    # "best/weights" is the branch `checkpoint["best"]["weights"]`
    return functools.reduce(operator.getitem, final.branch.split("/"), checkpoint)
