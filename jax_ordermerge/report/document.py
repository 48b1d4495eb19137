"""A page of headings, paragraphs, tables and pictures, rendered as HTML and as Markdown."""

import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2
from markupsafe import Markup

from jax_ordermerge.checkpoint import atomic

EMPTY = ("", "–")  # cells that hold nothing
_LONGEST_LABEL = 28  # characters; a column with a longer cell may break between words


@dataclass(frozen=True)
class Heading:
    """A heading. Inside a chapter its level is one deeper than stated."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """Plain text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    sentences: Sequence[str]


@dataclass(frozen=True)
class Interval:
    """A cell with an estimate; its table gives interval and p values columns of their own."""

    estimate: str
    bounds: str = ""
    p: str = ""
    holm: str = ""
    note: str = ""

    def __str__(self) -> str:
        """Return the cell as it stands in a sentence."""
        parts = [f"{self.estimate} {self.bounds}".strip()]
        parts += [f"p {self.p}" if self.p.startswith("<") else f"p = {self.p}"] if self.p else []
        parts += [f"by Holm {self.holm}"] if self.holm else []
        return ", ".join(parts + ([self.note] if self.note else []))


Cell = str | Interval
# headers of the columns behind that of the estimate
_PARTS = {"bounds": "95 %", "p": "p", "holm": "p by Holm", "note": "note"}


@dataclass(frozen=True)
class Table:
    """Cells of text. Columns numbered in `text` are aligned left, rows in `strong` stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    # numbers are aligned right, so that digits stand below each other
    text: Sequence[int] = (0,)
    strong: Sequence[int] = ()

    def filled(self) -> "Table":
        """Return the table of texts, without the columns that no row fills; the first one stays.

        Example:
            >>> Table(["model", "loss", "p"], [["a", "1.0", "–"]]).filled().header
            ['model', 'loss']
            >>> Table(["a", "gap"], [["x", Interval("+1", "[0, 2]", "0.05")]]).filled().header
            ['a', 'gap', '95 %', 'p']
        """
        header: list[str] = []
        text: list[int] = []
        rows: list[list[Cell]] = [[] for _ in self.rows]
        for column, name in enumerate(self.header):
            cells = [row[column] for row in self.rows]
            # a part that no cell of the column has makes no column
            for part, title in {"estimate": name, **_PARTS}.items():
                values = [_part(cell, part) for cell in cells]
                first = part == "estimate" and (column == 0 or not cells)
                if not first and all(value in EMPTY for value in values):
                    continue
                if column in self.text or part == "note":
                    text.append(len(header))
                header.append(title)
                for row, value in zip(rows, values, strict=True):
                    row.append(value)
        return replace(self, header=header, rows=rows, text=text)

    @property
    def prose(self) -> list[int]:
        """Columns of sentences. All others are as wide as their longest cell."""
        return [
            column
            for column in self.text
            if any(len(str(row[column])) > _LONGEST_LABEL for row in self.rows)
        ]


@dataclass(frozen=True)
class Picture:
    """SVG text; the name is unique on its page, and names the file beside the Markdown."""

    name: str
    svg: str
    caption: str = ""
    narrow: bool = False  # it fits a phone; all others scroll there

    @property
    def alternative(self) -> str:
        """The text for readers who cannot see the picture; the SVG text has a longer one."""
        return self.caption or self.name


@dataclass(frozen=True)
class Fold:
    """Preformatted text that opens on a click."""

    summary: str
    # an answer of a model may be long, and a repr stands in the messages of failed tests
    text: str = field(repr=False)


@dataclass(frozen=True)
class Chapter:
    """Blocks that an HTML page folds away, with a line in its table of contents.

    The chapters of a page stand behind all of its other blocks.
    """

    title: str
    blocks: Sequence["Block"]

    @property
    def anchor(self) -> str:
        """Target of links; pictures have ids too, hence the prefix."""
        return "chapter-" + re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


# A closed union: each kind has a branch in both templates, so HTML and Markdown cannot differ in
# content.
Block = Heading | Paragraph | Bullets | Table | Picture | Fold | Chapter


def _part(cell: Cell, part: str) -> str:
    if isinstance(cell, Interval):
        return str(getattr(cell, part))
    return cell if part == "estimate" else ""


def pictures_of(blocks: Sequence[Block]) -> Iterator[Picture]:
    """Return the pictures among blocks and in their chapters."""
    for block in blocks:
        if isinstance(block, Chapter):
            yield from pictures_of(block.blocks)
        elif isinstance(block, Picture):
            yield block


def render_html(title: str, blocks: Sequence[Block]) -> str:
    """Return an HTML page that loads nothing from elsewhere.

    Example:
        >>> page = render_html("A & B", [Paragraph("x < y")])
        >>> "<title>A &amp; B</title>" in page, "<p>x &lt; y</p>" in page
        (True, True)
    """
    return _ENVIRONMENT.get_template("page.html").render(title=title, blocks=blocks)


def render_markdown(title: str, blocks: Sequence[Block], *, pictures: str) -> str:
    """Return Markdown whose pictures are the files `{pictures}/{name}.svg`.

    Example:
        >>> print(render_markdown("T", [Table(["model", "loss"], [["a|b", "1.0"]])], pictures="."))
        # T
        <BLANKLINE>
        | model | loss |
        | :-- | --: |
        | a\\|b | 1.0 |
        <BLANKLINE>
    """
    template = _ENVIRONMENT.get_template("page.md")
    return template.render(title=title, blocks=blocks, pictures=pictures)


def publish(page: Path, title: str, blocks: Sequence[Block], *, pictures: str) -> None:
    """Write an HTML page, the same page in Markdown beside it, and the pictures of the latter.

    Args:
        page: ends in `.html`.
        title: of both pages.
        blocks: of both pages.
        pictures: directory of the pictures, relative to the page.
    """
    # pictures first: a page never refers to a file that is not there
    for picture in pictures_of(blocks):
        file = page.parent / pictures / f"{picture.name}.svg"
        atomic.replace(file, f"{picture.svg}\n".encode())
    markdown = render_markdown(title, blocks, pictures=pictures)
    atomic.replace(page.with_suffix(".md"), markdown.encode())
    # last: the report stage is complete where the HTML exists
    atomic.replace(page, render_html(title, blocks).encode())


def _plain(text: str) -> Markup:
    """Escape text of a user or a model, so that it cannot act as Markdown or HTML."""
    # HTML first: Markdown passes tags through. Backslashes before the marks that they escape.
    escaped = html.escape(text, quote=False).replace("\\", "\\\\")
    for mark in "*`[]":
        escaped = escaped.replace(mark, f"\\{mark}")
    return Markup(escaped)


def _cell(text: str, strong: bool = False) -> Markup:
    """Escape a cell of a Markdown table, which must stay on one line."""
    # `Markup.replace` would escape the tag that it inserts, hence the plain string
    escaped = Markup(str(_plain(text)).replace("|", "\\|").replace("\n", "<br>"))
    return Markup("**{}**").format(escaped) if strong and text else escaped


def _fenced(text: str) -> Markup:
    """Return a Markdown code block; the fence is longer than any fence in the text."""
    # an answer may hold code blocks of its own, which would end ours
    fence = "```"
    while fence in text:
        fence += "`"
    return Markup(f"{fence}\n{text.rstrip()}\n{fence}")


def _environment() -> jinja2.Environment:
    # Autoescape: tables hold texts of data sets and answers of models. StrictUndefined: a wrong
    # name in a template is an error, not an empty cell.
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jax_ordermerge.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"plain": _plain, "cell": _cell, "fenced": _fenced}
    for kind in (Heading, Paragraph, Bullets, Table, Picture, Fold, Chapter):
        # `{% if block is table %}`
        # `kind=kind` binds the class of this round: a closure would see the last one
        environment.tests[kind.__name__.lower()] = lambda block, kind=kind: isinstance(block, kind)
    return environment


_ENVIRONMENT = _environment()  # templates are compiled once, when first rendered
