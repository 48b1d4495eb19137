"""`ordermerge plan`: memory and time of an experiment."""

from typing import Any

from jax_ordermerge.config import Config
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.plan import formatting, planner


def plan_experiment(config: Config, *, as_json: bool = False, **options: Any) -> str:
    """Return the plan of an experiment as text or JSON.

    Args:
        config: the experiment.
        as_json: whether to return JSON.
        options: see `planner.plan_experiment`.

    Raises:
        UserError: the topology or the architecture is not known, or the mesh does not fit it.
    """
    plan = planner.plan_experiment(plan_spec(config), **options)
    return formatting.as_json(plan) if as_json else formatting.as_text(plan)
