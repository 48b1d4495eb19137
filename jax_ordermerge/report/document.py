"""A page of headings, paragraphs, tables and pictures, written once and rendered as HTML and as Markdown."""

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jax_ordermerge.checkpoint import atomic

CSS = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.5rem 5rem; color: #222; background: #fff;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .3rem; } h2 { font-size: 1.25rem; margin: 2.6rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid #ddd; } h3 { font-size: 1.02rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 52rem; } li { margin: .25rem 0; }
figure { margin: 1rem 0 1.4rem; } figure svg { max-width: 100%; height: auto; display: block; }
figcaption, caption { color: #555; font-size: .88rem; text-align: left; max-width: 52rem; }
caption { caption-side: bottom; padding-top: .35rem; }
.scroll { overflow-x: auto; margin: .8rem 0 1.2rem; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #e6e6e6; }
th { border-bottom: 2px solid #bbb; font-weight: 600; } td.text, th.text { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; }
tr.strong td { font-weight: 600; background: #f6f4ee; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow: auto; font-size: .8rem; line-height: 1.4; max-height: 32rem; }
summary { cursor: pointer; font-weight: 600; margin: .8rem 0; }
"""


@dataclass(frozen=True)
class Heading:
    """A heading; level 2 opens a chapter."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Cells of text. Columns numbered in `text` are aligned left, rows numbered in `strong` stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    text: Sequence[int] = (0,)
    strong: Sequence[int] = ()


@dataclass(frozen=True)
class Picture:
    """SVG text under a name that no other picture of the page has."""

    name: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Fold:
    """Preformatted text that opens on a click."""

    summary: str
    text: str = field(repr=False)


Block = Heading | Paragraph | Bullets | Table | Picture | Fold


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Return a whole HTML page that needs nothing from elsewhere.

    Example:
        >>> page = render_html("A & B", [Paragraph("x < y")])
        >>> "<title>A &amp; B</title>" in page, "<p>x &lt; y</p>" in page
        (True, True)
    """
    body = "\n".join(_html(block) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def render_markdown(title: str, blocks: Sequence[Block], *, pictures: str) -> str:
    """Return Markdown whose pictures are the files `{pictures}/{name}.svg`.

    Example:
        >>> print(
        ...     render_markdown(
        ...         "T", [Table(["model", "loss"], [["a|b", "1.0"]])], pictures="report"
        ...     )
        ... )
        # T
        <BLANKLINE>
        | model | loss |
        | :-- | --: |
        | a\\|b | 1.0 |
        <BLANKLINE>
    """
    return (
        "\n\n".join([f"# {_plain(title)}", *(_markdown(block, pictures) for block in blocks)])
        + "\n"
    )


def _html(block: Block) -> str:
    escape = html.escape
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{escape(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Picture(_, svg, caption):
            note = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
            return f"<figure>\n{svg}{note}\n</figure>"
        case Fold(summary, text):
            return f"<details>\n<summary>{escape(summary)}</summary>\n<pre>{escape(text)}</pre>\n</details>"


def _html_table(table: Table) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="text"' if number in table.text else "" for number in range(len(cells)))
        return "".join(
            f"<{tag}{kind}>{html.escape(cell)}</{tag}>"
            for kind, cell in zip(kinds, cells, strict=True)
        )

    lines = ['<div class="scroll">', "<table>"]
    lines += [f"<caption>{html.escape(table.caption)}</caption>"] if table.caption else []
    lines += [f"<thead><tr>{row(table.header, 'th')}</tr></thead>", "<tbody>"]
    for number, cells in enumerate(table.rows):
        kind = ' class="strong"' if number in table.strong else ""
        lines.append(f"<tr{kind}>{row(cells, 'td')}</tr>")
    return "\n".join([*lines, "</tbody>", "</table>", "</div>"])


def _markdown(block: Block, pictures: str) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Table():
            return _markdown_table(block)
        case Picture(name, _, caption):
            return f"![{name}]({pictures}/{name}.svg)" + (
                f"\n\n*{_plain(caption)}*" if caption else ""
            )
        case Fold(summary, text):
            fence = "```"
            while fence in text:
                fence += "`"
            return f"{_plain(summary)}\n\n{fence}\n{text.rstrip()}\n{fence}"


def _markdown_table(table: Table) -> str:
    def row(cells: Sequence[str], strong: bool = False) -> str:
        shown = [_plain(cell).replace("|", "\\|").replace("\n", "<br>") for cell in cells]
        return (
            "| " + " | ".join(f"**{cell}**" if strong and cell else cell for cell in shown) + " |"
        )

    lines = [
        row(table.header),
        "| "
        + " | ".join(":--" if n in table.text else "--:" for n in range(len(table.header)))
        + " |",
    ]
    lines += [row(cells, number in table.strong) for number, cells in enumerate(table.rows)]
    return "\n".join(lines) + (f"\n\n*{_plain(table.caption)}*" if table.caption else "")


def _plain(text: str) -> str:
    """Keep text from a user or a model from acting as markup."""
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    for mark in "*`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return escaped


def publish(page: Path, title: str, blocks: Sequence[Block], *, pictures: str) -> None:
    """Write a page of HTML, the same beside it in Markdown, and the pictures of the latter.

    Args:
        page: ends in `.html`.
        title: of both.
        blocks: of both.
        pictures: where the pictures go, seen from the page.
    """
    for block in blocks:
        if isinstance(block, Picture):
            atomic.replace(
                page.parent / pictures / f"{block.name}.svg", (block.svg + "\n").encode()
            )
    atomic.replace(
        page.with_suffix(".md"), render_markdown(title, blocks, pictures=pictures).encode()
    )
    atomic.replace(page, render_html(title, blocks).encode())
