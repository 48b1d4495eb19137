"""Google Kubernetes Engine, by a JobSet."""

import math
from typing import Annotated, ClassVar, Final, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge import hardware
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
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

# A slice is a torus of two sides (v5e, v6e) or three (v4, v5p).
Topology = Annotated[str, Field(pattern=r"^\d+(x\d+){1,2}$")]
# also a containerPort of the template
_PORT: Final = 8476
# The label cloud.google.com/gke-tpu-accelerator of GKE's node pools, and the name in `hardware`.
_TPUS: Final = {
    "tpu-v4-podslice": "v4",
    "tpu-v5-lite-podslice": "v5e",
    "tpu-v5-lite-device": "v5e",
    "tpu-v5p-slice": "v5p",
    "tpu-v6e-slice": "v6e",
    "tpu7x": "tpu7x",
}


class Gke(Target):
    """A JobSet: a TPU slice is a Job, a GPU node is a pod."""

    template: ClassVar[str] = "gke.yaml"
    submit_command: ClassVar[tuple[str, ...]] = ("kubectl", "apply", "-f")

    image: Word = Field(description="container image that holds ordermerge, see docker/")
    accelerator: Word = Field(
        description="label of the node pool: tpu-v5p-slice, tpu-v6e-slice, tpu7x,"
        " nvidia-h100-80gb, ..."
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
    pull_secret: Word | None = Field(None, description="Secret with which the image is pulled")
    labels: Labels = Field(
        (), description="labels of the JobSet and its pods: KEY=VALUE, separated by commas"
    )
    queue: Word | None = Field(None, description="LocalQueue of Kueue that admits the JobSet")
    priority_class: Word | None = Field(None, description="PriorityClass of the pods")
    memory: Word | None = Field(
        None, description="host memory that a pod asks for, such as 400Gi: the base is read there"
    )
    spot: bool = False
    flex_start: bool = Field(False, description="a node pool of flex-start")
    reservation: Word | None = Field(
        None, description="a node pool of the reservation of this name"
    )
    # Disruptions (a preemption, an eviction, a stop with a checkpoint) do not count. Bad input
    # (exit code 2) and a lack of host memory (137) end the JobSet at once: neither is mended by a
    # restart.
    restarts: Annotated[int, Field(ge=0)] = Field(
        10, description="failures to survive; preemptions and evictions do not count"
    )
    # Kubernetes kills the pod after it: a checkpoint that takes longer is lost. On spot nodes GKE
    # gives 15 seconds at most, whatever this says.
    grace: PositiveInt = Field(
        120,
        description="seconds to save a checkpoint when a pod is asked to stop; at a preemption of"
        " spot nodes it has 15 at most",
    )

    @pydantic.field_validator("accelerator")
    @classmethod
    def _known_label(cls, value: str) -> str:
        if value not in _TPUS and not value.startswith("nvidia-"):
            labels = ", ".join(_TPUS)
            raise ValueError(
                f"accelerator = {value}: expected {labels}, or a label that begins with nvidia-"
            )
        return value

    @pydantic.model_validator(mode="after")
    def _tpu_or_gpu(self) -> Self:
        exclusive(self, "spot", "flex_start", "reservation")
        if self.tpu and self.topology is None:
            raise ValueError(
                f"topology is missing for {self.accelerator}; give one such as topology=4x4x2"
            )
        if not self.tpu and (self.topology is not None or self.slices != 1):
            raise ValueError(
                f"topology and slices are of TPUs, not of {self.accelerator}; give nodes and gpus"
            )
        if self.tpu:
            try:
                hardware.parse(f"{_TPUS[self.accelerator]}:{self.topology}")
            except UserError as error:
                message = str(error).rpartition(": ")[2]
                raise ValueError(f"topology = {self.topology}: {message}") from None
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
        return self.accelerator in _TPUS

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
        """Chips or GPUs per pod."""
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
        # a chip of TPU7x is two devices
        cores = (
            hardware.parse(f"{_TPUS[self.accelerator]}:{self.topology}").cores if self.tpu else 1
        )
        slices = self.slices if self.tpu else self.nodes
        check_mesh(job, self.slices * self.pods * self.pod_devices * cores, slices)

    def notes(self, job: Job) -> list[str]:
        """Return what the reader of the manifest should know."""
        return saves_by_time(job) if self.spot else []


TARGETS.register("gke", Gke)
