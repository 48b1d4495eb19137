"""SLURM clusters."""

from typing import Annotated, ClassVar, Literal, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.launch.target import TARGETS, Job, Target, Word, check_mesh


class Slurm(Target):
    """A batch job; all nodes must see the submission directory."""

    template: ClassVar[str] = "slurm.sh"
    submit_command: ClassVar[tuple[str, ...]] = ("sbatch",)

    nodes: PositiveInt = 1
    gpus: Annotated[int, Field(ge=0)] = Field(8, description="GPUs per node; 0 for CPU")
    tasks: PositiveInt | None = Field(
        None, description="processes per node: one per GPU by default, or 1 for all of its GPUs"
    )
    cpus: PositiveInt | None = Field(None, description="cores per process")
    memory: Word | None = Field(None, description="memory per node, such as 200G; 0 for all")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Word | None = Field(
        None, description="time limit, such as 12:00:00; the job is requeued when it is reached"
    )
    signal: PositiveInt = Field(
        300, description="seconds before the limit at which a checkpoint is saved"
    )
    requeues: PositiveInt = Field(100, description="how often the job may start again")
    image: Word | None = Field(None, description="container image; none by default")
    container: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts the image")
    mounts: Word | None = Field(
        None, description="directories of the container, HOST:CONTAINER, separated by commas"
    )
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
        if self.mounts and not self.image:
            raise ValueError("mounts are of a container; give image too")
        return self

    @property
    def processes(self) -> int:
        """Processes per node."""
        return self.tasks or self.gpus or 1

    def check(self, job: Job) -> None:
        """Refuse a mesh of another size. On CPU each process has one device."""
        check_mesh(job.mesh, self.nodes * (self.gpus or self.processes))


TARGETS.register("slurm", Slurm)
