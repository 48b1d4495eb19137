"""Specifications for the packages that must not see the whole config, each built once from it."""

import dataclasses

from jax_ordermerge import config as schema
from jax_ordermerge import record
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import checkpoints_merged
from jax_ordermerge.plan.spec import PlanSpec
from jax_ordermerge.train.spec import TrackingSpec, TrainingSpec


def data_settings(config: Config) -> schema.Data:
    """Return the section of the data with the format that the objective needs.

    Example:
        >>> data_settings(Config(objective={"kind": "dpo"})).format
        'preference'
    """
    if config.objective.kind != "dpo":
        return config.data
    # `format: auto` would read a file without rejected responses as plain responses
    return config.data.model_copy(update={"format": "preference"})


def training_spec(config: Config) -> TrainingSpec:
    """Return what a training needs of a config.

    Example:
        >>> training_spec(Config(seed=3)).seed
        3
    """
    return TrainingSpec(
        seed=config.seed,
        model=config.model,
        base_dtype=config.base_dtype,
        data=config.data,
        population=config.population,
        objective=config.objective,
        training=config.training,
        lora=config.lora,
        sample_every=config.samples.every,
        checkpoints_merged=checkpoints_merged(config.merge),
        # checkpoints carry them, so that a training is not continued with others
        settings=record.settings("train", config),
        tracking=TrackingSpec(config.name, config.tracking, schema.to_dict(config)),
    )


def plan_spec(config: Config) -> PlanSpec:
    """Return what a plan needs of a config.

    Example:
        >>> plan_spec(Config()).mesh.fsdp
        -1
    """
    training = dataclasses.replace(training_spec(config), data=data_settings(config))
    return PlanSpec(
        **{field.name: getattr(training, field.name) for field in dataclasses.fields(training)},
        mesh=config.mesh,
        merge=config.merge,
        analysis=config.analysis,
        evaluation=config.evaluation,
    )
