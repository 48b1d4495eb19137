"""Versions of the installed packages, and whether they go together."""

import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Final

from packaging.markers import UndefinedEnvironmentName
from packaging.requirements import Requirement

from jax_ordermerge.commands.doctor.finding import Finding

# packages that bring devices to jax; without one jax has CPUs only
ACCELERATORS: Final = ("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin")
_SHOWN = (
    *("jax", "jaxlib", *ACCELERATORS, "flax", "optax", "orbax-checkpoint"),
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


def installed() -> list[tuple[str, str]]:
    """Return `(package, version)` of Python and of the relevant packages, without importing them.

    Example:
        >>> dict(installed())["python"].startswith("3.")
        True
    """
    # by metadata: importing jax would already start what may be broken
    python = ".".join(str(part) for part in sys.version_info[:3])
    packages = [(name, package_version(name)) for name in ("jax_ordermerge", *_SHOWN)]
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
            if all(map(package_version, names))
        ),
    ]
    if errors:
        return [Finding("versions", "error", error) for error in errors]
    versions = ", ".join(f"{name} {version}" for name, version in installed())
    return [Finding("versions", "ok", versions)]


def package_version(name: str) -> str | None:
    """Return the version of an installed package, None if it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _unmet_requirements() -> Iterator[str]:
    """Yield what a package requires of another and does not get.

    Requirements of an extra count where its package is installed.
    """
    for name in _CHECKED:
        version = package_version(name)
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
            present = package_version(requirement.name)
            specifier = requirement.specifier
            # prereleases=True: nightly builds of jax are installed on purpose
            if extras and present and not specifier.contains(present, prereleases=True):
                wanted = f"{requirement.name}{specifier}"
                yield f"{name} {version} needs {wanted}, not {present}; pip install '{wanted}'"
            # requirements of an extra may be absent: nobody asked for the extra
            if "" in extras and present is None:
                yield f"{name} {version} needs {requirement.name}, which is not installed"
