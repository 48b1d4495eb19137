"""Hosts that ssh reaches without a password."""

from typing import Annotated, ClassVar

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.json_types import Json
from jax_ordermerge.launch.target import TARGETS, Job, Target, Word, check_mesh


class Ssh(Target):
    """A few hosts with one process each, which uses all GPUs of its host."""

    template: ClassVar[str] = "ssh.sh"

    hosts: tuple[Word, ...] = Field(
        description="HOST or USER@HOST, separated by commas; the first coordinates"
    )
    gpus: Annotated[int, Field(ge=0)] = Field(8, description="GPUs per host; 0 for CPU")
    directory: Word = Field(
        "ordermerge",
        description="working directory there; output must be on a file system that all hosts see",
    )
    # The process on the first host listens there; the others must reach it through firewalls.
    port: PositiveInt = Field(8476, description="port of the first host")
    env_file: str | None = Field(
        None,
        description="file of this machine with lines NAME=VALUE (HF_TOKEN=... for gated models),"
        " mode 600; the processes get it, the script does not hold it",
    )
    setup: str | None = Field(
        None, description="shell line before the run, such as 'source venv/bin/activate'"
    )
    command: str = Field("ordermerge", description="how ordermerge is called")

    # "before": an option is one text, which pydantic would not take for a tuple
    @pydantic.field_validator("hosts", mode="before")
    @classmethod
    def _split(cls, hosts: object) -> object:
        return tuple(hosts.split(",")) if isinstance(hosts, str) else hosts

    def distributed(self, job: Job) -> Json:
        """Return the address of the first host."""
        # USER@ is for ssh; the other hosts connect to the address alone
        host = self.hosts[0].rpartition("@")[2]
        # the index of each process is added by the script
        return {"coordinator": f"{host}:{self.port}", "processes": len(self.hosts)}

    def check(self, job: Job) -> None:
        """Refuse a mesh of another size. On CPU each process has one device."""
        # No check of the output: which disks the hosts share is not known here. A run in a bucket
        # keeps its local copy in the directory, and refuses to start where it is not shared.
        check_mesh(job, len(self.hosts) * (self.gpus or 1), len(self.hosts) if self.gpus else 1)


TARGETS.register("ssh", Ssh)
