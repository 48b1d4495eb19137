"""What a picture shows, in words and numbers: the text for readers who cannot see it."""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator

_MOST_MARKS = 40  # a longer list of numbers is no help


def describe(figure: Figure) -> str:
    """Return the axes of a figure, its curves by their ends, and its marks by their values.

    It is read from what was drawn, so that no picture can be without a text, or beside it.

    Example:
        >>> figure = Figure()
        >>> axes = figure.subplots()
        >>> _ = axes.plot([1, 2, 3], [0.5, 0.1, 0.2], label="member 0")
        >>> _ = axes.set(xlabel="step", ylabel="loss")
        >>> describe(figure)
        'loss by step. member 0: from 0.5 at 1 to 0.2 at 3, lowest 0.1 at 2.'
    """
    shared = getattr(figure, "_supxlabel", None)
    sentences = [shared.get_text()] if isinstance(shared, Text) else []
    for axes in figure.axes:
        # a second axis shades the learning rate, and colour bars have their own axes
        if axes.get_label() != "<colorbar>":
            sentences += _axes_sentences(axes)
    return " ".join(f"{' '.join(text.split()).rstrip('.')}." for text in sentences if text)


def _axes_sentences(axes: Axes) -> list[str]:
    x, y = (label.replace("\n", " ") for label in (axes.get_xlabel(), axes.get_ylabel()))
    sentences = [axes.get_title(loc="left"), f"{y} by {x}" if x and y else x or y]
    marks = [mark for container in axes.containers for mark in _marks(axes, container)]
    if len(marks) <= _MOST_MARKS:
        sentences += ["; ".join(marks)]
    in_containers = {
        id(line)
        for container in axes.containers
        if isinstance(container, ErrorbarContainer)
        for line in container.get_children()
    }
    for line in axes.get_lines():
        label = str(line.get_label())
        if id(line) in in_containers or label.startswith("_"):
            continue  # lines without a label are guides
        at, values = (np.asarray(data, float) for data in line.get_data())
        if len(values) > 1 and np.isfinite(values).any():
            lowest = int(np.nanargmin(values))
            sentences.append(
                f"{label}: from {values[0]:.4g} at {at[0]:.4g} to {values[-1]:.4g} at "
                f"{at[-1]:.4g}, lowest {values[lowest]:.4g} at {at[lowest]:.4g}"
            )
    # numbers in the cells of a map
    if axes.images:
        sentences.append("; ".join(_cells(axes)))
    return sentences


def _marks(axes: Axes, container: object) -> Iterator[str]:
    """Return the estimates with their intervals, or the lengths of bars, of one container."""
    if isinstance(container, BarContainer):
        reaches = container.errorbar
        ends = (
            reaches.lines[2][0].get_segments() if reaches else [np.zeros((2, 2))] * len(container)
        )
        for number, (bar, (low, high)) in enumerate(zip(container, ends, strict=True)):
            # without a length where the error is undefined
            reach = f" [{low[0]:.4g}, {high[0]:.4g}]" if high[0] > low[0] else ""
            yield f"{_name(axes, number)} {bar.get_width():.4g}{reach}"
    if not isinstance(container, ErrorbarContainer) or container.lines[0] is None:
        return
    data, _, bars = container.lines
    places = np.column_stack([np.asarray(values, float) for values in data.get_data()])
    # the axis along which the interval reaches
    axis = 1 if container.has_yerr else 0
    label = str(container.get_label())
    label = "" if label.startswith("_") else f"{label}, "
    for place, segment in zip(places, bars[0].get_segments(), strict=True):
        low, high = (float(end[axis]) for end in np.asarray(segment))
        at = _name(axes, place[1 - axis], horizontal=axis == 1)
        yield f"{label}{at} {place[axis]:+.4g} [{low:+.4g}, {high:+.4g}]"


def _name(axes: Axes, at: float, *, horizontal: bool = False) -> str:
    """Return the name of a place where the axis has names, else its number."""
    axis = axes.xaxis if horizontal else axes.yaxis
    # places that were chosen have names; those of other axes are numbers on a scale
    if isinstance(axis.get_major_locator(), FixedLocator):
        places = np.asarray(axis.get_ticklocs(), float)
        nearest = int(np.argmin(np.abs(places - at)))
        return axis.get_major_formatter().format_ticks(places.tolist())[nearest]
    return f"{axis.get_label_text().split(' (')[0]} {at:.3g}".strip()


def _cells(axes: Axes) -> list[str]:
    return [
        f"{text.get_position()[1]:.0f} and {text.get_position()[0]:.0f} {text.get_text()}"
        for text in axes.texts
        if text.get_position()[0] > text.get_position()[1]
    ][:_MOST_MARKS]
