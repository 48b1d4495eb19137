"""A plan as JSON for programs, and as text for a terminal."""

import dataclasses
import io
import math
from collections.abc import Iterable

from rich import box
from rich.console import Console
from rich.table import Table

from jax_ordermerge.console import to_json
from jax_ordermerge.json_types import Json
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.collectives import Collectives
from jax_ordermerge.plan.results import ExperimentPlan, OptionPlan, Plan, ProgramPlan, Settings

# wide enough for both options side by side; docs/plans_7b_70b.md shows the text as it is
_WIDTH = 130
_MEMORY_KINDS = ("parameters", "optimizer", "base", "batch", "temporaries", "total")
# The keys of the JSON document are its interface: they stay when fields of a plan are renamed.
_TIME_KEYS = {"matmuls": "products", "memory": "memory", "collectives": "exchanges"}
_TIMED_KEYS = ("tokens_per_second", "mfu", "training_hours", "population_step_seconds")


# ------------------------------------------------------------------------------------------- JSON


def as_json(plan: Plan) -> str:
    """Return a plan as a JSON document. Bytes are per device, except those of `experiment`."""
    device, experiment = plan.topology.device, dataclasses.asdict(plan.experiment)
    # asdict has fields alone, and the total is a property
    experiment["hours"]["total"] = plan.experiment.total_hours
    document = {
        "topology": {
            "name": plan.topology.name,
            "devices": plan.topology.size,
            "device": device and dataclasses.asdict(device),
        },
        "model": {"name": plan.model_name, "parameters": plan.parameters},
        "work": dataclasses.asdict(plan.work),
        "source": plan.configured.source,
        "given": _option_json(plan.configured),
        "recommended": plan.recommended and _option_json(plan.recommended),
        "candidates": [_option_json(candidate) for candidate in plan.candidates],
        "programs": {name: _program_json(program) for name, program in plan.programs.items()},
        "experiment": experiment,
        "assumed": plan.assumptions,
        "notes": plan.notes,
    }
    return to_json(document)


def _option_json(option: OptionPlan) -> Json:
    step = option.step
    seconds: dict[str, float | None] | None = None
    memory = dataclasses.asdict(step.memory)
    # without a data sheet there are no times, and `seconds` is null
    if step.times is not None:
        seconds = {_TIME_KEYS[kind]: value for kind, value in step.times.items()}
        seconds["step"] = step.seconds
    document: Json = {
        "settings": option.settings,
        "changes": option.changes,
        "members_at_once": option.members,
        "memory": memory | {"total": step.memory.total, "limit": option.memory_limit},
        "fits": option.fits,
        "flops": {"model": option.model_flops, "executed_a_device": step.flops},
        "moved_bytes": step.moved,
        "traffic_bytes": step.traffic,
        "seconds": seconds,
    }
    if seconds is not None:
        document |= {name: getattr(option, name) for name in _TIMED_KEYS}
    # optional keys come last: a reader that does not know them sees the same document as ever
    document["source"] = option.source
    if option.refused:
        document["refused"] = True
    if option.requirements is not None:
        document |= {
            "compiled_seconds": option.requirements.seconds,
            "analytic_bytes": option.analytic_bytes,
            "exchanges": _collectives_json(option.requirements.collectives),
        }
    return document


def _program_json(program: ProgramPlan) -> Json:
    document: Json = {"bytes": program.bytes, "fits": program.fits}
    if program.requirements is not None:
        document |= {
            "arguments": program.requirements.arguments,
            "temporaries": program.requirements.temporaries,
            "compiled_seconds": program.requirements.seconds,
            "exchanges": _collectives_json(program.collectives),
        }
    if program.fitting:
        document["fitting"] = program.fitting
    return document


def _collectives_json(collectives: Collectives) -> list[Json]:
    return [
        {"kind": kind, "axes": list(axes), "operations": count, "bytes": size}
        for (kind, axes), (count, size) in collectives.items()
    ]


# ------------------------------------------------------------------------------------------- text


def _count(parameters: int) -> str:
    """Return a number of parameters with three digits or so.

    Example:
        >>> _count(6_738_415_616), _count(134_515_008), _count(622_080)
        ('6.74 B', '134.52 M', '0.62 M')
    """
    billions = parameters / 1e9
    return f"{billions:.2f} B" if billions >= 1 else f"{parameters / 1e6:.2f} M"


def as_text(plan: Plan) -> str:
    """Return a plan as tables and a verdict."""
    # a fixed width, so that the text does not depend on the terminal and can be tested
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, highlight=False, markup=False)
    work = plan.work
    console.print(
        f"{plan.model_name}, {_count(plan.parameters)} parameters, on {plan.topology.name}"
        f" ({plan.topology.size} devices)"
    )
    steps = f"{work.steps:,} steps" if work.steps else "number of steps not known"
    console.print(
        f"each step of a member: {work.rows} rows of {work.length} tokens, {work.tokens:,.0f} of"
        f" them not padding; {steps}\n"
    )
    console.print(_options_table(plan))
    if plan.programs:
        console.print(_programs_table(plan))
    if plan.candidates:
        console.print(_candidates_table(plan))
    console.print(_experiment_table(plan))
    console.print(
        "\n" + describe_verdict(plan.configured, plan.recommended, plan.programs), soft_wrap=True
    )
    for note in plan.notes:
        console.print(f"note: {note}", soft_wrap=True)
    console.print("assumed: " + "; ".join(plan.assumptions), soft_wrap=True)
    return file.getvalue()


def describe_verdict(
    configured: OptionPlan, recommended: OptionPlan | None, programs: dict[str, ProgramPlan]
) -> str:
    """Return whether the config fits and what to change, one sentence per line."""
    # None is a third answer: CPUs and unknown devices have no data sheet
    fits = {
        True: "It fits",
        False: "It does not fit",
        None: "The memory of these devices is not known",
    }[configured.fits]
    if recommended:
        changes = format_changes(recommended.changes)
        sentences = [f"{fits}. Better ({recommended.source}): {changes}"]
    elif configured.fits:
        sentences = [f"{fits}, and no settings that were tried are much better."]
    else:
        sentences = [f"{fits}."]
    # the training step has its own sentence; here are the programs that would fail after it
    for name, program in programs.items():
        if program.fits is not False:
            continue
        remedy = ""
        if program.fitting:
            remedy = f"; it does with {format_changes(program.fitting)}"
        elif name == "merge":
            remedy = ": merge the exported members as files (ordermerge merge MODEL...)"
        sentences.append(f"{name} does not fit{remedy}.")
    return "\n".join(sentences)


def describe_saves(experiment: ExperimentPlan) -> str:
    """Return what to do where saving a checkpoint takes longer than training until the next."""
    assert experiment.checkpoint_interval is not None
    seconds, interval = experiment.checkpoint_seconds, experiment.checkpoint_interval
    enough = math.ceil(experiment.save_bytes / interval / 1e6)
    return (
        f"a checkpoint takes {seconds:,.0f} s to save and the next follows after {interval:,.0f} s,"
        " so that the devices wait: save less often (training.checkpoint_every,"
        f" training.checkpoint_minutes), or on storage that takes {enough:,} MB per second (then"
        f" state it: --set training.checkpoint_bandwidth={enough})"
    )


def format_changes(changes: Settings) -> str:
    """Return changes of settings as options of the command line.

    Example:
        >>> format_changes({"mesh.fsdp": 8, "population.wave": None, "mesh.dcn": {"order": 2}})
        "--set mesh.fsdp=8 --set population.wave=null --set 'mesh.dcn={order: 2}'"
    """
    options = []
    for name, value in changes.items():
        # flow style of YAML, quoted for the shell
        if isinstance(value, dict):
            entries = ", ".join(f"{key}: {size}" for key, size in value.items())
            options.append(f"--set '{name}={{{entries}}}'")
        else:
            options.append(f"--set {name}={'null' if value is None else value}")
    return " ".join(options) or "as configured"


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.HORIZONTALS, show_edge=False)


def _options_table(plan: Plan) -> Table:
    """Return a table with a column for the config and one for the recommended settings."""
    # two options side by side show at a glance what the recommendation costs and saves
    options = [plan.configured, *([plan.recommended] if plan.recommended else [])]
    table = Table(box=box.HORIZONTALS, show_edge=False, header_style="bold")
    table.add_column("training step, per device")
    for name, option in zip(("as configured", "recommended"), options, strict=False):
        table.add_column(f"{name}, {option.source}", justify="right")

    def row(name: str, values: Iterable[str]) -> None:
        table.add_row(name, *values)

    row("mesh", map(_format_mesh, options))
    row("members at once, microbatch, remat", map(_format_pieces, options))
    for kind in _MEMORY_KINDS:
        sizes = [getattr(option.step.memory, kind) for option in options]
        # the base is 0 in full fine-tuning
        if any(sizes):
            row(f"memory: {kind}, GiB", map(_gib, sizes))
    # without a data sheet a column of "no" would be wrong: nothing is known
    if plan.configured.memory_limit is not None:
        row("memory: limit, GiB", (_gib(option.memory_limit) for option in options))
        row("fits", ("yes" if option.fits else "no" for option in options))
    row("FLOPs of the model, all devices", (f"{option.model_flops:.3g}" for option in options))
    row("FLOPs with recomputation and padding", (f"{option.step.flops:.3g}" for option in options))
    # Both options in one row, though one of them may not cross these axes.
    for axes in sorted({axes for option in options for axes in option.step.traffic}):
        received = [option.step.traffic.get(axes, 0) for option in options]
        row(f"received over {axes}, GiB", map(_gib, received))
    if plan.configured.step.times is not None:
        times = [option.step.times or {} for option in options]
        for kind in plan.configured.step.times:
            row(f"seconds: {kind}", (f"{seconds[kind]:.3f}" for seconds in times))
        row("seconds per step (analytic)", (f"{option.step.seconds:.3f}" for option in options))
        row("tokens per second, all devices", (f"{o.tokens_per_second:,.0f}" for o in options))
        row("MFU", (f"{option.mfu:.0%}" for option in options))
        row("hours of the whole training", (_hours(option.training_hours) for option in options))
    # A dash tells an estimate from a compilation in 0 s.
    compiled = [option.requirements for option in options]
    row("seconds of compilation", (f"{needs.seconds:.0f}" if needs else "-" for needs in compiled))
    return table


def _programs_table(plan: Plan) -> Table:
    table = _table("other programs, compiled", "GiB per device", "fits", "received, GiB")
    for name, program in plan.programs.items():
        received = sum(size for _, size in program.collectives.values())
        fits = {True: "yes", False: "no", None: "?"}[program.fits]
        table.add_row(name, _gib(program.bytes), fits, _gib(received))
    return table


def _candidates_table(plan: Plan) -> Table:
    table = _table("other settings, best first (analytic)", "GiB", "hours", "MFU")
    for option in plan.candidates:
        table.add_row(
            format_changes(option.changes),
            _gib(option.step.memory.total),
            _hours(option.training_hours),
            f"{option.mfu:.0%}",
        )
    return table


def _experiment_table(plan: Plan) -> Table:
    experiment = plan.experiment
    settings = "as recommended" if plan.recommended else "as configured"
    table = _table(f"the whole experiment {settings}", "hours (analytic), or GB")
    for stage, hours in experiment.hours.items():
        models = f" ({experiment.models} models)" if stage in ("analysis", "evaluation") else ""
        table.add_row(stage + models, _hours(hours))
    table.add_row("total", _hours(experiment.total_hours))
    for name, size in (
        (f"checkpoint in GB ({experiment.checkpoints_kept} are kept)", experiment.checkpoint_bytes),
        ("merged models in GB", experiment.merged_bytes),
    ):
        table.add_row(name, f"{size / 1e9:,.1f}")
    interval = experiment.checkpoint_interval
    table.add_row("hours to save a checkpoint", _hours(experiment.checkpoint_seconds / 3600))
    table.add_row("hours between checkpoints", _hours(interval and interval / 3600))
    return table


def _format_mesh(option: OptionPlan) -> str:
    # `order` and `fsdp` always, the other axes only if they divide something
    sizes = analytic.abstract_mesh(option.spec, option.topology).shape
    return " x ".join(
        f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("order", "fsdp")
    )


def _format_pieces(option: OptionPlan) -> str:
    # null in a config, which a reader could take for unknown
    microbatch = option.spec.training.microbatch or "whole batch"
    return f"{option.members}, {microbatch}, {option.spec.model.remat}"


def _gib(size: float | None) -> str:
    return "not known" if size is None else f"{size / 2**30:.2f}"


def _hours(hours: float | None) -> str:
    return "not known" if hours is None else f"{hours:.2f}"
