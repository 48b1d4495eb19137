"""The plan of an experiment: memory and time on hardware that need not be present."""

from typing import Any

from jax_ordermerge import program_cache
from jax_ordermerge.config import Config, check_inputs
from jax_ordermerge.experiment import preflight
from jax_ordermerge.experiment.specs import plan_spec
from jax_ordermerge.plan import formatting, planner


def plan_experiment(config: Config, *, as_json: bool, **options: Any) -> str:
    """Return the plan of an experiment as text or JSON.

    Args:
        config: of the experiment.
        as_json: return JSON.
        options: see `planner.plan_experiment`.

    Raises:
        UserError: the config, the topology or an option is wrong.
    """
    # Refuse what a run would refuse: a plan of an impossible experiment would help nobody.
    # What an option gives in place of the config need not be named there, and without the base
    # there is no tokenizer to read examples with.
    if options.get("architecture") is None:
        data = ["data.train"] if options.get("examples") is None else []
        check_inputs(config, ["model.base", *data])
    preflight.check_config(config)
    # a program out of the cache would report the seconds of its reading as those of compilation
    program_cache.configure(None, by_default=False)
    plan = planner.plan_experiment(plan_spec(config), **options)
    return formatting.as_json(plan) if as_json else formatting.as_text(plan)
