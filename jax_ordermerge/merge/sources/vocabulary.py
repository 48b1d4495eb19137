"""Models with different vocabularies in one merge.

Rows of embedding and output head are matched by token, through `tokenizer.json`. A row without a
token (padding of the embedding), and every row of a model without that file, is matched by its
number. If the donor of the vocabulary has no such file, all rows of all models are. A row that a
model lacks is copied from the first model that has it, the base first.
"""

import dataclasses
import filecmp
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar, cast

import jax.numpy as jnp
import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.arch import UnlistedConfig
from jax_ordermerge.checkpoint import json_files
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge.sources.storage import AnySource

TOKENIZER = "tokenizer.json"
_ROWS_IN_NOTE = 3
S = TypeVar("S", bound=AnySource)
Key = str | int  # what identifies a row: its token, or its number


class TokenSource(NamedTuple):
    """Where a recipe takes the row of a token from.

    Attributes:
        source: index of the model; None for a row of zeros.
        force: for all models, and not only for those that lack the token.
        key: the token, or the number of the row, in that model; None for the same token.
    """

    source: int | None
    force: bool
    key: Key | None = None


class Aligned(NamedTuple, Generic[S]):
    """Models with one vocabulary.

    Attributes:
        sources: the models in the given order.
        added_tokens: entries of `tokenizer.json` for tokens that the donor lacks, with their ids.
        notes: what was done, for the user.
    """

    sources: tuple[S, ...]
    added_tokens: tuple[Json, ...]
    notes: tuple[str, ...]


class RemappedVocabulary:
    """A model with a rearranged vocabulary.

    Row r of its embedding and of its head is row `row[r]` of model `owner[r]`.

    Args:
        inner: the model.
        owners: models of the same width. If their dtypes differ from that of `inner`, the tensors
            have the widest of them.
        owner: int[V], indices into `owners`; -1 is a row of zeros.
        row: int[V].
    """

    def __init__(
        self, inner: AnySource, owners: Sequence[AnySource], owner: np.ndarray, row: np.ndarray
    ) -> None:
        self.inner, self.label, self.directory = inner, inner.label, inner.directory
        self.prompt_format, self.export_dtype = inner.prompt_format, inner.export_dtype
        self.config = dataclasses.replace(inner.config, vocab_size=len(row))
        self._owners, self._owner, self._row = owners, owner, row
        if isinstance(inner.config, UnlistedConfig):
            self._remapped = {*inner.config.vocabulary}
        else:
            # Embedding and head by their axis: the table of a tied model has no head.
            table = arch.tensor_table(inner.config)
            self._remapped = {spec.hf_name for spec in table if spec.axes[0] == "vocab"}
        self._read_from = [owners[index] for index in np.unique(owner[owner >= 0])]

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        dtype, shape = self.inner.info(name)
        if name not in self._remapped:
            return TensorInfo(dtype, shape)
        for source in self._read_from:
            # the widest, so that no row is rounded when it moves to another model
            dtype = np.dtype(jnp.promote_types(dtype, source.info(name).dtype))
        return TensorInfo(dtype, (len(self._row), *shape[1:]))

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`."""
        if name not in self._remapped:
            self.inner.read_into(name, start, out)
            return
        flat, width = out.reshape(-1), math.prod(self.info(name).shape[1:])
        stop = start + flat.size
        first, last = start // width, -(-stop // width)
        owner, row = self._owner[first:last], self._row[first:last]
        # one read for each run of rows that are consecutive in one model, which mostly is one
        breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1)) + 1
        for begin, end in zip([0, *breaks], [*breaks, last - first], strict=True):
            run_start = (first + begin) * width
            # The first and the last row may be asked for in part.
            here, there = max(run_start, start), min((first + end) * width, stop)
            part = flat[here - start : there - start]
            if owner[begin] < 0:
                part[:] = 0
                continue
            source = self._owners[owner[begin]]
            # in the dtype of that model; the assignment widens it, see `info`
            values = np.empty(part.size, source.info(name).dtype)
            source.read_into(name, int(row[begin]) * width + here - run_start, values)
            part[:] = values

    def identity(self) -> str:
        """See `Source.identity`."""
        # the mapping depends on tokenizer files, whose changes the identities of models do not show
        mapping = hashlib.sha256(self._owner.tobytes() + self._row.tobytes()).hexdigest()
        owners = [source.identity() for source in self._read_from]
        return " ".join([self.inner.identity(), mapping, *owners])


def align(
    sources: Sequence[S],
    *,
    first: int,
    donor: int,
    union: bool = False,
    token_sources: Mapping[str, TokenSource] | None = None,
    multiple: int = 1,
) -> Aligned[S]:
    """Give models one vocabulary, by the rules on top of this file.

    Args:
        sources: the models, in the order of the recipe.
        first: index of the model that others take missing rows from first: the base.
        donor: index of the model whose vocabulary the result has.
        union: add the added tokens that only other models have, in the order of the models.
        token_sources: token -> where its row is taken from. A token that the vocabulary lacks is
            added to it.
        multiple: rows of zeros are added up to a multiple of it.

    Raises:
        UserError: a tokenizer cannot be read or extended, or a model lacks the token that is to be
            taken from it.
    """
    token_sources = token_sources or {}
    tokenizers = [_read_tokenizer(source.directory) for source in sources]
    order = [first, *(i for i in range(len(sources)) if i != first)]
    target = _row_keys(sources[donor].config.vocab_size, tokenizers[donor])
    new = _added_by_others(sources, tokenizers, donor, order) if union else {}
    new |= _added_by_recipe(token_sources, tokenizers, donor, {*target, *new})
    added = _extend(sources, tokenizers, donor, new, target) if union or new else []
    if tokenizers[donor] is None:
        # the rows of the result have no tokens that those of the others could be matched with
        tokenizers = [None] * len(sources)
    models = [
        _Rows(source, tokenizer, _find_rows(source.config.vocab_size, tokenizer, target))
        for source, tokenizer in zip(sources, tokenizers, strict=True)
    ]
    target += [-1 - i for i in range(-len(target) % multiple)]  # keys that no model has: zeros
    # Where a row comes from, as (owner, row): the model's own, else by `token_sources`, else the
    # first model in `order` that has it, which overwrites the others in `first_rows`. Forced tokens
    # come before the model's own.
    first_rows = {key: (i, row) for i in reversed(order) for key, row in models[i].rows.items()}
    requested: dict[Key, tuple[int, int]] = {}
    forced: dict[Key, tuple[int, int]] = {}
    for token, (source, force, key) in token_sources.items():
        origin = (-1, 0) if source is None else (source, _row_of(models[source], token, key))
        (forced if force else requested)[token] = origin
    aligned = []
    for index, model in enumerate(models):
        own_rows = {key: (index, row) for key, row in model.rows.items()}
        origins = {**first_rows, **requested, **own_rows, **forced}
        owner, row = np.array([origins.get(key, (-1, 0)) for key in target]).T
        # A model with all of its own rows needs no wrapper, and its rows are read in one piece.
        is_unchanged = (
            len(target) == model.source.config.vocab_size
            and (owner == index).all()
            and (row == np.arange(len(row))).all()
        )
        remapped = RemappedVocabulary(model.source, sources, owner, row)
        # what a model is does not change with its vocabulary
        aligned.append(sources[index] if is_unchanged else cast(S, remapped))
    notes = _notes(models, target, donor)
    if named := [token for token in token_sources if token in new]:
        notes.append(f"added to the vocabulary: {_list_rows(named)}")
    return Aligned(tuple(aligned), tuple(added), tuple(notes))


def tokens_of(directory: Path | None) -> set[str]:
    """Return the tokens of the `tokenizer.json` of a directory; none where it has no such file.

    Raises:
        UserError: the file has another form.

    Example:
        >>> tokens_of(Path("nowhere"))
        set()
    """
    tokenizer = _read_tokenizer(directory)
    return set() if tokenizer is None else {*tokenizer.ids}


def compare(sources: Sequence[AnySource], donor: int) -> tuple[bool, tuple[str, ...]]:
    """Compare the vocabularies of models whose embeddings have the same number of rows.

    A row that has a token in one model and another token in the other is not a moved token where
    neither model has both: a fine-tune that gives a reserved row a name keeps the row.

    Args:
        sources: the models.
        donor: index of the model whose vocabulary the result has.

    Returns:
        Whether a token has another row in one of the models than in the donor, so that rows must be
        matched by token; and notes for the user.

    Raises:
        UserError: a tokenizer cannot be read.
    """
    moved, notes = False, []
    for source in sources:
        if _same_file(source.directory, sources[donor].directory):
            continue  # before parsing: tokenizers have megabytes, and mostly they are copies
        reference, tokenizer = map(_read_tokenizer, (sources[donor].directory, source.directory))
        if reference is None or tokenizer is None or tokenizer.ids == reference.ids:
            continue
        shared = tokenizer.ids.keys() & reference.ids.keys()
        different = sorted(
            token for token in shared if tokenizer.ids[token] != reference.ids[token]
        )
        label = sources[donor].label
        # One moved token is enough: merged row by row, its row would be mixed with that of another
        # token.
        if different:
            moved = True
            notes.append(
                f"{source.label} has {_list_rows(different)} in other rows than {label}:"
                " its rows are matched by token"
            )
            continue
        ours, theirs = ({i: token for token, i in t.ids.items()} for t in (tokenizer, reference))
        size = source.config.vocab_size
        renamed = [
            i for i in sorted(ours.keys() & theirs.keys()) if i < size and ours[i] != theirs[i]
        ]
        if renamed:
            names = ", ".join(f"{ours[i]!r} for {theirs[i]!r}" for i in renamed[:_ROWS_IN_NOTE])
            notes.append(
                f"{source.label} has other tokens than {label} in {len(renamed)} rows ({names}):"
                " they are merged row by row, under the names of the latter"
            )
    return moved, tuple(notes)


def _same_file(first: Path | None, second: Path | None) -> bool:
    if first is None or second is None:
        return False
    files = first / TOKENIZER, second / TOKENIZER
    return all(map(Path.is_file, files)) and filecmp.cmp(files[0], files[1], shallow=False)


class _Tokenizer(NamedTuple):
    """A `tokenizer.json`.

    Attributes:
        ids: token -> id.
        added: entries of the tokens that were added to the trained vocabulary, by token.
        next_id: the id that the next token gets.
    """

    ids: dict[str, int]
    added: dict[str, Json]
    next_id: int


class _Rows(NamedTuple):
    """A model, its tokenizer, and its rows by key."""

    source: AnySource
    tokenizer: _Tokenizer | None
    rows: dict[Key, int]


def _read_tokenizer(directory: Path | None) -> _Tokenizer | None:
    """Return the tokenizer of a directory, None if it has no `tokenizer.json`."""
    if directory is None or not (directory / TOKENIZER).is_file():
        return None
    content = json_files.read_json(directory / TOKENIZER)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a Unigram model: [token, score]
            vocabulary = {token: i for i, (token, *_) in enumerate(vocabulary)}
        added = {entry["content"]: entry for entry in content.get("added_tokens") or ()}
        ids = {**vocabulary, **{token: entry["id"] for token, entry in added.items()}}
        # ids of added tokens may leave gaps after those of the vocabulary
        next_id = max([len(vocabulary), *(entry["id"] + 1 for entry in added.values())])
        return _Tokenizer({str(k): int(v) for k, v in ids.items()}, added, next_id)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{directory / TOKENIZER} has no vocabulary of tokens and numbers ({error!r})"
        ) from error


def _row_keys(size: int, tokenizer: _Tokenizer | None) -> list[Key]:
    """Return the key of each row: its token, or its number if no token has that id."""
    keys: list[Key] = list(range(size))
    for token, number in tokenizer.ids.items() if tokenizer else ():
        if number < size:
            keys[number] = token
    return keys


def _find_rows(size: int, tokenizer: _Tokenizer | None, target: Sequence[Key]) -> dict[Key, int]:
    """Return the row of each key of a model with `size` rows."""
    if tokenizer is None:
        return {(target[row] if row < len(target) else row): row for row in range(size)}
    # by token where there is one: equal tokens have different ids in different tokenizers
    rows = {key: row for row, key in enumerate(_row_keys(size, tokenizer))}
    # two tokens may share an id: `_row_keys` names the last of them only
    return rows | {token: row for token, row in tokenizer.ids.items() if row < size}


def _row_of(model: _Rows, token: str, key: Key | None) -> int:
    """Return the row of a model that the recipe takes for a token."""
    wanted = token if key is None else key
    if isinstance(wanted, int):
        if 0 <= wanted < model.source.config.vocab_size:
            return wanted
    elif wanted in model.rows:
        return model.rows[wanted]
    # an error and no note: the recipe names this token, which a misspelling would silently drop
    raise UserError(f"tokenizer.tokens: {model.source.label} has no token {wanted!r}")


def _added_by_recipe(
    token_sources: Mapping[str, TokenSource],
    tokenizers: Sequence[_Tokenizer | None],
    donor: int,
    vocabulary: set[Key],
) -> dict[str, Json]:
    """Return the entries of tokens that the recipe names and the vocabulary lacks."""
    entries = {}
    for token, (source, _, _) in token_sources.items():
        if token in vocabulary:
            continue
        tokenizer = tokenizers[donor if source is None else source]
        plain = {"content": token, "special": False, "normalized": False}
        plain |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        # as the model has it that the row is from
        entries[token] = plain if tokenizer is None else tokenizer.added.get(token, plain)
    return entries


def _added_by_others(
    sources: Sequence[AnySource],
    tokenizers: Sequence[_Tokenizer | None],
    donor: int,
    order: Sequence[int],
) -> dict[str, Json]:
    """Return the entries of added tokens that the donor lacks, by token."""
    label, tokenizer = sources[donor].label, tokenizers[donor]
    new: dict[str, Json] = {}
    if tokenizer is None:
        return new  # `_extend` refuses it
    for index in order:
        current = tokenizers[index] or tokenizer
        for token in current.ids:
            if token in tokenizer.ids or token in new:
                continue
            if token not in current.added:
                # a trained token also needs merges or scores, which cannot simply be joined
                raise UserError(
                    f"tokenizer_source union: {sources[index].label} has the token {token!r} in "
                    f"its trained vocabulary and {label} has not; only added tokens can be united, "
                    "give tokenizer_source base or a model"
                )
            new[token] = current.added[token]
    return new


def _extend(
    sources: Sequence[AnySource],
    tokenizers: Sequence[_Tokenizer | None],
    donor: int,
    new: Mapping[str, Json],
    target: list[Key],
) -> list[Json]:
    """Add new tokens to `target`; return their entries with ids."""
    tokenizer = tokenizers[donor]
    if tokenizer is None:
        raise UserError(
            f"{sources[donor].label} has no {TOKENIZER} to extend; give another tokenizer_source"
        )
    if not new:
        return []
    new_ids = {token: tokenizer.next_id + i for i, token in enumerate(new)}
    # the donor's own tokens beyond its embedding get rows, too, so that no id is without one
    beyond = {token: i for token, i in tokenizer.ids.items() if i >= len(target)}
    for token, number in [*beyond.items(), *new_ids.items()]:
        target.extend(range(len(target), number + 1))
        target[number] = token
    return [{**new[token], "id": number} for token, number in new_ids.items()]


def _notes(models: Sequence[_Rows], target: Sequence[Key], donor: int) -> list[str]:
    notes = []
    label, size = models[donor].source.label, models[donor].source.config.vocab_size
    if len(target) != size:
        notes.append(f"the embedding has {len(target)} rows, that of {label} has {size}")
    if models[donor].tokenizer is None:
        notes.append(f"{label} has no {TOKENIZER}: all rows are matched by number")
    merged_keys = set(target)
    available = set().union(*(model.rows for model in models))
    for source, tokenizer, rows in models:
        if tokenizer is None and models[donor].tokenizer is not None:
            notes.append(f"{source.label} has no {TOKENIZER}: its rows are matched by number")
        lacks = [key for key in target if key not in rows and key in available]
        if lacks:
            notes.append(
                f"{source.label} lacks {_list_rows(lacks)}: "
                "taken from the first model that has it, the base first"
            )
        extra = [key for key in rows if key not in merged_keys]
        if extra:
            notes.append(
                f"{source.label} has {_list_rows(extra)}, "
                "which the merged vocabulary has not: left out"
            )
    zeros = sum(key not in available for key in target)
    if zeros:
        notes.append(f"{zeros} rows of the embedding are zero: no model has them")
    return notes


def _list_rows(keys: Sequence[Key]) -> str:
    names = [repr(key) if isinstance(key, str) else f"row {key}" for key in keys[:_ROWS_IN_NOTE]]
    rest = f" and {len(keys) - _ROWS_IN_NOTE} more rows" if len(keys) > _ROWS_IN_NOTE else ""
    return ", ".join(names) + rest
