"""SkyPilot: one YAML for any cloud, Kubernetes cluster or SLURM that its user has."""

from typing import Annotated, ClassVar, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.json_types import Json
from jax_ordermerge.launch.target import (
    TARGETS,
    Job,
    Labels,
    Target,
    Word,
    check_mesh,
    check_output,
    saves_by_time,
)
from jax_ordermerge.launch.tpu_types import parse_type

_PORT = 8476


class Skypilot(Target):
    """A managed job of SkyPilot: nodes with GPUs, or a TPU slice."""

    template: ClassVar[str] = "skypilot.yaml"
    submit_command: ClassVar[tuple[str, ...]] = ("sky", "jobs", "launch", "--yes")

    accelerators: Annotated[str, Field(pattern=r"^[A-Za-z0-9-]+(:[1-9]\d*)?$")] = Field(
        description="GPUs per node, such as H100:8, or a TPU slice, such as tpu-v5p-64"
    )
    nodes: PositiveInt = Field(1, description="nodes with GPUs")
    # no `Word`: requirements hold brackets, spaces and @
    package: str = Field(description="what pip installs there, with the extra tpu or cuda")
    constraints: str = Field(
        "docker/constraints.txt",
        description="versions that pip keeps to there, a file of this machine; none: the newest",
    )
    infra: Word | None = Field(
        None, description="where: gcp/us-east5/us-east5-a, aws, k8s/CONTEXT; anywhere by default"
    )
    image: Word | None = Field(None, description="image, such as docker:REGISTRY/IMAGE:TAG")
    runtime: Word | None = Field(None, description="software of TPU VMs, such as v2-alpha-tpuv5")
    spot: bool = False
    # Exit code 143 is a stop with a checkpoint, which SkyPilot takes for a failure of the program.
    restarts: Annotated[int, Field(ge=0)] = Field(
        3, description="failures to survive; preemptions do not count"
    )
    disk: PositiveInt | None = Field(None, description="disk of a node in GB")
    memory: Word | None = Field(None, description="host memory of a node in GB, such as 400+")
    labels: Labels = Field((), description="labels of the machines: KEY=VALUE, separated by commas")
    volume: Word | None = Field(
        None, description="volume of SkyPilot that all nodes mount for run directories"
    )
    mount: Word = Field("/mnt/shared", description="where they mount it")
    token: bool = Field(
        False,
        description="gated models: HF_TOKEN is a secret, which its user gives to sky by"
        " --secret HF_TOKEN; it is not in the file",
    )
    setup: str | None = Field(None, description="shell line before the installation")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.tpu and (self.nodes > 1 or ":" in self.accelerators):
            raise ValueError(
                f"accelerators = {self.accelerators}: a TPU slice is one resource; give nodes=1 and"
                " the size in the type, such as tpu-v5p-64"
            )
        if self.tpu:
            parse_type(self.accelerators.removeprefix("tpu-"))
        if self.runtime and not self.tpu:
            raise ValueError(f"runtime is of TPUs, not of {self.accelerators}")
        return self

    @property
    def tpu(self) -> bool:
        """Whether it asks for a TPU slice."""
        return self.accelerators.startswith("tpu-")

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        return int(self.accelerators.partition(":")[2] or 1)

    def distributed(self, job: Job) -> Json:
        """Return how processes find each other; the script adds the address of the first node."""
        # on a TPU slice the machines know their peers; one node is one process
        if self.tpu or self.nodes == 1:
            return {"coordinator": "auto"} if self.tpu else {}
        return {"coordinator": f"first-node:{_PORT}", "processes": self.nodes}

    def check(self, job: Job) -> None:
        """Refuse an output on the disk of a node, and a mesh of another size."""
        tpus = parse_type(self.accelerators.removeprefix("tpu-")) if self.tpu else None
        hosts = tpus.hosts if tpus else self.nodes
        check_output(
            job.output,
            self.mount if self.volume else None,
            separate_disks=self.volume is None and hosts > 1,
        )
        devices = tpus.chips if tpus else self.nodes * self.gpus
        check_mesh(job, devices, 1 if tpus else self.nodes)

    def notes(self, job: Job) -> list[str]:
        """Return what the reader of the file should know."""
        return saves_by_time(job) if self.spot else []


TARGETS.register("skypilot", Skypilot)
