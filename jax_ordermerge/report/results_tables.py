"""Tables over the populations of several runs: length against direction, and how many members."""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean

from jax_ordermerge.analysis.populations import population_contrast
from jax_ordermerge.analysis.result import Missing, or_missing
from jax_ordermerge.config.merge import LOSS
from jax_ordermerge.report import formatting
from jax_ordermerge.report.differences import BEST_MEMBER, MEAN_MEMBER, seed_groups
from jax_ordermerge.report.document import Block, Cell, Heading, Interval, Table
from jax_ordermerge.report.measures import loss_at_own_lambda, measured
from jax_ordermerge.report.run import Run

_LAMBDA_HEADER = ("run", "model", "at lambda 1", "at its own lambda")


def _merges(run: Run) -> list[str]:
    merges = [model["name"] for model in run.models if model["kind"] == "merge"]
    return list(seed_groups(merges, run.merge))


def _mean(of: Callable[[Run, str], float], populations: Sequence[Run], name: str) -> float:
    return fmean(of(population, name) for population in populations)


def lambda_table(runs: Sequence[Run]) -> list[Block]:
    """Return the losses at lambda 1 and at the own lambda, means over populations, by run."""
    rows: list[list[Cell]] = []
    for run in runs:
        populations = [run, *run.populations]
        for name in (MEAN_MEMBER, BEST_MEMBER, *_merges(run)):
            losses = [
                or_missing(_mean, of, populations, name)
                for of in (partial(measured, measure=LOSS), loss_at_own_lambda)
            ]
            if any(isinstance(loss, Missing) for loss in losses):
                continue  # no lambda line was drawn of it
            rows.append([run.name, name, *(f"{loss:.4f}" for loss in losses)])
    if not rows:
        return []
    caption = (
        f"Loss on test examples in {runs[0].loss_unit}, mean over populations. Own lambda: the "
        "factor of the task vector that has the lowest loss on validation examples. At lambda 1 a "
        "merge differs from its members in length as well as in direction."
    )
    return [Heading("Length and direction"), Table(_LAMBDA_HEADER, rows, caption, text=(0, 1))]


def members_table(runs: Sequence[Run]) -> list[Block]:
    """Return what merges of more members gain over the mean member, by run."""
    rows: list[list[Cell]] = []
    for run in runs:
        curves = [(x.controls or {}).get("subsets") or {} for x in (run, *run.populations)]
        for method in curves[0]:
            points = [curve[method]["points"] for curve in curves if method in curve]
            # a mean over the populations that happen to have it would be another quantity
            if len(points) < len(curves):
                continue
            gains: dict[int, list[float]] = {}
            for point in (point for part in points for point in part[1:]):
                gains.setdefault(point["size"], []).append(point["gain"]["estimate"])
            for size, values in gains.items():
                contrast = or_missing(population_contrast, values)
                if isinstance(contrast, Missing):
                    continue
                cell = Interval(
                    f"{contrast.estimate:+.4f}", formatting.bounds(contrast.low, contrast.high)
                )
                rows.append([run.name, method, str(size), cell])
    if not rows:
        return []
    caption = (
        f"Loss less that of the mean member in {runs[0].loss_unit}: mean over all subsets of one "
        "size, then over populations, with 95 % intervals by Student's t over populations."
    )
    header = ["run", "merge", "members", "gain"]
    return [Heading("How many members"), Table(header, rows, caption, text=(0, 1))]
