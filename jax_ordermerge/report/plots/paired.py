"""The picture of paired differences: merges less their rivals, item by item."""

import itertools
from collections.abc import Mapping

from jax_ordermerge.analysis.paired import Difference
from jax_ordermerge.report.differences import BEST_MEMBER, MEAN_MEMBER
from jax_ordermerge.report.plots.figure import COLOURS, FAINT, KIND, MARKS, draw, names_down

# beyond so many times the reach of the others a model is named at the edge, not drawn
_OUTLIER = 4.0
_WIDTH = 5.2  # inches: as wide as a phone without losing its letters


def paired_differences(gaps: Mapping[str, Mapping[str, Difference]], unit: str) -> str:
    """Draw the differences of models to the mean member and to the best one, with 95 % intervals.

    A difference far beyond the others is written at the edge: it would squeeze them together.

    Args:
        gaps: model less rival, by model and rival.
        unit: of losses.
    """
    series = {
        MEAN_MEMBER: ("less the mean member", KIND["member"], "o", -0.14),
        BEST_MEMBER: ("less the best member", COLOURS[5], "s", 0.14),
    }
    limit = _limit(gaps)

    with draw("differences", 1.25 + 0.34 * len(gaps), _WIDTH) as figure:
        axes = figure.subplots()
        axes.axvline(0, color=FAINT, linewidth=1.2)
        for rival, (label, colour, marker, offset) in series.items():
            drawn = [
                (at + offset, gap)
                for at, row in enumerate(gaps.values())
                if (gap := row.get(rival)) is not None
            ]
            near = [(at, gap) for at, gap in drawn if abs(gap.estimate) <= limit]
            if near:
                reach = [
                    [max(gap.estimate - gap.low, 0) for _, gap in near],
                    [max(gap.high - gap.estimate, 0) for _, gap in near],
                ]
                marks = MARKS | {"fmt": marker, "markersize": 4.5}
                x, y = [gap.estimate for _, gap in near], [at for at, _ in near]
                axes.errorbar(x, y, xerr=reach, color=colour, label=label, **marks)
            for at, gap in (row for row in drawn if row not in near):
                right = gap.estimate > 0
                text = f"{gap.estimate:+.4f} →" if right else f"← {gap.estimate:+.4f}"
                align, edge = ("right", limit) if right else ("left", -limit)
                axes.text(edge, at, text, ha=align, va="center", color=colour, fontsize=8)
        if limit < float("inf"):
            axes.set_xlim(-1.05 * limit, 1.05 * limit)
        names_down(axes, list(gaps))
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(f"difference in loss ({unit})")
        figure.legend(loc="outside upper center", ncols=2)
    return figure.svg


def _limit(gaps: Mapping[str, Mapping[str, Difference]]) -> float:
    """Return the largest size of a difference that is drawn; infinity where all are."""
    reaches = sorted(
        max(abs(gap.low), abs(gap.high)) for row in gaps.values() for gap in row.values()
    )
    for inner, outer in itertools.pairwise(reaches):
        # half of the differences at least are drawn
        if outer > _OUTLIER * inner > 0 and reaches.index(outer) >= len(reaches) / 2:
            return 1.3 * inner
    return float("inf")
