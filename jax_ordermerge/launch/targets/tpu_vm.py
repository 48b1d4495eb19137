"""TPU VMs, created and watched by the scripts of tpu_scripts/."""

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
from jax_ordermerge.launch.tpu_types import TpuType, parse_type


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
        parse_type(value)
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        exclusive(self, "spot", "reserved", "reservation", "flex_start")
        if self.flex_start != bool(self.max_duration):
            raise ValueError("flex_start and max_duration belong together; give both, or neither")
        if self.flex_start and self.slice_type.family not in ("v5litepod", "v6e"):
            raise ValueError(f"flex_start is offered for v5e and v6e, not for {self.type}")
        return self

    @property
    def slice_type(self) -> TpuType:
        """What a slice consists of."""
        return parse_type(self.type)

    def check(self, job: Job) -> None:
        """Refuse an output on the disk of a VM, and a mesh of another size."""
        # the disk of a VM goes with the slice, which is deleted at the end and at preemptions
        separate = self.nfs is None and self.slices * self.slice_type.hosts > 1
        mount = self.mount if self.nfs else None
        check_output(job.output, mount, separate_disks=separate, remedy="nfs=HOST:/SHARE")
        check_mesh(job, self.slices * self.slice_type.chips, self.slices)

    def notes(self, job: Job) -> list[str]:
        """Return what the reader of the script should know."""
        return saves_by_time(job) if self.spot else []


TARGETS.register("tpu-vm", TpuVm)
