"""The schema of every YAML file and `--set` flag.

It is strict: an unknown key or a wrong type is an error that names the nearest key.
"""

from jax_ordermerge.config.data import Data
from jax_ordermerge.config.evaluation import (
    PREFERENCES,
    TASK_KINDS,
    Evaluation,
    Task,
    TaskKind,
    make_task,
)
from jax_ordermerge.config.experiment import (
    Analysis,
    Config,
    check_inputs,
    load_config,
    make_config,
    read_search,
    read_yaml,
    to_dict,
)
from jax_ordermerge.config.model import Distributed, Mesh, Model
from jax_ordermerge.config.population import Dpo, Objective, Population, Sft
from jax_ordermerge.config.section import fixed_settings
from jax_ordermerge.config.training import (
    OPTIMIZERS,
    Lora,
    Mixing,
    Optimizer,
    OptimizerSettings,
    Papa,
    Samples,
    Tracking,
    Training,
    Wash,
)

# What other packages use. A setting that only its own section reads stays in its module.
__all__ = [
    "OPTIMIZERS",
    "PREFERENCES",
    "TASK_KINDS",
    "Analysis",
    "Config",
    "Data",
    "Distributed",
    "Dpo",
    "Evaluation",
    "Lora",
    "Mesh",
    "Mixing",
    "Model",
    "Objective",
    "Optimizer",
    "OptimizerSettings",
    "Papa",
    "Population",
    "Samples",
    "Sft",
    "Task",
    "TaskKind",
    "Tracking",
    "Training",
    "Wash",
    "check_inputs",
    "fixed_settings",
    "load_config",
    "make_config",
    "make_task",
    "read_search",
    "read_yaml",
    "to_dict",
]
