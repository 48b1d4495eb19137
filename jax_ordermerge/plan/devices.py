"""Devices to compile for: those of this process, or descriptions of devices that are absent.

Only the compiler of the devices must be installed: libtpu for TPUs (extra `plan-tpu`), the CUDA
plug-in of jax for NVIDIA GPUs (extra `plan-gpu`, which needs no CUDA).
"""

import importlib.util
import os
from typing import Any, NamedTuple

import jax

from jax_ordermerge import mesh as meshes
from jax_ordermerge.errors import UserError
from jax_ordermerge.hardware import Topology


class _Gpu(NamedTuple):
    """Figures of a GPU that XLA asks for, from NVIDIA's data sheets and CUDA guide."""

    compute_capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int  # bytes per multiprocessor
    block_memory: int  # bytes of shared memory per block, at most (opt-in)
    l2_cache: int  # bytes
    clock: float  # GHz


_GPUS = {
    "b200": _Gpu((10, 0), 148, 233472, 232448, 126 * 2**20, 1.965),
    "h200": _Gpu((9, 0), 132, 233472, 232448, 50 * 2**20, 1.98),
    "h100": _Gpu((9, 0), 132, 233472, 232448, 50 * 2**20, 1.98),
    "h100-pcie": _Gpu((9, 0), 114, 233472, 232448, 50 * 2**20, 1.755),
    "a100": _Gpu((8, 0), 108, 167936, 166912, 40 * 2**20, 1.41),
}


# the extras cuda and cuda12
_CUDA_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")


def has_compiler(topology: Topology) -> bool:
    """Return whether what is installed can compile programs for a topology."""
    # the devices of this process bring their compiler, and jaxlib always has that of CPUs
    if topology.device is None or topology.present:
        return True
    if topology.tpu:
        return _is_installed("libtpu")
    # The data sheets of `hardware` lack what XLA asks for: a GPU that is not described here can
    # only be estimated.
    return topology.device.name in _GPUS and any(map(_is_installed, _CUDA_PLUGINS))


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that would hold the module is absent
        return False


def compiler_extra(topology: Topology) -> str:
    """Return the extra of this package that installs the compiler for a topology."""
    return "plan-tpu" if topology.tpu else "plan-gpu"


def topology_devices(topology: Topology) -> list[Any]:
    """Return the devices of a topology, or descriptions that programs can be compiled for.

    Raises:
        UserError: the compiler is not installed, the topology does not exist, or this process has
            too few devices.
    """
    if topology.device is None:
        return _cpu_devices(topology.size)
    if topology.present:
        return jax.devices()
    return _describe_tpus(topology) if topology.tpu else _describe_gpus(topology)


def _cpu_devices(count: int) -> list[Any]:
    meshes.provide_cpu_devices([count])
    # by platform, because a GPU may be there, too
    present = jax.devices("cpu")
    if len(present) < count:
        raise UserError(
            f"the topology has {count} CPU devices, this process has {len(present)}; set"
            f" XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    # jax may have started with more before the number was asked for
    return present[:count]


def _describe_tpus(topology: Topology) -> list[Any]:
    # libtpu would ask the metadata server of a TPU machine for these, and wait for its answer
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several processes may compile at the same time
    }.items():
        # setdefault: on a real TPU machine its own values stay
        os.environ.setdefault(name, value)
    assert topology.device is not None
    name = f"{topology.device.name}:{'x'.join(map(str, topology.shape))}"
    slices = {"num_slices": topology.slices} if topology.slices > 1 else {}
    return _describe("tpu", topology, topology_name=name, **slices)


def _describe_gpus(topology: Topology) -> list[Any]:
    device = topology.device
    assert device is not None
    if device.name not in _GPUS:
        raise UserError(
            f"{topology.name}: there is no description of this GPU to compile for; give --analytic"
        )
    if "xla_gpu_autotune_level" not in os.environ.get("XLA_FLAGS", ""):
        # autotuning runs kernels on the GPU, which is absent
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_autotune_level=0"
    gpu = _GPUS[device.name]
    major, minor = gpu.compute_capability
    # A text of XLA's protocol buffer GpuTargetConfigProto: jax describes GPUs by nothing else.
    target = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  fpus_per_core: {64 if major == 8 else 128}
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared_memory}
  shared_memory_per_block_optin: {gpu.block_memory}
  core_count: {gpu.multiprocessors} clock_rate_ghz: {gpu.clock} l2_cache_size: {gpu.l2_cache}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(device.bandwidth)} device_memory_size: {int(device.memory)}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "NVIDIA {device.kinds[0]}"
"""
    shape = f"{topology.slices}x1x{topology.shape[0]}"
    return _describe(
        "cuda", topology, topology_name=device.name, topology=shape, target_config=target
    )


def _describe(platform: str, requested: Topology, **description: Any) -> list[Any]:
    # experimental: a change of jax breaks plans for absent devices, and nothing else
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform=platform, **description).devices)
    except Exception as error:  # its type differs between versions of jax
        raise UserError(
            f"cannot compile for {requested.name}: {str(error).splitlines()[0]}; install"
            f' "jax_ordermerge[{compiler_extra(requested)}]" and give sizes that exist'
        ) from error
