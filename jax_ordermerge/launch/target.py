"""The base class of launch targets, their registry, and checks that several targets share."""

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from jax_ordermerge.config.section import Section
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.mesh_shape import mesh_shape
from jax_ordermerge.registry import Registry

# A value that is safe between double quotes of a shell, and unquoted.
Word = Annotated[str, Field(pattern=r"^[^\s'\"`$\\]+$")]


def _split_labels(value: object) -> object:
    """Return `a=1,b=2` as pairs."""
    if not isinstance(value, str):
        return value
    pairs = [item.partition("=") for item in value.split(",")]
    keys = {key for key, _, _ in pairs}
    if not all(equals for _, equals, _ in pairs) or len(keys) < len(pairs):
        raise ValueError(
            f"labels = {value}: expected KEY=VALUE, separated by commas, each key once"
        )
    return tuple((key, word) for key, _, word in pairs)


# The form that both Google Cloud and Kubernetes accept.
_LabelWord = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9_.-]{0,61}[a-z0-9])?$")]
Labels = Annotated[tuple[tuple[_LabelWord, _LabelWord], ...], BeforeValidator(_split_labels)]


@dataclasses.dataclass(frozen=True)
class Job:
    """An experiment as a target sees it.

    Attributes:
        name: name of the experiment.
        settings: the config as the user wrote it, without defaults.
        mesh: sizes of the mesh axes; -1 is all remaining devices.
        output: address or path of the run directory.
        dcn: `mesh.dcn`, how axes are divided over slices or nodes.
    """

    name: str
    settings: JsonRow
    mesh: Mapping[str, int]
    output: str
    dcn: Mapping[Any, int] = dataclasses.field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name in the form that clouds accept.

        These are lower-case letters, digits and dashes, and at most 40 of them, because the names
        of pods are longer.

        Example:
            >>> Job("Llama_2 7b", {}, {}, "runs/x").slug
            'llama-2-7b'
        """
        # a pod or a host name must also begin with a letter
        # cut before the strip, so that a cut at a dash leaves no dash at the end
        slug = re.sub("[^a-z0-9]+", "-", self.name.lower())[:40].strip("-")
        return slug if slug[:1].isalpha() else f"run-{slug}".strip("-")


class Target(Section):
    """A kind of machines that can run an experiment. The fields are the options of the target.

    Subclasses name a Jinja template, a file beside their module. The template sees `target` (this
    object), `name` (`job.slug`), `config` (YAML text) and `run` (the run directory).

    Attributes:
        template: name of the template.
        submit_command: program and arguments that run the rendered file.
    """

    # Class variables, so that pydantic does not take them for options.
    template: ClassVar[str]
    submit_command: ClassVar[tuple[str, ...]] = ("bash",)

    @classmethod
    def template_text(cls) -> str:
        """Return the text of the template."""
        # found by the module of the class, so that a target outside of this package has its own
        return Path(inspect.getfile(cls)).with_name(cls.template).read_text()

    def distributed(self, job: Job) -> Json:
        """Return the section `distributed` of the config there: how the processes find each other.

        By default jax detects it: on TPU pods and SLURM the machines know their peers.
        """
        return {"coordinator": "auto"}

    def check(self, job: Job) -> None:
        """Refuse an experiment that could not run there.

        Raises:
            UserError: the mesh or the output does not fit the machines.
        """

    def notes(self, job: Job) -> list[str]:
        """Return what the reader of the script should know, a line each."""
        return []


TARGETS = Registry[type[Target]]("launch target", "jax_ordermerge.launch.targets")


def exclusive(target: Target, *names: str) -> None:
    """Refuse more than one of some options.

    Raises:
        ValueError: in the way of validators of pydantic.
    """
    chosen = [name for name in names if getattr(target, name)]
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} exclude each other; give one")


def saves_by_time(job: Job) -> list[str]:
    """Return a note on machines that may be taken away, unless checkpoints are saved by time.

    Example:
        >>> saves_by_time(Job("one", {"training": {"checkpoint_minutes": 10}}, {}, "runs/one"))
        []
    """
    training = job.settings.get("training")
    if isinstance(training, dict) and training.get("checkpoint_minutes"):
        return []
    return [
        "These machines may be taken away with some seconds of notice, too few for a checkpoint of"
        " a large model:",
        "what was trained since the last periodic one is lost then. Save often enough with"
        " --set training.checkpoint_minutes=10.",
    ]


def check_output(
    output: str,
    mount: str | None,
    *,
    separate_disks: bool = False,
    remedy: str = "volume=NAME",
) -> None:
    """Refuse an output that would be lost with the machine that wrote it.

    Args:
        output: the output of the config.
        mount: where the storage that outlives the machines is mounted; None: nothing is mounted.
        separate_disks: whether there are several hosts without a common disk.
        remedy: option that gives them one.

    Raises:
        UserError: the output is neither below `mount` nor in a bucket, or it is in a bucket and
            the hosts share no disk for its local copy.

    Example:
        >>> check_output("/mnt/shared/runs/one", "/mnt/shared")
    """
    # Hosts write one checkpoint together in the local copy, and have to see the parts of each
    # other.
    if separate_disks and output.startswith(("gs://", "s3://")):
        raise UserError(
            f"output = {output}: several hosts need a common disk for the local copy of a bucket;"
            f" give {remedy}"
        )
    if mount is None:
        if not output.startswith(("gs://", "s3://")):
            raise UserError(
                f"output = {output} is on a disk that is deleted with its machine, and nothing is"
                f" mounted there; give {remedy}, or on one host"
                " --set output=gs://BUCKET/runs/{name}"
            )
        return
    # With a slash, so that /mnt/shared2 does not count as below /mnt/shared.
    if not output.startswith((mount.rstrip("/") + "/", "gs://", "s3://")):
        raise UserError(
            f"output = {output} is on a disk that is deleted with its machine;"
            f" give --set output={mount.rstrip('/')}/runs/{{name}}"
        )


def check_mesh(job: Job, devices: int, slices: int = 1) -> None:
    """Refuse a mesh that a run would refuse, or that does not use all devices.

    Args:
        job: the experiment.
        devices: number of devices in all.
        slices: number of TPU slices, or of GPU nodes.

    Raises:
        UserError: devices would be idle or are lacking, or the axes do not fit the slices.

    Example:
        >>> check_mesh(Job("one", {}, {"order": 4, "fsdp": -1}, "runs/one"), 32, slices=2)
    """
    # Here, because the job would start, wait in a queue, and fail at its mesh. -1 takes what is
    # left: the other sizes must divide the devices, and without it fill them.
    fixed = math.prod(size for size in job.mesh.values() if size > 0)
    if devices % fixed or (fixed != devices and -1 not in job.mesh.values()):
        # axes of size 1 are the defaults; the user did not write them
        shown = ", ".join(f"{name}={size}" for name, size in job.mesh.items() if size != 1)
        raise UserError(
            f"mesh {shown or 'of one device'} does not use all of the {devices} devices;"
            " change it with --set mesh.fsdp=-1"
        )
    mesh_shape(job.mesh, [devices // slices] * slices, job.dcn)
