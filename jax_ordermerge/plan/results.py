"""The parts of a plan. Derived figures are properties, so that no two of them can disagree."""

import dataclasses
from typing import Literal

from jax_ordermerge.hardware import Topology
from jax_ordermerge.plan import analytic
from jax_ordermerge.plan.analytic import StepEstimate, Workload
from jax_ordermerge.plan.collectives import Collectives
from jax_ordermerge.plan.compiled import Requirements
from jax_ordermerge.plan.spec import PlanSpec

# values as `--set` takes them; null is None
Settings = dict[str, int | float | str | dict[str, int] | None]


def list_settings(spec: PlanSpec, topology: Topology) -> Settings:
    """Return the settings that the planner may change, by the names that `--set` takes.

    An axis size of -1 is written as the size that it stands for.

    Example:
        >>> from jax_ordermerge.hardware import parse
        >>> list_settings(PlanSpec(), parse("cpu:8"))["mesh.fsdp"]
        8
    """
    # with sizes in place of -1, so that two specs that mean the same mesh have no differences
    sizes = dict(analytic.abstract_mesh(spec, topology).shape)
    return {f"mesh.{name}": size for name, size in sizes.items()} | {
        "mesh.dcn": {str(name): size for name, size in spec.mesh.dcn.items()},
        "training.microbatch": spec.training.microbatch,
        "model.remat": spec.model.remat,
        "population.wave": spec.population.wave,
        "lora.rank": None if spec.lora is None else spec.lora.rank,
        "lora.alpha": None if spec.lora is None else spec.lora.alpha,
    }


def list_changes(before: PlanSpec, after: PlanSpec, topology: Topology) -> Settings:
    """Return the settings of `after` that differ from those of `before`."""
    # only what a plan may change: other settings are equal
    old, new = list_settings(before, topology), list_settings(after, topology)
    return {name: value for name, value in new.items() if value != old[name]}


@dataclasses.dataclass(frozen=True)
class OptionPlan:
    """The training step with one choice of settings.

    Attributes:
        spec: the settings.
        changes: those that differ from the settings of the user.
        topology: devices.
        work: inputs of the step of one member.
        step: costs of the step; its memory and traffic are the compiler's if `source` is.
        source: where memory and traffic are from.
        refused: whether the compiler refused the program because it does not fit.
        requirements: what the compiler says; None without a compiler, and if it refused.
        analytic_bytes: the estimate of the total memory beside the compiler's figure.
    """

    spec: PlanSpec
    changes: Settings
    topology: Topology
    work: Workload
    step: StepEstimate
    source: Literal["compiled", "analytic"] = "analytic"
    refused: bool = False
    requirements: Requirements | None = None
    analytic_bytes: float | None = None

    @property
    def settings(self) -> Settings:
        """See `list_settings`."""
        return list_settings(self.spec, self.topology)

    @property
    def members(self) -> int:
        """Members that are trained together."""
        # One program trains a wave; the other waves follow with the same program.
        return len(self.spec.first_wave)

    @property
    def memory_limit(self) -> float | None:
        """Bytes per device that may be used; None without a data sheet."""
        # less than the memory: the rest is for what no plan sees, runtime and gaps between buffers
        return self.topology.memory_limit

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the memory; None without a data sheet."""
        limit = self.memory_limit
        # the compiler may refuse for reasons that the total does not show, such as fragmentation
        return None if limit is None else self.step.memory.total <= limit and not self.refused

    @property
    def model_flops(self) -> float:
        """FLOPs of the model per step over all devices, without padding and recomputation."""
        # of the members that are trained together, as the seconds of a step are
        return self.members * self.work.flops

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second over all devices, padding not counted."""
        seconds = self.step.seconds
        return None if seconds is None else self.members * self.work.tokens / seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization: the fraction of the peak of all devices."""
        seconds = self.step.seconds
        if seconds is None:
            return None
        # of the model only: counting recomputation would reward settings that waste FLOPs
        peak = analytic.peak_flops(self.spec, self.topology) * self.topology.size
        return self.model_flops / seconds / peak

    @property
    def population_step_seconds(self) -> float:
        """Seconds in which every member of the population makes one step, wave after wave.

        This is what the search minimizes: time per step alone would favor small waves. It is
        infinite without a data sheet.
        """
        seconds = self.step.seconds
        # infinity compares as slower than anything, so options without times are never recommended
        if seconds is None:
            return float("inf")
        return seconds * self.spec.population.total / self.members

    @property
    def training_hours(self) -> float | None:
        """Hours of the whole training; None if seconds or steps are not known."""
        if self.step.seconds is None or self.work.steps is None:
            return None
        return self.population_step_seconds * self.work.steps / 3600


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """Requirements of a compiled program other than the training step.

    Attributes:
        bytes: bytes per device in all; None if the compiler refused and does not say.
        fits: whether they fit the memory; None without a data sheet.
        requirements: what the compiler says; None if it refused.
        fitting: settings with which the program fits, if it does not as configured.
    """

    bytes: int | None
    fits: bool | None
    requirements: Requirements | None = None
    fitting: Settings = dataclasses.field(default_factory=dict)

    @property
    def collectives(self) -> Collectives:
        """Collectives of the program; empty if the compiler refused."""
        return {} if self.requirements is None else self.requirements.collectives


@dataclasses.dataclass(frozen=True)
class ExperimentPlan:
    """Hours of each stage of an experiment, and the bytes that it writes.

    Attributes:
        hours: by stage; None if they are not known.
        models: models that are analyzed and evaluated: base, members, merges.
        checkpoint_bytes: parameters and optimizer of all members.
        checkpoints_kept: checkpoints that stay on the disk.
        save_bytes: of the checkpoint of the members that are trained together: one save.
        checkpoint_seconds: time of one save at `training.checkpoint_bandwidth`.
        checkpoint_interval: seconds of training between two; None if they are not known.
        merged_bytes: all merged models.
    """

    hours: dict[str, float | None]
    models: int
    checkpoint_bytes: int
    checkpoints_kept: int
    save_bytes: int
    checkpoint_seconds: float
    checkpoint_interval: float | None
    merged_bytes: int

    @property
    def saves_too_often(self) -> bool:
        """Whether saving one checkpoint takes longer than training until the next."""
        interval = self.checkpoint_interval
        return interval is not None and self.checkpoint_seconds > interval

    @property
    def total_hours(self) -> float | None:
        """Hours of all stages; None if those of a stage are not known."""
        # a sum over known stages only would look like a total
        hours = [value for value in self.hours.values() if value is not None]
        return sum(hours) if len(hours) == len(self.hours) else None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A plan of an experiment.

    Attributes:
        topology: devices.
        model_name: where the architecture is from.
        parameters: parameters of the model.
        work: inputs of one training step of one member.
        configured: the training step with the settings of the user.
        recommended: with better settings; None if the search has none.
        candidates: settings that fit by the estimate, best first.
        programs: the other programs of a run; empty without a compiler.
        experiment: hours and bytes with the recommended settings, else with those of the user.
        assumptions: of the estimate.
        notes: what could not be read, and what was used in its place.
    """

    topology: Topology
    model_name: str
    parameters: int
    work: Workload
    configured: OptionPlan
    recommended: OptionPlan | None
    candidates: tuple[OptionPlan, ...]
    programs: dict[str, ProgramPlan]
    experiment: ExperimentPlan
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
