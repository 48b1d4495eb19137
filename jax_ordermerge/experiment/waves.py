"""Populations that do not fit the devices at once are trained in waves.

Each wave is a training of its own, with the layout of a run below `RunLayout.wave(n)`. In the end
its files are combined into those of one training. A member alone becomes what it becomes in the
population, so how a population is divided decides nothing but the time it takes.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import layout as layouts
from jax_ordermerge import processes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import MEMORY_FRACTION
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.plan import compiled
from jax_ordermerge.train import batches, benchmark, loop, members
from jax_ordermerge.train.benchmark import StepTiming
from jax_ordermerge.train.programs import LoadBase
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.tree import Tree

GIB = 2**30


def train(
    spec: TrainingSpec,
    model: ModelConfig,
    base: LoadBase,
    examples: Examples,
    mesh: Mesh,
    layout: RunLayout,
    *,
    log: Callable[[str], None],
    held_out: Examples | None = None,
    on_checkpoint: Callable[[], None] | None = None,
    sample: loop.Sample | None = None,
) -> None:
    """Fine-tune the members, in as many waves as needed; see `loop.train`.

    `population.wave` says how many members are trained at once, by default as many as the memory of
    the devices holds.
    """
    # A wave is one call of `loop.train`, which continues or does nothing where it is done: an
    # interrupted training in waves goes on in the wave that it stopped in.
    waves = _divide(spec, model, mesh, layout, log)
    for number, wave in enumerate(waves):
        if len(waves) > 1:
            numbers = ", ".join(map(str, wave))
            log(f"  wave {number + 1} of {len(waves)}: members {numbers}")
        loop.train(
            spec,
            model,
            base,
            examples,
            mesh,
            layout.wave(number) if len(waves) > 1 else layout,
            members=wave,
            held_out=held_out,
            on_checkpoint=on_checkpoint,
            sample=sample,
        )
    if len(waves) > 1 and jax.process_index() == 0:
        _combine([layout.wave(number) for number in range(len(waves))], layout)


def measure_steps(
    spec: TrainingSpec,
    model: ModelConfig,
    base: LoadBase,
    examples: Examples,
    mesh: Mesh,
    layout: RunLayout,
    *,
    count: int,
    profile: Path | None,
) -> StepTiming:
    """Time the first steps of the training, or of its first wave; see `train/benchmark.py`."""
    wave = _divide(spec, model, mesh, layout, lambda text: None)[0]
    plan = batches.make_plan(spec, examples, wave, mesh=mesh)
    return benchmark.measure_steps(model, base, plan, mesh, count=count, profile=profile)


def restore(
    spec: TrainingSpec,
    model: ModelConfig,
    mesh: Mesh,
    layout: RunLayout,
    *,
    dtype: str = "float32",
) -> Tree:
    """Return the trained population [M, ...]; see `members.restore_members`."""
    waves = range(len(_stored_waves(layout)))
    populations = [
        members.restore_members(spec, model, mesh, wave_layout, dtype=dtype)
        for wave_layout in map(layout.wave, waves)
    ]
    if not populations:  # all members were trained at once
        return members.restore_members(spec, model, mesh, layout, dtype=dtype)
    shardings = jax.tree.map(lambda x: x.sharding, populations[0])
    concatenate = jax.jit(
        lambda parts: jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts),
        out_shardings=shardings,
    )
    return concatenate(populations)


def member_layout(layout: RunLayout, member: int) -> RunLayout:
    """Return the layout whose checkpoints hold a member: that of its wave, or of the run."""
    for number, wave in enumerate(_stored_waves(layout)):
        if member in wave:
            return layout.wave(number)
    return layout


# ---------------------------------------------------------------------------------- dividing


def wave_size(members: int, groups: int, needs: compiled.Requirements, limit: int) -> int:
    """Return how many members are trained at once, a multiple of the device groups.

    Args:
        members: members of the population.
        groups: size of the mesh axis `order`.
        needs: memory for training all of them at once.
        limit: bytes of memory per device.

    Raises:
        UserError: not even one member per group fits.

    Example:
        >>> needs = compiled.Requirements(arguments=80, temporaries=10, collectives={}, seconds=0)
        >>> wave_size(8, 2, needs, limit=1000), wave_size(8, 2, needs, limit=60)
        (8, 4)
    """
    # Members of a group are trained one after another: only their states grow with their number.
    fixed = needs.temporaries + needs.shared
    per_member = (needs.arguments - needs.shared) / (members // groups)
    fitting = math.floor((MEMORY_FRACTION * limit - fixed) / per_member)
    if fitting < 1:
        raise UserError(
            f"one member needs {(per_member + fixed) / GIB:.1f} GiB per device, there are"
            f" {limit / GIB:.1f}; divide it over more devices (mesh.fsdp, mesh.tensor), lower"
            " training.microbatch, or set model.remat = full"
        )
    # waves of equal size, not full ones and a small rest: the slowest wave is what takes time
    waves = math.ceil(members / groups / fitting)
    return groups * math.ceil(members / groups / waves)


def _divide(
    spec: TrainingSpec,
    model: ModelConfig,
    mesh: Mesh,
    layout: RunLayout,
    log: Callable[[str], None],
) -> list[list[int]]:
    """Return the members of each wave."""
    # stays as it was decided, whatever the memory of the devices is now
    stored = _stored_waves(layout)
    if stored:
        return stored
    members, groups = spec.population.members, mesh.shape["order"]
    undivided = layout.checkpoints.is_dir()
    size = spec.population.wave
    if size is None:
        # CPUs have no limit; and a training that was begun undivided did fit
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        size = members
        if limit and not undivided:
            size = wave_size(members, groups, _memory_needs(spec, model, mesh), limit)
    waves = [list(range(start, min(start + size, members))) for start in range(0, members, size)]
    if len(waves) > 1:
        if undivided:
            raise UserError(
                f"{layout.root} holds a training of all members at once; choose another output"
                " directory for waves"
            )
        log(f"  {members} members in {len(waves)} waves of {size}")
        # written before anything is trained: member numbers say where a checkpoint is
        with processes.barrier("write the waves"):
            layouts.write_json(layout.waves, waves)
    return waves


def _memory_needs(spec: TrainingSpec, model: ModelConfig, mesh: Mesh) -> compiled.Requirements:
    """Return what training all members at once needs."""
    # Compilers of accelerators refuse a program that does not fit. Then it is computed from the
    # needs of one member per group: only the states grow with the members.
    try:
        return compiled.step_requirements(spec, model, mesh)
    except compiled.TooLarge:
        members, groups = spec.population.members, mesh.shape["order"]
        smallest = spec.population.model_copy(update={"wave": groups})
        try:
            needs = compiled.step_requirements(
                dataclasses.replace(spec, population=smallest), model, mesh
            )
        except compiled.TooLarge as error:
            raise UserError(
                "one member does not fit the devices; divide it over more of them (mesh.fsdp,"
                " mesh.tensor), lower training.microbatch, or set model.remat = full"
                f" ({str(error).splitlines()[0][:200]})"
            ) from error
        states = (needs.arguments - needs.shared) * (members // groups)
        return dataclasses.replace(needs, arguments=needs.shared + states)


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
    state = _concatenate(
        states, [key for key, value in states[0].items() if isinstance(value, list)]
    )
    for key in ("seconds", "tokens", "compilations"):
        state[key] = sum(wave[key] for wave in states)
    layouts.write_json(layout.training_state, state | {"waves": len(waves)})


def _rows_by_step(path: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in layouts.read_jsonl(path)}


def _combine_metrics(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combine the rows of one step: members are concatenated, times are added."""
    combined = _concatenate(
        rows, [key for key, value in rows[0].items() if isinstance(value, list)]
    )
    combined["seconds"] = sum(row["seconds"] for row in rows)
    # waves of equal work, one after another: the harmonic mean of their speeds
    seconds_per_token = sum(
        1 / row["tokens_per_second"] for row in rows if row["tokens_per_second"]
    )
    combined["tokens_per_second"] = len(rows) / seconds_per_token if seconds_per_token else 0.0
    return combined


def _concatenate(rows: Sequence[dict[str, Any]], keys: Iterable[str]) -> dict[str, Any]:
    """Return the first row, with the lists of all rows concatenated under some keys."""
    lists = {key: list(itertools.chain.from_iterable(row[key] for row in rows)) for key in keys}
    return rows[0] | lists
