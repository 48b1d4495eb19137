"""The schema of every YAML file and flag. Strict: an unknown key or a wrong type is an error that names the nearest key."""

from jax_ordermerge.config.evaluation import Task
from jax_ordermerge.config.experiment import (
    PREFERENCES,
    Analysis,
    Config,
    Data,
    Distributed,
    Evaluation,
    Lora,
    Mesh,
    Model,
    Objective,
    Population,
    Tracking,
    Training,
    load_config,
    make_config,
    read_search,
    to_dict,
)

__all__ = [
    "PREFERENCES",
    "Analysis",
    "Config",
    "Data",
    "Distributed",
    "Evaluation",
    "Lora",
    "Mesh",
    "Model",
    "Objective",
    "Population",
    "Task",
    "Tracking",
    "Training",
    "load_config",
    "make_config",
    "read_search",
    "to_dict",
]
