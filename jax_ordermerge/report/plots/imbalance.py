"""Pictures of the training and of the effect of position, from its log and from analysis.json."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from jax_ordermerge.json_types import Json
from jax_ordermerge.report.formatting import late_less_early
from jax_ordermerge.report.plots.figure import (
    COLOURS,
    FAINT,
    INK,
    KIND,
    MARKS,
    SHADE,
    colours,
    draw,
    interval,
    learning_rate,
    legend,
    names_down,
)

_MOST_PANELS = 5  # beside each other: in narrower ones the names leave no place for the values


def training(log: Sequence[Json], unit: str) -> str:
    """Draw the training loss of every member and the learning rate by step.

    Args:
        log: of metrics/train.jsonl, with `step`, `loss` (one per member) and `learning_rate`.
        unit: of losses.
    """
    steps = [line["step"] for line in log]
    losses = np.array([line["loss"] for line in log], dtype=np.float64).T

    with draw("training", 3.3) as figure:
        axes = figure.subplots()
        learning_rate(axes, steps, log)
        for member, (row, colour) in enumerate(zip(losses, colours(len(losses)), strict=True)):
            axes.plot(steps, row, color=colour, label=f"member {member}")
        axes.set(xlabel="optimizer step", ylabel=f"training loss ({unit})")
        axes.margins(x=0.01)
        legend(axes, len(losses))
    return figure.svg


def positions(analysis: Json, unit: str) -> str | None:
    """Draw final losses by position: in epoch 1 as measured; in every epoch without difficulty.

    Returns:
        SVG, or None where the data determined no curve.
    """
    # Raw curves show the noise that one member has; the others what the comparison of a sample
    # with itself brings. Beside each other, the reader sees why the latter is needed.
    raw, within = (analysis["pooled"][key] for key in ("raw", "within"))
    if "mean" not in raw[0]:
        return None

    def band(axes: Axes, curve: Json, colour: str, label: str) -> None:
        if "mean" in curve:
            position, low, high = curve["position"], curve["low"], curve["high"]
            axes.fill_between(position, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(position, curve["mean"], color=colour, linewidth=2.2, label=label)

    with draw("positions", 3.3) as figure:
        panels = figure.subplots(1, 2 if "mean" in within[0] else 1, squeeze=False)[0]
        members = analysis["members"]
        for member, colour in zip(members, colours(len(members)), strict=True):
            curve = member["epochs"][0]["curve"]
            panels[0].plot(curve["position"], curve["mean"], color=colour, linewidth=1)
        band(panels[0], raw[0], INK, "all members")
        panels[0].set(
            title="As measured, epoch 1",
            xlabel="position in epoch 1",
            ylabel=f"final loss ({unit})",
        )
        panels[0].legend(loc="best")
        # with one member there is only the raw panel
        for axes in panels[1:]:
            for epoch, curve in enumerate(within):
                band(axes, curve, COLOURS[epoch % len(COLOURS)], f"epoch {epoch + 1}")
            axes.set(title="Difficulty of samples taken out", xlabel="position in that epoch")
            axes.legend(loc="best")
        # shaded, since a small learning rate there is another cause of the same effect
        window = analysis["design"]["warmup_window"]
        for axes in panels:
            axes.set_xlim(0, 1)
            if 0 < window < 1:
                axes.axvspan(0, window, color=SHADE, zorder=0, linewidth=0)
    return figure.svg


def _learning_rate_by_epoch(axes: Axes, log: Sequence[Json], epochs: int) -> None:
    """Draw the learning rate, where there is a log, over epochs as the effects are."""
    if log:
        last = max(line["step"] for line in log)
        learning_rate(axes, [line["step"] / last * epochs for line in log], log)


def effects(analysis: Json, log: Sequence[Json], unit: str) -> str | None:
    """Draw the fixed-effects slope of each epoch, over the learning rate of the run.

    Returns:
        SVG, or None where the data determined no coefficient.
    """
    coefficients = analysis["fixed_effects"].get("coefficients")
    if not coefficients:
        return None
    epochs = analysis["design"]["epochs"]

    with draw("effects", 3.0) as figure:
        axes = figure.subplots()
        _learning_rate_by_epoch(axes, log, epochs)
        axes.axhline(0, color=FAINT, linewidth=1)
        for row in coefficients:
            # epochs that share a slope share a point, in their middle
            centre = float(np.mean(row["epochs"])) - 0.5
            interval(axes, centre, row, COLOURS[0], vertical=True, capsize=4, markersize=6)
            label, place = f"{row['estimate']:+.4f}", (centre, row["estimate"])
            axes.annotate(label, place, (9, 3), textcoords="offset points")
        axes.set(
            xlim=(0, epochs),
            xticks=np.arange(epochs) + 0.5,
            ylabel=f"slope of the final loss ({unit})",
        )
        axes.set_xticklabels([f"epoch {epoch + 1}" for epoch in range(epochs)])
        axes.margins(y=0.2)
    return figure.svg


def trajectory(analysis: Json, log: Sequence[Json], unit: str) -> str | None:
    """Draw what each step changes in the final loss of its samples, over the learning rate.

    Returns:
        SVG, or None where the data determined no curve.
    """
    curve = analysis["pooled"].get("trajectory", {})
    if "effect" not in curve:
        return None
    epochs = analysis["design"]["epochs"]

    with draw("trajectory", 3.0) as figure:
        axes = figure.subplots()
        _learning_rate_by_epoch(axes, log, epochs)
        axes.axhline(0, color=FAINT, linewidth=1)
        # an epoch at a time: a level is known within an epoch only, so nothing joins two of them
        numbers = np.minimum(np.floor(curve["epochs"]), epochs - 1)
        for epoch in range(epochs):
            at, low, high, effect = (
                np.asarray(curve[key])[numbers == epoch]
                for key in ("epochs", "low", "high", "effect")
            )
            axes.fill_between(at, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
            axes.plot(at, effect, color=COLOURS[0], linewidth=2.2)
        axes.set(
            xlim=(0, epochs), xlabel="epochs of training", ylabel=f"change of final loss ({unit})"
        )
    return figure.svg


def trajectories(runs: Mapping[str, Sequence[Json]], name: str, unit: str) -> str | None:
    """Draw what each step changes in the final loss of its samples, a panel per run.

    Args:
        runs: by name the analyses of their populations.
        name: of the picture.
        unit: of losses.

    Returns:
        SVG, or None where the data determined no curve.
    """
    curves = {
        run: [x["pooled"]["trajectory"] for x in analyses if "effect" in x["pooled"]["trajectory"]]
        for run, analyses in runs.items()
    }
    curves = {run: of_run for run, of_run in curves.items() if of_run}
    if not curves:
        return None
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    with draw(name, 0.4 + 1.5 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for axes in grid.ravel()[len(curves) :]:
            axes.set_visible(False)
        for axes, (run, of_run) in zip(grid.ravel(), curves.items(), strict=False):
            axes.axhline(0, color=FAINT, linewidth=1)
            # populations of one run have the same steps
            at = np.asarray(of_run[0]["epochs"])
            effects = np.array([curve["effect"] for curve in of_run])
            epochs = int(np.ceil(at.max()))
            numbers = np.minimum(np.floor(at), epochs - 1)
            # an epoch at a time: a level is known within an epoch only
            for part in (numbers == epoch for epoch in range(epochs)):
                axes.plot(at[part], effects[:, part].T, color=FAINT, linewidth=0.7)
                axes.plot(at[part], effects[:, part].mean(axis=0), color=COLOURS[0], linewidth=2)
            axes.set(xlim=(0, epochs), xticks=range(epochs + 1))
            axes.set_title(run)
        figure.supxlabel("epochs of training", fontsize=9)
        figure.supylabel(f"change of final loss ({unit})", fontsize=9)
    return figure.svg


def slopes(runs: Mapping[str, Sequence[Json]], unit: str) -> str:
    """Draw the fixed-effects slopes of several runs side by side.

    Args:
        runs: name -> `coefficients` of analysis.json.
        unit: of losses.
    """
    epochs = sorted({epoch for rows in runs.values() for row in rows for epoch in row["epochs"]})

    with draw("slopes", 3.0) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=FAINT, linewidth=1)
        for index, ((name, rows), colour) in enumerate(
            zip(runs.items(), colours(len(runs)), strict=True)
        ):
            # the runs of an epoch share half a unit around it
            at = [row["epochs"][0] + 0.5 * ((index + 0.5) / len(runs) - 0.5) for row in rows]
            values = [row["estimate"] for row in rows]
            reach = [
                [row["estimate"] - row["low"] for row in rows],
                [row["high"] - row["estimate"] for row in rows],
            ]
            axes.errorbar(at, values, yerr=reach, color=colour, label=name, **MARKS)
        axes.set(xticks=epochs, xlabel="epoch", ylabel=f"slope of the final loss ({unit})")
        legend(axes, len(runs))
    return figure.svg


def merging(analysis: Json, unit: str) -> str | None:
    """Draw the loss of late less early samples in the members and in every merge, by epoch.

    Returns:
        SVG, or None where there are no merges or no gaps.
    """
    merged, of_members = late_less_early(
        [
            {name: row["early_late"] for name, row in analysis["merged"].items()},
            analysis["pooled"]["early_late"],
        ]
    )
    if not merged or any("reason" in row for rows in merged.values() for row in rows):
        return None
    names = ["members", *merged]

    epochs = analysis["design"]["epochs"]
    columns = min(epochs, _MOST_PANELS)
    lines = -(-epochs // columns)
    with draw("merging", 0.55 + lines * (0.6 + 0.3 * len(names))) as figure:
        # shared axes: the epochs are to be compared
        grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for axes in grid.ravel()[epochs:]:
            axes.set_visible(False)
        for epoch, axes in enumerate(grid.ravel()[:epochs]):
            interval(axes, 0, of_members[epoch], KIND["member"])
            for index, rows in enumerate(merged.values(), start=1):
                interval(axes, index, rows[epoch]["merged"], KIND["merge"])
            axes.axvline(0, color=FAINT, linewidth=1)
            if expected := of_members[epoch].get("expected"):
                axes.axvline(expected["estimate"], color=INK, linewidth=1, linestyle=":")
            axes.set(title=f"epoch {epoch + 1}")
            names_down(axes, names, above=0.5)
            axes.locator_params(axis="x", nbins=4)
        figure.supxlabel(f"loss of the late half less the early half ({unit})", fontsize=9)
    return figure.svg
