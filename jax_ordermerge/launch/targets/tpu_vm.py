"""TPU VMs, created and watched by the scripts of tpu_scripts/."""

import re
from typing import ClassVar, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.launch.target import (
    TARGETS,
    Job,
    Labels,
    Target,
    Word,
    check_mesh,
    check_output,
    exclusive,
    saves_by_time,
)

# By the pages of Cloud TPU: the number of a type counts cores (two per chip) for v4 and v5p, chips
# for v5e and v6e. Chips per host: four, and for v5e and v6e eight on a host that is alone.
_CORES_PER_CHIP = {"v4": 2, "v5p": 2, "v5litepod": 1, "v6e": 1}
_HOST_CHIPS = 4
_LONE_HOST_CHIPS = {"v4": 4, "v5p": 4, "v5litepod": 8, "v6e": 8}


class TpuVm(Target):
    """TPU VMs, one or several slices."""

    template: ClassVar[str] = "tpu_vm.sh"

    type: Word = Field(description="accelerator type, such as v5p-64")
    runtime: Word = Field(description="software of the VMs, such as v2-alpha-tpuv5")
    # no `Word`: requirements hold brackets, spaces and @; the template quotes it
    package: str = Field(description="what pip installs there, or a wheel of this machine")
    constraints: str = Field(
        "docker/constraints.txt",
        description="versions that pip keeps to there, a file of this machine; none: the newest",
    )
    slices: PositiveInt = 1
    spot: bool = False
    reserved: bool = Field(False, description="from the project's reservation")
    reservation: Word | None = Field(None, description="from the reservation of this name")
    flex_start: bool = Field(False, description="from the queue of flex-start (v5e, v6e)")
    max_duration: Word | None = Field(
        None, description="with flex_start: how long the slice may run, such as 24h"
    )
    labels: Labels = Field((), description="labels of the slices: KEY=VALUE, separated by commas")
    internal_ips: bool = Field(
        False, description="no external addresses: ssh through IAP, downloads through Cloud NAT"
    )
    network: Word | None = None
    subnetwork: Word | None = None
    service_account: Word | None = None
    secret: Word | None = Field(
        None,
        description="name in Secret Manager of the token HF_TOKEN for gated models; workers read it"
        " when the run starts",
    )
    env_file: str | None = Field(
        None,
        description="file of this machine with lines NAME=VALUE (HF_TOKEN=...), mode 600; copied to"
        " the workers, never into the script",
    )
    nfs: Word | None = Field(None, description="HOST:/SHARE that all workers mount")
    mount: Word = Field("/mnt/shared", description="where they mount it")
    # Before the slice is deleted. An output in a bucket outlives it, and needs no copy.
    fetch: Word | None = Field(
        None, description="path copied to this machine at the end; the report by default"
    )
    project: Word | None = None
    zone: Word | None = None
    scripts: str = Field("tpu_scripts", description="folder of the scripts")

    @pydantic.field_validator("type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        family, _, number = value.partition("-")
        if family == "tpu7x":
            raise ValueError("Cloud TPU has no TPU7x as VMs; use --target gke accelerator=tpu7x")
        if family not in _CORES_PER_CHIP or not re.fullmatch("[1-9][0-9]*", number):
            known = ", ".join(f"{name}-N" for name in _CORES_PER_CHIP)
            raise ValueError(f"type = {value}: expected {known}, such as v5p-64")
        if int(number) % _CORES_PER_CHIP[family]:
            raise ValueError(
                f"type = {value}: the number of {family} counts cores, two per chip; give an even one"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        exclusive(self, "spot", "reserved", "reservation", "flex_start")
        if self.flex_start != bool(self.max_duration):
            raise ValueError("flex_start and max_duration belong together; give both, or neither")
        if self.flex_start and self._family not in ("v5litepod", "v6e"):
            raise ValueError(f"flex_start is offered for v5e and v6e, not for {self.type}")
        return self

    @property
    def _family(self) -> str:
        return self.type.partition("-")[0]

    @property
    def slice_chips(self) -> int:
        """Chips per slice; a chip is a jax device in all of these generations."""
        return int(self.type.partition("-")[2]) // _CORES_PER_CHIP[self._family]

    @property
    def hosts(self) -> int:
        """Hosts of all slices."""
        alone = self.slice_chips <= _LONE_HOST_CHIPS[self._family]
        return self.slices * (1 if alone else self.slice_chips // _HOST_CHIPS)

    @property
    def interruptible(self) -> bool:
        """Whether the slices may be taken away."""
        return self.spot

    def check(self, job: Job) -> None:
        """Refuse an output on the disk of a VM, and a mesh of another size."""
        # the disk of a VM goes with the slice, which is deleted at the end and at preemptions
        separate = self.nfs is None and self.hosts > 1
        mount = self.mount if self.nfs else None
        check_output(job.output, mount, separate_disks=separate, remedy="nfs=HOST:/SHARE")
        check_mesh(job, self.slices * self.slice_chips, self.slices)

    def notes(self, job: Job) -> list[str]:
        """Return what the reader of the script should know."""
        return saves_by_time(job) if self.interruptible else []


TARGETS.register("tpu-vm", TpuVm)
