"""Devices of a machine: their number, drivers and memory, the mesh, and the links between them."""

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from jax_ordermerge.commands.doctor.finding import Finding
from jax_ordermerge.commands.doctor.versions import ACCELERATORS, package_version
from jax_ordermerge.config import Config
from jax_ordermerge.errors import PeerLost, UserError
from jax_ordermerge.hardware import MEMORY_FRACTION, find

_PATIENCE: Final = 180.0  # seconds for the devices to answer
# Bytes per device of the sum over all devices: long enough that latency does not count, and on
# CPUs, whose links nobody compares, short.
_SUMMED_BYTES: Final = {"cpu": 2**20}
_SUMMED_BYTES_ACCELERATOR: Final = 2**28
_REPEATS: Final = 5
# Below this share of the data sheet something is wrong: a cable, a plugin of NCCL, a firewall.
_SLOW_LINKS: Final = 0.25
# Below this share of a GPU's memory somebody has set another fraction than runs do.
_SMALL_FRACTION: Final = 0.8


def check_devices(config: Config | None) -> Iterator[Finding]:
    """Start the processes of a config, and check devices, drivers and mesh."""
    from jax_ordermerge import mesh, processes

    try:
        if config and config.distributed.coordinator:
            # The start of processes comes before any look at devices: jax cannot join peers
            # afterwards.
            processes.start_distributed(**config.distributed.model_dump())
        elif config:
            mesh.provide_cpu_devices(config.mesh.sizes.values())
        import jax  # after the number of CPU devices is set

        # in a thread, because a TPU that another process holds blocks for ever
        if not processes.within(mesh.check_accelerator, _PATIENCE) or not processes.within(
            jax.devices, _PATIENCE
        ):
            detail = (
                f"no answer within {_PATIENCE:.0f} s; does another program hold them,"
                " or is a worker not started?"
            )
            yield Finding("devices", "error", detail)
            return
    except (UserError, PeerLost, RuntimeError) as error:
        yield Finding("devices", "error", str(error).splitlines()[0])
        return
    count = jax.process_count()
    detail = f"{count}, this is number {jax.process_index()}" if count > 1 else "1"
    yield Finding("processes", "ok", detail)
    try:
        yield _check_sums()
    except RuntimeError as error:  # of XLA: a device that is listed fails at its first program
        yield Finding("devices", "error", str(error).splitlines()[0])
        return
    platform = jax.devices()[0].platform
    if platform == "cpu":
        yield from _check_cpu_is_meant(config)
    else:
        yield Finding("driver", "ok", describe_driver(platform))
        yield from _check_memory_fraction()
    if config:
        try:
            # by the function that a run uses, so that both refuse the same
            shape = mesh.make_mesh(**config.mesh.model_dump()).shape
        except UserError as error:
            yield Finding("mesh", "error", str(error))
        else:
            axes = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1)
            yield Finding("mesh", "ok", axes or "one device")


def _check_sums() -> Finding:
    import jax

    # jax.devices() holds those of all processes; only the local ones can be computed on here
    devices, local = jax.devices(), jax.local_devices()
    # a device that is listed may still fail at its first program
    sums = [float(jax.device_put(jax.numpy.ones(8), device).sum()) for device in local]
    if sums == [8.0] * len(sums):
        kind = devices[0].device_kind
        detail = f"{len(devices)} x {kind}, {len(sums)} of them here; each can add"
        return Finding("devices", "ok", detail)
    return Finding("devices", "error", f"a sum of eight ones on each local device gave {sums}")


def _check_cpu_is_meant(config: Config | None) -> Iterator[Finding]:
    """Yield an error where the CPU is found and something says that an accelerator was meant.

    What launch scripts were made for stands in `JAX_PLATFORMS`: `mesh.check_accelerator`.
    """
    from jax_ordermerge.train.compiler_options import PRESETS

    remedy = "check the driver and the extra (tpu, cuda, cuda12)"
    # jax falls back to the CPU with a warning only, and a run would be slow for no visible reason
    plugins = [name for name in ACCELERATORS if package_version(name)]
    if plugins and not os.environ.get("JAX_PLATFORMS"):
        detail = (
            f"{', '.join(plugins)} is installed, but only CPU devices are found; check the driver,"
            " or set JAX_PLATFORMS=cpu if the CPU is meant"
        )
        yield Finding("accelerator", "error", detail)
    if config is None:
        return
    model = config.model
    if model.attention in ("splash", "cudnn"):
        accelerator = {"splash": "a TPU", "cudnn": "a GPU"}[model.attention]
        detail = f"model.attention = {model.attention} is of {accelerator}, but jax finds the CPU"
        yield Finding("accelerator", "error", f"{detail} only; {remedy}")
    if model.compiler_preset is not None:
        platforms = PRESETS[model.compiler_preset].platforms
        if "cpu" not in platforms:
            detail = f"model.compiler_preset = {model.compiler_preset} is for {platforms[0]}"
            yield Finding("accelerator", "error", f"{detail}, but jax finds the CPU only; {remedy}")


# ---------------------------------------------------------------------------- drivers and memory


def describe_driver(platform: str) -> str:
    """Return the versions of the driver and the libraries that lie outside of Python packages.

    Args:
        platform: of jax, `gpu` or `tpu`.
    """
    if platform == "gpu":
        # by the C interfaces of NVIDIA: jax offers none of these numbers
        versions = {
            "driver": _nvidia_driver(),
            "CUDA of the driver": _cuda_version(),
            "cuDNN": _cudnn_version(),
        }
        return ", ".join(f"{name} {version or 'not known'}" for name, version in versions.items())
    import jax.extend

    return " ".join(jax.extend.backend.get_backend().platform_version.split())


def _nvidia_driver() -> str | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text)):
            return None
    except (OSError, AttributeError):
        return None
    return text.value.decode()


def _cuda_version() -> str | None:
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)):
            return None
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}"  # 13020 is 13.2


def _cudnn_version() -> str | None:
    try:
        library = ctypes.CDLL("libcudnn.so.9")
    except OSError:
        return None  # the start of jax has loaded it where there is one
    library.cudnnGetVersion.restype = ctypes.c_size_t
    return cudnn_name(library.cudnnGetVersion())


def cudnn_name(number: int) -> str:
    """Return the name of a version of cuDNN 9 or later from its number.

    Example:
        >>> cudnn_name(91002)
        '9.10.2'
    """
    return f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def _check_memory_fraction() -> Iterator[Finding]:
    import jax

    from jax_ordermerge.mesh import offered_memory

    offered, device = offered_memory(jax.devices()), find(jax.devices()[0].device_kind)
    if offered is None:
        return
    detail = f"{offered / 2**30:.1f} GiB per device for jax"
    if device is None:
        yield Finding("memory fraction", "ok", detail)
        return
    share = offered / device.memory
    detail += f", {share:.0%} of the data sheet of {device.name}"
    if share >= _SMALL_FRACTION:
        yield Finding("memory fraction", "ok", detail)
        return
    detail += (
        f"; runs take {MEMORY_FRACTION:.0%} unless XLA_CLIENT_MEM_FRACTION says otherwise; a part"
        " of a GPU (MIG) offers less"
    )
    yield Finding("memory fraction", "note", detail)


def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that limits it.

    Example:
        >>> host_memory() > 2**28
        True
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    # of cgroups version 2 and 1; "max", or a number beyond any memory, is no limit
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = Path("/sys/fs/cgroup") / name
        text = path.read_text().strip() if path.is_file() else ""
        if text.isdecimal():
            limits.append(int(text))
    return min(limits)


def measure_flops() -> float:
    """Return the FLOP/s of a product of matrices in float32 on one device of this process.

    The devices of a CPU share its cores, so it is the speed of all of them.

    Example:
        >>> measure_flops() > 1e6
        True
    """
    import jax

    side = 1024
    matrix = jax.numpy.ones((side, side))
    product = jax.jit(lambda x: x @ x)
    product(matrix).block_until_ready()  # compiles
    start = time.monotonic()
    for _ in range(_REPEATS):
        product(matrix).block_until_ready()
    return _REPEATS * 2 * side**3 / (time.monotonic() - start)


# --------------------------------------------------------------------------------------- exchange


def check_exchange() -> Iterator[Finding]:
    """Add arrays over all devices of all processes, and measure what a device receives.

    One device has nothing to exchange. All processes call it.
    """
    import jax

    from jax_ordermerge import processes

    devices = jax.devices()
    if len(devices) == 1:
        return
    results: list[tuple[bool, float]] = []
    try:
        done = processes.within(lambda: results.append(_sum_over_devices()), _PATIENCE)
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        reason = f"failed: {str(error).splitlines()[0]}"
        yield Finding("exchange", "error", f"a sum over {len(devices)} devices {reason}")
        return
    if not done:
        detail = (
            f"a sum over {len(devices)} devices did not end within {_PATIENCE:.0f} s; check the"
            " network between the machines (NCCL_DEBUG=INFO shows what NCCL uses)"
        )
        yield Finding("exchange", "error", detail)
        return
    right, speed = results[0]
    if not right:
        yield Finding("exchange", "error", f"a sum over {len(devices)} devices is wrong")
        return
    yield judge_links(len(devices), speed, _expected_speed())


def all_agree(flag: bool) -> bool:
    """Return whether a flag is true on all processes, and false where one does not answer in time.

    One process may see what the others do not; they would wait for it in the checks that follow.

    Example:
        >>> all_agree(True), all_agree(False)
        (True, False)
    """
    from jax_ordermerge import processes

    answers: list[bool] = []
    # the sum of the others ends up to so many seconds after that of this one
    ended = processes.within(lambda: answers.append(processes.on_all(flag)), 2 * _PATIENCE)
    return ended and answers == [True]


def judge_links(count: int, speed: float, expected: float | None) -> Finding:
    """Return the finding about a sum over devices.

    Args:
        count: number of devices.
        speed: bytes/s that each of them received.
        expected: bytes/s of the data sheet; None where there is none.

    Example:
        >>> judge_links(8, 300e9, 450e9).detail
        'a sum over 8 devices is right; each receives 300.0 GB/s (data sheet: 450.0)'
        >>> judge_links(16, 1e9, 50e9).verdict
        'note'
    """
    detail = f"a sum over {count} devices is right; each receives {speed / 1e9:.1f} GB/s"
    if expected is None:
        return Finding("exchange", "ok", detail)
    detail += f" (data sheet: {expected / 1e9:.1f})"
    if speed >= _SLOW_LINKS * expected:
        return Finding("exchange", "ok", detail)
    detail += "; the links are slow: check topology, network plugin (NCCL_DEBUG=INFO) and cables"
    return Finding("exchange", "note", detail)


def _sum_over_devices() -> tuple[bool, float]:
    """Return whether a sum over all devices is right, and the bytes/s that each received."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = jax.devices()
    count = len(devices)
    size = _SUMMED_BYTES.get(devices[0].platform, _SUMMED_BYTES_ACCELERATOR)
    mesh = Mesh(np.array(devices), ("device",))
    shape = (count, size // 4)
    # device i holds i + 1, so that a device that is left out or counted twice changes the sum
    numbers = np.arange(1, count + 1, dtype=np.float32)[:, None]
    values = jax.make_array_from_callback(
        shape,
        NamedSharding(mesh, P("device")),
        lambda index: np.broadcast_to(numbers, shape)[index],
    )
    add = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, "device"), mesh=mesh, in_specs=P("device"), out_specs=P()
        )
    )
    total = np.asarray(add(values).addressable_data(0))  # compiles and connects, too
    seconds = []
    for _ in range(_REPEATS):
        start = time.monotonic()
        jax.block_until_ready(add(values))
        seconds.append(time.monotonic() - start)
    # of the best algorithm: a device receives all but its own part twice, reduced and then gathered
    received = 2 * (count - 1) / count * size
    return bool((total == count * (count + 1) / 2).all()), received / min(seconds)


def _expected_speed() -> float | None:
    """Return the bytes/s of a device by its data sheet: of the network where there are nodes."""
    import jax

    from jax_ordermerge.mesh import slice_sizes

    device = find(jax.devices()[0].device_kind)
    if device is None:
        return None
    return device.network if len(slice_sizes(jax.devices())) > 1 else device.link
