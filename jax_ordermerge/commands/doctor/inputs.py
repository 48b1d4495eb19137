"""The base, the data, and what the plan of a run needs of this machine."""

import dataclasses
import os
from collections.abc import Iterator
from typing import Final

from jax_ordermerge import config as schema
from jax_ordermerge.checkpoint import convert, remote
from jax_ordermerge.checkpoint.resolve import is_on_hub
from jax_ordermerge.commands.doctor import devices
from jax_ordermerge.commands.doctor.finding import Finding
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.hardware import MEMORY_FRACTION, parse
from jax_ordermerge.mesh_shape import AXES
from jax_ordermerge.plan import planner
from jax_ordermerge.plan.inputs import Inputs, read_inputs
from jax_ordermerge.plan.results import ExperimentPlan, OptionPlan

# A training on CPUs that takes longer was meant for an accelerator.
_CPU_DAYS: Final = 7


@dataclasses.dataclass(frozen=True)
class Needs:
    """What the plan of a run says.

    Attributes:
        option: the training step; None where the mesh does not fit the devices.
        experiment: bytes that the run writes, and seconds between two checkpoints.
        bandwidth: `training.checkpoint_bandwidth` in bytes per second.
    """

    option: OptionPlan | None
    experiment: ExperimentPlan
    bandwidth: float

    @property
    def save_bytes(self) -> int:
        """Bytes of one save."""
        return self.experiment.save_bytes

    @property
    def interval(self) -> float | None:
        """Seconds of training between two checkpoints; None if they are not known."""
        return self.experiment.checkpoint_interval

    @property
    def disk_bytes(self) -> int:
        """Bytes of the run directory at its largest."""
        experiment = self.experiment
        # the one that is being written comes on top of those that are kept
        checkpoints = experiment.checkpoints_kept * experiment.checkpoint_bytes + self.save_bytes
        return checkpoints + experiment.merged_bytes


# ---------------------------------------------------------------------------------- base and data


def check_inputs(config: Config) -> tuple[Inputs | None, list[Finding]]:
    """Read the architecture of the base and the examples, and check what a run would refuse.

    Returns:
        What was read, None where not even the shape of the model is known, and the findings.
    """
    findings: list[Finding] = []
    try:
        preflight.check_config(config)
    except UserError as error:
        findings.append(Finding("config", "error", str(error)))
    try:
        schema.check_inputs(config, ["model.base"])
    except UserError as error:
        detail = f"{error}; base, data, memory and the size of checkpoints are not checked"
        return None, [*findings, Finding("base", "note", detail)]
    base = config.model.base
    try:
        # weights of a hub model are not downloaded, those of a directory are there
        directory = convert.resolve(base, weights=False)
        model = convert.load_config(directory, config.model.ignore_config_keys)
        has_weights = remote.address(base) is None and not is_on_hub(base)
        if has_weights:
            preflight.check_model(config, directory, model)
        else:
            config.data.check_length(model.context_length, base)
    except UserError as error:
        findings.append(Finding("base", "error", str(error)))
    else:
        later = "" if has_weights else "; its weights are downloaded when the run starts"
        findings.append(Finding("base", "ok", f"{base} can be read{later}"))
    findings += _check_token(config)
    try:
        inputs = read_inputs(plan_spec(config))
    except UserError:
        return None, findings  # of the base: it is above
    return inputs, findings + _check_data(config, inputs)


def _check_token(config: Config) -> Iterator[Finding]:
    """Yield whether a token of the hub is there, where a run reads from the hub."""
    import huggingface_hub

    if not is_on_hub(config.model.base):
        return
    if huggingface_hub.get_token():
        yield Finding("token", "ok", "a token for the Hugging Face hub is there")
    else:
        detail = (
            "no token for the Hugging Face hub (HF_TOKEN, hf auth login): gated models and data"
            " cannot be read"
        )
        # a note and no error: public models need no token
        yield Finding("token", "note", detail)


def _check_data(config: Config, inputs: Inputs) -> list[Finding]:
    try:
        schema.check_inputs(config, ["data.train"])
    except UserError as error:
        return [Finding("data", "note", f"{error}; the data are not checked")]
    if inputs.train is not None:
        return [Finding("data", "ok", f"{len(inputs.train)} training examples can be read")]
    if inputs.unread is not None:
        return [Finding("data", "error", inputs.unread)]
    return [Finding("data", "note", "not read: without the base there is no tokenizer")]


# ------------------------------------------------------------------------------- memory and time


def plan_needs(config: Config, inputs: Inputs, *, has_mesh: bool) -> Needs:
    """Plan the training by formulas: no compiler is started.

    Args:
        config: of the run.
        inputs: see `check_inputs`.
        has_mesh: whether the mesh fits the devices.

    Raises:
        UserError: the config does not fit the devices or the model.
    """
    spec, option = plan_spec(config), None
    if has_mesh:
        option, experiment = planner.estimate(spec, inputs, planner.present_topology(spec))
    else:
        # the bytes of a checkpoint do not depend on the mesh
        on_one_device = spec.change(mesh={**dict.fromkeys(AXES, 1), "dcn": {}})
        _, experiment = planner.estimate(on_one_device, inputs, parse("cpu:1"))
    return Needs(option, experiment, spec.training.checkpoint_bytes_per_second)


def check_needs(needs: Needs) -> Iterator[Finding]:
    """Compare the plan of the training with the memory and, on CPUs, the speed of the devices."""
    import jax

    if needs.option is None:
        return
    platform = jax.devices()[0].platform
    if platform == "cpu":
        # the devices of this process share its memory
        limit: float | None = MEMORY_FRACTION * devices.host_memory() / jax.local_device_count()
    else:
        limit = needs.option.memory_limit
    yield judge_memory(needs.option.step.memory.total, limit)
    if platform == "cpu":
        yield from _check_cpu_time(needs.option)


def judge_memory(needed: float, limit: float | None) -> Finding:
    """Return the finding about the memory per device.

    Args:
        needed: bytes per device of the training step, by the plan.
        limit: bytes per device that may be used; None if they are not known.

    Example:
        >>> judge_memory(2**30, 2**34)
        Finding(subject='memory', verdict='ok', detail='the training step takes 1.0 of 16.0 GiB per
        device (analytic)')
        >>> judge_memory(2**34, 2**30).verdict
        'error'
    """
    step = f"the training step takes {needed / 2**30:.1f}"
    if limit is None:
        detail = f"{step} GiB per device (analytic); the memory of the devices is not known"
        return Finding("memory", "note", detail)
    detail = f"{step} of {limit / 2**30:.1f} GiB per device (analytic)"
    if needed <= limit:
        return Finding("memory", "ok", detail)
    detail += "; ordermerge plan compiles it and searches for settings that fit"
    return Finding("memory", "error", detail)


def _check_cpu_time(option: OptionPlan) -> Iterator[Finding]:
    """Yield how long the training takes on CPUs, where that is too long to be meant."""
    import jax

    # where the number of examples is not known, at least one step per epoch
    steps = option.work.steps or option.spec.training.epochs
    flops = option.work.flops * option.spec.population.total * steps
    # the speed is that of this process; the others are taken to be as fast
    days = flops / devices.measure_flops() / jax.process_count() / 86400
    if days < _CPU_DAYS:
        return
    least = "about" if option.work.steps else "at least"
    detail = f"the training takes {least} {days:,.0f} days on the CPU devices of this machine"
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        yield Finding("accelerator", "note", f"{detail}, which JAX_PLATFORMS=cpu asks for")
    else:
        detail += "; an accelerator is meant: check the driver and the extra (tpu, cuda, cuda12)"
        yield Finding("accelerator", "error", detail)
