"""Pictures of controls and of the candidates of a search."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jax_ordermerge.json_types import Json
from jax_ordermerge.report.plots.figure import (
    COLOURS,
    DASHED,
    FAINT,
    INK,
    KIND,
    colours,
    draw,
    interval,
    names_down,
)


def lambda_line(lines: Mapping[str, Sequence[Json]], base: Json, split: str, unit: str) -> str:
    """Draw the loss of models along base (0), model (1) and beyond.

    A base far above the others is named below, not drawn: it would flatten the lines.

    Args:
        lines: rows by name of the model, with `at` = [lambda], `kind` and `loss`, ascending.
        base: the row of the base.
        split: that `loss` was measured on.
        unit: of losses.
    """
    trained = [row["loss"] for line in lines.values() for row in line]
    # a random base is far worse than any merge, a pretrained one may be near
    is_near = base["loss"] <= max(trained) + 2 * (max(trained) - min(trained))
    members = [name for name, line in lines.items() if line[0]["kind"] != "merge"]
    merges = [name for name in lines if name not in members]
    colour = dict(zip(merges, colours(len(merges) + 1)[1:], strict=True))

    with draw("lambda-line", 3.4) as figure:
        axes = figure.subplots()
        for name, line in lines.items():
            rows = [base, *line] if is_near else line
            x, y = [row["at"][0] for row in rows], [row["loss"] for row in rows]
            if name in members:
                # one name for all of them: which member it is says nothing here
                label = f"members ({len(members)})" if name == members[0] else None
                axes.plot(x, y, "-", color=KIND["member"], label=label, linewidth=0.9, alpha=0.7)
            else:
                axes.plot(x, y, "o-", color=colour[name], label=name, markersize=4)
        axes.axvline(1, color=FAINT, linewidth=1, linestyle=DASHED)
        note = "" if is_near else f"; the base, at {base['loss']:.3f}, lies outside"
        axes.set(
            xlabel=f"lambda: base + lambda × task vector; dashed: the model itself{note}",
            ylabel=f"{split} loss ({unit})",
        )
        axes.legend(loc="best")
    return figure.svg


def barrier(rows: Sequence[Json], split: str, unit: str) -> str:
    """Draw the loss on the straight line from member 0 (0) to member 1 (1).

    Args:
        rows: with `at` = [share], `loss` and `validation_loss`, ascending.
        split: that `loss` was measured on.
        unit: of losses.
    """

    with draw("barrier", 2.8) as figure:
        axes = figure.subplots()
        _line(axes, rows, split)
        axes.set(xlabel="from member 0 (0) to member 1 (1)", ylabel=f"loss ({unit})")
        axes.legend(loc="best")
    return figure.svg


def plane(rows: Sequence[Json], split: str, unit: str) -> str:
    """Draw the loss over the plane of the base and two members.

    Args:
        rows: with `at` = [a, b], the multiples of the two task vectors, of a complete grid, and
            `loss`.
        split: that `loss` was measured on.
        unit: of losses.
    """
    # contours need a grid: rows of it by the second coordinate
    across, up = (sorted({row["at"][axis] for row in rows}) for axis in (0, 1))
    by_place = {tuple(row["at"]): row["loss"] for row in rows}
    values = np.array([[by_place[a, b] for a in across] for b in up], dtype=np.float64)
    # Most of the plane is far worse than its valley: colours end at the 70 % quantile.
    top = max(float(np.quantile(values, 0.7)), values.min() + 1e-6)
    levels = np.linspace(values.min(), top, 13)
    labels = {"base": (0, 0), "0": (1, 0), "1": (0, 1), "average of both": (0.5, 0.5)}

    with draw("plane", 4.4, width=5.4) as figure:
        axes = figure.subplots()
        filled = axes.contourf(across, up, values, levels=levels, cmap="cividis", extend="max")
        for label, place in labels.items():
            axes.plot(*place, "o", color="white", markeredgecolor=INK, markersize=5)
            axes.annotate(
                label, place, (5, 4), textcoords="offset points", color="white", fontsize=8
            )
        axes.set(
            xlabel="times the task vector of member 0",
            ylabel="times the task vector of member 1",
            aspect="equal",
        )
        axes.grid(visible=False)
        bar = figure.colorbar(filled, ax=axes, shrink=0.85, label=f"{split} loss ({unit})")
        bar.outline.set_visible(False)
    return figure.svg


def subsets(curves: Mapping[str, Json], label: str, *, fit: bool = True) -> str:
    """Draw a measure of merges by their number of members.

    Args:
        curves: by method, of `search.subsets.curves` as JSON.
        label: what was measured.
        fit: whether to draw the fit up to twice as many members; the theory is of losses.
    """
    with draw("subsets", 3.0) as figure:
        axes = figure.subplots()
        for (method, curve), colour in zip(curves.items(), colours(len(curves)), strict=True):
            points = curve["points"]
            axes.plot([], [], "o", color=colour, label=method, markersize=4)
            first = points[0]["loss"]
            for point in points:
                # the interval of the difference to the mean member, around the loss
                gain = point.get("gain", {"low": 0.0, "high": 0.0})
                row = {
                    "estimate": point["loss"],
                    "low": first + gain["low"],
                    "high": first + gain["high"],
                }
                interval(axes, point["size"], row, colour, vertical=True, markersize=4)
            if fit:
                sizes = np.linspace(1, 2 * points[-1]["size"], 100)
                values = curve["a"] + curve["b"] / sizes
                axes.plot(sizes, values, color=colour, linewidth=1, linestyle=DASHED)
        axes.set(xlabel="members of the merge", ylabel=label)
        axes.legend(loc="best")
    return figure.svg


def splits(rows: Sequence[Json], chosen: Json | None, unit: str) -> str:
    """Draw test loss by validation loss of members, controls and the chosen merge, not the base.

    Args:
        rows: of controls.json, with `kind`, `loss` and `validation_loss`.
        chosen: the same of the chosen merge, if there is one.
        unit: of losses.
    """

    with draw("splits", 3.6, width=5.4) as figure:
        axes = figure.subplots()
        # the base lies far outside, and would squeeze the others together
        for kind in dict.fromkeys(row["kind"] for row in rows if row["kind"] != "base"):
            of_kind = [row for row in rows if row["kind"] == kind]
            x, y = ([row[key] for row in of_kind] for key in ("validation_loss", "loss"))
            axes.plot(x, y, "o", color=KIND.get(kind, COLOURS[2]), label=kind, markersize=5)
        if chosen is not None:
            x, y = chosen["validation_loss"], chosen["loss"]
            axes.plot(x, y, "*", color=INK, label="chosen", markersize=12)
        axes.set(xlabel=f"validation loss ({unit})", ylabel=f"test loss ({unit})")
        axes.legend(loc="best")
    return figure.svg


def candidates(rows: Sequence[Json], winner: int, label: str) -> str:
    """Draw the losses of the candidates of a search, by method.

    The loss of a candidate that was dropped early is estimated from its difference to the winner
    on the examples that it saw.

    Args:
        rows: of results.json, with `kind`, `candidate`, `to_winner`, `dropped` and `number`.
        winner: its number.
        label: what was minimized, and its unit.
    """
    best = next(row["loss"] for row in rows if row["number"] == winner)
    compared = [row for row in rows if row["to_winner"] is not None and row["kind"] != "base"]
    methods = list(dict.fromkeys(row["candidate"]["method"] for row in compared))

    with draw("search", 0.9 + 0.3 * max(3, len(methods))) as figure:
        axes = figure.subplots()
        for row in compared:
            colour = KIND["merge" if row["kind"] == "merge" else "member"]
            # hollow: estimated, not measured on all examples
            fill = colour if row["dropped"] is None else "none"
            x, y = best + row["to_winner"]["estimate"], methods.index(row["candidate"]["method"])
            axes.plot(x, y, "o", color=colour, markersize=4.5, markerfacecolor=fill)
        axes.axvline(best, color=INK, linewidth=1, linestyle=DASHED)
        names_down(axes, methods)
        axes.set_xlabel(
            f"{label}; dashed: the winner; hollow: estimated from a part of the examples"
        )
    return figure.svg


def _line(axes: Axes, rows: Sequence[Json], split: str) -> None:
    """Draw the loss on the reported split and, where it is another, on validation examples."""
    # Both splits, because a lambda that is best on one need not be best on the other.
    curves = {"loss": (split, KIND["merge"])}
    if split != "validation" and all(row["validation_loss"] is not None for row in rows):
        curves["validation_loss"] = ("validation", KIND["member"])
    at = [row["at"][0] for row in rows]
    for key, (label, colour) in curves.items():
        axes.plot(at, [row[key] for row in rows], "o-", color=colour, label=label, markersize=4)
