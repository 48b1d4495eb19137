"""Scripts and manifests that run an experiment elsewhere: printed, written, or submitted."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from jax_ordermerge.checkpoint import alias
from jax_ordermerge.config import Config, check_inputs
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment.context import Log
from jax_ordermerge.launch import render
from jax_ordermerge.launch.submit import submit as submit_file
from jax_ordermerge.launch.target import Job


def make_job(config: Config) -> Job:
    """Return an experiment as launch targets see it: with what the user wrote, not the defaults."""
    # A default is that of the version installed there; what a user wrote is shown as written.
    settings = config.model_dump(mode="json", exclude_unset=True)
    return Job(config.name, settings, config.mesh.sizes, config.output, config.mesh.dcn)


def render_script(config: Config, target: str, options: Sequence[str]) -> str:
    """Return the script or manifest of an experiment; see `launch.render`.

    Args:
        config: of the experiment.
        target: name of a launch target.
        options: `OPTION=VALUE` each.

    Raises:
        UserError: the config or an option is wrong.
    """
    check_inputs(config)
    alias.check_path(config.directory)  # a job has several processes as a rule
    preflight.check_config(config)  # here, not after hours in the queue of a cluster
    pairs = {}
    for item in options:
        # at the first "=": values such as setup="A=1 run" hold others
        name, sign, value = item.partition("=")
        if not (name and sign):
            raise UserError(f"{item}: expected OPTION=VALUE, e.g. nodes=4")
        if name in pairs:
            raise UserError(f"{item}: {name} is given twice; give it once")
        # text: the schema of the target turns it into numbers and lists
        pairs[name] = value
    return render.render(make_job(config), target, pairs)


def deliver(text: str, target: str, out: Path | None, *, submit: bool, log: Log) -> int:
    """Write a script to `out`, submit it, or both, and return the exit code of the submission.

    Raises:
        UserError: the program that submits is not installed, or `out` cannot be written.
    """
    # without --out the file is needed only until the submission has read it
    with tempfile.TemporaryDirectory() as scratch:
        path = out or Path(scratch) / "launch"
        try:
            path.write_text(text)
        except OSError as error:
            raise UserError(
                f"--out {path} cannot be written ({error.strerror}); give a file in a directory"
                " that exists"
            ) from error
        if out:
            log(f"wrote {out}")
        return submit_file(target, path) if submit else 0
