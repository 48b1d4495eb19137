"""The forest plot: one panel per quantity, one row per run, a dot per population."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax_ordermerge.analysis.result import Estimate
from jax_ordermerge.report.plots.figure import (
    COLOURS,
    FAINT,
    KIND,
    SHADE,
    draw,
    interval,
    names_down,
)

_TITLE_WIDTH = 60  # letters above a panel


class Row(NamedTuple):
    """A row of a panel.

    Attributes:
        name: on the vertical axis.
        size: estimate with its interval.
        dots: the estimates that it is the mean of.
        margin: of equivalence, shaded on both sides of 0; None shades nothing.
    """

    name: str
    size: Estimate
    dots: Sequence[float]
    margin: float | None


def draw_forest(panels: Mapping[str, Sequence[Row]], name: str) -> str:
    """Draw panels by title as SVG text.

    Args:
        panels: rows of each panel.
        name: of the picture.
    """
    # one column: names of runs and titles need its width. Limits reach half a row beyond.
    heights = [len(rows) + 0.2 for rows in panels.values()] or [1.0]
    with draw(name, 0.62 * len(heights) + 0.22 * sum(heights)) as figure:
        ratios = {"height_ratios": heights}
        grid = figure.subplots(len(heights), squeeze=False, gridspec_kw=ratios).ravel()
        for axes, (title, rows) in zip(grid, panels.items(), strict=False):
            axes.axvline(0, color=FAINT, linewidth=1.2)
            for at, row in enumerate(rows):
                if row.margin is not None:
                    axes.fill_betweenx(
                        [at - 0.4, at + 0.4], -row.margin, row.margin, color=SHADE, linewidth=0
                    )
                # a row without dots of its own is a mean over the others
                colour = KIND["member"] if row.dots else COLOURS[5]
                axes.scatter(row.dots, [at + 0.22] * len(row.dots), s=7, color=FAINT, zorder=2)
                interval(axes, at, vars(row.size), colour, markersize=4)
            names_down(axes, [row.name for row in rows])
            axes.set_title(textwrap.fill(title, _TITLE_WIDTH))
            axes.locator_params(axis="x", nbins=6)
    return figure.svg
