"""Other settings for the same experiment on the same devices, best first, judged on paper.

Mesh, microbatch, rematerialization and waves change where and in which pieces members are trained, not what they learn.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from jax_ordermerge import config as schema
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import MEMORY_FRACTION, Topology
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.analytic import Step, Work

_TENSOR = (1, 2, 4, 8)
_REMAT = ("none", "dots", "full")
_ALIKE = 1.02  # times whose ratio is below this are taken to be the same
_ADAPTERS = {"rank": 16, "alpha": 32.0}


class Candidate(NamedTuple):
    """Settings that fit.

    Attributes:
        changes: `{"mesh.fsdp": 8}`, what differs from the config given; as `--set` takes it.
        config: with them.
        step: the estimate.
        cost: seconds in which every member of the population makes one step.
    """

    changes: dict[str, Any]
    config: Config
    step: Step
    cost: float


def cost(config: Config, step: Step) -> float:
    """Return the seconds in which every member of the population makes one step, wave after wave."""
    assert step.seconds is not None
    return step.seconds * config.population.members / analytic.at_once(config)


def search(config: Config, model: ModelConfig, topology: Topology, work: Work) -> list[Candidate]:
    """Return the settings that fit, best first: the shorter time, then fewer waves, fewer microbatches, fewer changes, less memory.

    Args:
        config: where to start from; its axes `data` and `sequence` stay.
        model: the architecture.
        topology: the devices, of the table.
        work: of one member and step.
    """
    assert topology.device is not None
    found = []
    for changes in _choices(config, model, topology):
        try:
            changed = with_changes(config, changes)
            step = analytic.step(changed, model, topology, work)
        except UserError:  # sizes that do not go together
            continue
        if step.memory.total <= MEMORY_FRACTION * topology.device.memory:
            found.append(
                Candidate(
                    differences(config, changed, topology), changed, step, cost(changed, step)
                )
            )
    return sorted(found, key=_rank)


def with_adapters(config: Config) -> Config:
    """Return the config with low-rank adapters in place of full fine-tuning: another training, for where nothing else fits."""
    return with_changes(config, {"lora": _ADAPTERS})


def _rank(one: Candidate) -> tuple[Any, ...]:
    waves = math.ceil(one.config.population.members / analytic.at_once(one.config))
    pieces = one.config.training.batch // (
        one.config.training.microbatch or one.config.training.batch
    )
    alike = round(math.log(one.cost, _ALIKE))
    return (
        alike,
        waves,
        pieces,
        len(one.changes),
        one.step.memory.total,
        repr(sorted(one.changes.items())),
    )


def _choices(config: Config, model: ModelConfig, topology: Topology) -> Iterator[dict[str, Any]]:
    members, batch, fixed = (
        config.population.members,
        config.training.batch,
        config.mesh.data * config.mesh.sequence,
    )
    if fixed < 1 or topology.size % fixed:
        fixed = 1
    inner = topology.size // fixed
    orders = [
        order for order in range(1, members + 1) if members % order == 0 and inner % order == 0
    ]
    tensors = [
        size
        for size in _TENSOR
        if model.num_heads % size == 0 and model.intermediate_size % size == 0
    ]
    halves = [batch // 2**i for i in range(batch.bit_length()) if batch % 2**i == 0]
    for order, tensor, micro, remat in itertools.product(orders, tensors, halves, _REMAT):
        fsdp, rest = divmod(inner, order * tensor)
        if rest or (micro % (config.mesh.data * fsdp) and micro != batch):
            continue
        mesh: dict[str, Any] = {
            "order": order,
            "fsdp": fsdp,
            "tensor": tensor,
            "dcn": _across(order, fsdp, topology.slices),
        }
        if mesh["dcn"] is None:
            continue
        for wave in range(order, members + 1, order):
            yield {
                "mesh": mesh,
                "training": {"microbatch": None if micro == batch else micro},
                "model": {"remat": remat},
                "population": {"wave": None if wave == members else wave},
            }


def _across(order: int, fsdp: int, slices: int) -> dict[str, int] | None:
    """Return `mesh.dcn`: members lie on different slices as far as they can, parameters beyond that; None where neither can."""
    if slices == 1 or order % slices == 0:
        return {}
    own = math.gcd(order, slices)
    return {"order": own, "fsdp": slices // own} if fsdp % (slices // own) == 0 else None


def with_changes(config: Config, changes: dict[str, Any]) -> Config:
    """Return a config with sections changed.

    Raises:
        UserError: the result is no valid config.
    """
    raw = schema.to_dict(config)
    for name, section in changes.items():
        raw[name] = {**(raw[name] or {}), **section}
    return schema.make_config(raw)


def differences(config: Config, changed: Config, topology: Topology) -> dict[str, Any]:
    """Return what of mesh, microbatch, rematerialization, waves and adapters differs, as `--set` takes it; -1 is what it stands for."""
    before, after = settings(config, topology), settings(changed, topology)
    return {name: value for name, value in after.items() if value != before[name]}


def settings(config: Config, topology: Topology) -> dict[str, Any]:
    """Return the settings that this search knows, by the names that `--set` takes.

    Example:
        >>> from jax_ordermerge.hardware import parse
        >>> settings(Config(), parse("cpu:8"))["mesh.fsdp"]
        8
    """
    sizes = dict(analytic.abstract_mesh(config, topology).shape)
    return {f"mesh.{name}": size for name, size in sizes.items()} | {
        "mesh.dcn": dict(config.mesh.dcn),
        "training.microbatch": config.training.microbatch,
        "model.remat": config.model.remat,
        "population.wave": config.population.wave,
        "lora.rank": None if config.lora is None else config.lora.rank,
        "lora.alpha": None if config.lora is None else config.lora.alpha,
    }
