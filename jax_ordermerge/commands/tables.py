"""Results of `checkpoint.compare` as tables for a terminal and as JSON."""

import dataclasses
import io
import math
import sys
from collections.abc import Sequence
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jax_ordermerge.arch.unlisted import find_stacks
from jax_ordermerge.checkpoint.compare import Difference, Inventory, Numbers, Stats
from jax_ordermerge.json_types import Json, JsonValue

_MAX_WIDTH = 10_000  # characters; tensor names are long, and a file has no edge to wrap at


def inspect_table(inventory: Inventory) -> Table:
    """Return one row per tensor and a last one with the totals, with statistics if there are any.

    Example:
        >>> from jax_ordermerge.checkpoint.compare import Tensor
        >>> row = Tensor("w", "bfloat16", (2, 3), 6, 12, "model.safetensors", None)
        >>> show(inspect_table(Inventory((row,), 6, 12, 1, None)), sys.stdout)
        tensor     dtype      shape   elements   bytes   file
        ────────────────────────────────────────────────────────────────────
        w          bfloat16   2 x 3          6      12   model.safetensors
        ────────────────────────────────────────────────────────────────────
        1 tensor                             6      12   1 file
    """
    rows = [
        (
            row.name,
            row.dtype,
            _shape(row.shape),
            f"{row.elements:,}",
            f"{row.bytes:,}",
            row.file,
            *_stats_cells(row.stats),
        )
        for row in inventory.tensors
    ]
    total = (
        _count(len(inventory.tensors), "tensor"),
        "",
        "",
        f"{inventory.elements:,}",
        f"{inventory.bytes:,}",
        _count(inventory.files, "file"),
        *_stats_cells(inventory.stats),
    )
    heads = ["tensor", "dtype", "shape", "elements", "bytes", "file"]
    if inventory.stats is not None:
        heads += ["min", "max", "mean", "std", "NaN", "inf", "zeros"]
    table = _table(heads, rows, total, left=("tensor", "dtype", "shape", "file"))
    # what `slices` and gradients of a recipe take for layers
    stacks = find_stacks(row.name for row in inventory.tensors)
    text = "; ".join(
        f"layers: {prefix}.0 to {prefix}.{count - 1}" for prefix, count in stacks.items()
    )
    table.caption = _text(text) if text else None
    return table


def difference_table(difference: Difference) -> Table:
    """Return one row per tensor that differs, and a last one over all tensors.

    Example:
        >>> show(difference_table(Difference((), ("w",), (), (), None)), sys.stdout)
        tensor                               same   max |a-b|   max rel   cosine   zeros a ...
        ────────...
        w               only in a
        ────────...
        all 0 in both   0 have equal bytes
    """
    # without a base there are no task vectors, and no columns for them
    based = difference.total is not None and difference.total.kept_a is not None
    rows = []
    for pair in difference.pairs:
        # equal tensors are counted in the last row; only changes are listed
        if not pair.equal:
            changes = [
                f"{a} | {b}"
                for a, b in (
                    (pair.dtype_a, pair.dtype_b),
                    (_shape(pair.shape_a), _shape(pair.shape_b)),
                )
                if a != b
            ]
            rows.append((pair.name, ", ".join(changes), *_numbers_cells(pair.numbers, based)))
    # rows of one table need the same number of cells
    blank = _numbers_cells(None, based)
    # after the pairs, each side in its own order
    rows += [(name, "only in a", *blank) for name in difference.only_a]
    rows += [(name, "only in b", *blank) for name in difference.only_b]
    equal = sum(pair.equal for pair in difference.pairs)
    total = (
        f"all {len(difference.pairs)} in both",
        f"{equal} have equal bytes",
        *_numbers_cells(difference.total, based),
    )
    heads = ["tensor", "", "same", "max |a-b|", "max rel", "cosine", "zeros a", "zeros b"]
    if based:
        heads += ["cosine of a-base, b-base", "a at base", "b at base"]
    table = _table(heads, rows, total, left=("tensor", ""))
    notes = []
    if difference.total is not None and difference.total.nonfinite:
        notes.append(
            f"{difference.total.nonfinite:,} elements are NaN or infinite; maxima and cosines leave"
            " them out"
        )
    if difference.not_in_base:
        notes.append(
            f"{_count(len(difference.not_in_base), 'tensor')} not in the base, or in another shape"
        )
    table.caption = "; ".join(notes) or None
    return table


def inspect_json(inventory: Inventory) -> Json:
    """Return an inventory as JSON, with the number of layers of each stack that names show.

    NaN and infinities become None.

    Example:
        >>> inspect_json(Inventory((), 0, 0, 0, None))
        {'tensors': [], 'elements': 0, 'bytes': 0, 'files': 0, 'stats': None, 'layers': {}}
    """
    layers = find_stacks(row.name for row in inventory.tensors)
    return {**_plain(inventory), "layers": layers}


def difference_json(difference: Difference) -> Json:
    """Return a difference as JSON, equal pairs included; NaN and infinities become None.

    Example:
        >>> difference_json(Difference((), ("w",), (), (), None))
        {'equal': False, 'pairs': [], 'only_a': ['w'], 'only_b': [], 'not_in_base': [],
         'total': None}
    """
    return {"equal": difference.equal, **_plain(difference)}


def show(table: Table, file: IO[str] | None = None) -> None:
    """Print a table, by default to stdout, as wide as the terminal.

    Where the output is not a terminal, the table is as wide as its content: scripts read it.
    """
    console = Console(file=file or sys.stdout, highlight=False)
    # rich assumes 80 columns where there is no terminal, and would wrap names of tensors
    if not console.is_terminal:
        console.width = console.measure(
            table, options=console.options.update(width=_MAX_WIDTH)
        ).maximum
    console.print(table)


def _plain(value: object) -> JsonValue:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):  # a NamedTuple keeps its names
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    # JSON has neither NaN nor infinities
    return None if isinstance(value, float) and not math.isfinite(value) else value


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of texts, without a row of totals.

    Example:
        >>> show(text_table(["name", "time"], [["quickstart", "2 minutes"]]), sys.stdout)
        name         time
        ────────────────────────
        quickstart   2 minutes
    """
    table = _table(heads, rows, (), left=heads)
    table.columns[0].no_wrap = True  # a name that is folded cannot be copied
    return table


def to_text(table: Table, width: int | None = None) -> str:
    """Return a table as text, as wide as its content or so many characters."""
    file = io.StringIO()
    if width is None:
        show(table, file)
    else:
        Console(file=file, highlight=False, width=width).print(table)
    return file.getvalue()


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], total: Sequence[str], left: Sequence[str]
) -> Table:
    table = Table(box=box.HORIZONTALS, show_edge=False, header_style="bold")
    for head in heads:
        # fold: rich cuts by default, and a name of a tensor that is cut is no name
        table.add_column(head, justify="left" if head in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_text(cell) for cell in row))
    if total:
        table.add_section()
        table.add_row(*(_text(cell) for cell in total))
    return table


def _text(cell: str) -> Text:
    # names come from files: nothing in them may act as markup or move the cursor
    return Text("".join(c if c.isprintable() else "?" for c in cell))


def _stats_cells(stats: Stats | None) -> tuple[str, ...]:
    if stats is None:
        return ()
    return (*(_number(value) for value in stats[:4]), *(f"{count:,}" for count in stats[4:]))


def _numbers_cells(numbers: Numbers | None, based: bool) -> tuple[str, ...]:
    if numbers is None:
        return ("",) * (9 if based else 6)
    same = f"{100 * numbers.same / numbers.elements:.2f} %"
    cells = (
        same,
        _number(numbers.max_abs),
        _number(numbers.max_rel),
        _cosine(numbers.cosine),
        *_percent(numbers.zeros_a, numbers.zeros_b),
    )
    return (
        (*cells, _cosine(numbers.task_cosine), *_percent(numbers.kept_a, numbers.kept_b))
        if based
        else cells
    )


def _percent(*fractions: float | None) -> list[str]:
    return ["" if fraction is None else f"{100 * fraction:.2f} %" for fraction in fractions]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _shape(shape: tuple[int, ...]) -> str:
    # a scalar has an empty shape, and an empty cell would look like a missing one
    return " x ".join(map(str, shape)) or "scalar"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
