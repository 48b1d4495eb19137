"""Populations that do not fit the devices at once are trained in waves.

Each wave is a training of its own, with the layout of a run below `RunLayout.wave(n)`. In the end
its files are combined into those of one training. A member alone becomes what it becomes in the
population, so how a population is divided decides nothing but the time it takes, and with
`lora.fused` the rounding.
"""

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge import hardware, processes
from jax_ordermerge import layout as layouts
from jax_ordermerge import mesh as meshes
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config.merge import Trajectory
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge import trajectory
from jax_ordermerge.merge.sources import storage
from jax_ordermerge.plan import compiled
from jax_ordermerge.train import batches, benchmark, loop, members
from jax_ordermerge.train.benchmark import StepTiming
from jax_ordermerge.train.programs import LoadBase
from jax_ordermerge.tree import Tree

GIB = 2**30


def train(ctx: RunContext, load_base: LoadBase, sample: loop.Sample | None = None) -> None:
    """Fine-tune the members of a run, in as many waves as needed; see `loop.train`.

    `population.wave` says how many members are trained at once, by default as many as the memory of
    the devices holds.
    """
    # A wave is one call of `loop.train`, which continues or does nothing where it is done: an
    # interrupted training in waves goes on in the wave that it stopped in.
    waves = _divide(ctx)
    for number, wave in enumerate(waves):
        if len(waves) > 1:
            numbers = ", ".join(map(str, wave))
            ctx.log(f"  wave {number + 1} of {len(waves)}: members {numbers}")
        loop.train(
            ctx.training,
            ctx.model,
            load_base,
            ctx.splits["train"],
            ctx.mesh,
            ctx.layout.wave(number) if len(waves) > 1 else ctx.layout,
            members=wave,
            held_out=ctx.splits.get("validation"),
            on_checkpoint=ctx.on_checkpoint,
            sample=sample,
        )
    if len(waves) > 1 and jax.process_index() == 0:
        _combine([ctx.layout.wave(number) for number in range(len(waves))], ctx.layout)


def measure_steps(
    ctx: RunContext, load_base: LoadBase, *, count: int, profile: Path | None
) -> StepTiming:
    """Time the first steps of the training, or of its first wave; see `train/benchmark.py`."""
    wave = _divide(dataclasses.replace(ctx, log=lambda text: None))[0]
    plan = batches.make_plan(ctx.training, ctx.splits["train"], wave, mesh=ctx.mesh)
    return benchmark.measure_steps(
        ctx.model, load_base, plan, ctx.mesh, count=count, profile=profile
    )


def restore(ctx: RunContext, *, dtype: str = "float32", step: int | None = None) -> Tree:
    """Return the trained members [M, ...] of the population; see `members.restore_members`."""
    parts = [
        members.restore_members(ctx.training, ctx.model, ctx.mesh, layout, dtype=dtype, step=step)
        for layout in _training_layouts(ctx)
    ]
    replicates = ctx.config.population.replicates
    if len(parts) == 1 and replicates == 1:
        return parts[0]
    chosen = slice(ctx.members.start, ctx.members.stop)

    def join(parts: list[Tree]) -> Tree:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[chosen], *parts)

    abstract = convert.abstract_params(ctx.model, ctx.mesh, members=len(ctx.members), dtype=dtype)
    params: Tree = jax.jit(join, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(
        parts
    )
    return params


def restore_average(ctx: RunContext, settings: Trajectory, *, dtype: str) -> Tree:
    """Return the members [M, ...], each the weighted mean of its last checkpoints.

    One checkpoint at a time is in memory beside the sum, both in float32.

    Args:
        ctx: of a run with a complete training.
        settings: which checkpoints, and how they are weighted.
        dtype: of the result.

    Raises:
        UserError: the training has fewer checkpoints, or did not keep them.
    """
    steps = merged_steps(ctx, settings)
    shares = trajectory.weights(settings.weights, settings.last)
    return trajectory.average((restore(ctx, step=step) for step in steps), shares, dtype)


def check_checkpoints(ctx: RunContext, averaged: Sequence[Trajectory]) -> None:
    """Refuse averages of checkpoints that the training will not save, or has not kept.

    Args:
        ctx: of the run.
        averaged: what merges or a search ask for.

    Raises:
        UserError: before anything is trained or recorded, which would ask for them ever after.
    """
    if averaged and not ctx.training_layout.training_state.is_file():
        last = max(settings.last for settings in averaged)
        if last > ctx.training.checkpoints_merged:
            raise UserError(
                f"checkpoints.last = {last}: the training would not keep them, since merge of the"
                " config does not name them; put them into merge.auto or merge.methods"
            )
        plan = batches.make_plan(
            ctx.training, ctx.splits["train"], ctx.training.first_wave, mesh=ctx.mesh
        )
        loop.merged_steps(plan)
        return
    for settings in averaged:
        for step in merged_steps(ctx, settings):
            for layout in _training_layouts(ctx):
                storage.final_checkpoint(layout.checkpoints, step=step)


def merged_steps(ctx: RunContext, settings: Trajectory) -> list[int]:
    """Return the steps of the checkpoints that are averaged, the oldest first."""
    # Of a complete training the last checkpoint is that of the last step. All waves have as many
    # steps: their members see the same examples.
    steps = storage.final_checkpoint(_training_layouts(ctx)[0].checkpoints).step
    training = ctx.config.training
    every = training.checkpoint_every or steps // training.epochs
    return trajectory.planned_steps(steps, every, settings.last)


def _training_layouts(ctx: RunContext) -> list[RunLayout]:
    """Return the layouts of the waves, or that of the run where there are none."""
    # of all populations, which are trained as one
    run = ctx.training_layout
    return [run.wave(number) for number in range(len(_stored_waves(run)))] or [run]


def member_layout(layout: RunLayout, member: int) -> RunLayout:
    """Return the layout whose checkpoints hold a member: that of its wave, or of the run."""
    for number, wave in enumerate(_stored_waves(layout)):
        if member in wave:
            return layout.wave(number)
    return layout


# ---------------------------------------------------------------------------------- dividing


def wave_size(members: int, groups: int, needs: compiled.Requirements, limit: float) -> int:
    """Return how many members are trained at once, a multiple of the device groups.

    Args:
        members: members of the population.
        groups: size of the mesh axis `order`.
        needs: memory for training all of them at once.
        limit: bytes per device that may be used (`hardware.memory_limit`).

    Raises:
        UserError: not even one member per group fits.

    Example:
        >>> needs = compiled.Requirements(arguments=80, temporaries=10, collectives={}, seconds=0)
        >>> wave_size(8, 2, needs, limit=1000), wave_size(8, 2, needs, limit=60)
        (8, 4)
    """
    # Members of a group are trained one after another, and only their states grow with their
    # number, unless they are fused.
    count = members // groups
    fixed = needs.temporaries - count * needs.growth + needs.shared
    per_member = (needs.arguments - needs.shared) / count + needs.growth
    fitting = math.floor((limit - fixed) / per_member)
    if fitting < 1:
        raise UserError(
            f"one member needs {(per_member + fixed) / GIB:.1f} GiB per device, there are"
            f" {limit / GIB:.1f}; divide it over more devices (mesh.fsdp, mesh.tensor), lower"
            " training.microbatch, or set model.remat = full"
        )
    # as few waves as fit, of equal size: none takes more memory than it must
    waves = math.ceil(members / groups / fitting)
    return groups * math.ceil(members / groups / waves)


def _divide(ctx: RunContext) -> list[list[int]]:
    """Return the members of each wave."""
    # stays as it was decided, whatever the memory of the devices is now
    stored = _stored_waves(ctx.layout)
    if stored:
        return stored
    population, undivided = ctx.training.population, ctx.layout.checkpoints.is_dir()
    members, size = population.total, population.wave or population.total
    # CPUs have no limit; and a training that was begun undivided did fit
    device = ctx.mesh.local_devices[0]
    limit = hardware.memory_limit(
        hardware.find(device.device_kind), meshes.offered_memory([device])
    )
    if population.wave is None and limit and not undivided:
        size = wave_size(members, ctx.mesh.shape["order"], _requirements(ctx), limit)
    waves = [list(range(start, min(start + size, members))) for start in range(0, members, size)]
    if len(waves) > 1:
        if undivided:
            raise UserError(
                f"{ctx.layout.root} holds a training of all members at once; choose another output"
                " directory for waves"
            )
        ctx.log(f"  {members} members in {len(waves)} waves of {size}")
        # written before anything is trained: member numbers say where a checkpoint is
        with processes.barrier("write the waves"):
            layouts.write_json(ctx.layout.waves, waves)
    return waves


def _requirements(ctx: RunContext) -> compiled.Requirements:
    """Return the memory that training all members at once needs."""
    # Compilers of accelerators refuse a program that does not fit. Then it is computed from the
    # needs of one member per group: only the states grow with the members, and, where members are
    # fused, temporaries.
    count = ctx.training.population.total // ctx.mesh.shape["order"]
    try:
        needs = _compile_step(ctx, count)
        if not ctx.training.is_fused or count == 1:
            return needs
        growth = (needs.temporaries - _compile_step(ctx, 1).temporaries) // (count - 1)
        return dataclasses.replace(needs, growth=max(growth, 0))
    except compiled.TooLarge:
        pass
    try:
        needs = _compile_step(ctx, 1)
    except compiled.TooLarge as error:
        raise UserError(
            "one member does not fit the devices; divide it over more of them (mesh.fsdp,"
            " mesh.tensor), lower training.microbatch, or set model.remat = full"
            f" ({str(error).splitlines()[0][:200]})"
        ) from error
    growth = _growth(ctx, needs) if ctx.training.is_fused else 0
    return dataclasses.replace(
        needs,
        arguments=needs.shared + (needs.arguments - needs.shared) * count,
        temporaries=needs.temporaries + (count - 1) * growth,
        growth=growth,
    )


def _compile_step(ctx: RunContext, count: int) -> compiled.Requirements:
    """Return what the training step needs with `count` members per device group."""
    wave = count * ctx.mesh.shape["order"]
    population = ctx.training.population.model_copy(update={"wave": wave})
    spec = dataclasses.replace(ctx.training, population=population)
    return compiled.step_requirements(spec, ctx.model, ctx.mesh)


def _growth(ctx: RunContext, single: compiled.Requirements) -> int:
    """Return by how much a second fused member raises the temporaries of a single one."""
    try:
        return max(_compile_step(ctx, 2).temporaries - single.temporaries, 0)
    except compiled.TooLarge:
        return sys.maxsize  # so that one member per group is what fits


def _stored_waves(layout: RunLayout) -> list[list[int]]:
    """Return the members of each wave as they were decided; [] where there are no waves."""
    return layouts.read_json(layout.waves) or []


# ---------------------------------------------------------------------------------- combining


def _combine(waves: Sequence[RunLayout], layout: RunLayout) -> None:
    """Write what one training of all members would have written."""
    # orders, with the same bytes
    digests: dict[str, list[str]] = {}
    for wave in waves:
        digests |= layouts.read_json(wave.order_digests)
        for path in wave.member_orders():
            layouts.write_bytes(layout.orders / path.name, path.read_bytes())
    layouts.write_json(layout.order_digests, digests)

    # Rows of metrics and of generated samples. A wave may lack rows: it is free to log at other
    # steps when it continues.
    logs = [_rows_by_step(wave.training_log) for wave in waves]
    common_steps = sorted(set.intersection(*map(set, logs)))
    rows = [_combine_metrics([log[step] for log in logs]) for step in common_steps]
    layouts.write_jsonl(layout.training_log, rows)
    samples = [_rows_by_step(wave.generated_samples) for wave in waves]
    if all(samples):
        # the prompts are a list too, but the same for all members
        rows = [
            _concatenate([wave[step] for wave in samples], ("members", "texts"))
            for step in samples[0]
        ]
        layouts.write_jsonl(layout.generated_samples, rows)

    # losses of samples
    losses = [layouts.read_npz(wave.training_losses) for wave in waves]
    arrays = {
        "losses": np.concatenate([wave["losses"] for wave in losses]),
        "ids": losses[0]["ids"],
    }
    layouts.write_npz(layout.training_losses, arrays)

    # the state comes last: where it exists, everything is complete
    states = [layouts.read_json(wave.training_state) for wave in waves]
    state = _concatenate(states)
    for key in ("seconds", "tokens", "compilations"):
        state[key] = sum(wave[key] for wave in states)
    layouts.write_json(layout.training_state, state | {"waves": len(waves)})


def _rows_by_step(path: Path) -> dict[int, Json]:
    return {row["step"]: row for row in layouts.read_jsonl(path)}


def _combine_metrics(rows: Sequence[Json]) -> Json:
    """Combine the rows of one step: members are concatenated, times are added."""
    combined = _concatenate(rows)
    combined["seconds"] = sum(row["seconds"] for row in rows)
    # waves of equal work, one after another: the harmonic mean of their speeds
    seconds_per_token = sum(
        1 / row["tokens_per_second"] for row in rows if row["tokens_per_second"]
    )
    combined["tokens_per_second"] = len(rows) / seconds_per_token if seconds_per_token else 0.0
    return combined


def _concatenate(rows: Sequence[Json], keys: Iterable[str] | None = None) -> Json:
    """Return the first row, with the lists of all rows concatenated under `keys`, or all keys."""
    # a list has a value per member, and everything else is the same in all waves or added apart
    if keys is None:
        keys = [key for key, value in rows[0].items() if isinstance(value, list)]
    lists = {key: list(itertools.chain.from_iterable(row[key] for row in rows)) for key in keys}
    return rows[0] | lists
