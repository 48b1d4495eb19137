"""A config for a model, data and devices: what is chosen, and why, as comments beside it."""

import dataclasses
import functools
import math
import shlex
import textwrap
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.checkpoint import atomic, convert
from jax_ordermerge.commands import configs
from jax_ordermerge.commands import data as data_command
from jax_ordermerge.config import Config, make_config
from jax_ordermerge.config.reference import to_yaml
from jax_ordermerge.config.section import override, set_value
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import parse
from jax_ordermerge.json_types import Json
from jax_ordermerge.plan import planner
from jax_ordermerge.plan.results import OptionPlan, Plan

_LONGEST = 8192  # tokens of an example that are looked at; a context may be far longer
_WINDOW = 512  # tokens of a window, where the data are texts without examples
_ROUND = 16  # lengths are multiples of it, which vector units like
_FEWEST = 16  # examples of which some can be set aside
_HELD_OUT = 0.1  # share of the examples for validation, and for the test where no file is given
_MOST_HELD_OUT = 256
_STEPS = 10  # at least so many of an epoch, or the order would have little to say
_EXAMPLES_PER_ROW = 8  # examples in a packed row, about: fewer leave more of it empty
_MOST_PADDING = 0.3  # share of padding from which something is done about it
# parameters below each limit, and the learning rate to begin with there: 1e-3 is that of the studies
# in configs/small. With 1e-4 a model of 0.6 M was still worse than a uniform guess after 36 steps
_LEARNING_RATES = ((10**7, 1e-3), (10**9, 1e-4), (math.inf, 2e-5))


class Setting(NamedTuple):
    """A setting of the config to write.

    Attributes:
        key: dotted.
        value: as YAML takes it.
        reason: why, as a comment; empty where the user gave the value.
    """

    key: str
    value: object
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Request:
    """What a config is asked for.

    Attributes:
        model: base model, as `model.base` takes it.
        data: training data, as `data.train` takes them.
        test: test data; by default some examples are set aside.
        hardware: see `hardware.parse`; by default the devices of this machine.
        members: how many orders.
        changes: `"section.key=value"`, as `--set` takes them: settings that are given, not chosen.
    """

    model: str
    data: str
    test: str | None = None
    hardware: str | None = None
    members: int = 4
    changes: tuple[str, ...] = ()


def write_config(request: Request, out: Path) -> str:
    """Write a config that runs, and return a summary of one line.

    Args:
        request: model, data and devices.
        out: YAML file, which must not exist.

    Raises:
        UserError: the file exists; model, data or devices cannot be read, or do not fit.
    """
    configs.check_new(out)
    if request.hardware is not None:
        parse(request.hardware, 1)  # before minutes of reading
    settings = _choose_inputs(request, out.stem)
    architecture = convert.load_config(convert.resolve(request.model, weights=False))
    longest = Setting("data.max_length", min(architecture.context_length, _LONGEST))
    draft = _make(_give([*settings, longest], request))
    cap = draft.data.max_length
    loaded = data_command.load(draft)
    settings += _choose_data(loaded.splits["train"], request, cap)
    settings += _choose_training(_count_rows(settings, loaded.splits["train"]), architecture)
    draft = _make(_give([*settings, Setting("model.compute_dtype", "float32")], request))
    # by formulas: a compilation takes minutes, and may need a compiler that is not here
    plan = planner.plan_experiment(plan_spec(draft), request.hardware, analytic_only=True)
    settings += _choose_hardware(plan, request)
    settings.append(
        Setting(
            "merge.methods",
            [{"method": "average"}, {"method": "selection", "parameters": {"resample": 0}}],
            "a merge each; ordermerge search finds more without a training",
        )
    )
    settings = _give(settings, request)
    config = _make(settings)
    preflight.check_config(config)
    loaded = data_command.load(config)
    if shared := loaded.overlaps:
        counts = ", ".join(f"{x.examples} of {x.split} in {x.other_split}" for x in shared)
        reason = f"the data hold examples twice ({counts}): remove them for results held out"
        settings.insert(-1, Setting("data.allow_overlap", True, reason))
        loaded = dataclasses.replace(loaded, config=_make(settings))
    data_command.check(loaded)
    atomic.replace(out, _as_yaml(settings, request, out).encode())
    train = len(loaded.splits["train"])
    return f"{request.members} orders of {train:,} examples on {plan.topology.name}"


def _make(settings: list[Setting]) -> Config:
    return make_config(_nested(settings), "the config to write")


def _give(settings: list[Setting], request: Request) -> list[Setting]:
    """Return settings with those that are given in place of those that were chosen."""
    for item in request.changes:
        raw: Json = {}
        override(raw, item)
        key = item.partition("=")[0].strip()
        value = functools.reduce(lambda section, name: section[name], key.split("."), raw)
        # within a section that was chosen as one value, the given key comes after it
        settings = [*(x for x in settings if x.key != key), Setting(key, value)]
    return settings


def _nested(settings: list[Setting]) -> Json:
    raw: Json = {}
    for setting in settings:
        set_value(raw, setting.key, setting.value, setting.key)
    return raw


# ------------------------------------------------------------------------------------- settings


def _choose_inputs(request: Request, name: str) -> list[Setting]:
    settings = [
        Setting("name", name, "also of the run directory, runs/NAME"),
        Setting("model.base", request.model),
        Setting("data.train", request.data),
    ]
    if request.test is not None:
        settings.append(Setting("data.test", request.test))
    reason = "orders; each costs a training, and 4 are enough to see what the order does"
    return [*settings, Setting("population.members", request.members, reason)]


def _choose_data(train: Examples, request: Request, cap: int) -> list[Setting]:
    """Choose lengths, padding, and what is set aside."""
    count = len(train)
    if count < _FEWEST:
        raise UserError(
            f"--data {request.data} has {count} usable examples, expected at least {_FEWEST}; give"
            f" more examples, or a model whose context holds them (here {cap:,} tokens)"
        )
    lengths = train.lengths
    median, p99, longest = (int(x) for x in np.percentile(lengths, [50, 99, 100], method="higher"))
    if median == cap:  # texts are cut into windows of any length
        length, reason = min(cap, _WINDOW), "tokens of a window: the data are texts"
    else:
        # a few long examples would make all others wait, unless they are hardly longer
        chosen = longest if longest <= 1.25 * p99 else p99
        length = min(_round_up(chosen), cap)
        reason = (
            f"tokens: half of the {count:,} examples have at most {median}, 99 % at most {p99},"
            f" the longest {longest}"
        )
        if longest > length:
            reason += f"; {int((lengths > length).sum()):,} longer ones are dropped"
    settings = [Setting("data.max_length", length, reason)]
    waste = 1 - float(np.minimum(lengths, length).mean()) / length
    buckets = sorted(
        {_round_up(int(np.percentile(lengths, share, method="higher"))) for share in (50, 80)}
        - {length}
    )
    buckets = [bucket for bucket in buckets if bucket < length]
    if median < cap and waste > _MOST_PADDING and train.rejected is None and not _is_cpu(request):
        length = max(length, min(cap, _round_up(_EXAMPLES_PER_ROW * int(lengths.mean()))))
        settings[0] = Setting("data.max_length", length, f"{reason}; a row holds several")
        reason = f"one example in a row would leave {100 * waste:.0f} % of it padding"
        settings.append(Setting("data.packing", "packs", reason))
    elif median < cap and waste > _MOST_PADDING and buckets:
        reason = f"padded lengths: rows of {length} alone would be {100 * waste:.0f} % padding"
        settings.append(Setting("data.buckets", buckets, reason))
    elif median < cap:
        reason = f"rows are {100 * waste:.0f} % padding: several examples in one would gain little"
        settings.append(Setting("data.packing", "none", reason))
    held_out_count = max(2, min(_MOST_HELD_OUT, int(_HELD_OUT * count)))
    settings.append(
        Setting(
            "data.validation_examples",
            held_out_count,
            "set aside to choose a merge on, never trained",
        )
    )
    if request.test is None:
        reason = "set aside for the results, since no --test is given"
        settings.append(Setting("data.test_examples", held_out_count, reason))
    if train.rejected is not None:
        settings.append(Setting("objective.kind", "dpo", "the data are preference pairs"))
    return settings


def _is_cpu(request: Request) -> bool:
    if request.hardware is not None:
        return parse(request.hardware, 1).device is None
    return jax.default_backend() == "cpu"


def _count_rows(settings: list[Setting], train: Examples) -> float:
    """Return the number of rows in an epoch, of examples or packed, before any are set aside."""
    values = {setting.key: setting.value for setting in settings}
    if values.get("data.packing") != "packs":
        return len(train)
    length = values["data.max_length"]
    assert isinstance(length, int)
    return float(train.lengths.sum()) / length


def _choose_training(count: float, model: ModelConfig) -> list[Setting]:
    """Choose batch and learning rate; both are where to begin, not what is best."""
    used = count * (1 - 2 * _HELD_OUT)
    batch = 2 ** max(0, min(5, int(math.log2(max(used / _STEPS, 1)))))
    size = parameter_count(model)
    rate = next(rate for limit, rate in _LEARNING_RATES if size < limit)
    return [
        Setting("training.epochs", 3, "as in the recipe of Alpaca"),
        Setting("training.batch", batch, f"rows per step: {used / batch:.0f} steps per epoch"),
        Setting(
            "training.learning_rate",
            rate,
            f"to begin with, for {size / 1e6:,.1f} M parameters; compare validation losses of"
            " half and twice as much",
        ),
        Setting("training.schedule", "cosine"),
        Setting("training.warmup", 0.03),
    ]


def _choose_hardware(plan: Plan, request: Request) -> list[Setting]:
    """Choose mesh, microbatch, recomputation, waves and adapters by the estimate."""
    topology = plan.topology
    if topology.device is None:  # a CPU, of which there is no data sheet
        return [
            Setting("model.compute_dtype", "float32", "CPUs are no faster in bfloat16"),
            Setting("mesh.fsdp", -1, f"{topology.size} device: it takes all cores by itself"),
        ]
    option = plan.candidates[0] if plan.candidates else None
    if option is None:
        raise UserError(
            f"{request.model} does not fit {topology.name} with any settings, not even as adapters;"
            " give --hardware of more devices"
        )
    return [
        Setting("model.compute_dtype", "bfloat16", "matmuls; trained weights stay in float32"),
        *_planned(option, topology.name),
    ]


def _planned(option: OptionPlan, name: str) -> list[Setting]:
    spec, memory = option.spec, option.step.memory.total / 2**30
    fits = f"the fastest that fits {name} by the estimate, {memory:,.1f} GiB per device"
    settings = [
        Setting("model.remat", spec.model.remat, f"what is recomputed: {fits}"),
        Setting("mesh.order", spec.mesh.order, "groups that train members at the same time"),
        Setting("mesh.fsdp", spec.mesh.fsdp, "devices that share a member and its batch"),
        Setting("mesh.tensor", spec.mesh.tensor, "devices that share heads and mlp"),
    ]
    if spec.training.microbatch is not None:
        reason = "examples per pass: all at once would not fit, or be slower"
        settings.append(Setting("training.microbatch", spec.training.microbatch, reason))
    if spec.population.wave is not None:
        reason = "members in memory together; the others wait"
        settings.append(Setting("population.wave", spec.population.wave, reason))
    if spec.lora is not None:
        reason = "adapters: full fine-tuning fits with no settings"
        settings.append(Setting("lora.rank", spec.lora.rank, reason))
    return settings


def _round_up(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


# ------------------------------------------------------------------------------------- text


def _as_yaml(settings: list[Setting], request: Request, out: Path) -> str:
    """Return the settings as YAML, each with its reason above it."""
    options = [
        part
        for name, value in dataclasses.asdict(request).items()
        if name != "changes" and value is not None and (name, value) != ("members", 4)
        for part in (f"--{name}", str(value))
    ]
    options += [part for item in request.changes for part in ("--set", item)]
    path = shlex.quote(str(out))
    reasons = {setting.key: setting.reason for setting in settings if setting.reason}
    lines = [
        f"# Written by: ordermerge init {shlex.join(options)} {path}",
        "#",
        f"#   ordermerge data {path}    # what would be trained on",
        f"#   ordermerge plan {path}    # memory and time",
        f"#   ordermerge run {path}",
        "#",
        "# Reasons stand above the values. Learning rate, epochs and members are yours to change.",
    ]
    for section, values in _nested(settings).items():
        if not isinstance(values, dict):
            lines += [f"# {reasons[section]}"] if section in reasons else []
            lines.append(f"{section}: {to_yaml(values)}")
            continue
        lines.append(f"{section}:")
        for key, value in values.items():
            if reason := reasons.get(f"{section}.{key}"):
                lines += textwrap.wrap(
                    reason, 100, initial_indent="  # ", subsequent_indent="  #   "
                )
            lines += _entry(key, value)
    return "\n".join(lines) + "\n"


def _entry(key: str, value: object) -> list[str]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [f"  {key}:", *(f"    - {to_yaml(item)}" for item in value)]
    return [f"  {key}: {to_yaml(value)}"]
