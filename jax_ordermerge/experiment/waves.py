"""Populations that do not fit the devices at once: trained wave after wave, each as a training of its own, and put together.

A member becomes alone what it becomes among others, so how a population is divided decides nothing but the clock.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import processes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Config
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import MEMORY_FRACTION
from jax_ordermerge.layout import read_json, write_bytes, write_json
from jax_ordermerge.plan import compiled
from jax_ordermerge.train import batches, loop, recorder
from jax_ordermerge.train import benchmark as looks
from jax_ordermerge.train import members as trained
from jax_ordermerge.train.benchmark import StepTiming
from jax_ordermerge.tree import Tree

_FILE = "waves.json"


def train(
    config: Config,
    model: ModelConfig,
    base: Callable[[], Tree],
    examples: Examples,
    mesh: Mesh,
    log: Callable[[str], None],
    *,
    held_out: Examples | None = None,
    saved: Callable[[], None] | None = None,
    sample: loop.Sample | None = None,
) -> None:
    """Fine-tune the members, in as many waves as `population.wave` or the memory of the devices asks for; see `loop.train`."""
    waves = _divided(config, model, mesh, log)
    if len(waves) == 1:
        loop.train(
            config, model, base, examples, mesh, held_out=held_out, sample=sample, saved=saved
        )
        return
    for number, members in enumerate(waves):
        log(f"  wave {number + 1} of {len(waves)}: members {', '.join(map(str, members))}")
        own: dict[str, Any] = {"members": members, "directory": _room(config, number)}
        loop.train(
            config,
            model,
            base,
            examples,
            mesh,
            held_out=held_out,
            sample=sample,
            saved=saved,
            **own,
        )
    _gather(config, len(waves))


def look(
    config: Config,
    model: ModelConfig,
    base: Callable[[], Tree],
    examples: Examples,
    mesh: Mesh,
    count: int,
    profile: Path | None,
) -> StepTiming:
    """Look at the first steps of the training, or of its first wave; see `train/look.py`."""
    members = _divided(config, model, mesh, lambda text: None)[0]
    plan = batches.make_plan(config, examples, members, alike=mesh.size > mesh.shape["order"])
    return looks.look(config, model, base, plan, mesh, count=count, profile=profile)


def restore(config: Config, model: ModelConfig, mesh: Mesh, *, dtype: str = "float32") -> Tree:
    """Return the trained population [M, ...] from the last checkpoint, or from those of all waves; see `members.restore_members`."""
    homes = [_room(config, number) for number in range(len(_known(config)))] or [config.directory]
    found = [
        trained.restore_members(config, model, mesh, dtype=dtype, directory=home) for home in homes
    ]
    if len(found) == 1:
        return found[0]
    shardings = jax.tree.map(lambda x: x.sharding, found[0])
    return jax.jit(
        lambda parts: jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), out_shardings=shardings
    )(found)


def home(config: Config, member: int) -> Path:
    """Return the directory whose checkpoints hold a member: that of its wave, or the run's own."""
    waves = enumerate(_known(config))
    return next(
        (_room(config, number) for number, wave in waves if member in wave), config.directory
    )


def size_of_wave(members: int, groups: int, needs: compiled.Needs, limit: int) -> int:
    """Return how many members are trained at the same time, a multiple of the device groups.

    Args:
        members: of the population.
        groups: size of the mesh axis `order`.
        needs: of training all of them at once.
        limit: bytes of memory a device.

    Raises:
        UserError: not even one member a group fits.

    Example:
        >>> needs = compiled.Needs(arguments=80, temporaries=10, exchanges={}, seconds=0)
        >>> size_of_wave(8, 2, needs, limit=1000), size_of_wave(8, 2, needs, limit=60)
        (8, 4)
    """
    # members of a group are trained one after another: only what is kept of them grows with their number
    fixed = needs.temporaries + needs.shared
    each = (needs.arguments - needs.shared) / (members // groups)
    fitting = math.floor((MEMORY_FRACTION * limit - fixed) / each)
    if fitting < 1:
        raise UserError(
            f"one member needs {(each + fixed) / 2**30:.1f} GiB a device, {limit / 2**30:.1f} are there; divide it over more"
            " devices (mesh.fsdp, mesh.tensor), lower training.microbatch, or set model.remat = full"
        )
    waves = math.ceil(members / groups / fitting)
    return groups * math.ceil(members / groups / waves)


def _divided(
    config: Config, model: ModelConfig, mesh: Mesh, log: Callable[[str], None]
) -> list[list[int]]:
    """Return the members of each wave; what was decided once stays, on whatever devices the training goes on."""
    known = _known(config)
    if known:
        return known
    members, groups = config.population.members, mesh.shape["order"]
    size = config.population.wave
    if size is None:
        limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
        size = members
        if limit and not (config.directory / "checkpoints").is_dir():
            size = size_of_wave(members, groups, _needs(config, model, mesh), limit)
    waves = [list(range(start, min(start + size, members))) for start in range(0, members, size)]
    if len(waves) > 1:
        if (config.directory / "checkpoints").is_dir():
            raise UserError(
                f"{config.directory} holds a training of all members at once; choose another output directory for waves"
            )
        log(f"  {members} members in {len(waves)} waves of {size}")
        with processes.barrier("write waves.json"):
            write_json(config.directory / _FILE, waves)
    return waves


def _needs(config: Config, model: ModelConfig, mesh: Mesh) -> compiled.Needs:
    """Return what training all members at once needs. Where the compiler refuses that, it is reckoned from one member a group."""
    try:
        return compiled.step(config, model, mesh)
    except compiled.TooLarge:
        members, groups = config.population.members, mesh.shape["order"]
        alone = config.model_copy(
            update={"population": config.population.model_copy(update={"wave": groups})}
        )
        try:
            one = compiled.step(alone, model, mesh)
        except compiled.TooLarge as error:
            raise UserError(
                "one member does not fit the devices; divide it over more of them (mesh.fsdp, mesh.tensor), lower"
                f" training.microbatch, or set model.remat = full ({str(error).splitlines()[0][:200]})"
            ) from error
        return dataclasses.replace(
            one, arguments=one.shared + (one.arguments - one.shared) * (members // groups)
        )


def _known(config: Config) -> list[list[int]]:
    """Return the members of each wave, as they were decided; nothing where there are no waves."""
    return read_json(config.directory / _FILE) or []


def _room(config: Config, number: int) -> Path:
    return config.directory / "waves" / str(number)


def _gather(config: Config, count: int) -> None:
    """Write what one training of all members would have written; the state is the last: it says that all is whole."""
    rooms = [_room(config, number) for number in range(count)]
    if jax.process_index() != 0:
        return
    digests: dict[str, Any] = {}
    for room in rooms:
        digests |= json.loads((room / "orders" / "digests.json").read_text())
        for file in sorted((room / "orders").glob("*.npz")):
            write_bytes(config.directory / "orders" / file.name, file.read_bytes())
    write_json(config.directory / "orders" / "digests.json", digests)
    lines = _lines([_read_lines(room / "metrics" / "train.jsonl") for room in rooms])
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    write_bytes(config.directory / "metrics" / "train.jsonl", text.encode())
    answers = [_read_lines(room / "metrics" / "samples.jsonl") for room in rooms]
    if all(answers):
        joined_lines = [
            lines[0]
            | {key: [one for line in lines for one in line[key]] for key in ("members", "texts")}
            for lines in ([wave[step] for wave in answers] for step in answers[0])
        ]
        text = "".join(json.dumps(line) + "\n" for line in joined_lines)
        write_bytes(config.directory / "metrics" / "samples.jsonl", text.encode())
    losses = []
    for room in rooms:
        with np.load(room / "losses" / "train.npz") as saved:
            losses.append(saved["losses"])
            ids = saved["ids"]
    recorder.write_arrays(
        config.directory / "losses" / "train.npz", {"losses": np.concatenate(losses), "ids": ids}
    )
    states = [json.loads((room / "metrics" / "state.json").read_text()) for room in rooms]
    summed = {
        key: sum(state[key] for state in states) for key in ("seconds", "tokens", "compilations")
    }
    joined = {
        key: [one for state in states for one in state[key]]
        for key, value in states[0].items()
        if isinstance(value, list)
    }
    write_json(
        config.directory / "metrics" / "state.json",
        {**states[0], **summed, **joined, "waves": count},
    )


def _read_lines(path: Path) -> dict[int, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return {line["step"]: line for line in map(json.loads, lines)}


def _lines(waves: Sequence[dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put the metrics of one step together: those of members one after another, times added, everything else as in the first wave."""
    found = []
    for step in sorted(set.intersection(*(set(wave) for wave in waves))):
        lines = [wave[step] for wave in waves]
        whole = dict(lines[0])
        for key, value in whole.items():
            if isinstance(value, list):
                whole[key] = [one for line in lines for one in line[key]]
        whole["seconds"] = sum(line["seconds"] for line in lines)
        spent = sum(1 / line["tokens_per_second"] for line in lines if line["tokens_per_second"])
        whole["tokens_per_second"] = len(lines) / spent if spent else 0.0
        found.append(whole)
    return found
