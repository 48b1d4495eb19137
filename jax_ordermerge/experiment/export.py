"""A merge as a Hugging Face directory: the model, its recipe, and a card that says where it comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import jax_ordermerge
from jax_ordermerge.checkpoint import convert, sidecar_files
from jax_ordermerge.tree import Tree

if TYPE_CHECKING:
    from jax_ordermerge.experiment.stages import RunContext


def export(
    ctx: "RunContext",
    name: str,
    merged: Tree,
    what: dict[str, Any],
    story: str = "",
    target: Path | None = None,
) -> None:
    """Write a merge, unless it is there.

    Args:
        w: the workshop.
        name: of the merge.
        merged: its parameters.
        what: method, weights, parameters and seed, for the recipe.
        story: how it was chosen, for the card.
        target: by default merged/NAME of the run directory.
    """
    target = target or ctx.directory / "merged" / name
    if not (target / "config.json").is_file():
        recipe = _recipe(ctx, what)
        card = _card(ctx, name, recipe, story)
        convert.export(
            merged,
            ctx.model,
            target,
            dtype=ctx.config.merge.dtype,
            source=ctx.base,
            card=card,
            recipe=yaml.safe_dump(recipe),
        )


def _recipe(ctx: "RunContext", what: dict[str, Any]) -> dict[str, Any]:
    return {
        **what,
        "base_model": _public_base(ctx) or "base",
        "models": [f"member_{m}" for m in range(ctx.config.population.members)],
        "dtype": ctx.config.merge.dtype,
        "orders": {
            "level": ctx.config.population.level,
            "seed": ctx.config.seed,
            "epochs": ctx.config.training.epochs,
        },
        **(
            {}
            if ctx.config.training.ema is None
            else {"averages": {"ema": ctx.config.training.ema}}
        ),
        **(
            {}
            if ctx.config.training.checkpoint == "last"
            else {"checkpoint": ctx.config.training.checkpoint}
        ),
        "jax_ordermerge": jax_ordermerge.__version__,
    }


def _public_base(ctx: "RunContext") -> str | None:
    # a path of the machine that trained says nothing to a reader of the card
    return (
        None
        if Path(ctx.config.model.base).exists() or ":" in ctx.config.model.base
        else ctx.config.model.base
    )


def _card(ctx: "RunContext", name: str, recipe: dict[str, Any], story: str = "") -> str:
    members = ctx.config.population.members
    text = (
        f"One base model was fine-tuned {members} times on the same data in {members} different orders (level `{ctx.config.population.level}`,"
        f" {ctx.config.training.epochs} epochs), and the {members} models were merged by `{recipe['merge_method']}`.\n\n"
        + (f"{story}\n\n" if story else "")
        + f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
    )
    return sidecar_files.model_card(
        f"{ctx.config.name}: {name}",
        text,
        base_model=_public_base(ctx),
        relation="merge",
        tags=["merge", "parameter-selection"],
    )
