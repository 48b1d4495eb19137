"""Pictures of the evaluated models, and of the cosines between task vectors."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from jax_ordermerge.json_types import Json
from jax_ordermerge.report.formatting import NORMAL, share_bounds
from jax_ordermerge.report.plots.figure import DASHED, INK, KIND, MARKS, WIDTH, draw, names_down
from jax_ordermerge.report.run import percentages

_MOST_NUMBERS = 16  # members whose cosines are written into the cells


def losses(models: Sequence[Json], unit: str, name: str = "held-out loss") -> str:
    """Draw the loss of every model on the test split with its 95 % interval.

    A base far above the others is named below, not drawn: it would squeeze them together.
    """
    trained = [model["loss"] for model in models if model["kind"] != "base"]
    # above by more than all the others spread; at least 0.05, for members that are almost equal
    limit = max(trained) + max(max(trained) - min(trained), 0.05) if trained else np.inf
    outside = [model for model in models if model["kind"] == "base" and model["loss"] > limit]
    shown = [model for model in models if model not in outside]

    with draw("losses", 0.95 + 0.27 * len(shown)) as figure:
        axes = figure.subplots()
        for index, model in enumerate(shown):
            colour = KIND[model["kind"]]
            # the error of one example is undefined
            error = NORMAL * (model["loss_se"] or 0.0)
            axes.errorbar(model["loss"], index, xerr=error, color=colour, **MARKS)
        _models(axes, shown, [model["loss"] for model in shown])
        note = "".join(
            f"; the {model['name']}, at {model['loss']:.3f}, lies outside" for model in outside
        )
        axes.set_xlabel(f"{name} ({unit}), 95 %; dashed: mean member{note}")
        axes.margins(x=0.08)
    return figure.svg


def accuracies(models: Sequence[Json], task: str) -> str:
    """Draw the accuracy of every model on one task, a bar each with its 95 % interval.

    Args:
        models: of evaluations.json that have the task.
        task: its name.
    """
    shares = percentages(models, task)
    scores = [model["tasks"][task] for model in models]
    bounds = 100 * np.array(
        [share_bounds(*(score[key] for key in ("accuracy", "se", "n"))) for score in scores]
    )
    # room to the right of the longest bar, for the numbers
    end = max(high for _, high in bounds)

    with draw(f"accuracy-{task}", 0.9 + 0.27 * len(models)) as figure:
        axes = figure.subplots()
        # bars begin at 0: a cut axis would enlarge small differences
        axes.barh(
            range(len(models)),
            shares,
            xerr=np.abs(bounds.T - shares),
            color=[KIND[model["kind"]] for model in models],
            height=0.62,
            error_kw={"ecolor": INK, "capsize": 3, "elinewidth": 1},
        )
        for index, (share, (_, high)) in enumerate(zip(shares, bounds, strict=True)):
            at = high + 0.015 * end
            axes.text(at, index, f"{share:.1f}", va="center", fontsize=8.5)
        _models(axes, models, shares)
        label = f"{task}: correct answers (%), 95 %; dashed: mean member"
        axes.set(xlim=(0, max(1.0, 1.1 * end)), xlabel=label)
    return figure.svg


def cosines(matrix: Sequence[Sequence[float | None]]) -> str:
    """Draw the cosines [M, M] between task vectors as a heat map; None, of zeros, as a dash."""
    values = np.array(matrix, dtype=np.float64)
    size = len(values)
    # one colour scale for all runs, from 0 to 1, unless a cosine is negative
    low = min(0.0, float(np.nanmin(values, initial=0.0)))

    height, width = min(6.0, 1.4 + 0.5 * size), min(WIDTH, 2.2 + 0.62 * size)
    with draw("cosines", height, width) as figure:
        axes = figure.subplots()
        image = axes.imshow(values, cmap="cividis", vmin=low, vmax=1)
        for (row, column), value in np.ndenumerate(values) if size <= _MOST_NUMBERS else ():
            dark = value < low + 0.6 * (1 - low)
            # readable on both ends of the colour scale
            text, colour = "–" if np.isnan(value) else f"{value:.2f}", "white" if dark else "black"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        axes.set(xticks=range(size), yticks=range(size), xlabel="member", ylabel="member")
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, shrink=0.85, label="cosine").outline.set_visible(False)
    return figure.svg


def _models(axes: Axes, models: Sequence[Json], values: Sequence[float]) -> None:
    """Write the models' names on the vertical axis and draw a line at the mean member."""
    pairs = zip(models, values, strict=True)
    members = [value for model, value in pairs if model["kind"] == "member"]
    if members:
        mean = float(np.mean(members))
        axes.axvline(mean, color=KIND["member"], linewidth=1, linestyle=DASHED)
    names_down(axes, [model["name"] for model in models])
