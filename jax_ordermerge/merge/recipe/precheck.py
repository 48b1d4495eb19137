"""What of a recipe can be checked before its models are opened.

Models on a hub or in a bucket are downloaded when they are opened: a mistake in the recipe must not
cost that. Names and parameters are checked here, and again where the tensors are known.
"""

import os

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.recipe import chat_templates, rules, schema
from jax_ordermerge.merge.recipe.evaluator import Evaluator
from jax_ordermerge.merge.recipe.layers import Inputs, layer_ranges
from jax_ordermerge.merge.recipe.schema import Recipe, Reference
from jax_ordermerge.merge.sources.references import split_name


def check(recipe: Recipe, where: str) -> None:
    """Check a recipe without its models.

    Args:
        recipe: of a known form.
        where: names the recipe in an error.

    Raises:
        UserError: one line with the first thing that is unknown, contradictory or not offered.
    """
    rule = rules.find_rule(recipe.merge_method)
    table.refuse_data_dependent(rule.method)
    evaluator = Evaluator(recipe.merge_method, rule)
    references = recipe.references()
    spellings: dict[tuple[str, ...], Reference] = {}
    for reference in references:
        # messages have the first spelling, under which the user will find the model
        spellings.setdefault(_identify(reference), reference)
    keys, labels = list(spellings), [str(reference) for reference in spellings.values()]
    indices = {reference: keys.index(_identify(reference)) for reference in references}
    base = None if recipe.base_model is None else indices[recipe.base_model]
    layers = layer_ranges(recipe, Inputs(indices, base, labels, [None] * len(keys)))
    if rule.needs_base and any(part.base is None for part in layers):
        raise UserError(f"{where}: merge_method {recipe.merge_method} needs base_model")
    # names before values: a misspelt parameter is reported as such, not as one that is missing
    for part in layers:
        evaluator.check_names(part, labels)
    for part in layers:
        evaluator.check_values(part)
    for reference, what in _named_models(recipe):
        if _identify(reference) not in keys:
            raise UserError(
                f"{what} is {reference}, which is none of the models of the recipe"
                f" ({', '.join(map(str, references))})"
            )
    chat_templates.check(recipe.chat_template)
    dtype = recipe.out_dtype or recipe.dtype
    # None is the dtype of the members, which are not open yet: the planner checks again
    if dtype is not None:
        check_rounding(recipe, dtype, where)


def check_rounding(recipe: Recipe, out_dtype: str, where: str) -> None:
    """Refuse `rounding: stochastic` of an output that is not bfloat16.

    Raises:
        UserError: the output has another dtype.
    """
    if recipe.rounding == "stochastic" and out_dtype != "bfloat16":
        raise UserError(
            f"{where}: rounding: stochastic is for bfloat16, the output is {out_dtype}; "
            "leave it out"
        )


def _identify(reference: Reference) -> tuple[str, ...]:
    """Return what is equal for two spellings of one model, as far as names tell."""
    parts = [part for part in split_name(*reference) if part is not None]
    paths = [remote.expand(part) for part in parts]
    return tuple(
        str(path.resolve()) if os.path.lexists(path) else part.rstrip("/")
        for path, part in zip(paths, parts, strict=True)
    )


def _named_models(recipe: Recipe) -> list[tuple[Reference, str]]:
    """Return the models that the tokenizer names, each with what it is named as."""
    named = []
    tokenizer = recipe.tokenizer
    source = recipe.tokenizer_source if tokenizer is None else tokenizer.source
    if source is not None and str(source) not in ("union", "base"):
        named.append((source, "the tokenizer's source"))
    for token, rule in ({} if tokenizer is None else tokenizer.tokens).items():
        what = f"the source of token {token!r}"
        if isinstance(rule.source, schema.TokenRow):
            named.append((rule.source.model, what))
        elif isinstance(rule.source, Reference):
            named.append((rule.source, what))
    return named
