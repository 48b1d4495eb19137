"""Is this machine fit to run: versions, devices, the start of several processes, disk and output. Each answer is a finding."""

import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement
from rich.table import Table
from rich.text import Text

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import Config
from jax_ordermerge.errors import PeerLost, UserError

_SHOWN = (
    "jax",
    "jaxlib",
    "libtpu",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "flax",
    "optax",
    "orbax-checkpoint",
    "transformers",
    "datasets",
    "safetensors",
    "numpy",
)
_CHECKED = ("jax_ordermerge", "jax", "flax", "optax", "orbax-checkpoint", "transformers")
_EXTRAS = ("", "tpu", "cuda12", "cuda13")
# packages that may be installed, but not together with each other or with any jax that we run on
_KNOWN_BAD = {
    (
        "jax-cuda12-plugin",
        "jax-cuda13-plugin",
    ): "two CUDA plugins register the same platform; uninstall one",
    ("jax-metal",): "it was made for jax 0.4 and breaks the start of later ones; uninstall it",
}
_LEAST_DISK = (
    10 * 2**30
)  # bytes: a small model's checkpoints; large ones are planned for, not guessed
_PATIENCE = 180.0  # seconds for the devices to answer
_COLORS = {"ok": "green", "note": "yellow", "bad": "red"}


class Finding(NamedTuple):
    """What was looked at, how it is, and in words; `bad` means that a run would fail."""

    what: str
    verdict: Literal["ok", "note", "bad"]
    detail: str


def installed() -> list[tuple[str, str]]:
    """Return `(package, version)` of Python and of the packages that matter, where they are installed. Does not import them.

    Example:
        >>> dict(installed())["python"].startswith("3.")
        True
    """
    found = [("python", ".".join(str(part) for part in sys.version_info[:3]))]
    return found + [
        (name, version) for name in ("jax_ordermerge", *_SHOWN) if (version := _version(name))
    ]


def versions() -> list[Finding]:
    """Check that the versions go together: what each package asks of the others, and what is known to break.

    Example:
        >>> {one.what for one in versions()}
        {'versions'}
    """
    wrong = list(_refused()) + [
        f"{' and '.join(names)}: {why}"
        for names, why in _KNOWN_BAD.items()
        if all(_version(name) for name in names)
    ]
    if wrong:
        return [Finding("versions", "bad", one) for one in wrong]
    return [
        Finding("versions", "ok", ", ".join(f"{name} {version}" for name, version in installed()))
    ]


def examine(config: Config | None) -> Iterator[Finding]:
    """Look at versions, and in the processes that the config describes at devices, disk and output.

    Args:
        config: an experiment; without one this process alone and the current directory are looked at.

    Returns:
        The findings, as they are made: the start of processes may take long.
    """
    yield from versions()
    yield from _devices(config)
    yield from check_output(config.location if config else ".")


def check_output(output: str) -> list[Finding]:
    """Write, rename, read and remove a file where the run directory is going to be.

    Args:
        output: a path, or an address such as gs://bucket/runs/one.

    Example:
        >>> [one.what for one in check_output(tempfile.mkdtemp())]
        ['disk', 'output']
    """
    if "://" in output:
        disk, copy = check_output(str(remote.cache()))
        return [disk, copy._replace(what="copy"), _write_to_bucket(output)]
    parent = Path(output).absolute()
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    told = f"{free / 2**30:.0f} GiB free at {parent}"
    disk = Finding(
        "disk",
        "ok" if free >= _LEAST_DISK else "bad",
        told if free >= _LEAST_DISK else f"only {told}; make room",
    )
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".doctor-") as folder:
            file = Path(folder) / "written"
            file.write_bytes(b"whole")
            if file.rename(file.with_name("renamed")).read_bytes() != b"whole":
                return [
                    disk,
                    Finding(
                        "output", "bad", f"what was written to {parent} was read back otherwise"
                    ),
                ]
    except OSError as error:
        return [
            disk,
            Finding(
                "output",
                "bad",
                f"{output} cannot be written: {error.strerror}; choose another with --set output=DIRECTORY",
            ),
        ]
    return [disk, Finding("output", "ok", f"{output} can be written")]


def table(findings: list[Finding]) -> Table:
    """Return the findings as a table."""
    found = Table(box=None, show_header=False)
    for one in findings:
        found.add_row(
            Text(one.verdict, _COLORS[one.verdict]), one.what, Text(one.detail, overflow="fold")
        )
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _refused() -> Iterator[str]:
    """What one package asks of another and does not get. Optional parts count where they are installed."""
    for name in _CHECKED:
        for text in (importlib.metadata.requires(name) or ()) if _version(name) else ():
            wanted = Requirement(text)
            try:
                extras = [
                    extra
                    for extra in _EXTRAS
                    if wanted.marker is None or wanted.marker.evaluate({"extra": extra})
                ]
            except UndefinedEnvironmentName:
                continue
            have = _version(wanted.name)
            if extras and have and not wanted.specifier.contains(have, prereleases=True):
                yield f"{name} {_version(name)} needs {wanted.name}{wanted.specifier}, not {have}; pip install '{wanted.name}{wanted.specifier}'"
            if "" in extras and have is None:
                yield f"{name} {_version(name)} needs {wanted.name}, which is not installed"


def _devices(config: Config | None) -> Iterator[Finding]:
    from jax_ordermerge import mesh, processes

    try:
        if config and config.distributed.coordinator:
            processes.start_distributed(**config.distributed.model_dump())
        elif config:
            mesh.provide_cpu_devices(config.mesh.sizes.values())
        import jax

        if not processes.within(jax.devices, _PATIENCE):
            yield Finding(
                "devices",
                "bad",
                f"no answer within {_PATIENCE:.0f} s; does another program hold them, or is a worker not started?",
            )
            return
    except (UserError, PeerLost, RuntimeError) as error:
        yield Finding("devices", "bad", str(error).splitlines()[0])
        return
    devices = jax.devices()
    kind, count = devices[0].device_kind, jax.process_count()
    yield Finding(
        "processes",
        "ok",
        f"{count}" + (f", this is number {jax.process_index()}" if count > 1 else ""),
    )
    sums = [
        float(jax.device_put(jax.numpy.ones(8), device).sum()) for device in jax.local_devices()
    ]
    if sums != [8.0] * len(sums):
        yield Finding("devices", "bad", f"a sum of eight ones on each local device gave {sums}")
    else:
        yield Finding(
            "devices", "ok", f"{len(devices)} x {kind}, {len(sums)} of them here; each can add"
        )
    unused = [name for name in _SHOWN if (name == "libtpu" or "cuda" in name) and _version(name)]
    if devices[0].platform == "cpu" and unused and not os.environ.get("JAX_PLATFORMS"):
        yield Finding("devices", "note", f"{', '.join(unused)} is installed, but only CPU is seen")
    if config:
        try:
            made = mesh.make_mesh(**config.mesh.model_dump())
            yield Finding(
                "mesh",
                "ok",
                " x ".join(f"{name} {size}" for name, size in made.shape.items() if size > 1)
                or "one device",
            )
        except UserError as error:
            yield Finding("mesh", "bad", str(error))


def _write_to_bucket(output: str) -> Finding:
    try:
        url = remote.address(output)
        assert url is not None
        remote.try_out(url)
    except UserError as error:
        return Finding("output", "bad", str(error))
    return Finding("output", "ok", f"{url} can be written")
