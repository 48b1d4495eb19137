"""TPU VMs, created and watched by the scripts of tpu_scripts/."""

from typing import ClassVar, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.launch.target import TARGETS, Job, Target, Word, check_output


class TpuVm(Target):
    """TPU VMs, one or several slices."""

    template: ClassVar[str] = "tpu_vm.sh"

    # The number counts cores for some types (v5p-64 has 32 chips), so it is no number of devices,
    # and the mesh cannot be checked by it.
    type: Word = Field(description="accelerator type, such as v5p-64")
    runtime: Word = Field(description="software of the VMs, such as v2-alpha-tpuv5")
    # no `Word`: requirements hold brackets, spaces and @; the template quotes it
    package: str = Field(description="what pip installs there, or a wheel of this machine")
    slices: PositiveInt = 1
    spot: bool = False
    reserved: bool = False
    nfs: Word | None = Field(None, description="HOST:/SHARE that all workers mount")
    mount: Word = Field("/mnt/shared", description="where they mount it")
    # Before the slice is deleted. An output in a bucket outlives it, and needs no copy.
    fetch: Word | None = Field(
        None, description="path copied to this machine at the end; the report by default"
    )
    project: Word | None = None
    zone: Word | None = None
    scripts: str = Field("tpu_scripts", description="folder of the scripts")

    @pydantic.model_validator(mode="after")
    def _spot_or_reserved(self) -> Self:
        if self.spot and self.reserved:
            raise ValueError("spot and reserved exclude each other; give one")
        return self

    def check(self, job: Job) -> None:
        """Refuse an output on the disk of a VM."""
        # the disk of a VM goes with the slice, which is deleted at the end and at preemptions
        check_output(job.output, self.mount)


TARGETS.register("tpu-vm", TpuVm)
