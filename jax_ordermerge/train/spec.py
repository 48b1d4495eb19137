"""What a training needs of the settings of an experiment, and nothing else of them."""

import dataclasses
from dataclasses import field

from jax_ordermerge import config
from jax_ordermerge.json_types import Json


@dataclasses.dataclass(frozen=True)
class TrackingSpec:
    """Where metrics are shown besides the log.

    Attributes:
        name: name of the experiment.
        settings: which trackers.
        resolved_config: the whole config as plain data, shown with each W&B run.
    """

    name: str = "experiment"
    settings: config.Tracking = field(default_factory=config.Tracking)
    resolved_config: Json = field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainingSpec:
    """Settings of the training of a population. `experiment.specs` makes one from a config.

    Attributes:
        seed: seed of the experiment.
        model: the base and the numerics of the training step.
        base_dtype: dtype that the base is loaded in: that of a frozen base, else float32.
        data: padding and packing of the examples.
        population: number of members and the kind of their orders.
        objective: what is minimized.
        training: optimizer, schedule, logging, checkpoints.
        lora: settings of the adapters; None trains all parameters.
        sample_every: steps between answers to fixed prompts; None asks for none.
        checkpoints_merged: how many of the last planned checkpoints are kept because merges average
            them; 1 where none does.
        settings: all settings that the training rests on, as plain data for its checkpoints.
        tracking: trackers.

    Example:
        >>> TrainingSpec(population=config.Population(members=2)).first_wave
        (0, 1)
    """

    # Whole sections and not single settings: a new setting needs no change here, and a checkpoint
    # identifies a training by its sections. Sections of other stages are left out.
    seed: int = 0
    model: config.Model = field(default_factory=config.Model)
    base_dtype: str = "float32"
    data: config.Data = field(default_factory=config.Data)
    population: config.Population = field(default_factory=config.Population)
    objective: config.Objective = field(default_factory=config.Sft)
    training: config.Training = field(default_factory=config.Training)
    lora: config.Lora | None = None
    sample_every: int | None = None
    checkpoints_merged: int = 1
    settings: Json = field(default_factory=dict)
    tracking: TrackingSpec = field(default_factory=TrackingSpec)

    @property
    def is_fused(self) -> bool:
        """Whether the members of a device group train as one program (`lora.fused`)."""
        return self.lora is not None and self.lora.fused

    @property
    def first_wave(self) -> tuple[int, ...]:
        """Members that are trained together first: all, or as many as `population.wave` says."""
        members = self.population.total
        return tuple(range(min(self.population.wave or members, members)))
