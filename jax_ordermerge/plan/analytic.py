"""An estimate on paper: memory, arithmetic, traffic and time of a training step, from the tensor table and the data sheets alone.

What a device holds between steps (parameters, optimizer, base, batch) is exact: shapes and shardings are those of the training itself.
Temporaries, traffic and times are a model, whose assumptions are `ASSUMED` and the comments here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, TensorSpec, parameter_count, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.hardware import Topology
from jax_ordermerge.model import lora
from jax_ordermerge.train import flops, optimizers
from jax_ordermerge.train import step as steps

_PRODUCTS, _MEMORY, _LINKS, _SEEN = 0.65, 0.8, 0.8, 0.2
ASSUMED = (
    f"products reach {_PRODUCTS:.0%} of the peak, memory {_MEMORY:.0%} and links {_LINKS:.0%} of the data sheet",
    f"products, memory and exchanges overlap: a step takes the longest of them and {_SEEN:.0%} of the others",
    "members of a device group run one after another",
    "reading data, saving checkpoints, compilation and the network's latency take no time",
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes a device, by kind. `base` is held in common by all members (adapters); `temporaries` are gradients, activations and all
    else that lives within a step."""

    parameters: float
    optimizer: float
    base: float
    batch: float
    temporaries: float

    @property
    def total(self) -> float:
        """Bytes a device in all."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step of one member is given.

    Attributes:
        rows: sequences, padding rows included; of preference pairs twice their number.
        length: that rows are padded to.
        tokens: that are no padding, on average.
        flops: of the model on them, on average (`flops.training_flops`).
        steps: of the whole training, None where the number of examples is not known.
    """

    rows: int
    length: int
    tokens: float
    flops: float
    steps: int | None


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of all members that are trained together.

    Attributes:
        memory: see `Memory`.
        executed: FLOPs a device, what is computed again and padding included.
        moved: bytes a device reads and writes in its memory.
        traffic: bytes a device receives, by the mesh axes crossed (`"fsdp"`, `"fsdp tensor"`).
        times: seconds by `products`, `memory`, `exchanges`; None where the devices are not in the table.
    """

    memory: Memory
    executed: float
    moved: float
    traffic: Mapping[str, float]
    times: Mapping[str, float] | None

    @property
    def seconds(self) -> float | None:
        """Of the step: the longest of its times, and what is seen of the others."""
        if self.times is None:
            return None
        longest = max(self.times.values())
        return longest + _SEEN * (sum(self.times.values()) - longest)


class _Shape(NamedTuple):
    """What a device sees of a microbatch and of the model."""

    sizes: Mapping[str, int]
    split: int
    microbatches: int
    tokens: float
    rows: float
    item: int  # bytes of the compute dtype


def abstract_mesh(config: Config, topology: Topology) -> AbstractMesh:
    """Return the mesh of a config on so many devices, without devices.

    Raises:
        UserError: the sizes do not fit.
    """
    sizes = meshes.axis_sizes(config.mesh.sizes, topology.size)
    return AbstractMesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )


def at_once(config: Config) -> int:
    """Return how many members are trained together."""
    return min(config.population.wave or config.population.members, config.population.members)


def kernel(config: Config, topology: Topology) -> str:
    """Return the kernel of attention that is most likely chosen; see `kernels.choose`, which needs the devices."""
    if config.model.attention != "auto":
        return config.model.attention
    if topology.device is None:
        return "xla"
    fused = config.model.compute_dtype == "bfloat16" and config.data.packing == "none"
    return "splash" if topology.tpu else "cudnn" if fused else "xla"


def tables(
    config: Config, model: ModelConfig
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return what each member trains and what is held once, as `split.split` cuts a model."""
    table = tensor_table(model)
    return (table, ()) if config.lora is None else (lora.table(model, config.lora), table)


def step(config: Config, model: ModelConfig, topology: Topology, work: Work) -> Step:
    """Estimate a training step.

    Args:
        config: of the run; its mesh is laid over the topology.
        model: the architecture.
        topology: where it is trained.
        work: of one member and step.
    """
    mesh = abstract_mesh(config, topology)
    sizes, batch = dict(mesh.shape), config.training.microbatch or config.training.batch
    over = sizes["data"] * sizes["fsdp"]
    microbatches = config.training.batch // batch
    rows = work.rows / microbatches / (over if batch % over == 0 else 1)
    split = sizes["sequence"] * sizes["tensor"] * (over if batch % over == 0 else 1)
    item = 2 if config.model.compute_dtype == "bfloat16" else 4
    shape = _Shape(sizes, split, microbatches, rows * work.length / sizes["sequence"], rows, item)
    members = -(-at_once(config) // sizes["order"])
    held = state(config, model, mesh)
    fed = (
        members
        * work.rows
        * (5 * 4 * work.length + 8)
        / (over if batch % over == 0 else 1)
        / sizes["sequence"]
    )
    memory = Memory(
        **held, batch=fed, temporaries=_temporaries(config, model, topology, work, shape)
    )
    executed = members * _executed(config, model, topology, work) / split
    moved = members * _moved(config, model, topology, work, shape)
    traffic = {
        axis: members * size for axis, size in _traffic(config, model, work, shape).items() if size
    }
    return timed(Step(memory, executed, moved, traffic, None), config, topology)


def timed(one: Step, config: Config, topology: Topology) -> Step:
    """Return a step with the times that its figures take on the devices."""
    if topology.device is None:
        return one
    device, sizes = topology.device, meshes.axis_sizes(config.mesh.sizes, topology.size)
    times = {
        "products": one.executed / (_PRODUCTS * peak(config, topology)),
        "memory": one.moved / (_MEMORY * device.bandwidth),
        "exchanges": sum(
            size / (_LINKS * _speed(axes, sizes, config, topology))
            for axes, size in one.traffic.items()
        ),
    }
    return dataclasses.replace(one, times=times)


def _speed(axes: str, sizes: Mapping[str, int], config: Config, topology: Topology) -> float:
    """Return bytes/s that a device receives over mesh axes; what crosses slices goes over the network that joins them."""
    across = config.mesh.dcn or {"order": topology.slices}
    names = axes.split()
    if topology.slices > 1 and any(across.get(name, 1) != 1 for name in names):  # type: ignore[call-overload]
        assert topology.device is not None
        return topology.device.network
    return topology.speed(math.prod(sizes[name] for name in names))


# ----------------------------------------------------------------------------------------------------------------------------- memory


def state(config: Config, model: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Return the bytes a device of parameters, optimizer and frozen base: exact, from the shardings of the training.

    Parameters are there twice where each member's best are kept.

    Example:
        >>> model = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> state(Config(), model, AbstractMesh((2, 1, 2, 1, 1), meshes.AXES))[
        ...     "parameters"
        ... ]  # 2 members, float32, all but norms halved
        7488
    """
    trained, frozen = tables(config, model)
    return _state(config.training, trained, frozen, config.base_dtype, at_once(config), mesh)


@functools.lru_cache(maxsize=256)
def _state(
    training: Any, trained: Any, frozen: Any, base_dtype: str, members: int, mesh: AbstractMesh
) -> dict[str, int]:
    tx = optimizers.optimizer(training, 1, trained)
    whole = steps.abstract_state(convert.abstract_tensors(trained, mesh, members=members), tx, mesh)
    base = convert.abstract_tensors(frozen, mesh, dtype=base_dtype)
    return {
        "parameters": held(whole.params) * (2 if training.checkpoint == "best" else 1),
        "optimizer": held((whole.opt_state, whole.step)),
        "base": held(base),
    }


def held(abstract: Any) -> int:
    """Return the bytes a device of arrays that are only described."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )


def _temporaries(
    config: Config, model: ModelConfig, topology: Topology, work: Work, shape: _Shape
) -> float:
    sizes, t, item = shape.sizes, shape.tokens, shape.item
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    trained, frozen = tables(config, model)
    own = _count(trained) / fsdp / tensor
    D, F, V = model.hidden_size, model.intermediate_size, model.vocab_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # gradients; while they are accumulated, those so far and those of the microbatch
    gradients = 4 * own * (2 if shape.microbatches > 1 else 1)
    # weights in the compute dtype, cast outside the loop over layers
    cast = (
        item * _count(frozen or trained) / fsdp / tensor
        if item < 4 and (not frozen or config.base_dtype == "float32")
        else 0
    )
    # the whole vocabulary, for lookup and for the head, not at the same time
    embedding = item * V * D / tensor * (1 if config.lora else 2) if fsdp > 1 else 0
    # the layer at work: its weights gathered, and the next ones
    gathered = item * _layer(model) / tensor * (2 if config.lora else 3) if fsdp > 1 else 0
    kept = (
        D
        + {
            "full": 0,
            "dots": (2 * heads + 2 * kv + 2 * F) / tensor + D,
            "none": (5 * heads + 5 * kv + 4 * F) / tensor + 8 * D,
        }[config.model.remat]
    )
    activations = model.num_layers * t * kept * item
    working = t * (item * (6 * D + (3 * heads + 3 * kv + 5 * F) / tensor) + 4 * 2 * D)
    block = max(64, -(-work.length // 8))
    scores = (
        3 * 4 * shape.rows * model.num_heads / tensor * block * work.length
        if kernel(config, topology) == "xla"
        else 0
    )
    rows = min(512, t)
    logits = (
        2 * 4 * rows * V / tensor
        + 4 * V * D / fsdp / tensor
        + (0 if embedding else item * V * D / tensor)
    )
    return gradients + cast + embedding + gathered + activations + max(working + scores, logits)


def _count(table: tuple[TensorSpec, ...]) -> int:
    return sum(math.prod(spec.shape) for spec in table)


def _layer(model: ModelConfig) -> float:
    return sum(math.prod(spec.hf_shape) for spec in tensor_table(model) if spec.stacked)


# ------------------------------------------------------------------------------------------------------- arithmetic, memory, exchanges


def _executed(config: Config, model: ModelConfig, topology: Topology, work: Work) -> float:
    """Return the FLOPs of a step of one member, on all its devices together."""
    return flops.executed_flops(
        model,
        work.rows,
        work.length,
        remat=config.model.remat,
        kernel=kernel(config, topology),
        adapters=config.lora,
        pairs=config.objective.kind == "dpo",
    )


def _moved(
    config: Config, model: ModelConfig, topology: Topology, work: Work, shape: _Shape
) -> float:
    """Return the bytes that a device reads and writes for one member: weights, the optimizer's pass, activations."""
    sizes, t, item = shape.sizes, shape.tokens, shape.item
    fsdp, tensor, passes = sizes["fsdp"], sizes["tensor"], 3 + (config.model.remat == "full")
    trained, _ = tables(config, model)
    weights = item * parameter_count(model) / tensor * passes * (2 if fsdp > 1 else 1)
    # masters, gradients and two moments, read and written; the cast copy
    update = (32 + 4 + item) * _count(trained) / fsdp / tensor
    D, F = model.hidden_size, model.intermediate_size
    heads, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    # operands and results of the products, and what lies between them
    width = 2 * D + (2 * heads + 2 * kv + 4 * F) / tensor + 12 * D
    activations = model.num_layers * t * width * passes * item
    pairs = shape.rows * work.length**2 / 2 / sizes["sequence"]
    scores = (
        4 * 6 * passes * model.num_layers * model.num_heads / tensor * pairs
        if kernel(config, topology) == "xla"
        else 0
    )
    logits = 4 * 4 * t * model.vocab_size / tensor
    return shape.microbatches * (weights + activations + scores + logits) + update


def _traffic(config: Config, model: ModelConfig, work: Work, shape: _Shape) -> dict[str, float]:
    """Return the bytes that a device receives for one member, by mesh axis. Nothing crosses `order`."""
    sizes, t, item, times = shape.sizes, shape.tokens, shape.item, shape.microbatches
    full = config.model.remat == "full"
    trained, _ = tables(config, model)
    weights, changed = (
        item * parameter_count(model) / sizes["tensor"],
        _count(trained) / sizes["tensor"],
    )
    # gathered forward and backward, and to compute again; gradients reduced to where they are kept
    fsdp = _share(sizes["fsdp"]) * times * ((3 if full else 2) * weights + item * changed)
    data = 2 * _share(sizes["data"]) * times * 4 * changed / sizes["fsdp"]
    # two sums a layer forward, two backward, and what is computed again
    tensor = (
        2
        * _share(sizes["tensor"])
        * times
        * model.num_layers
        * (6 if full else 4)
        * t
        * model.hidden_size
        * item
    )
    keys = 2 * model.num_kv_heads * model.head_dim * item * shape.rows * work.length
    sequence = _share(sizes["sequence"]) * times * model.num_layers * (3 if full else 2) * keys
    return {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}


def _share(size: int) -> float:
    return (size - 1) / size


# ------------------------------------------------------------------------------------------------------------------------ other stages


def forward_seconds(
    config: Config, model: ModelConfig, topology: Topology, tokens: float, length: int
) -> float | None:
    """Return the seconds of measuring losses of one model over `tokens` tokens, on all devices together."""
    if topology.device is None:
        return None
    return flops.forward_flops(model, tokens, length) / (
        topology.size * _PRODUCTS * peak(config, topology)
    )


def token_seconds(
    config: Config, model: ModelConfig, topology: Topology, slots: int
) -> float | None:
    """Return the seconds of one round of generation, a token for each row of `evaluation.batch`: weights and cache read once.

    Rows are not divided over devices; the weights are, over `fsdp` and `tensor`.
    """
    if topology.device is None:
        return None
    sizes, rows = meshes.axis_sizes(config.mesh.sizes, topology.size), config.evaluation.batch
    item, parts = (
        2 if config.model.compute_dtype == "bfloat16" else 4,
        sizes["fsdp"] * sizes["tensor"],
    )
    cache = (
        rows
        * slots
        * 2
        * model.num_layers
        * model.num_kv_heads
        * model.head_dim
        * item
        / sizes["tensor"]
    )
    read = item * parameter_count(model) / parts + cache
    products = 2 * parameter_count(model) * rows / parts
    return max(
        read / (_MEMORY * topology.device.bandwidth),
        products / (_PRODUCTS * peak(config, topology)),
    )


def merge_seconds(config: Config, model: ModelConfig, topology: Topology) -> float | None:
    """Return the seconds of one merge in device memory: members and base read, the result written, members moved over `order` once."""
    if topology.device is None:
        return None
    sizes = meshes.axis_sizes(config.mesh.sizes, topology.size)
    item = 4 if config.merge.dtype == "float32" else 2
    size = (
        (config.population.members + 2)
        * item
        * parameter_count(model)
        / (sizes["fsdp"] * sizes["tensor"])
    )
    crossing = (
        0.0 if sizes["order"] == 1 else size / (_LINKS * _speed("order", sizes, config, topology))
    )
    return max(size / (_MEMORY * topology.device.bandwidth), crossing)


def peak(config: Config, topology: Topology) -> float:
    """Return the peak FLOP/s of a device of the topology with products of the compute dtype; see `flops.peak`."""
    assert topology.device is not None
    half = config.model.compute_dtype == "float32" and not topology.tpu
    return topology.device.flops / (2 if half else 1)
