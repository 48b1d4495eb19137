"""What a checkpoint of a training holds, and how a training continues from it.

A checkpoint has the branches `params`, `optimizer`, `step` and `losses`, and `best` where
validation losses are measured. Its metadata identify the training.
"""

import hashlib
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge.checkpoint.orbax import Checkpoints
from jax_ordermerge.config import fixed_settings
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.train import validation
from jax_ordermerge.train.programs import Programs
from jax_ordermerge.train.recorder import Recorder
from jax_ordermerge.train.step import TrainState
from jax_ordermerge.train.validation import Best

# Settings of adapters that are stored in the open and not only in the digest: for a reader of the
# checkpoint, and so that a message can name what differs.
_LORA_SHAPE = {"rank", "alpha", "rslora", "targets"}


def identity(programs: Programs) -> Json:
    """Return everything that decides the result of a training, as JSON."""
    # The mesh is not in it: a training may continue on other devices. Padded lengths and `remat`
    # are: they change the order of floating point additions, so the bits.
    spec, plan = programs.spec, programs.plan
    deciding: Json = {
        "training": fixed_settings(spec.training),
        "model": spec.model.model_dump(mode="json", include={"compute_dtype", "remat"}),
        "objective": spec.objective.model_dump(mode="json"),
        "architecture": repr(programs.model),
        "lengths": plan.lengths,
    }
    lora = None
    if spec.lora is not None:
        # only where it differs from before, so that a training that was begun before can continue
        settings = spec.lora.model_dump(mode="json", exclude={"base_block"})
        if not settings["fused"]:
            del settings["fused"]
        deciding |= {"lora": settings, "base_dtype": spec.base_dtype}
        if spec.lora.quantizes:
            deciding["base_block"] = spec.lora.block
        lora = spec.lora.model_dump(mode="json", include=_LORA_SHAPE)
    # as above
    if spec.population.vary != "order":
        deciding["vary"] = spec.population.vary
    # they may change the order of additions
    options = {"compiler_preset", "compiler_options"}
    deciding["model"] |= spec.model.model_dump(mode="json", include=options, exclude_defaults=True)
    if programs.held_out:
        deciding["validation"] = programs.held_out.digest
    return {
        "members": list(plan.members),
        "population": spec.population.total,
        "seed": spec.seed,
        "level": spec.population.level,
        "orders": plan.digests,
        "data": plan.examples.digest,
        "lora": lora,
        "config": hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest(),
    }


def check_same(checkpoints: Checkpoints, done: int, programs: Programs) -> None:
    """Refuse a checkpoint of another training.

    Raises:
        UserError: the first thing that differs is named.
    """
    metadata = checkpoints.metadata(done)
    for name, value in identity(programs).items():
        if metadata.get(name) != value:
            raise UserError(
                f"checkpoint {done} in {checkpoints.directory.parent} is of another training"
                f" ({name} differs); choose another output directory"
            )


def checkpoint_bytes(programs: Programs) -> int:
    """Return the bytes of a checkpoint, of all members and processes together."""
    # the losses by sample are small beside the arrays of the members
    leaves = jax.tree.leaves((programs.state, programs.best if programs.held_out else ()))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def save(
    checkpoints: Checkpoints,
    done: int,
    programs: Programs,
    recorder: Recorder,
    state: TrainState,
    best: Best,
) -> float:
    """Start saving a checkpoint after `done` steps; return the seconds waited for the last one."""
    # a copy: the checkpoint is written while the next steps fill in their losses
    losses = jax.make_array_from_callback(
        recorder.losses.shape,
        NamedSharding(programs.mesh, P()),
        lambda index: recorder.losses[index].copy(),
    )
    tree = {
        "params": state.params,
        "optimizer": state.opt_state,
        "step": state.step,
        "losses": losses,
    }
    if programs.held_out:
        tree["best"] = best
    metadata = {
        **identity(programs),
        "settings": dict(programs.spec.settings),  # in the open, so that a reader can name them
        "steps": programs.plan.steps,
        "weights": programs.members_branch,
        "mesh": dict(programs.mesh.shape),  # for the reader alone
        "recorder": recorder.to_metadata(),
    }
    return checkpoints.save(done, tree, metadata)


def restore(
    checkpoints: Checkpoints, done: int, programs: Programs, recorder: Recorder
) -> tuple[TrainState | None, Best]:
    """Restore a checkpoint, onto the mesh of this session.

    Returns:
        The state, and the best weights. Of a complete training the state is None and the best
        weights are `{}`: no weights are read.
    """
    losses = jax.ShapeDtypeStruct(
        recorder.losses.shape, jnp.float32, sharding=NamedSharding(programs.mesh, P())
    )
    # Of a complete training only its records are read, which may happen where no device has the
    # memory for its state.
    wanted: Json = {"losses": losses}
    complete = done == programs.plan.steps
    if not complete:
        abstract = programs.state
        wanted |= {
            "params": abstract.params,
            "optimizer": abstract.opt_state,
            "step": abstract.step,
        }
    if programs.held_out:
        wanted["best"] = programs.best._replace(weights={}) if complete else programs.best
    restored = checkpoints.restore(done, wanted)
    recorder.restore(np.asarray(restored["losses"]), checkpoints.metadata(done)["recorder"])
    best = restored["best"] if programs.held_out else validation.initial(programs.best)
    if complete:
        return None, best
    return TrainState(restored["params"], restored["optimizer"], restored["step"]), best
