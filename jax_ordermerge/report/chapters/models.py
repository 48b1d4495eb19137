"""Chapters: loss and accuracy of every model, perplexities of texts, answers side by side."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.paired import Difference
from jax_ordermerge.json_types import Json
from jax_ordermerge.report import formatting
from jax_ordermerge.report.chapters import spread
from jax_ordermerge.report.differences import (
    RIVALS,
    Comparison,
)
from jax_ordermerge.report.document import Block, Cell, Heading, Paragraph, Picture, Table
from jax_ordermerge.report.formatting import shortened
from jax_ordermerge.report.plots import models as plots
from jax_ordermerge.report.run import Run, missing, percentages

ITEMS_SHOWN = 5  # answers per task


def results(run: Run) -> list[Block]:
    """Return the table of the models, their pictures and the table of differences."""
    blocks: list[Block] = [Heading("Base, members and merges")]
    if not run.evaluations:
        return [*blocks, missing(run, "evaluate", run.layout.evaluations)]
    blocks.append(result_table(run))
    if spreads := spread.table([run]):
        blocks += [Heading("Spread between models", 3), spreads]
    if any("sources" in model for model in run.models):
        blocks += [Heading("By source", 3), _source_table(run)]
    if with_loss := [model for model in run.models if model.get("loss") is not None]:
        picture = plots.losses(with_loss, run.loss_unit, run.loss_name)
        blocks.append(Picture("losses", picture, f"{run.loss_name.capitalize()} of every model."))
    for task in run.tasks:
        with_task = [model for model in run.models if task in model.get("tasks", {})]
        # names of tasks are free text, those of pictures become file names
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"accuracy-{task}")
        picture = plots.accuracies(with_task, task)
        blocks.append(Picture(name, picture, f"Correct answers on {task}."))
    if any(merge.measures for merge in run.comparison.merges.values()):
        heading = Heading("Paired differences, merge less rival", 3)
        blocks += [heading, difference_table(run.comparison)]
    return blocks


def result_table(run: Run) -> Table:
    """Return a row per model, and rows of means: of the members, and of the seeds of a merge."""
    # (sd): how much a model owes to its order, which the errors over test items do not contain
    means = {"mean member (sd between members)": run.members}
    for name, merge in run.comparison.merges.items():
        if len(merge.names) > 1:
            means[f"mean {name} (sd between merge seeds)"] = [
                model for model in run.models if model["name"] in merge.names
            ]
    with_loss = any(model.get("loss") is not None for model in run.models)
    best, strong = run.comparison.best, []
    rows: list[list[Cell]] = []
    if best and best.chosen_on == "test" and not with_loss:
        best = None  # without a loss on test examples nothing was chosen on them
    for model in run.models:
        mark = f" (best by loss on {best.chosen_on})" if best and best.name == model["name"] else ""
        cells: list[Cell] = [
            model["name"] + mark,
            formatting.plus_minus(model.get("loss"), model.get("loss_se"), 4),
            formatting.number(model.get("perplexity"), 3),
            formatting.number(model.get("validation_loss"), 4),
        ]
        for score in (model.get("tasks", {}).get(task) for task in run.tasks):
            keys = ("accuracy", "se", "n")
            cells.append(formatting.share(*(score[key] for key in keys)) if score else "–")
        rows.append(cells)
        # a mean follows the last of its models
        for name, models in means.items():
            if models and models[-1] is model:
                strong.append(len(rows))
                rows.append([name, *_mean_cells(models, run.tasks)])
    header = ["model", "loss", "perplexity", "validation loss"]
    header += [f"{task}, %" for task in run.tasks]
    return Table(header, rows, _result_caption(run), strong=strong)


def _source_table(run: Run) -> Table:
    """Return a row per model with its loss on each source of the held-out examples."""
    models = [model for model in run.models if "sources" in model]
    sources = models[0]["sources"]
    rows = [
        [
            model["name"],
            *(
                formatting.plus_minus(part.get("loss"), part.get("loss_se"), 4)
                for part in (model["sources"].get(name, {}) for name in sources)
            ),
        ]
        for model in models
    ]
    header = ["model", *(f"{name} ({part['examples']})" for name, part in sources.items())]
    caption = (
        f"Loss and its 95 % interval in {run.loss_unit} on each source of the"
        f" {(run.evaluations or {}).get('split', 'test')} split, with its number of examples."
    )
    return Table(header, rows, caption)


def _mean_cells(models: Sequence[Json], tasks: Sequence[str]) -> list[str]:
    digits = {"loss": 4, "perplexity": 3, "validation_loss": 4}
    return [
        *(formatting.mean_sd([model.get(key) for model in models], digits[key]) for key in digits),
        *(formatting.mean_sd(percentages(models, task), 1) for task in tasks),
    ]


def _result_caption(run: Run) -> str:
    # all models share the split, so its sizes are read from any of them
    caption = f"On the {(run.evaluations or {}).get('split', 'test')} split"
    for other_split, overlap in run.test_overlaps.items():
        caption += (
            f" (overlapping: {overlap['examples']} of its examples are {other_split} examples too)"
        )
    if run.models and run.models[0].get("tokens"):
        caption += f"; {run.models[0]['tokens']} answer tokens"
    for task in run.tasks:
        first = next(model for model in run.models if task in model.get("tasks", {}))
        caption += f"; {task}: {first['tasks'][task]['n']} items"
    return f"{caption}. Loss in {run.loss_unit}."


def difference_table(comparison: Comparison) -> Table:
    """Return a row per merge (or group of seeds), measure and rival."""
    rows: list[list[Cell]] = []
    for name, merge in comparison.merges.items():
        count = len(merge.names)
        label = f"{name} (mean of {count} seeds)" if count > 1 else name
        for task, measure in merge.measures.items():
            # losses as they are, accuracies as percentage points
            title, scale, digits = (f"{task}, points", 100, 1) if task else ("loss", 1, 4)
            for rival, gap in measure.gaps.items():
                test = measure.mcnemar.get(rival)
                rows.append(
                    [
                        label,
                        title,
                        RIVALS[rival],
                        formatting.interval(gap, scale, digits, holm=measure.holm[rival]),
                        *_median(gap, scale, digits),
                        f"{test.only_first} : {test.only_second}" if test else "",
                        formatting.p_value(test.p) if test else "",
                    ]
                )
    header = ["merge", "measure", "against", "difference", "median", "p, Wilcoxon"]
    header += ["five items hold", "only it : only rival right", "p, McNemar"]
    caption = (
        "Merge less rival; less loss and more points are better. 95 %: studentized bootstrap. p: "
        "of the paired t-test; by Holm: corrected over all comparisons of this table, for answers "
        "of "
        "single models McNemar's mid-p test. Losses weigh tokens where their numbers are stored, "
        "else examples equally. Of several merge seeds the mean over them is compared on each "
        "item, and their spread is in interval and p. Median: items counting equally. Five items "
        "hold: their share of the variance, where it is above a quarter."
    )
    return Table(header, rows, caption, text=(0, 1, 2))


def _median(gap: Difference, scale: int, digits: int) -> list[Cell]:
    """Return what most items say, beside the mean, which a few may decide."""
    if gap.median is None or gap.wilcoxon_p is None:
        return ["", "", ""]
    few = gap.top_share is not None and gap.top_share > paired.FEW_ITEMS and scale == 1
    return [
        f"{scale * gap.median:+.{digits}f}",
        formatting.p_value(gap.wilcoxon_p),
        f"{100 * (gap.top_share or 0):.0f} %" if few else "",
    ]


def texts(run: Run) -> list[Block]:
    """Return perplexities of texts, and merges against members; empty without such a task."""
    # perplexities are no task of right answers, and stand apart in evaluations.json
    models = [model for model in run.models if model.get("texts")]
    if not models:
        return []
    units = ("word", "byte", "token")
    rows = []
    for task in models[0]["texts"]:
        for model in models:
            text = model["texts"][task]
            bits = formatting.plus_minus(text["bits_per_byte"], text["se"], 4)
            perplexities = (formatting.number(text[f"{unit}_perplexity"], 3) for unit in units)
            rows.append([task, model["name"], bits, *perplexities])
    header = ["texts", "model", "bits per byte", *(f"perplexity per {unit}" for unit in units)]
    counts = ", ".join(f"{task} {text['n']}" for task, text in models[0]["texts"].items())
    blocks: list[Block] = [
        Heading("Perplexity of texts"),
        Table(header, rows, f"Number of texts: {counts}.", text=(0, 1)),
    ]
    if differences := list(_text_differences(models, run)):
        corrected = paired.holm([gap.p for *_, gap in differences])
        gaps: list[list[Cell]] = [
            [task, name, formatting.interval(gap, holm=p)]
            for (task, name, gap), p in zip(differences, corrected, strict=True)
        ]
        caption = (
            "Bits per byte, merge less the mean member; 95 % studentized bootstrap "
            "intervals over texts, and p by Holm over this table."
        )
        blocks.append(Table(["texts", "merge", "against the mean member"], gaps, caption, (0, 1)))
    return blocks


def _text_differences(models: Sequence[Json], run: Run) -> Iterator[tuple[str, str, Difference]]:
    members = [model["name"] for model in models if model["kind"] == "member"]
    for model in models:
        names = [model["name"], *members]
        # a model without results by item cannot be paired
        if model["kind"] != "merge" or not members or any(name not in run.items for name in names):
            continue
        for task in model["texts"]:
            by_model = [run.items[name].get("texts", {}).get(task, []) for name in names]
            sizes = np.array([text["bytes"] for text in by_model[0]], float)
            ids = [[text["id"] for text in texts] for texts in by_model]
            # an empty text has no bits per byte; texts must be the same, in one order
            if len(sizes) < 2 or not sizes.all() or any(row != ids[0] for row in ids):
                continue
            merge, *of_members = (
                np.array([-text["logp"] for text in texts]) / sizes / math.log(2)
                for texts in by_model
            )
            # weighted by bytes: a ratio of total bits to total bytes, as in the table above
            mean = np.mean(of_members, axis=0)
            gap = paired.difference(merge, mean, weights=sizes, **run.resampling)
            yield task, model["name"], gap


def answers(run: Run) -> list[Block]:
    """Return the answers to a few items of each task; empty where no task kept its answers."""
    tasks = dict.fromkeys(task for items in run.items.values() for task in items.get("tasks", {}))
    kinds = {model["name"]: model["kind"] for model in run.models}
    blocks: list[Block] = []
    for task in tasks:
        # by id: a model may have been evaluated on a part of the items
        by_model = {
            name: {str(item["id"]): item for item in items["tasks"][task]}
            for name, items in run.items.items()
            if task in items.get("tasks", {})
        }
        for key in _most_telling(by_model, kinds):
            items = {name: items[key] for name, items in by_model.items()}
            question = next(iter(items.values()))
            parts = [[part, shortened(question[part])] for part in ("prompt", "reference")]
            rows = [
                [name, shortened(item["answer"]), "right" if item["correct"] else "wrong"]
                for name, item in items.items()
            ]
            blocks += [
                Heading(f"{task}, item {key}", 3),
                Table(["", ""], parts, text=(0, 1)),
                Table(["model", "answer", ""], rows, text=(0, 1, 2)),
            ]
    if not blocks:
        return []
    note = Paragraph("Items on which members and merges differ most come first.")
    return [Heading("Answers side by side"), note, *blocks]


def _most_telling(
    by_model: Mapping[str, Mapping[str, Json]], kinds: Mapping[str, str]
) -> list[str]:
    """Return ids of items that all models answered, those first on which members and merges differ.

    Args:
        by_model: answers by item id of each model.
        kinds: of the models. The base counts for nothing: it is wrong where all others are right.
    """

    def right(key: str, kind: str) -> list[bool]:
        return [
            bool(items[key]["correct"])
            for name, items in by_model.items()
            if kinds.get(name) == kind
        ]

    def agreement(key: str) -> tuple[float, bool]:
        members, merges = right(key, "member"), right(key, "merge")
        apart = abs(fmean(members) - fmean(merges)) if members and merges else 0.0
        return -apart, len({*members, *merges}) < 2

    first, *rest = by_model.values()
    common = [key for key in first if all(key in items for items in rest)]
    # the sort is stable: among equals the order of the data set stays
    return sorted(common, key=agreement)[:ITEMS_SHOWN]
