"""Search for better settings: mesh, microbatch, rematerialization and waves, by the estimate.

These settings decide where, and in which pieces, members are trained. They do not change what the
members learn, so the search may change them without asking.
"""

import itertools
import math
from collections.abc import Iterator

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import Topology
from jax_ordermerge.json_types import Json
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.analytic import Workload
from jax_ordermerge.plan.results import OptionPlan, list_changes
from jax_ordermerge.plan.spec import PlanSpec

# Up to 8, as many GPUs as a node has: each layer waits for the all-reduces of this axis.
_TENSOR_SIZES = (1, 2, 4, 8)
_REMAT = ("none", "dots", "full")
# Times within this ratio count as equal: the estimate is not more precise than that, and simpler
# settings are worth more than a hundredth of the time.
_EQUAL_RATIO = 1.02


def search(
    spec: PlanSpec, model: ModelConfig, topology: Topology, work: Workload
) -> list[OptionPlan]:
    """Return the settings that fit, best first.

    The order is by time, then by fewer waves, microbatches and changes, then by memory.

    Args:
        spec: settings to start from; the axes `data` and `sequence` stay.
        model: architecture.
        topology: devices with a data sheet.
        work: inputs of one step of one member.
    """
    options = []
    for sections in _enumerate_changes(spec, model, topology):
        changed = spec.change(**sections)
        try:
            step = analytic.estimate_step(changed, model, topology, work)
        # The sizes of the mesh do not fit the devices or the slices, or divide the blocks of a
        # quantized base.
        except UserError:
            continue
        changes = list_changes(spec, changed, topology)
        option = OptionPlan(changed, changes, topology, work, step)
        if option.fits:
            options.append(option)
    return sorted(options, key=_rank)


def _rank(option: OptionPlan) -> tuple[float | str, ...]:
    spec = option.spec
    return (
        # Whole powers of the ratio, so that times that are nearly equal compare as equal, and the
        # order stays transitive.
        round(math.log(option.population_step_seconds, _EQUAL_RATIO)),
        math.ceil(spec.population.total / option.members),
        spec.training.batch // spec.microbatch,
        len(option.changes),
        option.step.memory.total,
        repr(sorted(option.changes.items())),  # so that the order does not depend on the search
    )


def _enumerate_changes(
    spec: PlanSpec, model: ModelConfig, topology: Topology
) -> Iterator[dict[str, Json]]:
    """Yield changes of sections that are valid together, `{section: {setting: value}}`."""
    members, batch = spec.population.total, spec.training.batch
    fixed = spec.mesh.data * spec.mesh.sequence
    # -1, or sizes of other hardware: the axes that stay cannot be kept here
    if fixed < 1 or topology.size % fixed:
        fixed = 1
    devices = topology.size // fixed
    # a group must hold equally many members and devices as every other
    orders = [n for n in range(1, members + 1) if members % n == 0 and devices % n == 0]
    tensors = [
        size
        for size in _TENSOR_SIZES
        if model.num_heads % size == 0 and model.intermediate_size % size == 0
    ]
    # halvings only: each candidate is estimated, and other divisors lie between two of them
    microbatches = [batch // 2**i for i in range(batch.bit_length()) if batch % 2**i == 0]
    # `offload` only where it is configured: no device has measured its time
    remats = dict.fromkeys((*_REMAT, spec.model.remat))
    for order, tensor, microbatch, remat in itertools.product(
        orders, tensors, microbatches, remats
    ):
        fsdp, rest = divmod(devices, order * tensor)
        # a microbatch that the batch axes do not divide would be replicated, which only costs time
        if rest or (microbatch % (spec.mesh.data * fsdp) and microbatch != batch):
            continue
        # members that mix their weights must all be trained at the same time
        smallest = members if spec.training.mixing else order
        for wave in range(smallest, members + 1, order):
            yield {
                "mesh": {"order": order, "fsdp": fsdp, "tensor": tensor, "dcn": {}},
                "training": {"microbatch": None if microbatch == batch else microbatch},
                "model": {"remat": remat},
                "population": {"wave": None if wave == members else wave},
            }
