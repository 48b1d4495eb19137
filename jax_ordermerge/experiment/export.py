"""A merge as a Hugging Face directory: the model, its recipe, and a model card."""

from pathlib import Path

import yaml

import jax_ordermerge
from jax_ordermerge.checkpoint import convert, sidecar_files
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.experiment import cards
from jax_ordermerge.experiment.context import RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import member_name
from jax_ordermerge.merge.sources.public_names import public_name
from jax_ordermerge.tree import Tree


def export(
    ctx: RunContext,
    name: str,
    merged: Tree,
    recipe: Json,
    origin: str = "",
    target: Path | None = None,
) -> None:
    """Write a merge, unless its directory is complete.

    Args:
        ctx: of the run.
        name: of the merge.
        merged: its parameters.
        recipe: method, weights, parameters and seed; the run's part is added.
        origin: for the card, how the merge was chosen.
        target: directory; `merged/NAME` of the run by default.
    """
    target = target or ctx.layout.merged(name)
    # The directory is renamed into place when it is complete, so config.json stands for all of it.
    # An interrupted merge stage exports again only what is missing.
    if (target / "config.json").is_file():
        return
    recipe = _complete_recipe(ctx, recipe)
    convert.export(
        merged,
        ctx.model,
        target,
        dtype=ctx.export_dtype,
        source=ctx.base_dir,
        chat_template=ctx.prompt_format.chat_template,
        card=_card(ctx, name, recipe, origin),
        recipe=yaml.safe_dump(recipe),
    )


def _complete_recipe(ctx: RunContext, recipe: Json) -> Json:
    config, training = ctx.config, ctx.config.training
    # The recipe says how the members came about, too: without the orders nobody could make the
    # merge again.
    run = ctx.training_layout.root.resolve().name
    complete = recipe | {
        "base_model": public_name(config.model.base).text,
        "models": [f"{run}/{member_name(member)}" for member in ctx.members],
        "dtype": ctx.export_dtype,
        "orders": {
            "level": config.population.level,
            "seed": config.seed,
            "epochs": training.epochs,
        },
    }
    if config.population.replicates > 1:
        complete["population"] = ctx.population
    # named only where they differ from plain training: most recipes are then without them
    if config.population.vary != "order":
        complete["vary"] = config.population.vary
    if training.ema is not None:
        complete["averages"] = {"ema": training.ema}
    if training.checkpoint != "last":
        complete["checkpoint"] = training.checkpoint
    return complete | {"jax_ordermerge": jax_ordermerge.__version__}


def _of_population(ctx: RunContext) -> str:
    replicates = ctx.config.population.replicates
    return f", population {ctx.population} of 0 to {replicates - 1}" if replicates > 1 else ""


def _card(ctx: RunContext, name: str, recipe: Json, origin: str) -> str:
    count = ctx.config.population.members
    text = (
        f"{cards.describe_training(ctx.config, ctx.export_dtype)} The {count} models were merged"
        f" by `{recipe['merge_method']}`.\n\n"
        + (f"{origin}\n\n" if origin else "")
        + f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```\n\n"
        + prompt_section(ctx.prompt_format)
    )
    return sidecar_files.model_card(
        f"{ctx.config.name}: {name}{_of_population(ctx)}",
        text,
        base_model=public_name(ctx.config.model.base).card_id,
        relation="merge",
        tags=["merge", "parameter-selection"],
    )
