"""A plan as text for a terminal."""

import io
import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

_WIDTH = 130


def as_json(plan: dict[str, Any]) -> str:
    """Return a plan of `planner.make` as JSON.

    Example:
        >>> as_json({"source": "analytic"})
        '{\\n "source": "analytic"\\n}\\n'
    """
    return json.dumps(plan, indent=1, allow_nan=False) + "\n"


def as_text(plan: dict[str, Any]) -> str:
    """Return a plan of `planner.make` as tables and a verdict."""
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    topology, work = plan["topology"], plan["work"]
    console.print(
        f"{plan['model']['name']}, {plan['model']['parameters'] / 1e9:.2f} B parameters, on {topology['name']} ({topology['devices']} devices)"
    )
    known = f"{work['steps']:,} steps" if work["steps"] else "steps not known"
    console.print(
        f"a step of a member: {work['rows']} rows of {work['length']} tokens, {work['tokens']:,.0f} of them no padding; {known}\n"
    )
    options = [plan["given"], *([plan["recommended"]] if plan["recommended"] else [])]
    console.print(_options(options))
    if plan["programs"]:
        console.print(_programs(plan["programs"]))
    if plan["candidates"]:
        console.print(_candidates(plan["candidates"]))
    console.print(_experiment(plan))
    console.print("\n" + verdict(plan), soft_wrap=True)
    for note in plan["notes"]:
        console.print(f"note: {note}", soft_wrap=True)
    console.print("assumed: " + "; ".join(plan["assumed"]), soft_wrap=True)
    return file.getvalue()


def verdict(plan: dict[str, Any]) -> str:
    """Return in a sentence whether the config fits, and what to change.

    Example:
        >>> verdict({"given": {"fits": True}, "recommended": None, "programs": {}})
        'It fits, and no settings that were tried are much better.'
        >>> better = {"changes": {"model.remat": "dots"}, "source": "compiled"}
        >>> large = {"losses": {"fits": False, "fitting": {"analysis.batch": 32}}}
        >>> print(verdict({"given": {"fits": False}, "recommended": better, "programs": large}))
        It does not fit. Better (compiled): --set model.remat=dots
        losses does not fit; it does with --set analysis.batch=32.
    """
    given, recommended = plan["given"], plan["recommended"]
    fits = {
        True: "It fits",
        False: "It does not fit",
        None: "How much memory these devices have is not known",
    }[given["fits"]]
    if recommended:
        said = f"{fits}. Better ({recommended['source']}): {settings(recommended['changes'])}"
    elif given["fits"]:
        said = f"{fits}, and no settings that were tried are much better."
    else:
        said = f"{fits}."
    large = [
        f"{name} does not fit{_remedy(name, one)}."
        for name, one in plan["programs"].items()
        if one["fits"] is False
    ]
    return "\n".join([said, *large])


def _remedy(name: str, program: dict[str, Any]) -> str:
    if program.get("fitting"):
        return f"; it does with {settings(program['fitting'])}"
    return (
        ": merge the exported members as files (ordermerge merge MODEL...)"
        if name == "merge"
        else ""
    )


def settings(changes: dict[str, Any]) -> str:
    """Return changes as they are typed.

    Example:
        >>> settings({"mesh.fsdp": 8, "population.wave": None, "mesh.dcn": {"order": 2}})
        "--set mesh.fsdp=8 --set population.wave=null --set 'mesh.dcn={order: 2}'"
    """
    typed = []
    for name, value in changes.items():
        if isinstance(value, dict):
            typed.append(
                f"--set '{name}={{{', '.join(f'{key}: {one}' for key, one in value.items())}}}'"
            )
        else:
            typed.append(f"--set {name}={'null' if value is None else value}")
    return " ".join(typed) or "as it is"


def _options(options: Sequence[dict[str, Any]]) -> Table:
    """Return a column for the config and one for what is recommended."""
    table = Table(box=box.HORIZONTALS, show_edge=False, header_style="bold")
    table.add_column("a step of the training, each device")
    for name, option in zip(("as configured", "recommended"), options, strict=False):
        table.add_column(f"{name}, {option['source']}", justify="right")

    def row(name: str, values: Sequence[str]) -> None:
        table.add_row(name, *values)

    row("mesh", [_mesh(one["settings"]) for one in options])
    row("members at once, microbatch, remat", [_pieces(one) for one in options])
    for kind in ("parameters", "optimizer", "base", "batch", "temporaries", "total"):
        if any(one["memory"][kind] for one in options):
            row(f"memory: {kind}, GiB", [_gib(one["memory"][kind]) for one in options])
    if options[0]["memory"]["limit"]:
        row("memory: may be used, GiB", [_gib(one["memory"]["limit"]) for one in options])
        row("fits", ["yes" if one["fits"] else "no" for one in options])
    row("FLOPs of the model, all devices", [f"{one['flops']['model']:.3g}" for one in options])
    row(
        "FLOPs computed (again, padding), a device",
        [f"{one['flops']['executed_a_device']:.3g}" for one in options],
    )
    for axes in sorted({axes for one in options for axes in one["traffic_bytes"]}):
        row(
            f"received over {axes}, GiB",
            [_gib(one["traffic_bytes"].get(axes, 0)) for one in options],
        )
    if options[0]["seconds"]:
        for kind in ("products", "memory", "exchanges", "step"):
            label = f"seconds: {kind}" if kind != "step" else "seconds of a step (analytic)"
            row(label, [f"{one['seconds'][kind]:.3f}" for one in options])
        row("tokens/s, all devices", [f"{one['tokens_per_second']:,.0f}" for one in options])
        row("MFU", [f"{one['mfu']:.0%}" for one in options])
        row("hours of the whole training", [_hours(one["training_hours"]) for one in options])
    row(
        "compiled in, s",
        [f"{one['compiled_seconds']:.0f}" if "compiled_seconds" in one else "-" for one in options],
    )
    return table


def _programs(programs: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "other programs, compiled",
        "GiB a device",
        "fits",
        "received, GiB",
        box=box.HORIZONTALS,
        show_edge=False,
    )
    for name, one in programs.items():
        size = "not said" if one["bytes"] is None else _gib(one["bytes"])
        received = _gib(sum(exchange["bytes"] for exchange in one.get("exchanges", ())))
        table.add_row(name, size, {True: "yes", False: "no", None: "?"}[one["fits"]], received)
    return table


def _candidates(candidates: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        "other settings, best first (analytic)",
        "GiB",
        "hours",
        "MFU",
        box=box.HORIZONTALS,
        show_edge=False,
    )
    for one in candidates:
        hours = _hours(one["training_hours"])
        table.add_row(
            settings(one["changes"]), _gib(one["memory"]["total"]), hours, f"{one['mfu']:.0%}"
        )
    return table


def _experiment(plan: dict[str, Any]) -> Table:
    whole = plan["experiment"]
    which = "as recommended" if plan["recommended"] else "as configured"
    table = Table(
        f"the whole experiment {which}",
        "hours (analytic), or GB",
        box=box.HORIZONTALS,
        show_edge=False,
    )
    for stage, hours in whole["hours"].items():
        table.add_row(
            f"{stage} ({whole['models']} models)" if stage in ("analysis", "evaluation") else stage,
            _hours(hours),
        )
    table.add_row(
        f"checkpoint in GB ({whole['checkpoints_kept']} are kept)",
        f"{whole['checkpoint_bytes'] / 1e9:,.1f}",
    )
    table.add_row("merged models in GB", f"{whole['merged_bytes'] / 1e9:,.1f}")
    return table


def _mesh(chosen: dict[str, Any]) -> str:
    sizes = {
        name.removeprefix("mesh."): size
        for name, size in chosen.items()
        if name.startswith("mesh.") and name != "mesh.dcn"
    }
    return " x ".join(
        f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("order", "fsdp")
    )


def _pieces(one: dict[str, Any]) -> str:
    chosen = one["settings"]
    return f"{one['members_at_once']}, {chosen['training.microbatch'] or 'whole batch'}, {chosen['model.remat']}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def _hours(hours: float | None) -> str:
    return "not known" if hours is None else f"{hours:.2f}"
