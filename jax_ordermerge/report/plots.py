"""Pictures of a run as SVG text: the same numbers give the same bytes, no dates, no fonts or links from elsewhere."""

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from jax_ordermerge.report import formatting

# Okabe and Ito's palette: told apart with any colour vision
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C6D00", "#000000")
KIND = {"base": "#777777", "member": "#0072B2", "merge": "#D55E00"}
INK, FAINT = "#222222", "#9a9a9a"
WIDTH = 7.6
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],
    "font.size": 9,
    "svg.fonttype": "none",
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
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
}
NATS = formatting.loss_unit({})


def training(lines: Sequence[Mapping[str, Any]], unit: str = NATS) -> str:
    """Training loss of every member by step, and the learning rate on an axis of its own.

    Args:
        lines: of metrics/train.jsonl, each with `step`, `loss` (one a member) and `learning_rate`.
    """
    with _figure("training", 3.3) as (figure, found):
        axes = figure.subplots()
        steps = [line["step"] for line in lines]
        losses = np.array([line["loss"] for line in lines], dtype=np.float64)
        rate = axes.twinx()
        rate.fill_between(
            steps, [line["learning_rate"] for line in lines], color="#efe9dc", linewidth=0
        )
        rate.set(ylabel="learning rate (shaded)", ylim=(0, None))
        rate.grid(visible=False)
        rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        _above(axes, rate)
        for member, (row, colour) in enumerate(
            zip(losses.T, _colours(losses.shape[1]), strict=True)
        ):
            axes.plot(steps, row, color=colour, label=f"member {member}")
        axes.set(xlabel="optimizer step", ylabel=f"training loss ({unit})")
        axes.margins(x=0.01)
        _legend(axes, losses.shape[1])
    return found[0]


def positions(analysis: Mapping[str, Any], unit: str = NATS) -> str | None:
    """Final loss by position: in epoch 1 for each member and pooled; then for every epoch with difficulty taken out.

    Returns:
        SVG, or None where the data determined no curve.
    """
    raw, clean = (analysis["pooled"][key] for key in ("raw", "within"))
    if "mean" not in raw[0]:
        return None
    with _figure("positions", 3.3) as (figure, found):
        panels = figure.subplots(1, 2 if "mean" in clean[0] else 1, squeeze=False)[0]
        colours = _colours(len(analysis["members"]))
        for row, colour in zip(analysis["members"], colours, strict=True):
            curve = row["epochs"][0]["curve"]
            panels[0].plot(curve["position"], curve["mean"], color=colour, linewidth=1)
        _band(panels[0], raw[0], INK, "all members")
        panels[0].set(
            title="As measured, epoch 1",
            xlabel="position in epoch 1",
            ylabel=f"final loss ({unit})",
        )
        panels[0].legend()
        if len(panels) > 1:
            for epoch, curve in enumerate(clean):
                _band(panels[1], curve, COLOURS[epoch % len(COLOURS)], f"epoch {epoch + 1}")
            panels[1].set(title="Difficulty of samples taken out", xlabel="position in that epoch")
            panels[1].legend()
        for axes in panels:
            axes.set_xlim(0, 1)
            if 0 < analysis["design"]["warmup_window"] < 1:
                axes.axvspan(
                    0, analysis["design"]["warmup_window"], color="#f3efe6", zorder=0, linewidth=0
                )
    return found[0]


def effects(
    analysis: Mapping[str, Any], lines: Sequence[Mapping[str, Any]], unit: str = NATS
) -> str | None:
    """Fixed-effects coefficient of each epoch with its 95 % interval, over the learning rate of the run.

    Returns:
        SVG, or None where the data determined no coefficient.
    """
    coefficients = analysis["fixed_effects"].get("coefficients")
    if not coefficients:
        return None
    epochs = analysis["design"]["epochs"]
    with _figure("effects", 3.0) as (figure, found):
        axes = figure.subplots()
        if lines:
            rate = axes.twinx()
            last = max(line["step"] for line in lines)
            when = [line["step"] / last * epochs for line in lines]
            rate.fill_between(
                when, [line["learning_rate"] for line in lines], color="#efe9dc", linewidth=0
            )
            rate.set(ylabel="learning rate (shaded)", ylim=(0, None))
            rate.grid(visible=False)
            rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
            _above(axes, rate)
        axes.axhline(0, color=FAINT, linewidth=1)
        for row in coefficients:
            centre = np.mean(row["epochs"]) - 0.5
            error = [[row["estimate"] - row["low"]], [row["high"] - row["estimate"]]]
            axes.errorbar(
                centre,
                row["estimate"],
                yerr=np.maximum(error, 0),
                fmt="o",
                color=COLOURS[0],
                capsize=4,
                elinewidth=1.2,
                markersize=6,
            )
            axes.annotate(
                f"{row['estimate']:+.4f}",
                (centre, row["estimate"]),
                (9, 3),
                textcoords="offset points",
            )
        axes.set(
            xlim=(0, epochs),
            xticks=np.arange(epochs) + 0.5,
            ylabel=f"slope of the final loss ({unit})",
        )
        axes.set_xticklabels([f"epoch {epoch + 1}" for epoch in range(epochs)])
        axes.margins(y=0.2)
    return found[0]


def slopes(runs: Mapping[str, Sequence[Mapping[str, Any]]], unit: str = NATS) -> str:
    """Fixed-effects slope of every epoch, runs side by side, with 95 % intervals.

    Args:
        runs: name -> `coefficients` of analysis.json.
    """
    epochs = sorted({epoch for rows in runs.values() for row in rows for epoch in row["epochs"]})
    with _figure("slopes", 3.0) as (figure, found):
        axes = figure.subplots()
        axes.axhline(0, color="#888", linewidth=0.8)
        for place, ((name, rows), colour) in enumerate(
            zip(runs.items(), _colours(len(runs)), strict=True)
        ):
            at = [row["epochs"][0] + 0.5 * ((place + 0.5) / len(runs) - 0.5) for row in rows]
            values = [row["estimate"] for row in rows]
            reach = [
                [row["estimate"] - row["low"] for row in rows],
                [row["high"] - row["estimate"] for row in rows],
            ]
            axes.errorbar(
                at, values, yerr=reach, fmt="o", color=colour, capsize=3, elinewidth=1.2, label=name
            )
        axes.set(xticks=epochs, xlabel="epoch", ylabel=f"slope of the final loss ({unit})")
        _legend(axes, len(runs))
    return found[0]


def merging(analysis: Mapping[str, Any], unit: str = NATS) -> str | None:
    """Loss of samples that a member saw early less those it saw late, an epoch a panel: members, then every merge.

    Returns:
        SVG, or None where there are no merges or no gaps.
    """
    merged = {name: row["early_late"] for name, row in analysis["merged"].items()}
    if not merged or any("reason" in row for rows in merged.values() for row in rows):
        return None
    epochs = analysis["design"]["epochs"]
    with _figure("merging", 1.15 + 0.3 * (1 + len(merged))) as (figure, found):
        panels = figure.subplots(1, epochs, sharex=True, sharey=True, squeeze=False)[0]
        names = ["members", *merged]
        for epoch, axes in enumerate(panels):
            gaps = [
                analysis["pooled"]["early_late"][epoch],
                *(rows[epoch]["merged"] for rows in merged.values()),
            ]
            for place, (name, gap) in enumerate(zip(names, gaps, strict=True)):
                error = [[gap["estimate"] - gap["low"]], [gap["high"] - gap["estimate"]]]
                colour = KIND["member" if name == "members" else "merge"]
                axes.errorbar(
                    gap["estimate"],
                    place,
                    xerr=np.maximum(error, 0),
                    fmt="o",
                    color=colour,
                    capsize=3,
                    elinewidth=1.2,
                )
            axes.axvline(0, color=FAINT, linewidth=1)
            axes.set(
                title=f"epoch {epoch + 1}", yticks=range(len(names)), ylim=(len(names) - 0.5, -0.5)
            )
            axes.set_yticklabels(names)
            axes.locator_params(axis="x", nbins=4)
            axes.grid(visible=False, axis="y")
        figure.supxlabel(f"loss of the early half minus the late half ({unit})", fontsize=9)
    return found[0]


def cosines(matrix: Sequence[Sequence[float | None]]) -> str:
    """Cosines between the members' task vectors, [M, M], as a heat map with its numbers; None where one is zero."""
    values = np.array(matrix, dtype=np.float64)
    size = len(values)
    with _figure("cosines", min(6.0, 1.4 + 0.5 * size), width=min(WIDTH, 2.2 + 0.62 * size)) as (
        figure,
        found,
    ):
        axes = figure.subplots()
        low = min(0.0, float(np.nanmin(values, initial=0.0)))
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=1)
        if size <= 16:
            for i in range(size):
                for j in range(size):
                    light = "white" if values[i, j] < low + 0.6 * (1 - low) else "black"
                    axes.text(
                        j,
                        i,
                        "–" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}",
                        ha="center",
                        va="center",
                        color=light,
                        fontsize=8,
                    )
        axes.set(xticks=range(size), yticks=range(size), xlabel="member", ylabel="member")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.85, label="cosine").outline.set_visible(False)
    return found[0]


def accuracies(models: Sequence[Mapping[str, Any]], task: str) -> str:
    """Accuracy of every model on one task, a bar each with one standard error; the line is the mean member.

    Args:
        models: of evaluations.json that have the task.
    """
    with _figure(f"accuracy-{task}", 0.9 + 0.27 * len(models)) as (figure, found):
        axes = figure.subplots()
        shares = [100 * model["tasks"][task]["accuracy"] for model in models]
        errors = [100 * model["tasks"][task]["se"] for model in models]
        axes.barh(
            range(len(models)),
            shares,
            xerr=errors,
            color=[KIND[m["kind"]] for m in models],
            height=0.62,
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1},
        )
        end = max(s + e for s, e in zip(shares, errors, strict=True))
        for place, (share, error) in enumerate(zip(shares, errors, strict=True)):
            axes.text(share + error + 0.015 * end, place, f"{share:.1f}", va="center", fontsize=8.5)
        _models(axes, models, shares)
        axes.set(
            xlim=(0, max(1.0, 1.1 * end)),
            xlabel=f"{task}: right answers (%) ± one standard error; dashed: mean member",
        )
    return found[0]


def losses(models: Sequence[Mapping[str, Any]], unit: str = NATS) -> str:
    """Held-out loss of every model with one standard error; a base far outside is named, not drawn."""
    trained = [model["loss"] for model in models if model["kind"] != "base"]
    span = (max(trained) - min(trained)) if trained else 0.0
    far = [
        m
        for m in models
        if m["kind"] == "base" and trained and m["loss"] > max(trained) + max(span, 0.05)
    ]
    shown = [model for model in models if model not in far]
    with _figure("losses", 0.95 + 0.27 * len(shown)) as (figure, found):
        axes = figure.subplots()
        for place, model in enumerate(shown):
            axes.errorbar(
                model["loss"],
                place,
                xerr=model["loss_se"],
                fmt="o",
                color=KIND[model["kind"]],
                capsize=3,
                elinewidth=1.2,
            )
        _models(axes, shown, [model["loss"] for model in shown])
        note = "".join(
            f"; the {model['name']}, at {model['loss']:.3f}, lies outside" for model in far
        )
        axes.set_xlabel(f"held-out loss ({unit}) ± one standard error; dashed: mean member{note}")
        axes.margins(x=0.08)
    return found[0]


def lambda_line(rows: Sequence[Mapping[str, Any]], split: str, unit: str = NATS) -> str:
    """Loss along base (0), average (1) and beyond; the base itself is left out where it would flatten the rest.

    Args:
        rows: with `at` = [lambda], `loss` and `validation_loss`, ascending.
        split: what `loss` was measured on.
    """
    near = [row for row in rows if row["at"][0] > 0]
    span = max(row["loss"] for row in near) - min(row["loss"] for row in near)
    far = [
        row
        for row in rows
        if row["at"][0] == 0 and row["loss"] > max(x["loss"] for x in near) + 2 * span
    ]
    note = "".join(f"; the base, at {row['loss']:.3f}, lies outside" for row in far)
    with _figure("lambda-line", 3.0) as (figure, found):
        axes = figure.subplots()
        _lines(axes, [row for row in rows if row not in far], split, "o-")
        axes.axvline(1, color=FAINT, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(
            xlabel=f"lambda: base + lambda × mean task vector; dashed: the average{note}",
            ylabel=f"loss ({unit})",
        )
        axes.legend()
    return found[0]


def barrier(rows: Sequence[Mapping[str, Any]], split: str, unit: str = NATS) -> str:
    """Loss on the straight line from member 0 (0) to member 1 (1).

    Args:
        rows: with `at` = [share], `loss` and `validation_loss`, ascending.
        split: what `loss` was measured on.
    """
    with _figure("barrier", 2.8) as (figure, found):
        axes = figure.subplots()
        _lines(axes, rows, split, "o-")
        axes.set(xlabel="from member 0 (0) to member 1 (1)", ylabel=f"loss ({unit})")
        axes.legend()
    return found[0]


def plane(rows: Sequence[Mapping[str, Any]], split: str, unit: str = NATS) -> str:
    """Loss over the plane of the base and two members, in coordinates of their task vectors.

    Args:
        rows: with `at` = [a, b], of a whole grid, and `loss`.
        split: what `loss` was measured on.
    """
    across, up = (sorted({row["at"][axis] for row in rows}) for axis in (0, 1))
    by_place = {tuple(row["at"]): row["loss"] for row in rows}
    values = np.array([[by_place[a, b] for a in across] for b in up], dtype=np.float64)
    with _figure("plane", 4.4, width=5.4) as (figure, found):
        axes = figure.subplots()
        # most of the plane is far worse than its valley, which is what there is to see
        top = float(np.quantile(values, 0.7))
        levels = np.linspace(values.min(), max(top, values.min() + 1e-6), 13)
        filled = axes.contourf(across, up, values, levels=levels, cmap="cividis", extend="max")
        for label, place in {
            "base": (0, 0),
            "0": (1, 0),
            "1": (0, 1),
            "average of both": (0.5, 0.5),
        }.items():
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
        figure.colorbar(
            filled, ax=axes, shrink=0.85, label=f"{split} loss ({unit})"
        ).outline.set_visible(False)
    return found[0]


def splits(
    rows: Sequence[Mapping[str, Any]], chosen: Mapping[str, Any] | None, unit: str = NATS
) -> str:
    """Validation loss and test loss of members, controls and the chosen merge; a base far outside is left out.

    Args:
        rows: of controls.json, with `kind`, `loss` and `validation_loss`.
        chosen: the same of the chosen merge, if there is one.
    """
    shown = [row for row in rows if row["kind"] != "base"]
    with _figure("splits", 3.6, width=5.4) as (figure, found):
        axes = figure.subplots()
        for kind in dict.fromkeys(row["kind"] for row in shown):
            own = [row for row in shown if row["kind"] == kind]
            colour = KIND.get(kind, COLOURS[2])
            axes.plot(
                [r["validation_loss"] for r in own],
                [r["loss"] for r in own],
                "o",
                color=colour,
                label=kind,
                markersize=5,
            )
        if chosen is not None:
            axes.plot(
                chosen["validation_loss"],
                chosen["loss"],
                "*",
                color=INK,
                label="chosen",
                markersize=12,
            )
        axes.set(xlabel=f"validation loss ({unit})", ylabel=f"test loss ({unit})")
        axes.legend()
    return found[0]


def candidates(rows: Sequence[Mapping[str, Any]], winner: int, unit: str = NATS) -> str:
    """Candidates of a search, by method: the loss that each has, or would have by its difference to the winner on what it saw.

    Args:
        rows: of results.json, with `kind`, `candidate`, `to_winner`, `dropped` and `number`.
        winner: number of the winner.
    """
    best = next(row for row in rows if row["number"] == winner)["loss"]
    known = [row for row in rows if row["to_winner"] is not None and row["kind"] != "base"]
    methods = list(dict.fromkeys(row["candidate"]["method"] for row in known))
    with _figure("search", 0.9 + 0.3 * max(3, len(methods))) as (figure, found):
        axes = figure.subplots()
        for row in known:
            place, colour = (
                methods.index(row["candidate"]["method"]),
                KIND["member" if row["kind"] == "member" else "merge"],
            )
            fill = colour if row["dropped"] is None else "none"
            axes.plot(
                best + row["to_winner"]["estimate"],
                place,
                "o",
                color=colour,
                markersize=4.5,
                markerfacecolor=fill,
            )
        axes.axvline(best, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set(yticks=range(len(methods)), ylim=(len(methods) - 0.4, -0.6))
        axes.set_yticklabels(methods)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(
            f"validation loss ({unit}); dashed: the winner; hollow: estimated from a part of the examples"
        )
    return found[0]


def _lines(axes: Axes, rows: Sequence[Mapping[str, Any]], split: str, style: str) -> None:
    """Draw the loss on the split that is reported, and beside it that on validation examples where it is another."""
    at = [row["at"][0] for row in rows]
    axes.plot(
        at, [row["loss"] for row in rows], style, color=KIND["merge"], label=split, markersize=4
    )
    if split != "validation" and all(row["validation_loss"] is not None for row in rows):
        axes.plot(
            at,
            [row["validation_loss"] for row in rows],
            style,
            color=KIND["member"],
            label="validation",
            markersize=4,
        )


def _models(axes: Axes, models: Sequence[Mapping[str, Any]], values: Sequence[float]) -> None:
    members = [
        value for model, value in zip(models, values, strict=True) if model["kind"] == "member"
    ]
    if members:
        axes.axvline(
            float(np.mean(members)), color=KIND["member"], linewidth=1, linestyle=(0, (4, 3))
        )
    axes.set(yticks=range(len(models)), ylim=(len(models) - 0.4, -0.6))
    axes.set_yticklabels([model["name"] for model in models])
    axes.grid(visible=False, axis="y")


def _colours(count: int) -> list[Any]:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [mpl.colormaps["cividis"](x) for x in np.linspace(0, 0.92, count)]


def _legend(axes: Axes, count: int) -> None:
    # more names than these would hide the curves
    if count <= 8:
        axes.legend(ncols=2 if count > 4 else 1)


def _band(axes: Axes, curve: Mapping[str, Any], colour: str, label: str) -> None:
    if "mean" in curve:
        axes.fill_between(
            curve["position"], curve["low"], curve["high"], color=colour, alpha=0.15, linewidth=0
        )
        axes.plot(curve["position"], curve["mean"], color=colour, linewidth=2.2, label=label)


def _above(axes: Axes, behind: Axes) -> None:
    """Draw axes over its twin, which matplotlib would draw on top."""
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)
    behind.spines["top"].set_visible(False)


@contextmanager
def _figure(name: str, height: float, width: float = WIDTH) -> Iterator[tuple[Figure, list[str]]]:
    """Yield a figure and a list that holds its SVG text after the block."""
    found: list[str] = []
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, found
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    found.append(_inline(buffer.getvalue(), name))


def _inline(svg: str, name: str) -> str:
    """Keep the svg element only, and make its ids unlike those of any other picture on the page."""
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", name)
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{prefix}" ', 1)
