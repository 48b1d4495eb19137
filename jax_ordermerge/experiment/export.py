"""A merge as a Hugging Face directory: the model, its recipe, and a card that says where it comes from."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

import jax_ordermerge
from jax_ordermerge.checkpoint import convert, sidecar_files
from jax_ordermerge.tree import Tree

if TYPE_CHECKING:
    from jax_ordermerge.experiment.stages import Workshop


def export(
    w: "Workshop",
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
    target = target or w.directory / "merged" / name
    if not (target / "config.json").is_file():
        recipe = _recipe(w, what)
        card = _card(w, name, recipe, story)
        convert.export(
            merged,
            w.model,
            target,
            dtype=w.config.merge.dtype,
            source=w.base,
            card=card,
            recipe=yaml.safe_dump(recipe),
        )


def _recipe(w: "Workshop", what: dict[str, Any]) -> dict[str, Any]:
    return {
        **what,
        "base_model": _public_base(w) or "base",
        "models": [f"member_{m}" for m in range(w.config.population.members)],
        "dtype": w.config.merge.dtype,
        "orders": {
            "level": w.config.population.level,
            "seed": w.config.seed,
            "epochs": w.config.training.epochs,
        },
        **({} if w.config.training.ema is None else {"averages": {"ema": w.config.training.ema}}),
        **(
            {}
            if w.config.training.checkpoint == "last"
            else {"checkpoint": w.config.training.checkpoint}
        ),
        "jax_ordermerge": jax_ordermerge.__version__,
    }


def _public_base(w: "Workshop") -> str | None:
    # a path of the machine that trained says nothing to a reader of the card
    return (
        None
        if Path(w.config.model.base).exists() or ":" in w.config.model.base
        else w.config.model.base
    )


def _card(w: "Workshop", name: str, recipe: dict[str, Any], story: str = "") -> str:
    members = w.config.population.members
    text = (
        f"One base model was fine-tuned {members} times on the same data in {members} different orders (level `{w.config.population.level}`,"
        f" {w.config.training.epochs} epochs), and the {members} models were merged by `{recipe['merge_method']}`.\n\n"
        + (f"{story}\n\n" if story else "")
        + f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
    )
    return sidecar_files.model_card(
        f"{w.config.name}: {name}",
        text,
        base_model=_public_base(w),
        relation="merge",
        tags=["merge", "parameter-selection"],
    )
