"""What must be known of a place to run an experiment there, and what is refused: one section of options for each target."""

import math
from typing import Annotated, Literal, Self

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.config.section import Section
from jax_ordermerge.errors import UserError

Word = Annotated[str, Field(pattern=r"^[^\s'\"`$\\]+$")]
Topology = Annotated[str, Field(pattern=r"^\d+(x\d+){1,2}$")]


class TpuVm(Section):
    """TPU VMs, through the scripts of tpu_scripts/."""

    type: Word = Field(description="accelerator type, such as v5p-64")
    runtime: Word = Field(description="software of the VMs, such as v2-alpha-tpuv5")
    package: str = Field(description="what pip installs there, or a wheel of this machine")
    slices: PositiveInt = 1
    spot: bool = False
    reserved: bool = False
    nfs: Word | None = Field(None, description="HOST:/SHARE that all workers mount")
    mount: Word = Field("/mnt/shared", description="where")
    fetch: Word | None = Field(
        None, description="copied to this machine at the end; the report by default"
    )
    project: Word | None = None
    zone: Word | None = None
    scripts: str = Field("tpu_scripts", description="the folder of the scripts")

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.spot and self.reserved:
            raise ValueError("spot and reserved exclude each other; give one")
        return self


class Gke(Section):
    """A JobSet on Google Kubernetes Engine: a slice is a Job on TPU, a node is a pod on GPU."""

    image: Word = Field(description="container image that holds ordermerge, see docker/")
    accelerator: Word = Field(
        description="label of the node pool: tpu-v5p-slice, tpu-v6e-slice, nvidia-h100-80gb, ..."
    )
    topology: Topology | None = Field(None, description="of a TPU slice, such as 4x4x2")
    slices: PositiveInt = Field(1, description="TPU slices")
    chips: PositiveInt = Field(4, description="TPU chips of a node")
    nodes: PositiveInt = Field(1, description="GPU nodes")
    gpus: PositiveInt = Field(8, description="GPUs of a node")
    volume: Word | None = Field(
        None,
        description="PersistentVolumeClaim (ReadWriteMany) for run directories; made where storage is given",
    )
    storage: Word | None = Field(None, description="its size where it is to be made, such as 1Ti")
    storage_class: Word = Field("standard-rwx", description="its class (Filestore)")
    mount: Word = Field("/mnt/shared", description="where the volume is seen")
    namespace: Word = "default"
    service_account: Word | None = None
    token_secret: Word | None = Field(
        None, description="Secret with the key HF_TOKEN, for gated models"
    )
    spot: bool = False
    restarts: PositiveInt = Field(100, description="how many preemptions and failures to survive")
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
        if self.tpu and self.slice_chips > self.chips and self.slice_chips % self.chips:
            raise ValueError(
                f"topology {self.topology} has {self.slice_chips} chips, not a multiple of {self.chips} a node; change chips"
            )
        if self.storage and not self.volume:
            raise ValueError("storage is the size of a volume; name it with volume=NAME")
        return self

    @property
    def tpu(self) -> bool:
        """Whether the node pool has TPUs."""
        return self.accelerator.startswith("tpu-")

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(int(size) for size in (self.topology or "1").split("x"))

    @property
    def pods(self) -> int:
        """Pods of one Job."""
        return max(1, self.slice_chips // self.chips) if self.tpu else self.nodes

    @property
    def pod_devices(self) -> int:
        """Accelerators of one pod."""
        return min(self.chips, self.slice_chips) if self.tpu else self.gpus

    @property
    def devices(self) -> int:
        """All accelerators."""
        return self.slices * self.pods * self.pod_devices


class Slurm(Section):
    """A batch job of SLURM; the submission directory must be on a file system that all nodes see."""

    nodes: PositiveInt = 1
    gpus: Annotated[int, Field(ge=0)] = Field(8, description="GPUs of a node; 0 for CPU")
    tasks: PositiveInt | None = Field(
        None, description="processes of a node: one a GPU by default, or 1 for all of its GPUs"
    )
    cpus: PositiveInt | None = Field(None, description="cores of a process")
    memory: Word | None = Field(None, description="of a node, such as 200G; 0 for all")
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Word | None = Field(
        None, description="limit, such as 12:00:00; the job is requeued when it is reached"
    )
    signal: PositiveInt = Field(
        300, description="seconds before the limit at which a checkpoint is saved"
    )
    requeues: PositiveInt = Field(100, description="how often the job may start again")
    image: Word | None = Field(None, description="container image; none by default")
    container: Literal["pyxis", "apptainer"] = Field("pyxis", description="what starts it")
    mounts: Word | None = Field(
        None, description="directories seen in the container, HOST:CONTAINER, separated by commas"
    )
    setup: str | None = Field(
        None, description="shell line before the run, such as 'source venv/bin/activate'"
    )
    command: str = Field("ordermerge", description="how ordermerge is called")

    @pydantic.model_validator(mode="after")
    def _processes(self) -> Self:
        if self.gpus and self.processes not in (1, self.gpus):
            raise ValueError(
                f"tasks = {self.processes} of {self.gpus} GPUs a node: give 1 (all GPUs) or {self.gpus} (one each)"
            )
        if self.mounts and not self.image:
            raise ValueError("mounts are of a container; give image too")
        return self

    @property
    def processes(self) -> int:
        """Processes of a node."""
        return self.tasks or self.gpus or 1

    @property
    def devices(self) -> int:
        """All GPUs; one device a process on CPU."""
        return self.nodes * (self.gpus or self.processes)


class Ssh(Section):
    """A handful of hosts that ssh reaches without a password: one process each, with all GPUs of the host."""

    hosts: tuple[Word, ...] = Field(
        description="HOST or USER@HOST, separated by commas; the first coordinates"
    )
    directory: Word = Field(
        "ordermerge",
        description="working directory there; output must be on a file system that all see",
    )
    port: PositiveInt = Field(8476, description="of the first host, reached by the others")
    setup: str | None = Field(
        None, description="shell line before the run, such as 'source venv/bin/activate'"
    )
    command: str = Field("ordermerge", description="how ordermerge is called")

    @pydantic.field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, given: object) -> object:
        return tuple(given.split(",")) if isinstance(given, str) else given

    @property
    def coordinator(self) -> str:
        """Address of process 0."""
        return f"{self.hosts[0].rpartition('@')[2]}:{self.port}"


TARGETS: dict[str, type[Section]] = {"tpu-vm": TpuVm, "gke": Gke, "slurm": Slurm, "ssh": Ssh}


def check_output(output: str, mount: str, *, apart: bool = False) -> None:
    """Refuse an output that would be lost with the machine that wrote it.

    Args:
        output: of the config.
        mount: where what outlives the machines is seen.
        apart: several hosts that share no disk.

    Raises:
        UserError: it is neither below `mount` nor in a bucket; hosts that share no disk have no place for the copy of a bucket.

    Example:
        >>> check_output("/mnt/shared/runs/one", "/mnt/shared")
    """
    if apart and output.startswith(("gs://", "s3://")):
        raise UserError(
            f"output = {output}: several hosts need a disk that all of them see for the copy of what is in a bucket; give volume=NAME"
        )
    if not output.startswith((mount.rstrip("/") + "/", "gs://", "s3://")):
        raise UserError(
            f"output = {output} is on a disk that goes with its machine; give --set output={mount.rstrip('/')}/runs/{{name}}"
        )


def check_mesh(sizes: dict[str, int], devices: int) -> None:
    """Refuse a mesh that does not take all devices of the place.

    Args:
        sizes: of the mesh axes, -1 for all that remain.
        devices: how many there will be.

    Raises:
        UserError: some would be idle, or lack.

    Example:
        >>> check_mesh({"order": 4, "fsdp": -1}, 32)
    """
    fixed = math.prod(size for size in sizes.values() if size > 0)
    if devices % fixed or (fixed != devices and -1 not in sizes.values()):
        shown = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise UserError(
            f"mesh {shown or 'of one device'} does not take the {devices} devices asked for; change it with --set mesh.fsdp=-1"
        )
