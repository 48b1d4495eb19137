"""Checks of a machine before a run.

Versions, devices, the links between processes, base and data, memory and storage.
"""

import os
from collections.abc import Iterable, Iterator

from rich.table import Table
from rich.text import Text

from jax_ordermerge import console, processes
from jax_ordermerge.commands import tables
from jax_ordermerge.commands.doctor import devices, inputs, storage
from jax_ordermerge.commands.doctor.finding import Finding
from jax_ordermerge.commands.doctor.versions import check_versions, installed
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError

__all__ = ["Finding", "check_versions", "diagnose", "examine", "installed"]

_COLORS = {"ok": "green", "note": "yellow", "error": "red"}


def diagnose(config: Config | None, *, only_versions: bool, as_json: bool = False) -> bool:
    """Print the findings about a machine, and return whether a run can start on it.

    Args:
        config: see `examine`.
        only_versions: print versions and errors about them; start no devices.
        as_json: print JSON in place of a table.
    """
    versions = list(installed()) if only_versions else []
    if only_versions:
        findings = [finding for finding in check_versions() if finding.verdict == "error"]
    else:
        findings = list(examine(config))
    errors = [finding.subject for finding in findings if finding.verdict == "error"]
    if as_json:
        rows = [finding._asdict() for finding in findings]
        console.print_json({"fit": not errors, "versions": dict(versions), "findings": rows})
        return not errors
    # the header of a bug report: plain lines that can be pasted
    for name, version in versions:
        console.print_result(f"{name} {version}")
    if findings:
        table = Table(box=None, show_header=False)
        for subject, verdict, detail in findings:
            table.add_row(Text(verdict, _COLORS[verdict]), subject, Text(detail, overflow="fold"))
        tables.show(table)
    if errors:
        # the names in the last line: the table of a pod's workers is long
        names = ", ".join(dict.fromkeys(errors))
        console.print_error(
            f"not fit: {len(errors)} of {len(findings)} findings would make a run fail ({names})"
        )
    elif not only_versions:
        console.print_message("fit to run")
    return not errors


def examine(config: Config | None) -> Iterator[Finding]:
    """Check versions, devices, inputs, memory and storage in the processes of the config.

    Args:
        config: of an experiment; None checks this process alone and the current directory.

    Yields:
        findings as they are made, because the start of processes may take long. Several processes
        exchange messages between them, so each of them must take all.
    """
    yield from check_versions()
    findings = list(devices.check_devices(config))
    yield from findings
    # without devices, peers or links no later check can exchange a message
    connected = not _has_error(findings, "devices")
    if config and connected:
        exchange = list(devices.check_exchange())
        yield from exchange
        connected = devices.all_agree(not _has_error(exchange, "exchange"))
    if config is None or not connected:
        yield from storage.check_output(config.location if config else os.curdir)
        return
    # exchanges nothing: peers of a process that fails would wait for it in the checks of storage
    with processes.barrier("check base, data and plan"):
        needs, read = _check_inputs(config, has_mesh=not _has_error(findings, "mesh"))
    yield from read
    yield from storage.check_storage(config, needs)


def _check_inputs(config: Config, *, has_mesh: bool) -> tuple[inputs.Needs | None, list[Finding]]:
    base, findings = inputs.check_inputs(config)
    needs = None
    if base is not None:
        try:
            needs = inputs.plan_needs(config, base, has_mesh=has_mesh)
            findings += inputs.check_needs(needs)
        except UserError as error:
            findings.append(Finding("plan", "error", str(error)))
    return needs, findings


def _has_error(findings: Iterable[Finding], subject: str) -> bool:
    return any(f.subject == subject and f.verdict == "error" for f in findings)
