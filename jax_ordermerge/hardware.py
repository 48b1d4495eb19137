"""Devices by their makers' public data sheets, and names of topologies (`v5p:4x4x2`, `h100:8`).

This is the only table of devices. The MFU of a training and plans for absent hardware read it.
"""

import dataclasses
import math
import os
import re
from typing import Final

from jax_ordermerge.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Device:
    """One jax device: a chip (of TPU v4 and later, with both cores), or a GPU.

    Attributes:
        name: name in topologies.
        kinds: a jax `device_kind` that contains one of these is such a device.
        flops: peak FLOP/s of dense bfloat16 products.
        memory: bytes of its memory.
        bandwidth: bytes/s of its memory.
        link: bytes/s that it receives over all its fast links (ICI, NVLink).
        network: bytes/s that it receives over the network between slices or nodes: its share of
            the network of its host.
        sides: dimensions of the torus of its links; 0 where a switch connects all devices.
        cores: devices per chip. Topologies count chips.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: float
    bandwidth: float
    link: float
    network: float
    sides: int = 0
    cores: int = 1


# A device_kind is looked up in this order, so specific kinds stand before general ones.
DEVICES: Final = (
    # Sources: cloud.google.com/tpu/docs/v6e, v5e, v5p, v4. Memory in GiB. Links in one direction:
    # half of the bidirectional rates of the pages. Network per chip: v6e has four cards of 200
    # Gbit/s per host of eight chips; for v4 the page has no figure, that of v5p is used.
    # TPU7x (Ironwood) by cloud.google.com/tpu/docs/tpu7x: a chip is two devices, each with half of
    # it (libtpu describes tpu7x:4x4x4 as 128 devices).
    Device("tpu7x", ("TPU7x",), 1153.5e12, 96 * 2**30, 3690e9, 300e9, 6.25e9, sides=3, cores=2),
    Device("v6e", ("TPU v6",), 918e12, 32 * 2**30, 1638e9, 400e9, 12.5e9, sides=2),
    Device("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 819e9, 200e9, 3.125e9, sides=2),
    Device("v5p", ("TPU v5",), 459e12, 95 * 2**30, 2765e9, 600e9, 6.25e9, sides=3),
    Device("v4", ("TPU v4",), 275e12, 32 * 2**30, 1200e9, 300e9, 6.25e9, sides=3),
    # Sources: NVIDIA's data sheets of B200, GB200 (Blackwell), H200, H100, GH200 and A100. FLOP/s
    # are half of the rates with sparsity. Links are NVLink in one direction, or PCIe where cards
    # are linked in pairs at most. One network card per GPU, as in DGX and HGX systems.
    Device("gb200", ("GB200",), 2500e12, 186e9, 8000e9, 900e9, 50e9),
    Device("b200", ("B200",), 2250e12, 180e9, 8000e9, 900e9, 50e9),
    Device("gh200", ("GH200",), 989.4e12, 96e9, 4000e9, 450e9, 50e9),
    Device("h200-nvl", ("H200 NVL",), 835.5e12, 141e9, 4800e9, 450e9, 50e9),
    Device("h200", ("H200",), 989.4e12, 141e9, 4800e9, 450e9, 50e9),
    Device("h100-nvl", ("H100 NVL",), 835.5e12, 94e9, 3900e9, 64e9, 50e9),
    Device("h100-pcie", ("H100 PCIe",), 756e12, 80e9, 2000e9, 64e9, 50e9),
    Device("h100", ("H100",), 989.4e12, 80e9, 3350e9, 450e9, 50e9),
    Device("a100-pcie", ("A100 80GB PCIe",), 312e12, 80e9, 1935e9, 32e9, 25e9),
    Device("a100-40gb", ("A100-SXM4-40GB", "A100-PCIE-40GB"), 312e12, 40e9, 1555e9, 300e9, 25e9),
    Device("a100", ("A100",), 312e12, 80e9, 2039e9, 300e9, 25e9),
)
# Share of a device's memory that a program may use. The rest is left for fragmentation and for
# what other programs hold.
MEMORY_FRACTION: Final = 0.92
# Where jax reads the share of a GPU's memory that it takes at its start; the second is older.
_FRACTION_VARIABLES: Final = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def set_memory_fraction() -> None:
    """Let jax take `MEMORY_FRACTION` of a GPU, unless the environment says another share.

    Call it before jax starts. Its own share is three quarters, so that a run had much less memory
    than its plan.

    Example:
        >>> set_memory_fraction()
    """
    # jax refuses both names at once
    if not any(os.environ.get(name) for name in _FRACTION_VARIABLES):
        os.environ[_FRACTION_VARIABLES[0]] = str(MEMORY_FRACTION)


def memory_limit(device: Device | None, offered: float | None = None) -> float | None:
    """Return the bytes per device that a program may use; None if nothing is known.

    Plans and runs ask this function, so that they have one limit.

    Args:
        device: with its data sheet; None for devices that the table lacks.
        offered: bytes that the runtime of a device that is present offers (`bytes_limit`).

    Example:
        >>> v5e = next(device for device in DEVICES if device.name == "v5e")
        >>> [
        ...     round(memory_limit(v5e, offered) / 2**30, 2)
        ...     for offered in (None, 15.75 * 2**30, 2**30)
        ... ]
        [14.72, 14.72, 1.0]
    """
    limits = [] if device is None else [MEMORY_FRACTION * device.memory]
    if offered is not None:
        # Of a GPU it is the share that jax has taken already, for example of a part (MIG), so
        # that no further share is taken. Without a data sheet nothing tells whether it is all.
        limits.append(offered if limits else MEMORY_FRACTION * offered)
    return min(limits, default=None)


def find(device_kind: str) -> Device | None:
    """Return the device of a jax `device_kind`, or None if the table lacks it.

    Example:
        >>> find("NVIDIA H100 80GB HBM3").name, find("TPU v5 lite").name, find("cpu")
        ('h100', 'v5e', None)
    """
    for device in DEVICES:
        if any(kind in device_kind for kind in device.kinds):
            return device
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """An arrangement of equal devices.

    Attributes:
        device: None for devices that the table lacks, such as CPUs.
        shape: sides of a TPU slice in chips, or the number of GPUs per node.
        slices: number of slices, or nodes, which a slower network connects.
        present: whether these are the devices of this process.
        offered: bytes per device that the runtime offers, of devices that are present.
    """

    device: Device | None
    shape: tuple[int, ...]
    slices: int = 1
    present: bool = False
    offered: float | None = None

    @property
    def memory_limit(self) -> float | None:
        """Bytes per device that a program may use; None without a data sheet."""
        return None if self.device is None else memory_limit(self.device, self.offered)

    @property
    def size(self) -> int:
        """Total number of devices."""
        return math.prod(self.shape) * self.cores * self.slices

    @property
    def cores(self) -> int:
        """Devices per chip."""
        # devices that are present are counted as devices: a mesh may take one of a chip
        return self.device.cores if self.device and not self.present else 1

    @property
    def tpu(self) -> bool:
        """Whether these are TPUs."""
        return self.device is not None and self.device.sides > 0

    @property
    def platform(self) -> str:
        """Name of the platform in jax."""
        return "tpu" if self.tpu else "gpu" if self.device else "cpu"

    @property
    def name(self) -> str:
        """The name, e.g. `v5p:4x4x2`, `2 x v5e:8x8` or `h200:8x4`."""
        kind = self.device.name if self.device else "cpu"
        sides = "x".join(map(str, self.shape))
        # the form that `parse` reads: nodes are a second size of GPUs, slices an option of TPUs
        if self.device and not self.tpu:
            return f"{kind}:{sides}" + (f"x{self.slices}" if self.slices > 1 else "")
        return (f"{self.slices} x " if self.slices > 1 else "") + f"{kind}:{sides}"

    def speed(self, size: int) -> float:
        """Return the bytes/s that a device receives within a group of `size` devices of a slice.

        Example:
            >>> [parse("v5p:4x4x2").speed(size) / 1e9 for size in (4, 8, 32)]
            [200.0, 400.0, 600.0]
            >>> parse("h100:8").speed(2) / 1e9
            450.0
        """
        assert self.device is not None
        if not self.device.sides:
            return self.device.link  # a switch gives every group the full rate
        # on a torus a group uses the links along the sides that it covers, the longest side first
        # devices of one chip have no links between chips to use
        covered, sides = self.cores, 0
        for side in sorted(self.shape, reverse=True):
            if covered >= size:
                break
            covered, sides = covered * side, sides + 1
        return self.device.link * max(sides, 1) / self.device.sides


def parse(text: str, slices: int = 1) -> Topology:
    """Read the name of a topology.

    Args:
        text: sides of a TPU slice (`v5p:4x4x2`, `v5e:8x8`), GPUs per node and number of nodes
            (`h100:8`, `h200:8x4`), or a number of CPU devices (`cpu:8`).
        slices: number of TPU slices.

    Raises:
        UserError: the device is unknown, or the sizes do not fit it.

    Example:
        >>> parse("h200:8x4").size, parse("v5e:4x4", slices=2).name
        (32, '2 x v5e:4x4')
        >>> parse("v5q:4x4x2")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: --topology v5q:4x4x2: unknown device v5q (did you mean
        'v5p'?)
    """
    # lower-case and stripped, as names come from command lines
    match = re.fullmatch(r"([a-z0-9-]+):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        raise UserError(
            f"--topology {text}: expected DEVICE:SIZES, such as v5p:4x4x2, v5e:8x8, h100:8,"
            " h200:8x4 or cpu:8"
        )
    name, shape = match[1], tuple(int(side) for side in match[2].split("x"))
    # cpu is no device of the table: it has no data sheet, and any number of devices
    devices = {device.name: device for device in DEVICES}
    if name != "cpu" and name not in devices:
        near = did_you_mean(name, [*devices, "cpu"])
        raise UserError(f"--topology {text}: unknown device {name}{near}")
    if min(shape) < 1 or slices < 1:
        raise UserError(f"--topology {text}, --slices {slices}: sizes are at least 1")
    device = devices.get(name)
    if device is None or not device.sides:
        if slices > 1:
            raise UserError(
                f"--slices {slices}: only TPUs have slices; give nodes as the second size, as in"
                f" h200:8x{slices}"
            )
        if len(shape) > (2 if device else 1):
            gpus, cpus = (
                "GPUs per node and nodes, as in h200:8x4",
                "a number of devices, as in cpu:8",
            )
            expected = gpus if device else cpus
            raise UserError(f"--topology {text}: expected {expected}")
        return Topology(device, shape[:1], shape[1] if len(shape) > 1 else 1)
    if len(shape) != device.sides:
        example = f"{name}:{'x'.join(['4'] * device.sides)}"
        raise UserError(
            f"--topology {text}: a slice of {name} has {device.sides} sides, as in {example}"
        )
    return Topology(device, shape, slices)
