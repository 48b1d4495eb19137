"""Chapters: diagnostics of the merges, the search for one, and the controls to compare with."""

import math
from collections.abc import Iterator, Sequence

from jax_ordermerge.analysis.paired import Difference, holm
from jax_ordermerge.config.merge import AUTO, LOSS
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import member_name
from jax_ordermerge.report import formatting, search_findings
from jax_ordermerge.report.contrasts import OUTSIDE_THE_TABLE
from jax_ordermerge.report.differences import AVERAGE, BEST_MEMBER, MEAN_MEMBER, RIVALS
from jax_ordermerge.report.document import (
    Block,
    Bullets,
    Cell,
    Heading,
    Interval,
    Picture,
    Table,
)
from jax_ordermerge.report.plots import controls as plots
from jax_ordermerge.report.plots.models import cosines as cosine_map
from jax_ordermerge.report.run import Run, missing

CANDIDATES_SHOWN = 25
_CONTROL_RIVALS = (BEST_MEMBER, MEAN_MEMBER, AVERAGE)  # order of the columns


def merges(run: Run) -> list[Block]:
    """Return a row per merge and the cosines of the task vectors."""
    heading = Heading("Merges and task vectors")
    if not run.merge:
        return [heading, missing(run, "merge", run.layout.merges)]
    rows, cosines = [], None
    for merge in run.merge["merges"]:
        total = merge.get("diagnostics", {}).get("total", {})
        # of the members: the same in every merge that is made of them, and not of averages
        if "checkpoints" not in merge:
            cosines = cosines or total.get("cosines")
        settings = {"weights": merge["weights"]} if merge.get("weights") else {}
        settings |= merge.get("parameters") or {}
        settings |= {f"checkpoints {k}": v for k, v in merge.get("checkpoints", {}).items()}
        # where no member moved, no method can change anything
        shared = total.get("unchanged_by_all")
        rows.append(
            [
                merge["name"],
                merge["method"],
                ", ".join(f"{key}={value}" for key, value in settings.items()),
                str(merge.get("seed", "")),
                formatting.percents(total.get("unchanged")),
                formatting.percents(None if shared is None else [shared]),
                formatting.percents(total.get("redrawn")),
                formatting.number(total.get("norm_ratio"), 3),
                formatting.number(total.get("lambda_eff"), 3),
            ]
        )
    header = ["merge", "method", "parameters", "seed", "zeros by member, %", "zero in all, %"]
    header += ["drawn again, %", "norm ratio", "lambda_eff"]
    caption = (
        f"Stored and merged as {run.merge.get('dtype')}; the dtype decides how many elements of "
        "the task vectors are exactly zero. Drawn again: elements in each round of a selection's "
        "resampling, of those that any member changed. Norm ratio: norm of the merged task vector "
        "over the mean norm of the members'. lambda_eff: its length along the mean task vector, 1 "
        "for the average."
    )
    blocks: list[Block] = [heading, Table(header, rows, caption, text=(0, 1, 2))]
    if cosines and len(cosines) > 1:
        caption = "Cosines between the members' task vectors, all tensors together."
        blocks.append(Picture("cosines", cosine_map(cosines), caption))
    return blocks


def search(results: Json | None, unit: str) -> list[Block]:
    """Return the chapter about a search; empty where there was none.

    Args:
        results: results.json.
        unit: of losses.
    """
    if not results:
        return []
    # The unit is that of the loss; other measures are shares.
    measure = results["settings"]["space"]["measure"]
    name = search_findings.criterion(measure)
    unit = f"validation {name} ({unit})" if measure == [LOSS] else f"{name}, on validation"
    # Losses are comparable on the same examples only, so those measured on most come first. A
    # candidate that was dropped has no loss on all of them.
    rows = sorted(
        results["candidates"],
        key=lambda row: (-row["examples"], math.inf if row["loss"] is None else row["loss"]),
    )[:CANDIDATES_SHOWN]
    cells = [
        [
            row["name"],
            str(row["examples"]),
            formatting.number(row["loss"], 4),
            *(_gap(row[key]) for key in ("to_winner", "to_best_member")),
            "" if row["dropped"] is None else str(row["dropped"]),
        ]
        for row in rows
    ]
    caption = (
        f"{results['tried']} candidates, of which {results['measured_fully']} were measured on all "
        f"{results['examples']} validation examples; the table shows the best {len(rows)} of those "
        "that came furthest. Differences are paired, on the examples that both saw, with 95 % "
        "intervals. They are measured on the data that chose, so they flatter the winner. Dropped: "
        "the round after which a candidate was given up."
    )
    header = [
        "candidate",
        "examples",
        unit,
        "less the winner's",
        "less the best member's",
        "dropped",
    ]
    strong = [index for index, row in enumerate(rows) if row["number"] == results["winner"]]
    return [
        Heading("The chosen merge"),
        Bullets(search_findings.sentences(results)),
        Table(header, cells, caption, strong=strong),
        Picture(
            "search",
            plots.candidates(results["candidates"], results["winner"], unit),
            f"Candidates by their {name} on all validation examples. Where a candidate saw only "
            "part of them, it is estimated.",
        ),
    ]


def _gap(gap: Json | None) -> Cell:
    # None: the loss of the candidate is not finite
    if gap is None:
        return "–"
    return Interval(f"{gap['estimate']:+.4f}", formatting.normal_bounds(gap["estimate"], gap["se"]))


def controls(run: Run) -> list[Block]:
    """Return the table of the controls and their pictures; empty where there are none."""
    if not run.controls:
        return []
    # a searched merge is evaluated under the name of its method
    chosen = next((model for model in run.models if model["name"] == AUTO), None)
    return control_blocks(run.controls, run.loss_unit, chosen)


def control_blocks(controls: Json, unit: str, chosen: Json | None = None) -> list[Block]:
    """Return the blocks of the chapter.

    Args:
        controls: controls.json.
        unit: of losses.
        chosen: summary of the merge that a search chose, for the picture of both splits.
    """
    # the plane has 49 models: it is a picture only; subsets have a table of their own
    rows = [row for row in controls["rows"] if row["group"] not in OUTSIDE_THE_TABLE]
    split = controls["split"]
    p_values = [gap["p"] for row in rows for gap in row["against"].values()]
    # an iterator: `_cells` takes the values in the order of `p_values`
    corrected = iter(holm(p_values))
    cells: list[list[Cell]] = [_cells(row, controls["best_member"], corrected) for row in rows]
    # the mean is no model, and has no paired differences here
    members = [index for index, row in enumerate(rows) if row["kind"] == "member"]
    means = [
        formatting.mean_sd([rows[index][key] for index in members], 4)
        for key in ("loss", "validation_loss")
    ]
    after_members = members[-1] + 1
    cells.insert(after_members, ["mean member (sd between members)", *means, "", "", ""])
    header = ["model", f"{split} loss ({unit})", "validation loss"]
    header += [f"less {RIVALS[rival]}" for rival in _CONTROL_RIVALS]
    caption = (
        f"On {controls['examples']} {split} examples. 95 %: "
        "bootstrap, p of the paired t-test, and p by Holm's method over all comparisons "
        "of this table. All "
        "controls were made in device memory; none was written."
    )
    table = Table(header, cells, caption, strong=[after_members])
    blocks: list[Block] = [Heading("Controls")]
    # Before the long table: whether merging or length is what helps.
    if lambdas := controls.get("lambdas"):
        blocks.append(_lambda_table(lambdas))
    return [
        *blocks,
        table,
        *_subset_blocks(controls, unit),
        *_subset_score_blocks(controls),
        *_pictures(controls["rows"], split, unit, chosen),
    ]


def _subset_blocks(controls: Json, unit: str) -> list[Block]:
    """Return table and picture of the loss by number of members; empty where it is not measured."""
    # absent in files of an earlier version
    curves = controls.get("subsets")
    if not curves:
        return []
    rows: list[list[Cell]] = []
    strong = []
    for method, curve in curves.items():
        for point in curve["points"]:
            gain = "gain" in point
            cell = formatting.interval(Difference(**point["gain"])) if gain else ""
            loss = formatting.number(point["loss"], 4)
            rows.append([method, str(point["size"]), str(point["subsets"]), loss, cell])
        doubled = curve["doubled"]
        if "reason" in doubled:
            continue
        strong.append(len(rows))
        gap = {key: value for key, value in doubled.items() if key not in ("size", "loss")}
        loss = formatting.number(doubled["loss"], 4)
        cells = [f"{doubled['size']} (extrapolated)", "", loss]
        rows.append([method, *cells, formatting.interval(Difference(**gap))])
    fits = "; ".join(
        f"{method} {curve['a']:.4f} {curve['b']:+.4f} / members, at most {curve['misfit']:.4f} off"
        for method, curve in curves.items()
    )
    reasons = {curve["doubled"].get("reason") for curve in curves.values()} - {None}
    caption = (
        f"Merges of subsets of the members on {controls['examples']} {controls['split']} examples: "
        "mean over subsets. Difference to the mean member; of the extrapolated row to all members. "
        "95 % intervals and p over items and, where there are three members or more, over members "
        f"(jackknife, conservative). Fits: {fits}."
        + "".join(f" No extrapolation: {reason}." for reason in sorted(reasons))
    )
    header = ["merge", "members", "subsets", f"loss ({unit})", "difference"]
    return [
        Heading("How many members are worth it?", 3),
        Table(header, rows, caption, strong=strong),
        Picture(
            "subsets",
            plots.subsets(curves, f"{controls['split']} loss ({unit})"),
            "Loss by number of merged members; dashed: the fit up to twice as many.",
        ),
    ]


def _subset_score_blocks(controls: Json) -> list[Block]:
    """Return tables and pictures of the share of right answers by number of members."""
    blocks: list[Block] = []
    for task, curves in (controls.get("subset_scores") or {}).items():
        rows: list[list[Cell]] = [
            [
                method,
                str(point["size"]),
                str(point["subsets"]),
                formatting.number(100 * point["loss"], 1),
                formatting.interval(Difference(**point["gain"]), 100, 1) if "gain" in point else "",
            ]
            for method, curve in curves.items()
            for point in curve["points"]
        ]
        caption = (
            f"Right answers to {task}: mean over the subsets of one size. Difference to the mean "
            "member, in points. 95 % intervals and p over items and, where there are "
            "three members or more, over members (jackknife, conservative)."
        )
        header = ["merge", "members", "subsets", "right (%)", "difference"]
        picture = plots.subsets(curves, f"right answers to {task}", fit=False)
        blocks += [
            Heading(f"How many members are worth it, by {task}?", 3),
            Table(header, rows, caption),
            Picture(f"subsets-{task}", picture, "Share of right answers by number of members."),
        ]
    return blocks


def _lambda_table(lambdas: Json) -> Table:
    """Return the comparisons at lambda 1 and with each side at its own lambda."""
    own_rows = lambdas["own"]
    best = lambdas["best_member"]

    def label(name: str) -> str:
        return {**RIVALS, AVERAGE: AVERAGE}.get(name, name)

    def scale(name: str) -> str:
        if name == MEAN_MEMBER:
            return "each its own"
        row = best if name == BEST_MEMBER else own_rows[name]
        line = f" ({row['line']})" if name == BEST_MEMBER else ""
        return f"{row['lambda']:g}{' (edge)' if row['edge'] else ''}{line}"

    gaps = [row[side] for row in lambdas["rows"] for side in ("at_one", "own") if row[side]]
    corrected = iter(holm([gap["p"] for gap in gaps]))

    def cell(gap: Json | None) -> Cell:
        if gap is None:
            return ""
        return formatting.interval(Difference(**gap), holm=next(corrected))

    rows: list[list[Cell]] = []
    for row in lambdas["rows"]:
        is_same = row["rival"] == row["model"]
        rows.append(
            [
                label(row["model"]),
                "itself at lambda 1" if is_same else label(row["rival"]),
                cell(row["at_one"]),
                scale(row["model"]),
                "1" if is_same else scale(row["rival"]),
                cell(row["own"]) or "the same model",
            ]
        )
    header = ["model", "less", "at lambda 1", "its lambda", "lambda of the other"]
    header.append("each at its own lambda")
    caption = (
        "base + lambda (model - base). A lambda is chosen on validation among those of the "
        "controls, by loss; (edge): the lowest or highest of them. At its own lambda the best "
        "member is the one that is best then. What a merge gains on it is merging; what a model "
        "gains on itself at lambda 1 is length. 95 %: bootstrap, p of the paired t-test, and p by "
        "Holm's method over all comparisons of this table."
    )
    return Table(header, rows, caption, text=(0, 1))


def _cells(row: Json, best: Json, corrected: Iterator[float]) -> list[Cell]:
    mark = f" (best by loss on {best['chosen_on']})" if row["name"] == best["name"] else ""
    # in the order of the p values that were corrected
    holm_p = {rival: next(corrected) for rival in row["against"]}
    gaps = ((row["against"].get(rival), holm_p.get(rival)) for rival in _CONTROL_RIVALS)
    return [
        row["name"] + mark,
        formatting.number(row["loss"], 4),
        formatting.number(row["validation_loss"], 4),
        *(
            "" if gap is None or p is None else formatting.interval(Difference(**gap), holm=p)
            for gap, p in gaps
        ),
    ]


def _lines(rows: Sequence[Json]) -> dict[str, list[Json]]:
    """Return the rows of every model that was measured at several lambdas, ascending."""
    lines: dict[str, list[Json]] = {}
    for row in rows:
        # of an earlier version only the average has a line, which has no name there
        line = row.get("line") or (AVERAGE if row["group"] == "lambda_line" else None)
        line = AVERAGE if row["name"] == AVERAGE else line
        if line is not None and row["name"] != "base":
            lines.setdefault(line, []).append(row)
    return {
        name: sorted(line, key=lambda row: float(row["at"][0]))
        for name, line in lines.items()
        if len(line) > 1
    }


def _pictures(rows: Sequence[Json], split: str, unit: str, chosen: Json | None) -> list[Block]:
    def at(row: Json) -> float:
        return float(row["at"][0])

    # each picture only where its group of controls was asked for
    by_name = {row["name"]: row for row in rows}
    pictures: list[Block] = []
    lines = _lines(rows)
    # base and average are always among the controls: alone they are no line
    if lines:
        picture = plots.lambda_line(lines, by_name["base"], split, unit)
        caption = "From the base (0) to the model (1) and beyond: members, average and selections."
        pictures.append(Picture("lambda-line", picture, caption))
    if between := [row for row in rows if row["group"] == "barrier"]:
        # the members themselves are the ends of the line, and were measured under their names
        ends = [{**by_name[member_name(end)], "at": [end]} for end in (0, 1)]
        picture = plots.barrier(sorted([*between, *ends], key=at), split, unit)
        caption = "On the straight line from one member to another."
        pictures.append(Picture("barrier", picture, caption))
    if plane := [row for row in rows if row["group"] == "plane"]:
        picture = plots.plane(plane, split, unit)
        pictures.append(Picture("plane", picture, "The plane of the base and two members."))
    both = [
        row
        for row in rows
        if row["validation_loss"] is not None and row["group"] not in OUTSIDE_THE_TABLE
    ]
    # with validation on both axes the picture would be a diagonal
    if split == "test" and both:
        picture = plots.splits(both, chosen, unit)
        caption = "Does validation order the models as the test does?"
        pictures.append(Picture("splits", picture, caption))
    return pictures
