"""Rendering of launch scripts and manifests. Pure: nothing is read but the templates."""

import json
import shlex
from typing import NamedTuple

import jinja2
import yaml

from jax_ordermerge.config import section
from jax_ordermerge.json_types import JsonRow
from jax_ordermerge.launch.target import TARGETS, Job


def render(job: Job, target_name: str, options: JsonRow) -> str:
    """Return the script or manifest that runs an experiment on a target.

    The config is part of the text, so that a restarted job continues with the same settings.

    Args:
        job: the experiment.
        target_name: a name of `TARGETS`.
        options: options of that target by name.

    Raises:
        UserError: the target is unknown, an option is missing, unknown or of a wrong type, or the
            target cannot run the experiment.

    Example:
        >>> text = render(Job("one", {}, {"fsdp": -1}, "runs/one"), "slurm", {"gpus": "0"})
        >>> text.splitlines()[0], "#SBATCH --nodes=1" in text
        ('#!/bin/bash', True)
    """
    # Options are text from a command line; `parse` reads them by the schema, as it does a config.
    target = section.parse(TARGETS[target_name], options, target_name)
    target.check(job)
    # The target decides how processes find each other; what the user says on waiting remains.
    written = job.settings.get("distributed", {})
    timeouts = {key: value for key, value in written.items() if key.endswith("timeout")}
    config = {
        **job.settings,
        "name": job.name,
        "distributed": target.distributed(job) | timeouts,
    }
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,  # a misspelt name must not render as nothing
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Free text must not end a shell word or a YAML value; options of type `Word` need no quotes.
    environment.filters |= {"quote": shlex.quote, "json": json.dumps}
    return environment.from_string(target.template_text()).render(
        name=job.slug,
        target=target,
        notes=target.notes(job),
        # keys in the order in which the user wrote them
        config=yaml.safe_dump(config, sort_keys=False, width=120),
        # as `Config.location` does
        run=job.output.replace("{name}", job.name),
    )


class OptionHelp(NamedTuple):
    """Help on an option of a target."""

    name: str
    default: str  # "required" where there is none, "" for null
    description: str


def describe(target_name: str) -> list[OptionHelp]:
    """Return the options of a target.

    Raises:
        UserError: the target is unknown.

    Example:
        >>> describe("ssh")[3]
        OptionHelp(name='port', default='8476', description='port of the first host')
    """
    options = []
    for name, field in TARGETS[target_name].model_fields.items():
        default = "" if field.default in (None, ()) else str(field.default)
        # without a default `field.default` is a marker of pydantic, which must not be shown
        default = "required" if field.is_required() else default
        options.append(OptionHelp(name, default, field.description or ""))
    return options
