"""Google Kubernetes Engine, by a JobSet."""

import math
from typing import Annotated, ClassVar, Final, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.json_types import Json
from jax_ordermerge.launch.target import (
    TARGETS,
    Job,
    Target,
    Word,
    check_mesh,
    check_output,
)

# A slice is a torus of two sides (v5e, v6e) or three (v4, v5p).
Topology = Annotated[str, Field(pattern=r"^\d+(x\d+){1,2}$")]
# also a containerPort of the template
_PORT: Final = 8476


class Gke(Target):
    """A JobSet: a TPU slice is a Job, a GPU node is a pod."""

    template: ClassVar[str] = "gke.yaml"
    submit_command: ClassVar[tuple[str, ...]] = ("kubectl", "apply", "-f")

    image: Word = Field(description="container image that holds ordermerge, see docker/")
    accelerator: Word = Field(
        description="label of the node pool: tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb, ..."
    )
    topology: Topology | None = Field(None, description="topology of a TPU slice, such as 4x4x2")
    slices: PositiveInt = Field(1, description="TPU slices")
    chips: PositiveInt = Field(4, description="TPU chips per node")
    nodes: PositiveInt = Field(1, description="GPU nodes")
    gpus: PositiveInt = Field(8, description="GPUs per node")
    volume: Word | None = Field(
        None,
        description="PersistentVolumeClaim (ReadWriteMany) for run directories; created if storage"
        " is given",
    )
    storage: Word | None = Field(None, description="size of the created volume, such as 1Ti")
    storage_class: Word = Field("standard-rwx", description="class of the created volume")
    mount: Word = Field("/mnt/shared", description="mount path of the volume")
    namespace: Word = "default"
    service_account: Word | None = None
    token_secret: Word | None = Field(
        None, description="Secret with the key HF_TOKEN, for gated models"
    )
    spot: bool = False
    # Many, because a preemption counts as a failure. Bad input (exit code 2) ends the JobSet at
    # once.
    restarts: PositiveInt = Field(100, description="preemptions and failures to survive")
    # Kubernetes kills the pod after it: a checkpoint that takes longer is lost.
    grace: PositiveInt = Field(
        120, description="seconds to save a checkpoint when a pod is asked to stop"
    )

    @pydantic.model_validator(mode="after")
    def _tpu_or_gpu(self) -> Self:
        if self.tpu and self.topology is None:
            raise ValueError(
                f"topology is missing for {self.accelerator}; give one such as topology=4x4x2"
            )
        if not self.tpu and (self.topology is not None or self.slices != 1):
            raise ValueError(
                f"topology and slices are of TPUs, not of {self.accelerator}; give nodes and gpus"
            )
        # pods of one Job have equal resources, so the hosts of a slice must be full
        if self.tpu and self.slice_chips > self.chips and self.slice_chips % self.chips:
            raise ValueError(
                f"topology {self.topology} has {self.slice_chips} chips, not a multiple of"
                f" {self.chips} per node; change chips"
            )
        if self.storage and not self.volume:
            raise ValueError("storage is the size of a volume; name it with volume=NAME")
        return self

    @property
    def tpu(self) -> bool:
        """Whether the node pool has TPUs."""
        # by the label that GKE gives to its node pools
        return self.accelerator.startswith("tpu-")

    @property
    def slice_chips(self) -> int:
        """Chips per slice."""
        return math.prod(int(size) for size in (self.topology or "1").split("x"))

    @property
    def pods(self) -> int:
        """Pods per Job."""
        # a topology smaller than a node, such as 2x2, is one pod with fewer chips
        return max(1, self.slice_chips // self.chips) if self.tpu else self.nodes

    @property
    def pod_devices(self) -> int:
        """Accelerators per pod."""
        return min(self.chips, self.slice_chips) if self.tpu else self.gpus

    def distributed(self, job: Job) -> Json:
        """Return the address of the first pod: GPU pods do not know their peers."""
        if self.tpu:
            return super().distributed(job)
        # the names that a JobSet gives to its pods, and to the service that resolves them
        coordinator = f"{job.slug}-nodes-0-0.{job.slug}:{_PORT}"
        return {"coordinator": coordinator, "processes": self.nodes}

    def check(self, job: Job) -> None:
        """Refuse an output on the disk of a pod, and a mesh of another size."""
        # without a common volume each pod has a disk of its own
        separate = self.volume is None and self.slices * self.pods > 1
        check_output(job.output, self.mount, separate_disks=separate)
        slices = self.slices if self.tpu else self.nodes
        check_mesh(job, self.slices * self.pods * self.pod_devices, slices)


TARGETS.register("gke", Gke)
