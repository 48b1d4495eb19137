"""Hosts that ssh reaches without a password."""

from typing import ClassVar

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.json_types import Json
from jax_ordermerge.launch.target import TARGETS, Job, Target, Word


class Ssh(Target):
    """A few hosts with one process each, which uses all GPUs of its host."""

    template: ClassVar[str] = "ssh.sh"

    hosts: tuple[Word, ...] = Field(
        description="HOST or USER@HOST, separated by commas; the first coordinates"
    )
    directory: Word = Field(
        "ordermerge",
        description="working directory there; output must be on a file system that all hosts see",
    )
    # The process on the first host listens there; the others must reach it through firewalls.
    port: PositiveInt = Field(8476, description="port of the first host")
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
        # No check of mesh or output: GPUs and disks of the hosts are not known here. The index of
        # each process is added by the script.
        return {"coordinator": f"{host}:{self.port}", "processes": len(self.hosts)}


TARGETS.register("ssh", Ssh)
