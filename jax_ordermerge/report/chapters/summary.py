"""The first screen of the report: four sentences, one table and one picture."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from jax_ordermerge.analysis.paired import Difference, holm
from jax_ordermerge.config.merge import AUTO
from jax_ordermerge.json_types import Json
from jax_ordermerge.report import contrasts, formatting
from jax_ordermerge.report.differences import (
    AVERAGE,
    BEST_MEMBER,
    MEAN_MEMBER,
    RIVALS,
    MergeComparison,
)
from jax_ordermerge.report.document import Block, Bullets, Heading, Paragraph, Picture, Table
from jax_ordermerge.report.formatting import INDISTINGUISHABLE, number, verdict, versus
from jax_ordermerge.report.plots.paired import paired_differences
from jax_ordermerge.report.run import Run, percentages

ROWS = 8  # of the table, at most
_TASKS = 2  # with a column in it
_LAMBDA = "lambda_"  # prefix of the groups of controls that are models at other lambdas


@dataclass(frozen=True)
class _Control:
    """The control at another lambda that validation chose.

    Attributes:
        name, loss: of the model.
        gaps: to the rivals.
        p: against the best member, not corrected; None where the two were not compared.
    """

    name: str
    loss: float
    gaps: dict[str, Difference]
    p: float | None


def summary(run: Run) -> list[Block]:
    """Return what a reader needs who reads no further."""
    control = _scaled(run)
    sentences = [*_position(run), *_average(run), *_selection(run), *_ship(run, control)]
    heading = Heading("What was found")
    if not sentences:
        return [
            heading,
            Paragraph("Nothing yet: neither the analysis nor the evaluation has been run."),
        ]
    blocks: list[Block] = [heading, Bullets(sentences)]
    rows = _rows(run, control)
    if any(row.merge for row in rows):
        blocks.append(_table(run, rows, control))
    gaps = {row.label: row.gaps for row in rows if row.gaps}
    if gaps:
        caption = (
            f"Paired differences in {run.loss_name} on the same examples, with 95 % intervals. "
            "Left of 0: better than that rival."
        )
        picture = paired_differences(gaps, run.loss_unit)
        blocks.append(Picture("differences", picture, caption, narrow=True))
    return blocks


# ---------------------------------------------------------------------- sentences


def _position(run: Run) -> Iterator[str]:
    if run.analysis is None:
        return
    if "reason" in run.analysis["fixed_effects"]:
        yield f"Position: not determined, {run.analysis['fixed_effects']['reason']}."
        return
    rows = contrasts.slopes(run)
    # the sentence makes a claim for each epoch, so each pays for all
    corrected = holm([gap.p for _, gap in rows])
    # position 0 is the first step: a negative slope is a higher loss of early samples
    ends: dict[str, list[str]] = {"early": [], "late": [], "": []}
    for (label, gap), p in zip(rows, corrected, strict=True):
        size = label
        strength = formatting.strength(p)
        if strength:
            size += (
                f" ({strength}: slope {gap.estimate:+.4f} "
                f"{formatting.bounds(gap.low, gap.high)}, {formatting.p_text(p)})"
            )
        end = "early" if gap.estimate < 0 else "late"
        ends[end if strength else ""].append(size)
    clauses = [
        f"samples seen {end} end with the higher loss in {', '.join(ends[end])}"
        for end in ("early", "late")
        if ends[end]
    ]
    if ends[""]:
        clauses.append(f"no slope is distinguishable from 0 in {', '.join(ends[''])}")
    tested = len(rows) > 1 and len(ends[""]) < len(rows)
    correction = " p is corrected over the epochs by Holm's method." if tested else ""
    yield f"Position: {'; '.join(clauses)}.{correction}"


def _average(run: Run) -> Iterator[str]:
    if merge := run.claims.merges.get(AVERAGE):
        yield f"Average: {_against(run, merge, (MEAN_MEMBER, BEST_MEMBER))}."


def _selection(run: Run) -> Iterator[str]:
    methods = {row["name"]: row.get("method") for row in (run.merge or {"merges": []})["merges"]}
    names = [
        name
        for name, merge in run.claims.merges.items()
        if methods.get(merge.names[0], name) == "selection"
    ]
    if not names:
        return
    # of several variants the first in the config: the best of them would be a choice by the test
    name = _lowest(run, names) or names[0]
    variants = f", of {len(names)} variants" if len(names) > 1 else ""
    merge = run.claims.merges[name]
    yield f"Selection ({name}{variants}): {_against(run, merge, (AVERAGE, BEST_MEMBER))}."


def _ship(run: Run, control: _Control | None) -> Iterator[str]:
    best = run.claims.best
    if best is None or not run.claims.merges:
        return
    name, why = shipped(run)
    text = f"What to ship: {name}, {why}."
    if control and control.p is not None:
        gap = control.gaps[BEST_MEMBER]
        word = verdict(gap.estimate, control.p)
        if word.endswith("better"):
            text += (
                f" But another length of the task vector helps by itself: {control.name} has loss "
                f"{control.loss:.4f}, {word} "
                f"({gap.estimate:+.4f} {formatting.bounds(gap.low, gap.high)}, "
                f"{formatting.p_text(control.p)}) than the best member; see Controls."
            )
    elif not control:
        text += _without_choice(run)
    yield text


def shipped(run: Run) -> tuple[str, str]:
    """Return which model to ship, and why.

    It is a merge only where the choice did not need the test examples, and where those say that it
    is better than what it replaces and worse in no measure.
    """
    best = run.claims.best
    assert best is not None
    merges = run.claims.merges
    validated = best.chosen_on == "validation"
    # a search has chosen on validation examples; else the lowest loss there; else no choice at all
    candidate = AUTO if AUTO in merges else _lowest(run, list(merges)) if validated else AVERAGE
    rival = BEST_MEMBER if validated or candidate == AUTO else MEAN_MEMBER
    if candidate not in merges:
        return best.name, "because there is no merge that could be chosen without test examples"
    verdicts = _verdicts(merges[candidate], rival)
    # before the word a verdict has its strength: weakly or clearly
    worse = [measure for measure, word in verdicts.items() if word.endswith("worse")]
    better = [measure for measure, word in verdicts.items() if word.endswith("better")]
    chosen = "the merge of the lowest validation loss" if validated else "which needs no choice"
    if candidate == AUTO:
        chosen = "the merge that the search chose on validation"
    if better and not worse:
        return candidate, (
            f"{chosen}: it is better in {' and '.join(better)} than {RIVALS[rival]}, and worse in "
            "no measure"
        )
    reason = f"worse in {' and '.join(worse)}" if worse else "not distinguishable in any measure"
    if validated:
        return best.name, (
            f"the best member on validation: {candidate}, {chosen}, is {reason} on test"
        )
    return "any member", (
        f"or add validation examples to choose one: {candidate}, {chosen}, is {reason} against "
        f"{RIVALS[rival]}"
    )


def _against(run: Run, merge: MergeComparison, rivals: Sequence[str]) -> str:
    """Return the verdicts on the loss, or on the first task where no loss was measured."""
    task = None if merge.loss else next(iter(merge.measures), None)
    measure = merge.measures.get(task)
    if measure is None:
        return "not compared, there are no results on the same test examples"
    scale, digits = (1, 4) if task is None else (100, 1)
    clauses = []
    for rival in rivals:
        if (gap := measure.gaps.get(rival)) is None:
            continue
        word = verdict(gap.estimate, measure.holm[rival], lower_is_better=task is None)
        size = (
            f"{scale * gap.estimate:+.{digits}f} "
            f"{formatting.bounds(scale * gap.low, scale * gap.high, digits)}, "
            f"{formatting.p_text(measure.holm[rival])}"
        )
        clauses.append(versus(word, size, _rival_name(run, rival)))
    name = run.loss_name if task is None else f"right answers to {task}, points"
    return f"{name} {'; '.join(clauses)}"


def _rival_name(run: Run, rival: str) -> str:
    best = run.claims.best
    if rival != BEST_MEMBER or best is None:
        return RIVALS[rival]
    if run.populations:
        return f"{RIVALS[rival]} of each population, chosen on {best.chosen_on}"
    # the luckiest of several on the very examples that judge it
    optimistic = ": optimistic" if best.chosen_on == "test" else ""
    return f"{RIVALS[rival]} ({best.name}, chosen on {best.chosen_on}{optimistic})"


def _verdicts(merge: MergeComparison, rival: str) -> dict[str, str]:
    return {
        task or "loss": verdict(
            measure.gaps[rival].estimate, measure.holm[rival], lower_is_better=task is None
        )
        for task, measure in merge.measures.items()
        if rival in measure.gaps
    }


def _lowest(run: Run, names: Sequence[str]) -> str | None:
    """Return the merge of the lowest mean validation loss; None where it was not measured."""
    models = {
        model["name"]: float(model["validation_loss"])
        for model in run.models
        if model.get("validation_loss") is not None
    }
    seeds = {name: run.claims.merges[name].names for name in names}
    # a merge of which only some seeds were measured has no mean
    means = {
        name: fmean(models[seed] for seed in of_name)
        for name, of_name in seeds.items()
        if all(seed in models for seed in of_name)
    }
    return min(means, key=lambda name: means[name], default=None)


def _lambda_controls(run: Run) -> list[Json]:
    """Return the controls of models at other lambdas, which have the best member as a rival."""
    rows = [
        row
        for row in (run.controls or {"rows": []})["rows"]
        if row["group"].startswith(_LAMBDA) and row["against"].get(BEST_MEMBER)
    ]
    # an average at another lambda is also a merge: what length does alone, a member shows
    return [row for row in rows if row["kind"] == "scaled member"] or rows


def _scaled(run: Run) -> _Control | None:
    """Return the control of another lambda with the lowest validation loss.

    None where the examples that would choose are those that are reported: the lowest of many losses
    is low by chance.
    """
    rows = _lambda_controls(run)
    unmeasured = any(row["validation_loss"] is None for row in rows)
    if not run.controls or run.controls["split"] == "validation" or not rows or unmeasured:
        return None
    row = min(rows, key=lambda row: float(row["validation_loss"]))
    against = contrasts.of_controls(run)[row["name"]]
    gaps = {rival: gap for rival, gap in against.items() if rival in RIVALS}
    p = gaps[BEST_MEMBER].p if BEST_MEMBER in gaps else None
    return _Control(row["name"], float(row["loss"]), gaps, p)


def _without_choice(run: Run) -> str:
    """Return how many models at other lambdas are better, where validation could choose none."""
    against = contrasts.of_controls(run)
    tests = {
        (name, rival): gap for name, of_name in against.items() for rival, gap in of_name.items()
    }
    # the reader will pick the best of them, so each pays for all comparisons of the controls
    corrected = dict(zip(tests, holm([gap.p for gap in tests.values()]), strict=True))
    keys = [(row["name"], BEST_MEMBER) for row in _lambda_controls(run)]
    compared = [key for key in keys if key in tests]
    better = sum(
        verdict(tests[key].estimate, corrected[key]).endswith("better") for key in compared
    )
    if not better:
        return ""
    return (
        f" But another length of the task vector helps by itself: {better} of the {len(compared)} "
        "models at other lambdas are better than the best member, by Holm's method over all "
        "comparisons of the controls. None of them is chosen: that takes validation examples "
        "beside the reported ones; see Controls."
    )


# ---------------------------------------------------------------------- table


@dataclass(frozen=True)
class _Row:
    """A row of the table: models whose mean is shown, and their differences to the rivals."""

    label: str
    loss: float | None
    models: Sequence[Json] = ()
    gaps: dict[str, Difference] | None = None  # of the loss
    p: float | None = None  # against the best member
    merge: str | None = None


def _rows(run: Run, control: _Control | None) -> list[_Row]:
    if not run.members:
        return []
    best, base = run.claims.best, [model for model in run.models if model["kind"] == "base"]
    rows = [_Row(model["name"], model.get("loss"), [model]) for model in base]
    rows.append(_Row(f"mean of {len(run.members)} members", _mean_loss(run.members), run.members))
    if best is not None:
        models = [model for model in run.models if model["name"] == best.name]
        rows.append(_Row(f"best member on {best.chosen_on}", _mean_loss(models), models))
    merges = [_merge_row(run, name, merge) for name, merge in run.claims.merges.items()]
    places = ROWS - len(rows) - (control is not None)
    if len(merges) > places:
        # those that matter: the plain average, what would be shipped, and then by loss
        first = {AVERAGE, AUTO, shipped(run)[0]}
        order = sorted(merges, key=lambda row: (row.merge not in first, row.loss or 0.0))
        merges = [row for row in merges if row in order[:places]]
    rows += merges
    if control is not None:
        label = f"{control.name} (control)"
        rows.append(_Row(label, control.loss, gaps=control.gaps, p=control.p))
    return rows


def _merge_row(run: Run, name: str, merge: MergeComparison) -> _Row:
    models = [model for model in run.models if model["name"] in merge.names]
    label = f"{name} ({len(models)} seeds)" if len(models) > 1 else name
    gaps = merge.loss.gaps if merge.loss else None
    p = merge.loss.holm.get(BEST_MEMBER) if merge.loss else None
    return _Row(label, _mean_loss(models), models, gaps, p, name)


def _mean_loss(models: Sequence[Json]) -> float | None:
    losses = [float(model["loss"]) for model in models if model.get("loss") is not None]
    # a mean over some of the models would not be comparable with that of another row
    return fmean(losses) if losses and len(losses) == len(models) else None


def _table(run: Run, rows: Sequence[_Row], control: _Control | None) -> Table:
    tasks = run.tasks[:_TASKS]
    cells = []
    for row in rows:
        shares = [percentages(row.models, task) for task in tasks]
        gap = (row.gaps or {}).get(BEST_MEMBER)
        cells.append(
            [
                row.label,
                number(row.loss, 4),
                *(f"{fmean(share):.1f}" if share else "–" for share in shares),
                "–" if gap is None else f"{gap.estimate:+.4f}",
                "–" if gap is None else formatting.bounds(gap.low, gap.high),
                "–" if row.p is None else formatting.p_value(row.p),
                "–" if row.p is None or gap is None else verdict(gap.estimate, row.p),
            ]
        )
    name = shipped(run)[0] if run.claims.best else None
    strong = [at for at, row in enumerate(rows) if name is not None and row.merge == name]
    if run.claims.best and name == run.claims.best.name:
        strong = [at for at, row in enumerate(rows) if row.label.startswith("best member")]
    header = ["model", "loss", *(f"{task}, %" for task in tasks)]
    header += ["less the best member", "95 %", "p", "verdict"]
    hidden = len(run.claims.merges) - sum(row.merge is not None for row in rows)
    compared = control is not None and control.p is not None
    of_control = "; of the control, which validation chose, not corrected" if compared else ""
    caption = (
        f"{run.loss_name.capitalize()} in {run.loss_unit}. p: corrected by Holm's method over all "
        f"comparisons of the merges{of_control}. Above 0.05 two models are {INDISTINGUISHABLE}, "
        "never equal."
    )
    if run.populations:
        caption += (
            f" The losses are those of population 0, the differences means over"
            f" {1 + len(run.populations)} populations with t intervals over them."
        )
    if hidden:
        caption += f" More merges, {hidden} of them, stand in Models and merges."
    return Table(header, cells, caption, text=(0, len(header) - 1), strong=strong)
