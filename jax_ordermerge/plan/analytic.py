"""An estimate of a training step: memory, FLOPs, traffic and time, from tables alone.

It needs neither a device nor a compiler. Bytes that stay between steps (parameters, optimizer,
base, batch) are exact, because shapes and shardings are those of the training itself. Temporaries,
traffic and times are a model: `assumptions` and the comments below state it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
from jax.sharding import AbstractMesh, AxisType

from jax_ordermerge.arch import ModelConfig, TensorSpec, parameter_count, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Training
from jax_ordermerge.hardware import Topology
from jax_ordermerge.mesh_shape import MeshShape, mesh_shape
from jax_ordermerge.model import lora
from jax_ordermerge.plan import calibration
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train import flops
from jax_ordermerge.train import frozen as frozen_base
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.frozen import Storage
from jax_ordermerge.train.optimizer import make_optimizer
from jax_ordermerge.tree import PyTree

# Fractions of the data sheet that programs reach in practice (of matmuls, see `calibration`), and
# the fraction of the shorter of overlapping times that still shows in the time of a step.
MEMORY_EFFICIENCY, LINK_EFFICIENCY = 0.8, 0.8
_EXPOSED = 0.2


def assumptions(topology: Topology, *, fused: bool = False) -> tuple[str, ...]:
    """Return what the estimate of times rests on, one sentence each."""
    members = "as one program (lora.fused)" if fused else "one after another"
    return (
        calibration.describe(topology.device),
        f"memory reaches {MEMORY_EFFICIENCY:.0%} and links {LINK_EFFICIENCY:.0%} of the data sheet",
        "matmuls, memory and collectives overlap: a step takes the longest of them and"
        f" {_EXPOSED:.0%} of the others",
        f"members of a device group run {members}",
        "reading data, saving checkpoints, transfers to the memory of the host, compilation and the"
        " network's latency take no time",
    )


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, by kind.

    Attributes:
        parameters: weights of the members; twice with `training.checkpoint = best`.
        optimizer: state of the optimizer.
        base: frozen base of adapters, shared by all members.
        batch: inputs of a step.
        temporaries: gradients, activations and all else that lives within a step only.
    """

    parameters: float
    optimizer: float
    base: float
    batch: float
    temporaries: float

    @property
    def total(self) -> float:
        """Bytes per device in all."""
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Workload:
    """Inputs of one training step of one member.

    Attributes:
        rows: sequences, padding rows included; two per preference pair.
        length: tokens per row, padding included.
        tokens: tokens that are not padding, on average.
        flops: FLOPs of the model on these tokens, on average (`flops.training_flops`).
        steps: steps of the whole training; None if the number of examples is not known.
    """

    # padding is computed as any row is, so it costs time; it is left out of tokens and MFU
    rows: int
    length: int
    tokens: float
    flops: float
    # None and not 0: hours of an unknown number of steps are unknown
    steps: int | None


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Costs of one step of all members that are trained together.

    Attributes:
        memory: bytes per device.
        flops: FLOPs per device, recomputation and padding included.
        moved: bytes per device read from and written to its memory.
        traffic: bytes per device received, by the mesh axes crossed (`"fsdp"`, `"fsdp tensor"`).
        times: seconds of `matmuls`, `memory` and `collectives`; None without a data sheet.
    """

    memory: Memory
    flops: float
    moved: float
    traffic: Mapping[str, float]
    times: Mapping[str, float] | None = None

    @property
    def seconds(self) -> float | None:
        """Seconds of the step: the longest of its times and the exposed part of the others."""
        if self.times is None:
            return None
        # Not the sum, since the three overlap, and not the longest alone, since they never overlap
        # fully.
        longest = max(self.times.values())
        return longest + _EXPOSED * (sum(self.times.values()) - longest)


# --------------------------------------------------------------------------------------- settings


def abstract_mesh(spec: PlanSpec, topology: Topology) -> AbstractMesh:
    """Return the mesh of a spec over a topology, without devices.

    Raises:
        UserError: the sizes do not fit the devices.
    """
    sizes = mesh_layout(spec, topology).sizes
    # Auto, as in the mesh of a training: the compiler decides the shardings in between.
    types = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types)


def mesh_layout(spec: PlanSpec, topology: Topology) -> MeshShape:
    """Return the sizes of the mesh axes, and how they lie over slices or nodes.

    Raises:
        UserError: the sizes do not fit, by the function that a run asks.
    """
    slices = [topology.size // topology.slices] * topology.slices
    return mesh_shape(spec.mesh.sizes, slices, spec.mesh.dcn)


def attention_kernel(spec: PlanSpec, model: ModelConfig, topology: Topology) -> str:
    """Return the attention kernel that `kernels.choose` is likely to choose; it needs devices."""
    # not `kernels.choose`, which asks devices for their kind, and there are none
    if spec.model.attention != "auto":
        return spec.model.attention
    if topology.device is None:
        return "xla"
    if topology.tpu:
        return "splash"
    # cuDNN computes in bfloat16, with heads of up to 128 dimensions and without a soft cap
    fits = model.head_dim <= 128 and model.attention_softcap is None
    return "cudnn" if spec.model.compute_dtype == "bfloat16" and fits else "xla"


def peak_flops(spec: PlanSpec, topology: Topology) -> float:
    """Return the peak FLOP/s per device for matmuls of the compute dtype."""
    assert topology.device is not None
    # see `flops.peak_flops`: float32 runs as TF32 on a GPU, in one pass of bfloat16 on a TPU
    half = spec.model.compute_dtype == "float32" and not topology.tpu
    return topology.device.flops / (2 if half else 1)


def matmul_flops(spec: PlanSpec, topology: Topology) -> float:
    """Return the FLOP/s per device that matmuls of the compute dtype reach."""
    assert topology.device is not None
    return calibration.matmul_efficiency(topology.device) * peak_flops(spec, topology)


def link_speed(axes: str, spec: PlanSpec, topology: Topology) -> float:
    """Return the bytes/s per device of collectives over mesh axes, such as `"fsdp tensor"`.

    Collectives between slices run over the network that joins the slices.
    """
    assert topology.device is not None
    names = axes.split()
    shape = mesh_layout(spec, topology)
    # one axis over the network is enough: the slowest link sets the time of a collective
    if any(shape.across[name] > 1 for name in names):
        return topology.device.network
    return topology.speed(math.prod(shape.sizes[name] for name in names))


# ------------------------------------------------------------------------------------------- step


def estimate_step(
    spec: PlanSpec, model: ModelConfig, topology: Topology, work: Workload
) -> StepEstimate:
    """Estimate a training step.

    Args:
        spec: settings; the mesh is laid over the topology.
        model: architecture.
        topology: devices.
        work: inputs of one member.

    Raises:
        UserError: the mesh does not fit the topology.
    """
    costs = _StepCosts(spec, model, topology, work)
    estimate = StepEstimate(costs.memory(), costs.flops(), costs.moved(), costs.traffic())
    return with_times(estimate, spec, topology)


def with_times(estimate: StepEstimate, spec: PlanSpec, topology: Topology) -> StepEstimate:
    """Return an estimate with the times that its FLOPs and bytes take on the devices."""
    device = topology.device
    # CPUs have no data sheet here; memory and FLOPs are counted all the same
    if device is None:
        return estimate
    times = {
        "matmuls": estimate.flops / matmul_flops(spec, topology),
        "memory": estimate.moved / (MEMORY_EFFICIENCY * device.bandwidth),
        "collectives": sum(
            size / (LINK_EFFICIENCY * link_speed(axes, spec, topology))
            for axes, size in estimate.traffic.items()
        ),
    }
    return dataclasses.replace(estimate, times=times)


# ----------------------------------------------------------------------------------------- memory


def state_bytes(spec: PlanSpec, model: ModelConfig, mesh: AbstractMesh) -> dict[str, int]:
    """Return the exact bytes per device of parameters, optimizer and frozen base.

    Example:
        >>> from jax_ordermerge.mesh_shape import AXES
        >>> model = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> mesh = AbstractMesh((2, 1, 2, 1, 1), AXES)
        >>> state_bytes(PlanSpec(), model, mesh)["parameters"]  # 2 members, all but norms halved
        7488
    """
    trained, frozen = _tables(spec, model)
    members = len(spec.first_wave)
    storage = Storage.of(spec)
    return dict(_state_bytes(spec.training, trained, frozen, storage, members, mesh))


# The search asks for the same states again and again: microbatch and rematerialization do not
# change them, and tracing the optimizer takes most of the time of an estimate.
@functools.lru_cache(maxsize=256)
def _state_bytes(
    training: Training,
    trained: tuple[TensorSpec, ...],
    frozen: tuple[TensorSpec, ...],
    storage: Storage,
    members: int,
    mesh: AbstractMesh,
) -> dict[str, int]:
    # one step in all: the length of the schedule changes no shape
    optimizer = make_optimizer(training, 1, trained)
    params = convert.abstract_tensors(trained, mesh, members=members)
    state = steps.abstract_state(params, optimizer, mesh)
    # the best weights of each member are a second copy of the parameters
    copies = 2 if training.checkpoint == "best" else 1
    local = members // mesh.shape["order"]
    on_device = 1 / local if training.optimizer_memory == "host" else 1
    return {
        "parameters": bytes_per_device(state.params) * copies,
        # on the host, but for that of the member that is updated
        "optimizer": round(bytes_per_device((state.opt_state, state.step)) * on_device),
        "base": bytes_per_device(frozen_base.abstract(frozen, storage, mesh)),
    }


def bytes_per_device(abstract: PyTree) -> int:
    """Return the bytes per device of a pytree of `jax.ShapeDtypeStruct` with shardings."""
    return sum(
        # shard_shape and not size / devices: an axis that does not divide is replicated
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(abstract)
    )


def _tables(
    spec: PlanSpec, model: ModelConfig
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the trained and the frozen tensors; see `trainable.make_trainable`."""
    table = tensor_table(model)
    return (table, ()) if spec.lora is None else (lora.table(model, spec.lora), table)


class _StepCosts:
    """The costs of a step per device, by kind.

    Members of a device group run one after another, so temporaries are those of one member, while
    FLOPs and traffic are those of all members of the group. With `lora.fused` they are one program:
    temporaries are those of all of them, and the base is gathered and read once.
    """

    def __init__(
        self, spec: PlanSpec, model: ModelConfig, topology: Topology, work: Workload
    ) -> None:
        self.spec, self.model, self.topology, self.work = spec, model, topology, work
        self.mesh = abstract_mesh(spec, topology)
        self.order, self.data, self.fsdp, self.sequence, self.tensor = self.mesh.shape.values()
        # those of one device group
        self.members = -(-len(spec.first_wave) // self.order)
        # of one program
        self.fused = self.members if spec.is_fused else 1
        self.microbatches = spec.training.batch // spec.microbatch
        # a microbatch that the batch axes do not divide is replicated over them
        batch_axes = self.data * self.fsdp
        self.batch_shards = batch_axes if spec.microbatch % batch_axes == 0 else 1
        self.rows = work.rows / self.microbatches / self.batch_shards  # per microbatch
        self.tokens = self.rows * work.length / self.sequence  # per microbatch
        self.kernel = attention_kernel(spec, model, topology)
        self.item = spec.compute_bytes
        trained, frozen = _tables(spec, model)
        self.trained, self.frozen = _size(trained), _size(frozen)
        # all of them, trained or not: the forward pass reads every weight
        self.parameters = parameter_count(model)
        # Bytes of the weights as devices gather and read them: in the compute dtype, or quantized.
        storage = Storage.of(spec)
        self.quantized = storage.format is not None
        self.weights: float = self.item * self.parameters
        layer = [entry for entry in tensor_table(model) if entry.stacked]
        self.layer: float = self.item * sum(math.prod(entry.hf_shape) for entry in layer)
        if self.quantized:
            self.weights = frozen_base.stored_bytes(frozen, storage)
            self.layer = frozen_base.stored_bytes(layer, storage) / model.num_layers
        self.heads = model.num_heads * model.head_dim
        self.kv = model.num_kv_heads * model.head_dim
        # `dots` repeats elementwise work only, which no count of matmuls sees
        self.recomputes = spec.model.remat in flops.RECOMPUTING

    def memory(self) -> Memory:
        # five arrays of four bytes per token (tokens, targets, positions, segments, weights), two
        # numbers per row
        inputs = self.members * self.work.rows * (5 * 4 * self.work.length + 8)
        return Memory(
            **state_bytes(self.spec, self.model, self.mesh),
            batch=inputs / self.batch_shards / self.sequence,
            temporaries=self.temporaries(),
        )

    def temporaries(self) -> float:
        """Return the bytes that live within a step."""
        fsdp, tensor, item = self.fsdp, self.tensor, self.item
        tokens = self.fused * self.tokens
        heads, kv, adapters = self.heads, self.kv, self.frozen > 0
        D, F, V = self.model.hidden_size, self.model.intermediate_size, self.model.vocab_size
        # gradients in float32; while they accumulate, the sum and those of the microbatch
        gradients = 4 * self.fused * (self.trained / fsdp / tensor)
        gradients *= 2 if self.microbatches > 1 else 1
        # weights in the compute dtype: XLA casts all of them ahead of the loop over layers
        casts = item < 4 and (not adapters or self.spec.base_dtype == "float32")
        cast = item * (self.frozen or self.trained) / fsdp / tensor if casts else 0
        # the program of accelerators, see `layers.Embedding` and `loss._sums_forward`
        by_head = self.topology.device is not None and self.batch_shards > 1 and not adapters
        # FSDP gathers the whole vocabulary, for the lookup and for the head, not at the same time
        embedding = item * V * D / tensor * (1 if adapters else 2) if fsdp > 1 else 0
        # the gathered weights of the current layer, those of the next one, the layer's gradients
        gathered = self.layer / tensor * (2 if adapters else 3) if fsdp > 1 else 0
        # of a quantized layer one matrix at a time is dense
        dense = item * D * F / tensor if self.quantized else 0
        # kept for the backward pass per token and layer: its input, and results not recomputed
        results = {
            "full": 0,
            "dots": (2 * heads + 2 * kv + 2 * F) / tensor + D,
            "none": (5 * heads + 5 * kv + 4 * F) / tensor + 8 * D,
        }
        # The input of a layer is kept in every mode: recomputation starts from it. On the host it
        # takes no memory here.
        remat = self.spec.model.remat
        saved = 0 if remat == "offload" else D + results[remat]
        activations = self.model.num_layers * tokens * saved * item
        # the layer at work: its intermediate results, and two float32 residuals
        working = tokens * (item * (6 * D + (3 * heads + 3 * kv + 5 * F) / tensor) + 4 * 2 * D)
        # only plain attention holds scores, of a block of queries: logits, weights, gradients
        scores = 0.0
        if self.kernel == "xla":
            block = max(64, -(-self.work.length // 8))
            queries = self.fused * self.rows * self.model.num_heads / tensor * block
            scores = 3 * 4 * queries * self.work.length
        # the head runs over blocks of 512 tokens: float32 logits and their gradients, and the
        # gradient of the head
        logits = (
            2 * 4 * min(512, tokens) * V / tensor
            + 4 * V * D / fsdp / tensor
            + (0 if embedding else item * V * D / tensor)
        )
        lookup = 0.0
        if by_head:
            # Nothing is gathered for the lookup, whose columns `tensor` does not divide: the table
            # and later its gradient, in float32.
            embedding, lookup = 0, 4 * V * D / fsdp if tensor > 1 else 0
            # The gradient of the head is whole on each device, in float32: beside the gathered
            # head, and then beside its cast, which the devices reduce.
            logits = 2 * 4 * min(512, tokens) * V / tensor + (4 + item) * V * D / tensor
        # The layer at work, the head and the lookup are never in memory together, so the largest
        # of them counts.
        largest = max(working + scores, logits, lookup)
        return gradients + cast + embedding + gathered + dense + activations + largest

    def flops(self) -> float:
        """Return the FLOPs that are executed."""
        executed = flops.executed_flops(
            self.model,
            self.work.rows,
            self.work.length,
            remat=self.spec.model.remat,
            kernel=self.kernel,
            adapters=self.spec.lora,
            pairs=self.spec.has_pairs,
        )
        return self.members * executed / (self.sequence * self.tensor * self.batch_shards)

    def moved(self) -> float:
        """Return the bytes that are read and written."""
        fsdp, tensor, item, layers = self.fsdp, self.tensor, self.item, self.model.num_layers
        # forward, backward with respect to inputs and to weights, and recomputed
        passes = 3 + self.recomputes
        # gathered weights are written before they are read
        weights = self.weights / tensor * passes * (2 if fsdp > 1 else 1)
        # Dequantized weights are written and read in each pass but that for their gradients, which
        # a frozen base has not.
        if self.quantized:
            weights += 2 * item * self.parameters / tensor * (passes - 1)
        # float32 weights, gradients and two moments, read and written, and the cast copy
        update = (32 + 4 + item) * self.trained / fsdp / tensor
        # operands and results of the matmuls, and the elementwise results between them
        D, F = self.model.hidden_size, self.model.intermediate_size
        width = 2 * D + (2 * self.heads + 2 * self.kv + 4 * F) / tensor + 12 * D
        activations = layers * self.tokens * width * passes * item
        scores = 0.0
        if self.kernel == "xla":
            # causal: half of the pairs of positions
            pairs = self.rows * self.work.length**2 / 2 / self.sequence
            scores = 4 * 6 * passes * layers * self.model.num_heads / tensor * pairs
        logits = 4 * 4 * self.tokens * self.model.vocab_size / tensor
        microbatch = weights / self.fused + activations + scores + logits
        return self.members * (self.microbatches * microbatch + update)

    def traffic(self) -> dict[str, float]:
        """Return the bytes received, by mesh axis. Nothing crosses `order`."""
        times, layers = self.microbatches, self.model.num_layers
        weights = self.weights / self.tensor
        trained = self.trained / self.tensor
        # weights are gathered forward, backward and recomputed; gradients are reduced to shards
        gathers = 3 if self.recomputes else 2
        gathered = gathers * weights / self.fused
        fsdp = _remote(self.fsdp) * times * (gathered + self.item * trained)
        # an all-reduce is a reduce-scatter and an all-gather: twice the remote part, in float32
        data = 2 * _remote(self.data) * times * 4 * trained / self.fsdp
        # all-reduces per layer: two forward, two backward, two recomputed
        reduces = layers * (6 if self.recomputes else 4)
        width = self.model.hidden_size
        tensor = 2 * _remote(self.tensor) * times * reduces * self.tokens * width * self.item
        # keys and values of all positions, while queries stay where they are
        keys = 2 * self.kv * self.item * self.rows * self.work.length
        sequence = _remote(self.sequence) * times * layers * gathers * keys
        traffic = {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}
        # of all members of a group, together or one after another
        return {axis: self.members * size for axis, size in traffic.items() if size}


def _size(table: tuple[TensorSpec, ...]) -> int:
    return sum(math.prod(entry.shape) for entry in table)


def _remote(size: int) -> float:
    """Return the fraction of an array over an axis of this size that lies on other devices."""
    return (size - 1) / size
