"""The programs of a run, compiled for devices that need not be here, and what they need.

Only the compiler of the devices must be installed: libtpu for TPUs (extra `plan-tpu`), the CUDA plug-in of jax for NVIDIA GPUs (extra
`plan-gpu`, no CUDA needed). Memory is what the compiler planned, and exchanges are read from the compiled program.
"""

import dataclasses
import functools
import importlib.util
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode, scoring
from jax_ordermerge.hardware import Topology
from jax_ordermerge.merge import population
from jax_ordermerge.model import kernels
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.collectives import Exchanges, exchanges
from jax_ordermerge.train import batches
from jax_ordermerge.train.programs import Programs
from jax_ordermerge.train.spec import TrainingSpec

# compute capability, multiprocessors, shared memory of each and of a block (opt-in), L2 cache, GHz: NVIDIA's data sheets and CUDA guide
_GPUS = {
    "b200": ((10, 0), 148, 233472, 232448, 126 * 2**20, 1.965),
    "h200": ((9, 0), 132, 233472, 232448, 50 * 2**20, 1.98),
    "h100": ((9, 0), 132, 233472, 232448, 50 * 2**20, 1.98),
    "h100-pcie": ((9, 0), 114, 233472, 232448, 50 * 2**20, 1.755),
    "a100": ((8, 0), 108, 167936, 166912, 40 * 2**20, 1.41),
}
_EXTRA = {True: "plan-tpu", False: "plan-gpu"}
_USED = re.compile(r"Used ([\d.]+)([KMGT])i?B? of")


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a compiled program needs.

    Attributes:
        arguments: bytes a device of what it is given; of a training step the state (parameters, optimizer), which it updates in place,
            the batch, and `shared`.
        temporaries: bytes a device of everything that lives only while it runs, and of its results.
        exchanges: see `exchanges.exchanges`.
        seconds: that compilation took.
        shared: bytes a device of what all members hold in common, such as the frozen base of adapters.
    """

    arguments: int
    temporaries: int
    exchanges: Exchanges
    seconds: float
    shared: int = 0

    @property
    def bytes(self) -> int:
        """Bytes a device in all."""
        return self.arguments + self.temporaries


class TooLarge(Exception):
    """The compiler refused a program that does not fit; `bytes` a device is what it would have used, None where it does not say."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        found = _USED.search(message)
        self.bytes = (
            None if found is None else int(float(found[1]) * 1024 ** (" KMGT".index(found[2])))
        )


def compiler(topology: Topology) -> bool:
    """Return whether programs can be compiled for these devices with what is installed."""
    if topology.device is None or topology.present:
        return True
    if topology.tpu:
        return importlib.util.find_spec("libtpu") is not None
    return (
        topology.device.name in _GPUS
        and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
    )


def extra(topology: Topology) -> str:
    """Return the extra of this package that brings the compiler for these devices."""
    return _EXTRA[topology.tpu]


def devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology: those that are here, or descriptions that programs can be compiled for.

    Raises:
        UserError: the compiler is absent, there is no such topology, or there are not so many devices here.
    """
    if topology.device is None:
        return _here(topology.size)
    if topology.present:
        return jax.devices()
    return _tpus(topology) if topology.tpu else _gpus(topology)


def _here(count: int) -> list[Any]:
    meshes.provide_cpu_devices([count])
    present = jax.devices("cpu")
    if len(present) < count:
        raise UserError(
            f"{count} CPU devices are asked for and {len(present)} are there; set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return present[:count]


def _tpus(topology: Topology) -> list[Any]:
    # what libtpu would ask the machine about, which is none of a TPU
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # by several processes: they only compile
    }.items():
        os.environ.setdefault(name, value)
    assert topology.device is not None
    name = f"{topology.device.name}:{'x'.join(map(str, topology.shape))}"
    more = {"num_slices": topology.slices} if topology.slices > 1 else {}
    return _described("tpu", topology, topology_name=name, **more)


def _gpus(topology: Topology) -> list[Any]:
    assert topology.device is not None
    if topology.device.name not in _GPUS:
        raise UserError(
            f"{topology.name}: there is no description of this GPU to compile for; give --analytic"
        )
    if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"  # nothing here to try kernels on
        )
    (major, minor), cores, shared, block, cache, clock = _GPUS[topology.device.name]
    text = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 fpus_per_core: {64 if major == 8 else 128}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
  core_count: {cores} clock_rate_ghz: {clock} l2_cache_size: {cache}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(topology.device.bandwidth)} device_memory_size: {int(topology.device.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {topology.device.kinds[0]}"
"""
    shape = f"{topology.slices}x1x{topology.shape[0]}"
    return _described(
        "cuda", topology, topology_name=topology.device.name, topology=shape, target_config=text
    )


def _described(platform: str, asked: Topology, **description: Any) -> list[Any]:
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **description).devices)
    except Exception as error:  # of several kinds, by version
        need = f'it needs pip install "jax_ordermerge[{extra(asked)}]" and sizes that exist'
        raise UserError(
            f"no devices {asked.name} to compile for: {str(error).splitlines()[0]}; {need}"
        ) from error


# ------------------------------------------------------------------------------------------------------------------------- programs


def step(
    spec: TrainingSpec, model: ModelConfig, mesh: Mesh, examples: Examples | None = None
) -> Needs:
    """Compile the training step of a run and read what it needs.

    Args:
        spec: of the training; nothing that it names is read.
        model: the architecture.
        mesh: of devices here, or of `devices`.
        examples: to be trained on; by default a batch of `data.max_length` tokens each.

    Raises:
        TooLarge: the compiler says that it does not fit.
    """
    plan = batches.make_plan(spec, examples or made_up(spec), spec.first_wave, mesh=mesh)
    programs = Programs(model, plan, mesh)
    needs = _read(programs.compile_step, mesh)
    cut, best = programs.trainable, 0
    if (
        spec.training.checkpoint == "best"
    ):  # the step does not see the weights that were best, but they are there
        best = analytic.held(convert.abstract_tensors(cut.trained, mesh, members=len(plan.members)))
    return dataclasses.replace(
        needs,
        arguments=needs.arguments + best,
        shared=analytic.held(convert.abstract_tensors(cut.frozen, mesh, dtype=spec.base_dtype)),
    )


def made_up(spec: TrainingSpec) -> Examples:
    """Return a batch of examples as long as the config lets them be."""
    size, length = spec.training.batch, spec.data.max_length
    ones = Ragged(np.ones(size * length, np.int32), np.arange(size + 1) * length)
    examples = Examples(ones, Ragged(ones.flat.astype(np.bool_), ones.offsets), np.arange(size))
    if spec.objective.kind == "dpo":
        examples = dataclasses.replace(
            examples, rejected=examples, reference=np.zeros((size, 2), np.float32)
        )
    return examples


def losses(config: Config, model: ModelConfig, mesh: Mesh, length: int) -> Needs:
    """Compile the program that measures the losses of one model, of rows padded to `length`."""
    dtype = config.model.compute_dtype
    kernel = kernels.choose(config.model.attention, model, mesh, dtype=dtype)
    held, size = config.merge.dtype, config.analysis.batch
    return _read(
        lambda: scoring.compile_losses(
            model, mesh, batch=size, length=length, held=held, dtype=dtype, kernel=kernel
        ),
        mesh,
    )


def generation(config: Config, model: ModelConfig, mesh: Mesh, prompt: int, new: int) -> Needs:
    """Compile the program that continues prompts of `prompt` tokens by up to `new`."""
    held, dtype, rows = config.merge.dtype, config.model.compute_dtype, config.evaluation.batch
    return _read(
        lambda: decode.compile_generation(
            model, mesh, batch=rows, prompt=prompt, max_new_tokens=new, held=held, dtype=dtype
        ),
        mesh,
        rounds=new,
    )


def merge(config: Config, model: ModelConfig, mesh: Mesh) -> Needs:
    """Compile the merges of a config on their largest tensor; beside it lie all members, the base and the merged model.

    Exchanges are of that one tensor, by the method that exchanges most.
    """
    dtype, members = config.merge.dtype, config.population.members
    found = [_read(program, mesh) for program in _merges(config, model, mesh)]
    table = (
        convert.abstract_params(model, mesh, members=members, dtype=dtype),
        convert.abstract_params(model, mesh, dtype=dtype),
    )
    population_bytes, one = (analytic.held(part) for part in table)
    return Needs(
        population_bytes + one,
        one + max((needs.temporaries for needs in found), default=0),
        max(
            (needs.exchanges for needs in found),
            key=lambda e: sum(size for _, size in e.values()),
            default={},
        ),
        sum(needs.seconds for needs in found),
    )


def _merges(config: Config, model: ModelConfig, mesh: Mesh) -> Iterator[Callable[[], Any]]:
    """Yield what compiles each merge whose program differs; seeds do not matter, and a greedy soup is an average."""
    seen: list[tuple[Any, ...]] = []
    for spec in config.merge.methods:
        own: tuple[Any, ...] = (spec.method, spec.weights, spec.parameters)
        if spec.method == "greedy_soup":
            own = ("average", None, {})
        if own in seen:
            continue
        seen.append(own)
        method, weights, parameters = own
        yield functools.partial(
            population.compile_merge,
            model,
            mesh,
            members=config.population.members
            * (2 if method == "fisher" else 1),  # members, and their information
            method=method,
            weights=weights,
            parameters=parameters,
            dtype=config.merge.dtype,
        )


def _read(compile: Callable[[], Any], mesh: Mesh, rounds: int = 1) -> Needs:
    start = time.monotonic()
    try:
        compiled = compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TooLarge(str(error)) from error
    seconds = time.monotonic() - start
    memory = compiled.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    crossing = exchanges(compiled.as_text(), mesh, rounds=rounds)
    return Needs(
        memory.argument_size_in_bytes, memory.temp_size_in_bytes + outputs, crossing, seconds
    )
