"""Checks of a machine before a run: versions, devices, start of processes, disk and output."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import rich
from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.errors import PeerLost, UserError
from jax_ordermerge.experiment.context import Log

# packages that bring devices to jax; without one jax has CPUs only
_ACCELERATORS = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SHOWN = (
    *("jax", "jaxlib", *_ACCELERATORS, "flax", "optax", "orbax-checkpoint"),
    *("transformers", "datasets", "safetensors", "numpy"),
)
# Only packages whose versions have to match; numpy and others are checked as their requirements.
_CHECKED = ("jax_ordermerge", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
# "" is no extra: requirements that always count
_EXTRAS = ("", "tpu", "cuda12", "cuda13")
# packages that do not work together, or with any version of jax that is supported
_CONFLICTS = {
    (
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
    ): "two CUDA plugins register the same platform; uninstall one",
    ("jax-metal",): "it was made for jax 0.4 and breaks the start of later ones; uninstall it",
}
# enough for the checkpoints of a small model; `ordermerge plan` computes what a large one needs
_MIN_DISK_BYTES = 10 * 2**30
_PATIENCE = 180.0  # seconds for the devices to answer
_COLORS = {"ok": "green", "note": "yellow", "error": "red"}


class Finding(NamedTuple):
    """Result of one check.

    Attributes:
        subject: what was checked.
        verdict: `error` means that a run would fail.
        detail: the result in words, with the remedy of an error.
    """

    subject: str
    verdict: Literal["ok", "note", "error"]
    detail: str


def diagnose(config: Config | None, *, only_versions: bool, log: Log) -> bool:
    """Print the findings about a machine, and return whether a run can start on it.

    Args:
        config: see `examine`.
        only_versions: print versions and errors about them; start no devices.
        log: receives one-line messages.
    """
    if only_versions:
        # the header of a bug report: plain lines that can be pasted
        for name, version in installed():
            log(f"{name} {version}")
        findings = [finding for finding in check_versions() if finding.verdict == "error"]
    else:
        findings = list(examine(config))
    errors = sum(finding.verdict == "error" for finding in findings)
    if findings:
        table = Table(box=None, show_header=False)
        for subject, verdict, detail in findings:
            table.add_row(Text(verdict, _COLORS[verdict]), subject, Text(detail, overflow="fold"))
        rich.print(table)
    if errors:
        print(
            f"not fit: {errors} of {len(findings)} findings would make a run fail", file=sys.stderr
        )
    elif not only_versions:
        log("fit to run")
    return not errors


def installed() -> list[tuple[str, str]]:
    """Return `(package, version)` of Python and of the relevant packages, without importing them.

    Example:
        >>> dict(installed())["python"].startswith("3.")
        True
    """
    # by metadata: importing jax would already start what may be broken
    python = ".".join(str(part) for part in sys.version_info[:3])
    packages = [(name, _version(name)) for name in ("jax_ordermerge", *_SHOWN)]
    return [("python", python), *((name, version) for name, version in packages if version)]


def check_versions() -> list[Finding]:
    """Check what each package requires of the others, and known conflicts.

    Example:
        >>> {finding.subject for finding in check_versions()}
        {'versions'}
    """
    errors = [
        *_unmet_requirements(),
        *(
            f"{' and '.join(names)}: {reason}"
            for names, reason in _CONFLICTS.items()
            if all(map(_version, names))
        ),
    ]
    if errors:
        return [Finding("versions", "error", error) for error in errors]
    versions = ", ".join(f"{name} {version}" for name, version in installed())
    return [Finding("versions", "ok", versions)]


def examine(config: Config | None) -> Iterator[Finding]:
    """Check versions, then devices, disk and output in the processes of the config.

    Args:
        config: of an experiment; None checks this process alone and the current directory.

    Yields:
        findings as they are made, because the start of processes may take long.
    """
    yield from check_versions()
    yield from _check_devices(config)
    yield from check_output(config.location if config else ".")


def check_output(output: str) -> list[Finding]:
    """Write, rename, read and remove a file where the run directory is going to be.

    Args:
        output: a path, or an address such as gs://bucket/runs/one.

    Example:
        >>> [finding.subject for finding in check_output(tempfile.mkdtemp())]
        ['disk', 'output']
    """
    if "://" in output:
        # a run in a bucket works on a local copy, so both places must be writable
        disk, copy = check_output(str(remote.cache()))
        return [disk, copy._replace(subject="copy"), _check_bucket(output)]
    # nothing is created: the run directory is checked at its nearest existing parent
    parent = Path(output).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    size = f"{free / 2**30:.0f} GiB free at {parent}"
    if free >= _MIN_DISK_BYTES:
        disk = Finding("disk", "ok", size)
    else:
        disk = Finding("disk", "error", f"only {size}; free some space")
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".doctor-") as scratch:
            # what every writer does: some network file systems allow all of it but the rename
            path = Path(scratch) / "written"
            path.write_bytes(b"complete")
            content = path.rename(path.with_name("renamed")).read_bytes()
    except OSError as error:
        detail = (
            f"{output} cannot be written: {error.strerror};"
            " choose another with --set output=DIRECTORY"
        )
        return [disk, Finding("output", "error", detail)]
    if content != b"complete":
        return [disk, Finding("output", "error", f"a file at {parent} was read back changed")]
    return [disk, Finding("output", "ok", f"{output} can be written")]


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> Iterator[str]:
    """Yield what a package requires of another and does not get.

    Requirements of an extra count where its package is installed.
    """
    for name in _CHECKED:
        version = _version(name)
        for text in (importlib.metadata.requires(name) or ()) if version else ():
            requirement = Requirement(text)
            marker = requirement.marker
            try:
                extras = [
                    extra
                    for extra in _EXTRAS
                    if marker is None or marker.evaluate({"extra": extra})
                ]
            except UndefinedEnvironmentName:  # a marker for builds, not for installations
                continue
            present = _version(requirement.name)
            specifier = requirement.specifier
            # prereleases=True: nightly builds of jax are installed on purpose
            if extras and present and not specifier.contains(present, prereleases=True):
                wanted = f"{requirement.name}{specifier}"
                yield f"{name} {version} needs {wanted}, not {present}; pip install '{wanted}'"
            # requirements of an extra may be absent: nobody asked for the extra
            if "" in extras and present is None:
                yield f"{name} {version} needs {requirement.name}, which is not installed"


def _check_devices(config: Config | None) -> Iterator[Finding]:
    from jax_ordermerge import mesh, processes

    try:
        if config and config.distributed.coordinator:
            # The start of processes comes before any look at devices: jax cannot join peers
            # afterwards.
            processes.start_distributed(**config.distributed.model_dump())
        elif config:
            mesh.provide_cpu_devices(config.mesh.sizes.values())
        import jax  # after the number of CPU devices is set

        # in a thread, because a TPU that another process holds blocks for ever
        if not processes.within(mesh.check_accelerator, _PATIENCE) or not processes.within(
            jax.devices, _PATIENCE
        ):
            detail = (
                f"no answer within {_PATIENCE:.0f} s; does another program hold them,"
                " or is a worker not started?"
            )
            yield Finding("devices", "error", detail)
            return
    except (UserError, PeerLost, RuntimeError) as error:
        yield Finding("devices", "error", str(error).splitlines()[0])
        return
    # jax.devices() holds those of all processes; only the local ones can be computed on here
    devices, local, count = jax.devices(), jax.local_devices(), jax.process_count()
    detail = f"{count}, this is number {jax.process_index()}" if count > 1 else "1"
    yield Finding("processes", "ok", detail)
    # a device that is listed may still fail at its first program
    sums = [float(jax.device_put(jax.numpy.ones(8), device).sum()) for device in local]
    if sums == [8.0] * len(sums):
        detail = (
            f"{len(devices)} x {devices[0].device_kind}, {len(sums)} of them here; each can add"
        )
        yield Finding("devices", "ok", detail)
    else:
        detail = f"a sum of eight ones on each local device gave {sums}"
        yield Finding("devices", "error", detail)
    # jax falls back to the CPU with a warning only, and a run would be slow for no visible reason
    unused = [name for name in _ACCELERATORS if _version(name)]
    if devices[0].platform == "cpu" and unused and not os.environ.get("JAX_PLATFORMS"):
        detail = (
            f"{', '.join(unused)} is installed, but only CPU devices are found; check the driver,"
            " or set JAX_PLATFORMS=cpu if the CPU is meant"
        )
        yield Finding("devices", "error", detail)
    if config:
        try:
            # by the function that a run uses, so that both refuse the same
            shape = mesh.make_mesh(**config.mesh.model_dump()).shape
        except UserError as error:
            yield Finding("mesh", "error", str(error))
        else:
            axes = " x ".join(f"{name} {size}" for name, size in shape.items() if size > 1)
            yield Finding("mesh", "ok", axes or "one device")


def _check_bucket(output: str) -> Finding:
    try:
        url = remote.address(output)
        assert url is not None
        remote.check_writable(url)
    except UserError as error:
        return Finding("output", "error", str(error))
    return Finding("output", "ok", f"{url} can be written")
