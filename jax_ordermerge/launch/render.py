"""A config and a place become a script or a manifest. Pure: text out, nothing is read but the templates beside this file."""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import jinja2
import yaml

from jax_ordermerge.config import Config, section
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.launch.targets import TARGETS, Gke, Slurm, Ssh, TpuVm, check_mesh, check_output

_TEMPLATES = {"tpu-vm": "tpu_vm.sh", "gke": "gke.yaml", "slurm": "slurm.sh", "ssh": "ssh.sh"}
_GKE_PORT = 8476


def render(config: Config, target: str, options: Mapping[str, Any]) -> str:
    """Return the script (tpu-vm, slurm, ssh) or the manifest (gke) that runs an experiment at a place.

    The config is written into the text, so that what runs is what was read, and is continued with the same settings.

    Args:
        config: the experiment.
        target: a name of `TARGETS`.
        options: of that target, by name.

    Raises:
        UserError: an unknown target; an option that is missing, unknown or of a wrong kind; a mesh or output that the place cannot have.

    Example:
        >>> text = render(Config(), "slurm", {"gpus": "0"})
        >>> text.splitlines()[0], "#SBATCH --nodes=1" in text
        ('#!/bin/bash', True)
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target}{did_you_mean(target, TARGETS)}")
    place = section.parse(TARGETS[target], options, target)
    distributed: dict[str, Any] = {"coordinator": "auto"}
    if isinstance(place, Ssh):
        distributed = {"coordinator": place.coordinator, "processes": len(place.hosts)}
    name = _name(config.name)
    if isinstance(place, Gke) and not place.tpu:
        # the names that a JobSet gives to its pods
        distributed = {
            "coordinator": f"{name}-nodes-0-0.{name}:{_GKE_PORT}",
            "processes": place.nodes,
        }
    if isinstance(place, TpuVm | Gke):
        check_output(
            config.output,
            place.mount,
            apart=isinstance(place, Gke) and place.volume is None and place.slices * place.pods > 1,
        )
    if isinstance(place, Gke | Slurm):
        check_mesh(config.mesh.sizes, place.devices)
    # what the user wrote, with what was set on the command line; defaults stay defaults
    written = config.model_dump(mode="json", exclude_unset=True)
    kept = {
        key: value
        for key, value in written.get("distributed", {}).items()
        if key.endswith("timeout")
    }
    text = yaml.safe_dump(
        written | {"name": config.name, "distributed": distributed | kept},
        sort_keys=False,
        width=120,
    )
    return (
        _environment()
        .get_template(_TEMPLATES[target])
        .render(name=name, place=place, config=text, run=config.location)
    )


def describe(target: str) -> list[tuple[str, str, str]]:
    """Return `(option, default, what it is)` of a target; a default of "required" where there is none.

    Raises:
        UserError: an unknown target.

    Example:
        >>> describe("ssh")[2]
        ('port', '8476', 'of the first host, reached by the others')
    """
    if target not in TARGETS:
        raise UserError(f"unknown target {target}{did_you_mean(target, TARGETS)}")
    return [
        (
            name,
            "required"
            if field.is_required()
            else ""
            if field.default is None
            else str(field.default),
            field.description or "",
        )
        for name, field in TARGETS[target].model_fields.items()
    ]


def _name(name: str) -> str:
    """Return a name as clouds want it: lower-case letters, digits and dashes, 40 at most (pods get longer ones)."""
    short = re.sub("[^a-z0-9]+", "-", name.lower())[:40].strip("-")
    return short if short[:1].isalpha() else f"run-{short}".strip("-")


def _environment() -> jinja2.Environment:
    found = jinja2.Environment(
        loader=jinja2.PackageLoader("jax_ordermerge.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters |= {"quote": shlex.quote, "json": json.dumps}
    return found
