"""SLURM clusters."""

import re
from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.launch.target import TARGETS, Job, Target, Word, check_mesh


class Slurm(Target):
    """A batch job; all nodes must see the submission directory."""

    template: ClassVar[str] = "slurm.sh"
    submit_command: ClassVar[tuple[str, ...]] = ("sbatch",)

    nodes: PositiveInt = 1
    # 0 is for clusters of CPUs, on which the scripts are tested with a real SLURM.
    gpus: Annotated[int, Field(ge=0)] = Field(8, description="GPUs per node; 0 for CPU")
    tasks: PositiveInt | None = Field(
        None, description="processes per node: one per GPU by default, or 1 for all of its GPUs"
    )
    cpus: PositiveInt | None = Field(None, description="cores per process")
    # text, because SLURM has suffixes of its own and reads 0 as all
    memory: Word | None = Field(None, description="memory per node, such as 200G; 0 for all")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    # text, as SLURM writes it (days-hours:minutes:seconds)
    time: Word | None = Field(
        None, description="time limit, such as 12:00:00; the job is requeued when it is reached"
    )
    # SLURM signals the script so long before the limit. It must cover the step and the checkpoint.
    signal: PositiveInt = Field(
        300, description="seconds before the limit at which a checkpoint is saved"
    )
    # A limit, because a job that is requeued without progress would do so for ever.
    requeues: PositiveInt = Field(100, description="how often the job may start again")
    # 134: a process lost another one. 137: a process was killed, often for want of memory.
    crashes: Annotated[int, Field(ge=0)] = Field(
        3, description="how often the job starts again after a crash (exit code 134 or 137)"
    )
    env_file: Word | None = Field(
        None,
        description="file that the nodes see with lines NAME=VALUE, such as HF_TOKEN=... for gated"
        " models; mode 600",
    )
    image: Word | None = Field(
        None, description="container image: REGISTRY/IMAGE:TAG, or a file; none by default"
    )
    container: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts the image")
    mounts: Word | None = Field(
        None, description="directories of the container, HOST:CONTAINER, separated by commas"
    )
    # no `Word`: it is a line of shell, quotes and variables included
    setup: str | None = Field(
        None, description="shell line before the run, such as 'source venv/bin/activate'"
    )
    command: str = Field("ordermerge", description="how ordermerge is called")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> Self:
        # jax gives a process of SLURM one GPU, or by JAX_LOCAL_DEVICE_IDS all of its node
        if self.gpus and self.processes not in (1, self.gpus):
            raise ValueError(
                f"tasks = {self.processes} for {self.gpus} GPUs per node: give 1 (all GPUs) or"
                f" {self.gpus} (one each)"
            )
        if self.image and self.container == "apptainer" and "#" in self.image:
            raise ValueError(f"image = {self.image}: REGISTRY#IMAGE is the form of pyxis; give /")
        if self.mounts and not self.image:
            raise ValueError("mounts are of a container; give image too")
        return self

    @property
    def processes(self) -> int:
        """Processes per node."""
        return self.tasks or self.gpus or 1

    @property
    def container_image(self) -> str:
        """The image in the form of what starts it.

        Example:
            >>> Slurm(image="ghcr.io/me/ordermerge:1").container_image
            'ghcr.io#me/ordermerge:1'
            >>> Slurm(image="ghcr.io/me/ordermerge:1", container="apptainer").container_image
            'docker://ghcr.io/me/ordermerge:1'
            >>> Slurm(image="./ordermerge.sqsh").container_image
            './ordermerge.sqsh'
        """
        image = self.image or ""
        if "://" in image or image.startswith(("/", ".")) or image.endswith((".sqsh", ".sif")):
            return image
        if self.container == "apptainer":
            return f"docker://{image}"
        # enroot takes what stands before the first slash for a part of a name on Docker Hub: the
        # registry ends with #. Docker's own rule says which first part is a registry.
        registry = re.match(r"(localhost|[^/#]*[.:][^/#]*)/(.+)", image)
        return f"{registry[1]}#{registry[2]}" if registry else image

    def check(self, job: Job) -> None:
        """Refuse a mesh of another size. On CPU each process has one device."""
        # No check of the output: nodes are not deleted with the job, unlike VMs and pods.
        # to jax a node of GPUs is a slice; nodes of CPUs are not
        check_mesh(job, self.nodes * (self.gpus or self.processes), self.nodes if self.gpus else 1)


TARGETS.register("slurm", Slurm)
