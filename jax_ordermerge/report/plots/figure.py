"""One style for all pictures, and their way to SVG text: no dates, no links to other files."""

import html
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_ordermerge.json_types import Json
from jax_ordermerge.report.plots.description import describe

INK, FAINT, SHADE, GRID = "#222222", "#9a9a9a", "#efe9dc", "#e8e8e8"
# Okabe and Ito's palette, distinguishable with any colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D00", INK)
KIND = {"base": "#777777", "member": "#0072B2", "merge": "#D55E00"}
# Colours on a dark ground. The others are readable on both.
_DARK = {
    INK: "#dcdcdc",
    FAINT: "#767c83",
    SHADE: "#2f2c25",
    GRID: "#2c3137",
    "#0072B2": "#4aa3df",
    "#D55E00": "#f07f2e",
    "#8C6D00": "#bfa04a",
    "#777777": "#a0a0a0",
}
DASHED = (0, (4, 3))
MARKS: dict[str, Any] = {"fmt": "o", "capsize": 3, "elinewidth": 1.2}  # of an error bar
WIDTH = 7.6  # inches
_MOST_NAMES = 8  # a longer legend would hide the curves
_POINTS_PER_LETTER = 4.9  # on average, of a label of 9 points
_FONTS = ["DejaVu Sans", "Helvetica", "Arial"]
# as matplotlib writes it at each text of a picture
_FONT = f"font-family: {', '.join(map(repr, _FONTS))}, sans-serif"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": _FONTS,
    "font.size": 9,
    "text.parse_math": False,  # names may hold dollar signs
    "svg.fonttype": "none",  # text stays text: it can be searched and selected
    # without a salt matplotlib draws its ids at random
    "svg.hashsalt": "ordermerge",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}


class SvgFigure(Figure):
    """A figure; `svg` is its text once the block of `draw` has ended."""

    svg = ""


@contextmanager
def draw(name: str, height: float, width: float = WIDTH) -> Iterator[SvgFigure]:
    """Yield an empty figure and render it at the end of the block.

    Args:
        name: of the picture; makes its ids unlike those of the others on a page.
        height, width: inches.
    """
    # `Figure` instead of `pyplot`: no display is needed, and no figure stays behind in a registry
    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure = SvgFigure(figsize=(width, height), layout="constrained")
        yield figure
        description = describe(figure)
        _wrap_labels(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    # The text goes into HTML. Several pictures share its ids, and a prolog, a date or a link to
    # a schema have no place there.
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # a sixth of its bytes: indents, rotations by nothing, and the font of each text
    svg = re.sub(r"\n +", "\n", svg)
    svg = re.sub(r' transform="rotate\(-0 [^"]*"', "", svg)
    svg = svg.replace(f"{_FONT}; ", "")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    # a page in the dark, and no paper: the rules hold for all pictures of a page
    rules = "".join(
        f'svg [style*="{part}: {light.lower()}"] {{ {part}: {dark} !important; }}'
        for light, dark in _DARK.items()
        for part in ("fill", "stroke")
    )
    texts = (
        f'<title id="{prefix}-title">{html.escape(name.replace("-", " "))}</title>'
        f'<desc id="{prefix}-desc">{html.escape(description)}</desc>'
        f"<style>@media screen and (prefers-color-scheme: dark) {{ {rules} }}</style>"
    )
    head, _, body = svg.partition(">")
    names = f'style="{_FONT}" role="img" aria-labelledby="{prefix}-title {prefix}-desc"'
    figure.svg = f"{head} {names}>{texts}{body}"


def _wrap_labels(figure: Figure) -> None:
    """Break labels that are longer than the figure; what reaches beyond it would be cut off."""
    width, height = (72 * inches / _POINTS_PER_LETTER for inches in figure.get_size_inches())
    shared = getattr(figure, "_supxlabel", None)
    # a colour bar has no place in the grid
    grids = [spec.get_gridspec() for axes in figure.axes if (spec := axes.get_subplotspec())]
    columns = max((grid.ncols for grid in grids), default=1)
    labels = [(axes.xaxis.label, 0.9 * width / columns) for axes in figure.axes]
    labels += [(axes.yaxis.label, 0.9 * height) for axes in figure.axes]
    labels += [(shared, 0.9 * width)] if shared is not None else []
    for label, letters in labels:
        label.set_text(textwrap.fill(label.get_text(), max(12, int(letters))))


def colours(count: int) -> list[Any]:
    """Return colours for curves: the palette, or shades of one map where it is too short."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    # cividis is readable with any colour vision; its ends are too pale or too dark for a line
    return [mpl.colormaps["cividis"](x) for x in np.linspace(0.2, 0.9, count)]


def legend(axes: Axes, count: int) -> None:
    """Draw a legend, unless it would have too many names."""
    if count <= _MOST_NAMES:
        # named: on a slow machine matplotlib warns of its default, which is the same
        axes.legend(loc="best", ncols=2 if count > 4 else 1)


def interval(
    axes: Axes,
    at: float,
    row: Json,
    colour: str,
    *,
    vertical: bool = False,
    **marks: Any,
) -> None:
    """Draw an estimate with its interval `low`, `high` at a place on the other axis."""
    estimate = row["estimate"]
    # rounding may put a bound of a narrow interval on the wrong side, which matplotlib refuses
    reach = np.maximum([[estimate - row["low"]], [row["high"] - estimate]], 0)
    marks = MARKS | {"color": colour} | marks
    if vertical:
        axes.errorbar(at, estimate, yerr=reach, **marks)
    else:
        axes.errorbar(estimate, at, xerr=reach, **marks)


def learning_rate(axes: Axes, at: Sequence[float], training_log: Sequence[Json]) -> None:
    """Shade the learning rate behind axes, on an axis of its own."""
    rate = axes.twinx()
    rates = [line["learning_rate"] for line in training_log]
    rate.fill_between(at, rates, color=SHADE, linewidth=0)
    rate.set(ylabel="learning rate (shaded)", ylim=(0, None))
    rate.grid(visible=False)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    # matplotlib draws a twin on top of its axes
    axes.set_zorder(rate.get_zorder() + 1)
    axes.patch.set_visible(False)
    rate.spines["top"].set_visible(False)


def names_down(axes: Axes, names: Sequence[str], *, above: float = 0.6) -> None:
    """Write names on the vertical axis, the first on top."""
    # limits from high to low: tables and pictures show the models in the same order
    axes.set(yticks=range(len(names)), ylim=(len(names) - 1 + above, -above))
    axes.set_yticklabels(names)
    axes.grid(visible=False, axis="y")
