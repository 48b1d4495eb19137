"""The models of a recipe: opened, each once, and given one vocabulary."""

import os
from collections.abc import Callable, Mapping
from typing import Generic, NamedTuple, TypeVar, cast

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge.plan import check_same, resolve_dtype
from jax_ordermerge.merge.recipe import schema
from jax_ordermerge.merge.recipe.schema import Recipe, Reference
from jax_ordermerge.merge.sources import vocabulary
from jax_ordermerge.merge.sources.references import is_downloaded
from jax_ordermerge.merge.sources.storage import AnySource, Source, Untied

S = TypeVar("S", bound=AnySource)


class Models(NamedTuple, Generic[S]):
    """The models of a recipe.

    Attributes:
        open_source: opens a model by name and adapter.
        sources: the models, with one vocabulary.
        indices: name in the recipe -> index.
        base: index of the base.
        donor: index of the model that the tokenizer is from.
        added_tokens: entries of tokens that the tokenizer of the donor lacks.
        notes: for the user.
    """

    open_source: Callable[..., AnySource]
    sources: tuple[S, ...]
    indices: Mapping[Reference, int]
    base: int | None
    donor: int
    added_tokens: tuple[Json, ...]
    notes: tuple[str, ...]


def open_models(recipe: Recipe, open_source: Callable[..., AnySource]) -> Models[AnySource]:
    """Open the models of a recipe, those on this machine first.

    Args:
        recipe: checked.
        open_source: opens a model by name and adapter.

    Raises:
        UserError: a model does not exist, or is not complete.
    """
    references = recipe.references()
    # Known before the models are opened, so that an adapter on its base is rounded to it once.
    dtype = None if recipe.dtype is None else resolve_dtype(recipe.dtype, [])
    by_reference: dict[Reference, AnySource] = {}
    # those on this machine first: a mistake in one of them costs no download
    for reference in sorted(references, key=lambda reference: is_downloaded(*reference)):
        by_reference[reference] = open_source(reference.name, reference.adapter, dtype=dtype)
    opened = [by_reference[reference] for reference in references]
    # One model may be spelled in several ways (`a`, `./a`, a link, MODEL+ADAPTER): taken for two,
    # it would count twice, or a base would count as a member.
    identities = list(dict.fromkeys(source.identity() for source in opened))
    indices = {
        reference: identities.index(source.identity())
        for reference, source in zip(references, opened, strict=True)
    }
    sources = tuple(
        next(source for source in opened if source.identity() == identity)
        for identity in identities
    )
    base = None if recipe.base_model is None else indices[recipe.base_model]
    return Models(open_source, sources, indices, base, base or 0, (), ())


def check_listed(recipe: Recipe, models: Models[AnySource]) -> Models[Source]:
    """Return models in the tensor table, of one architecture and with one vocabulary.

    Raises:
        UserError: the architectures differ, or a vocabulary cannot be read.
    """
    # the caller has looked: none of them is unlisted
    sources = [cast(Source, source) for source in models.sources]
    notes = []
    # a tied head can be made a copy of the embedding, an untied one cannot be tied again
    tied = [source for source in sources if source.config.tie_embeddings]
    if 0 < len(tied) < len(sources):
        sources = [Untied(source) if source in tied else source for source in sources]
        notes = [
            f"{source.label} ties its output head to its embedding: the head is the embedding there"
            for source in tied
        ]
    # vocabularies are aligned below; slices say which layers they take, and each keeps its rope
    of_slices = ["num_layers", "no_rope_layers"] if recipe.module.slices else []
    may_differ = {"vocab_size", *of_slices}
    for source in sources[1:]:
        check_same(sources[0], source, may_differ)
    listed = Models(
        models.open_source,
        tuple(sources),
        models.indices,
        models.base,
        models.donor,
        (),
        tuple(notes),
    )
    return unite_vocabularies(recipe, listed)


def unite_vocabularies(recipe: Recipe, models: Models[S]) -> Models[S]:
    """Give the models one vocabulary, if the recipe says so or if they differ in size."""
    is_default = recipe.tokenizer is None and recipe.tokenizer_source is None
    if is_default and len({source.config.vocab_size for source in models.sources}) == 1:
        moved, notes = vocabulary.compare(models.sources, models.donor)
        models = models._replace(notes=(*models.notes, *notes))
        if not moved:
            return models
    tokenizer = recipe.tokenizer or schema.Tokenizer(
        source=recipe.tokenizer_source or Reference("base")
    )
    # `union` begins with the tokens of the base, and `base` has no others
    donor = models.donor
    if str(tokenizer.source) not in ("union", "base"):
        donor = index_of(tokenizer.source, "the tokenizer's source", models)
    token_sources = {
        token: _token_source(token, rule, models) for token, rule in tokenizer.tokens.items()
    }
    aligned = vocabulary.align(
        models.sources,
        first=models.donor,
        donor=donor,
        union=str(tokenizer.source) == "union",
        token_sources=token_sources,
        multiple=tokenizer.pad_to_multiple_of,
    )
    notes = (*models.notes, *aligned.notes)
    return models._replace(
        sources=aligned.sources, donor=donor, added_tokens=aligned.added_tokens, notes=notes
    )


def _token_source(token: str, rule: schema.Token, models: Models[S]) -> vocabulary.TokenSource:
    what = f"the source of token {token!r}"
    match rule.source:
        case schema.ZeroRow():
            return vocabulary.TokenSource(None, rule.force)
        case schema.TokenRow(model=model, token=other, token_id=number):
            index = index_of(model, what, models)
            return vocabulary.TokenSource(index, rule.force, number if other is None else other)
        case reference:
            return vocabulary.TokenSource(index_of(reference, what, models), rule.force)


def index_of(reference: Reference, what: str, models: Models[S]) -> int:
    if reference not in models.indices:
        # spelled in another way than among the models
        # Only what lies on this disk is opened for the comparison; a hub name would be downloaded.
        local = os.path.lexists(remote.expand(reference.name))
        opened = models.open_source(reference.name, reference.adapter) if local else None
        identity = None if opened is None else opened.identity()
        for index, source in enumerate(models.sources):
            if source.identity() == identity:
                return index
        listed = ", ".join(map(str, models.indices))
        raise UserError(
            f"{what} is {reference}, which is none of the models of the recipe ({listed})"
        )
    return models.indices[reference]
