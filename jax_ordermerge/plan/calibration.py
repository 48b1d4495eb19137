"""Published training runs, and the share of the peak that matmuls reach by them.

A data sheet says what a device could do. What programs of this kind do with it is taken from runs
that others have measured and published, one per device.
"""

import dataclasses
from typing import Final

from jax_ordermerge.hardware import Device

# The share of the peak where no run of a Llama in bfloat16 is published for the device.
ASSUMED_EFFICIENCY: Final = 0.65


@dataclasses.dataclass(frozen=True)
class PublishedRun:
    """A measured training of all weights in bfloat16, with FSDP over all devices.

    Attributes:
        topology: name of the devices, as `hardware.parse` reads it.
        model: a name of `arch.ARCHITECTURES`.
        rows: sequences per device and step.
        length: tokens per sequence.
        tokens_per_second: per device.
        efficiency: share of the peak that matmuls must reach for an estimate of this run, with
            `model.remat = dots`, to have this speed (`tests/plan/test_calibration.py`).
        source: where it is published.
        remark: what differs from the settings here; empty if nothing does.
    """

    topology: str
    model: str
    rows: int
    length: int
    tokens_per_second: float
    efficiency: float
    source: str
    remark: str = ""

    @property
    def device(self) -> str:
        """Name of the device."""
        return self.topology.partition(":")[0]


_MAXTEXT: Final = "github.com/AI-Hypercomputer/maxtext"
# Of MaxText, because it is compiled by the same compiler. Read on 2026-11-30 at commit e591f30.
RUNS: Final = (
    # Published as 45.46 %, counting attention to later tokens, too. It recomputes half of the MLP,
    # which is between `dots` and `full`.
    PublishedRun(
        "v6e:16x16",
        "llama-3.1-8b",
        rows=4,
        length=8192,
        tokens_per_second=7207,
        efficiency=0.452,
        source=f"{_MAXTEXT}/blob/main/docs/reference/models/tiering.md",
        remark="recomputes half of the MLP",
    ),
    PublishedRun(
        "v5p:8x8x8",
        "llama-2-70b",
        rows=2,
        length=4096,
        tokens_per_second=692,
        efficiency=0.682,
        source=f"{_MAXTEXT}/blob/main/docs/reference/models/tiering.md",
        remark="recomputes a third of the MLP",
    ),
    # Published: 492 TFLOP/s per device, of 46.1 GFLOP per token (6 N, and attention to all tokens).
    PublishedRun(
        "h100:8",
        "llama-2-7b",
        rows=4,
        length=4096,
        tokens_per_second=492e12 / 46.1e9,
        efficiency=0.491,
        source=f"{_MAXTEXT}/blob/main/src/maxtext/configs/gpu/a3/llama_2_7b/README.md",
    ),
)
# Devices with the matrix units of one that has a run.
_LIKE: Final = {"h200": "h100", "gh200": "h100", "h100-nvl": "h100", "h100-pcie": "h100"}


def find_run(device: Device) -> PublishedRun | None:
    """Return the published run by which times on a device are estimated, None if there is none."""
    name = _LIKE.get(device.name, device.name)
    return next((run for run in RUNS if run.device == name), None)


def matmul_efficiency(device: Device) -> float:
    """Return the share of the peak FLOP/s that matmuls reach.

    Example:
        >>> from jax_ordermerge.hardware import DEVICES
        >>> devices = {device.name: device for device in DEVICES}
        >>> [matmul_efficiency(devices[name]) for name in ("v6e", "h200", "a100")]
        [0.452, 0.491, 0.65]
    """
    run = find_run(device)
    return ASSUMED_EFFICIENCY if run is None else run.efficiency


def describe(device: Device | None) -> str:
    """Return where the share of the peak comes from.

    Example:
        >>> from jax_ordermerge.hardware import parse
        >>> describe(parse("a100:8").device)
        'matmuls reach 65% of the peak, which is assumed: no published run is known for a100'
    """
    if device is None:
        return "no times are estimated for these devices"
    run = find_run(device)
    reach = f"matmuls reach {matmul_efficiency(device):.0%} of the peak, "
    if run is None:
        return f"{reach}which is assumed: no published run is known for {device.name}"
    remark = f" ({run.remark})" if run.remark else ""
    return (
        f"{reach}by a published run: {run.model} on {run.topology} at {run.tokens_per_second:,.0f}"
        f" tokens per second and device{remark}, {run.source}"
    )
