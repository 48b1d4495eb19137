"""Tables of one checkpoint, and of the differences between two."""

import io
import json

from rich.table import Table

from jax_ordermerge.checkpoint import compare, convert
from jax_ordermerge.commands import tables
from jax_ordermerge.layout import Json


def inspect_model(model: str, *, stats: bool, as_json: bool) -> str:
    """Return the tensors of a checkpoint as a table or JSON; see `checkpoint.compare.inspect`."""
    inventory = compare.inspect(convert.resolve(model), stats=stats)
    if as_json:
        # the exact numbers; the table rounds them
        return _json_text(tables.inspect_json(inventory))
    return _table_text(tables.inspect_table(inventory))


def compare_models(a: str, b: str, *, base: str | None, as_json: bool) -> tuple[str, bool]:
    """Return the differences of two checkpoints as text, and whether all bytes are equal.

    Args:
        a, b: HF directories, hub names or `embedded:NAME`.
        base: with it, task vectors are compared, too.
        as_json: return JSON in place of a table.
    """
    base_dir = None if base is None else convert.resolve(base)
    difference = compare.difference(convert.resolve(a), convert.resolve(b), base_dir)
    if as_json:
        text = _json_text(tables.difference_json(difference))
    else:
        text = _table_text(tables.difference_table(difference))
    return text, difference.equal


def _json_text(value: Json) -> str:
    return json.dumps(value, indent=1) + "\n"


def _table_text(table: Table) -> str:
    text = io.StringIO()
    # Into a string: nothing is printed here, so tests and notebooks get the text.
    tables.show(table, text)
    return text.getvalue()
