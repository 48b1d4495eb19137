"""Models of different vocabularies in one merge: which row of an embedding is whose, and the tokenizer of the result.

Rows are matched by token string, through `tokenizer.json`; a row without a token (padding of the embedding), and every row of a
model without that file, is matched by its number (all rows of all models, where it is the donor that has none). A row that a model
lacks is taken from the first model that has it, the base first.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.checkpoint.safetensors import TensorInfo
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources.storage import Source

TOKENIZER = "tokenizer.json"
_SHOWN = 3  # rows in a note
Key = str | int  # what identifies a row: its token, or its number


class Forced(NamedTuple):
    """Where a recipe takes the row of a token from.

    Attributes:
        source: number of the model.
        force: for all models, and not only for those that lack the token.
    """

    source: int
    force: bool


class Aligned(NamedTuple):
    """Models brought to one vocabulary.

    Attributes:
        sources: in the order given.
        files: tokenizer files of the result that differ from those of the donor, name -> text.
        notes: of the rules that were applied.
    """

    sources: tuple[Source, ...]
    files: Mapping[str, str]
    notes: tuple[str, ...]


class RemappedVocabulary:
    """A model whose vocabulary is rearranged: row r of its embedding and its head is row `row[r]` of model `owner[r]`.

    Args:
        inner: the model.
        owners: models of the same width; where their dtypes differ from that of `inner`, the wider one is answered.
        owner: int[V], numbers of owners; -1 is a row of zeros.
        row: int[V].
    """

    def __init__(
        self, inner: Source, owners: Sequence[Source], owner: np.ndarray, row: np.ndarray
    ) -> None:
        self.inner, self.label, self.directory = inner, inner.label, inner.directory
        self.config = dataclasses.replace(inner.config, vocab_size=len(row))
        self._owners, self._owner, self._row = owners, owner, row
        self._names = {
            spec.hf_name for spec in arch.tensor_table(inner.config) if spec.axes[0] == "vocab"
        }
        self._used = sorted({int(number) for number in owner if number >= 0})

    def info(self, name: str) -> TensorInfo:
        """See `Source.info`."""
        info = self.inner.info(name)
        if name not in self._names:
            return info
        dtype = info.dtype
        for number in self._used:
            dtype = np.dtype(jnp.promote_types(dtype, self._owners[number].info(name).dtype))
        return TensorInfo(dtype, (len(self._row), *info.shape[1:]))

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See `Source.read_into`: rows that follow each other in one model are read together."""
        if name not in self._names:
            self.inner.read_into(name, start, out)
            return
        flat, width = out.reshape(-1), math.prod(self.info(name).shape[1:])
        first, last = start // width, -(-(start + flat.size) // width)
        owner, row = self._owner[first:last], self._row[first:last]
        breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(row) != 1)) + 1
        for begin, end in zip([0, *breaks], [*breaks, last - first], strict=True):
            here, there = (
                max((first + begin) * width, start),
                min((first + end) * width, start + flat.size),
            )
            part = flat[here - start : there - start]
            if owner[begin] < 0:
                part[:] = 0
                continue
            source = self._owners[owner[begin]]
            found = np.empty(part.size, source.info(name).dtype)
            source.read_into(name, int(row[begin]) * width + here - (first + begin) * width, found)
            part[:] = found

    def identity(self) -> str:
        """See `Source.identity`."""
        table = hashlib.sha256(self._owner.tobytes() + self._row.tobytes()).hexdigest()
        return " ".join(
            [
                self.inner.identity(),
                table,
                *(self._owners[number].identity() for number in self._used),
            ]
        )


class _Tokens(NamedTuple):
    """A `tokenizer.json`: its content, token -> number, and the entries of the tokens that were added to the trained vocabulary."""

    content: dict[str, Any]
    numbers: dict[str, int]
    added: dict[str, dict[str, Any]]
    size: int  # the number that the next token gets


def align(
    sources: Sequence[Source],
    *,
    first: int,
    donor: int,
    union: bool = False,
    forced: Mapping[str, Forced] | None = None,
    multiple: int = 1,
) -> Aligned:
    """Bring models to one vocabulary, by the rules on top of this file.

    Args:
        sources: the models, in the order of the recipe.
        first: the one that is asked first for rows which others lack: the base.
        donor: whose vocabulary it is.
        union: extended by the added tokens that only others have, in the order of the models.
        forced: token -> where its row is taken from.
        multiple: rows of zeros are added up to a multiple of it.

    Raises:
        UserError: a tokenizer cannot be read or extended, or a token of `forced` is not there.
    """
    tokens = [_read_tokens(source.directory) for source in sources]
    order = [first, *(i for i in range(len(sources)) if i != first)]
    target = _named_rows(sources[donor].config.vocab_size, tokens[donor])
    files: dict[str, str] = {}
    if union:
        files = _extend(sources, tokens, donor, order, target)
    if tokens[donor] is None:
        # nothing to match strings with
        tokens = [None] * len(sources)
    have = [
        _have(source.config.vocab_size, own, target)
        for source, own in zip(sources, tokens, strict=True)
    ]
    target += [-1 - i for i in range(-len(target) % multiple)]  # numbers that no row has
    plan = _Owners(sources, have, order, forced or {})
    aligned = tuple(plan.wrap(number, target) for number in range(len(sources)))
    return Aligned(aligned, files, tuple(_notes(sources, tokens, have, target, donor)))


class _Owners(NamedTuple):
    """Decides whose row is taken; `have` is what stands in a row of each model -> its number."""

    sources: Sequence[Source]
    have: Sequence[Mapping[Key, int]]
    order: Sequence[int]
    forced: Mapping[str, Forced]

    def wrap(self, number: int, target: Sequence[Key]) -> Source:
        """Return a model with the rows of `target`: itself, where these are its own."""
        unknown = sorted(set(self.forced) - {key for key in target if isinstance(key, str)})
        if unknown:
            raise UserError(f"tokenizer.tokens: the merged vocabulary has no token {unknown[0]!r}")
        owner = np.array([self._owner(number, key) for key in target])
        row = np.array(
            [self.have[one][key] if one >= 0 else 0 for one, key in zip(owner, target, strict=True)]
        )
        source = self.sources[number]
        if (
            len(target) == source.config.vocab_size
            and (owner == number).all()
            and (row == np.arange(len(row))).all()
        ):
            return source
        return RemappedVocabulary(source, self.sources, owner, row)

    def _owner(self, number: int, key: Key) -> int:
        candidates = (number, *self.order)
        if isinstance(key, str) and key in self.forced:
            rule = self.forced[key]
            if key not in self.have[rule.source]:
                raise UserError(
                    f"tokenizer.tokens: {self.sources[rule.source].label} has no token {key!r}"
                )
            candidates = (rule.source,) if rule.force else (number, rule.source)
        return next((one for one in candidates if key in self.have[one]), -1)


def _read_tokens(directory: Path | None) -> _Tokens | None:
    """Return the tokens of a directory, None where it has no `tokenizer.json`."""
    if directory is None or not (directory / TOKENIZER).is_file():
        return None
    content = safetensors.read_json(directory / TOKENIZER)
    try:
        vocabulary = content["model"]["vocab"]
        # a list is that of Unigram: [token, score]
        trained = (
            {one[0]: i for i, one in enumerate(vocabulary)}
            if isinstance(vocabulary, list)
            else dict(vocabulary)
        )
        added = {one["content"]: one for one in content.get("added_tokens") or ()}
        numbers = {**trained, **{token: entry["id"] for token, entry in added.items()}}
        size = max([len(trained), *(entry["id"] + 1 for entry in added.values())])
        return _Tokens(
            content, {str(token): int(number) for token, number in numbers.items()}, added, size
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{directory / TOKENIZER} has no vocabulary of tokens and numbers ({error!r})"
        ) from error


def _named_rows(size: int, tokens: _Tokens | None) -> list[Key]:
    """Return what stands in each row."""
    rows: list[Key] = list(range(size))
    for token, number in tokens.numbers.items() if tokens else ():
        if number < size:
            rows[number] = token
    return rows


def _have(size: int, tokens: _Tokens | None, target: Sequence[Key]) -> dict[Key, int]:
    """Return what stands in the rows of a model -> the row; by number where nothing else is known."""
    if tokens is None:
        return {(target[row] if row < len(target) else row): row for row in range(size)}
    named: dict[Key, int] = {token: row for token, row in tokens.numbers.items() if row < size}
    return {**{key: row for row, key in enumerate(_named_rows(size, tokens))}, **named}


def _extend(
    sources: Sequence[Source],
    tokens: Sequence[_Tokens | None],
    donor: int,
    order: Sequence[int],
    target: list[Key],
) -> dict[str, str]:
    """Put the added tokens that the donor lacks into `target`; return the tokenizer that has them."""
    own = tokens[donor]
    if own is None:
        raise UserError(
            f"tokenizer_source union: {sources[donor].label} has no {TOKENIZER} to extend; give another source"
        )
    new: dict[str, dict[str, Any]] = {}
    for number in order:
        for token in (tokens[number] or own).numbers:
            if token in own.numbers or token in new:
                continue
            entry = (tokens[number] or own).added.get(token)
            if entry is None:
                raise UserError(
                    f"tokenizer_source union: {sources[number].label} has the token {token!r} in its trained vocabulary and"
                    f" {sources[donor].label} has not; only added tokens can be united, give tokenizer_source base or a model"
                )
            new[token] = entry
    if not new:
        return {}
    numbered = {token: own.size + i for i, token in enumerate(new)}
    for token, number in [
        *((t, n) for t, n in own.numbers.items() if n >= len(target)),
        *numbered.items(),
    ]:
        target.extend(range(len(target), number + 1))
        target[number] = token
    entries = [{**new[token], "id": number} for token, number in numbered.items()]
    content = {**own.content, "added_tokens": [*(own.content.get("added_tokens") or ()), *entries]}
    return {TOKENIZER: json.dumps(content, indent=2, ensure_ascii=False)}


def _notes(
    sources: Sequence[Source],
    tokens: Sequence[_Tokens | None],
    have: Sequence[Mapping[Key, int]],
    target: Sequence[Key],
    donor: int,
) -> list[str]:
    notes, wanted = [], set(target)
    if len(target) != sources[donor].config.vocab_size:
        notes.append(
            f"the embedding has {len(target)} rows, that of {sources[donor].label} has {sources[donor].config.vocab_size}"
        )
    if tokens[donor] is None:
        notes.append(f"{sources[donor].label} has no {TOKENIZER}: all rows are matched by number")
    for source, own, rows in zip(sources, tokens, have, strict=True):
        if own is None and tokens[donor] is not None:
            notes.append(f"{source.label} has no {TOKENIZER}: its rows are matched by number")
        lacks = [key for key in target if key not in rows and any(key in others for others in have)]
        if lacks:
            notes.append(
                f"{source.label} lacks {_shown(lacks)}: taken from the first model that has it, the base first"
            )
        extra = [key for key in rows if key not in wanted]
        if extra:
            notes.append(
                f"{source.label} has {_shown(extra)}, which the merged vocabulary has not: left out"
            )
    zeros = sum(not any(key in rows for rows in have) for key in target)
    if zeros:
        notes.append(f"{zeros} rows of the embedding are zero: no model has them")
    return notes


def _shown(keys: Sequence[Key]) -> str:
    names = [repr(key) if isinstance(key, str) else f"row {key}" for key in keys[:_SHOWN]]
    return ", ".join(names) + (f" and {len(keys) - _SHOWN} more rows" if len(keys) > _SHOWN else "")
