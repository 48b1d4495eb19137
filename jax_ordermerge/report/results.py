"""Run directories -> one page of Markdown: what each run found, what they show together, and what they do not."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.report import document, findings, formatting, run_report
from jax_ordermerge.report.document import Block, Bullets, Heading, Paragraph, Table
from jax_ordermerge.report.run_report import Run

_AGAINST = {
    "mean_member": "the mean member",
    "best_member": "the member chosen on validation",
    "average": "the average",
}


def write(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Write one page about several runs.

    Nothing on it depends on where the runs or their data lie: of paths the last part is named.

    Args:
        directories: run directories that are evaluated.
        out: the file, which ends in `.md`.

    Raises:
        UserError: no run directory, one that was not evaluated, two of one name, or losses of different kinds.
    """
    page = Path(out)
    if page.suffix != ".md":
        raise UserError(f"--out {out}: expected a file that ends in .md")
    runs = [run_report.read(Path(directory)) for directory in directories]
    unfinished = [run.name for run in runs if not (run.evaluations and run.analysis)]
    if unfinished:
        raise UserError(
            f"the run {unfinished[0]} was not analyzed and evaluated; let ordermerge run finish it first"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(
            f"two of the runs have the same name ({', '.join(names)}); give each config a name of its own"
        )
    if len({run.loss_unit for run in runs}) > 1:
        raise UserError(
            "the losses of these runs are of different kinds; give runs of one objective"
        )
    atomic.replace(page, document.render_markdown("Results", build(runs), pictures=".").encode())
    return page


def build(runs: Sequence[Run]) -> list[Block]:
    """Return the blocks of the page, for runs that are analyzed and evaluated."""
    compared = [run_report.compare(run) for run in runs]
    blocks: list[Block] = [
        Paragraph(
            "Written by ordermerge results from the run directories: every number and every verdict is computed, none is typed. "
            "An error after ± is one standard error. Clearly: p < 0.01 after Holm's correction over the merges of a run, weakly: p < 0.05."
        ),
        Heading("All runs"),
        _overview(runs, compared),
        _verdicts(runs, compared),
        Heading("What is shown, and what is not"),
        Bullets([*_shown(runs, compared), *_not_shown(runs, compared)]),
    ]
    for run, found in zip(runs, compared, strict=True):
        told = findings.sentences(run.analysis, run.evaluations, found, run.merge, run.loss_unit)
        blocks += [
            Heading(run.name),
            Paragraph(_setting(run)),
            Bullets(told),
            run_report.result_table(run, found),
            run_report.difference_table(found),
            _positions(run, found),
        ]
    return blocks


# --- over all runs ----------------------------------------------------------------------------------------------------------


def _overview(runs: Sequence[Run], compared: Sequence[findings.Comparison]) -> Table:
    rows = []
    for run, found in zip(runs, compared, strict=True):
        models = _models(run)
        members = [model for model in models.values() if model["kind"] == "member"]
        best = found["best"]
        chosen, on = _chosen(run, found)
        gap = found["merges"][chosen]["loss"] if chosen else None
        rows.append(
            [
                run.name,
                formatting.number(models["base"].get("loss"), 4),
                formatting.mean_sd([model.get("loss") for model in members], 4),
                f"{formatting.number(models[best['name']].get('loss'), 4)} ({best['name']}, by {best['chosen_on']})"
                if best
                else "–",
                f"{_loss_of(run, found, chosen)} ({chosen}, by {on})" if chosen else "–",
                formatting.interval(gap["mean_member"], 1, 4) if gap else "–",
                formatting.number(run.cosine, 3),
            ]
        )
    return Table(
        [
            "run",
            "base",
            "mean member (sd)",
            "best member",
            "best merge",
            "best merge less mean member",
            "cosine",
        ],
        rows,
        f"Held-out loss in {runs[0].loss_unit}. Best: of the lowest validation loss, reported on test examples; of several merge seeds "
        "the mean. The difference with its 95 % paired bootstrap interval. Cosine: mean over pairs of the members' task vectors.",
        text=(0, 3, 4),
    )


def _chosen(run: Run, found: findings.Comparison) -> tuple[str | None, str]:
    """Return the merge of the lowest validation loss, of several seeds the mean, and what it was chosen on."""
    key = (
        "validation_loss"
        if found["best"] and found["best"]["chosen_on"] == "validation"
        else "loss"
    )
    models = _models(run)
    known = {
        name: fmean(models[one][key] for one in row["names"])
        for name, row in found["merges"].items()
        if all(models[one].get(key) is not None for one in row["names"])
    }
    return min(
        known, key=lambda name: known[name]
    ) if known else None, "validation" if key != "loss" else "test"


def _loss_of(run: Run, found: findings.Comparison, name: str) -> str:
    models = _models(run)
    return formatting.mean_sd(
        [models[one].get("loss") for one in found["merges"][name]["names"]], 4
    )


def _verdicts(runs: Sequence[Run], compared: Sequence[findings.Comparison]) -> Table:
    merges = dict.fromkeys(name for found in compared for name in found["merges"])
    rows = [
        [
            name,
            *(
                _counts(findings.verdict(*one) for one in _tested(name, compared, against))
                for against in _AGAINST
            ),
        ]
        for name in merges
    ]
    return Table(
        ["merge", *(f"against {whom}" for whom in _AGAINST.values())],
        rows,
        f"Held-out loss: in how many of {len(runs)} runs a merge is clearly or weakly better or worse, after Holm's correction in each run.",
        text=(0, 1, 2, 3),
    )


def _tested(
    name: str, compared: Sequence[findings.Comparison], against: str
) -> list[tuple[float, float, bool]]:
    rows = [found["merges"][name]["loss"] for found in compared if name in found["merges"]]
    return [
        (row[against]["estimate"], row["holm"][against], True)
        for row in rows
        if row and against in row
    ]


def _counts(verdicts: Iterable[str]) -> str:
    """Return how often each verdict came.

    Example:
        >>> _counts(["clearly worse", "not told apart", "clearly worse"])
        'not told apart 1, clearly worse 2'
    """
    found = list(verdicts)
    order = ("clearly better", "weakly better", findings.APART, "weakly worse", "clearly worse")
    return (
        ", ".join(f"{name} {found.count(name)}" for name in sorted(set(found), key=order.index))
        or "–"
    )


def _shown(runs: Sequence[Run], compared: Sequence[findings.Comparison]) -> list[str]:
    told = []
    epochs = dict.fromkeys(tuple(row["epochs"]) for run in runs for row in _effects(run))
    for label in epochs:
        rows = [row for run in runs for row in _effects(run) if tuple(row["epochs"]) == label]
        early, late = (
            sum(
                bool(formatting.strength(row["p"])) and (row["estimate"] < 0) == first
                for row in rows
            )
            for first in (True, False)
        )
        sizes = ", ".join(f"{row['estimate']:+.3f}" for row in rows)
        told.append(
            f"Position in epoch {' = '.join(map(str, label))}: samples seen early end with the higher loss in {early} of {len(rows)} runs, "
            f"those seen late in {late}, no effect can be told in {len(rows) - early - late} "
            f"(slopes {sizes} {runs[0].loss_unit}; p < 0.05 in each run by itself)."
        )
    for name in dict.fromkeys(name for found in compared for name in found["merges"]):
        verdicts = {
            against: [findings.verdict(*one) for one in _tested(name, compared, against)]
            for against in ("mean_member", "average")
        }
        for against, seen in verdicts.items():
            better, worse = (sum(word in one for one in seen) for word in ("better", "worse"))
            if better == len(seen) > 0:
                told.append(f"{name} is better than {_AGAINST[against]} in all {len(seen)} runs.")
            elif worse == len(seen) > 0:
                told.append(f"{name} is worse than {_AGAINST[against]} in all {len(seen)} runs.")
            elif better and worse:
                told.append(
                    f"{name} is better than {_AGAINST[against]} in {better} and worse in {worse} of {len(seen)} runs: it depends on the data."
                )
    return told


def _not_shown(runs: Sequence[Run], compared: Sequence[findings.Comparison]) -> list[str]:
    sizes = sorted(
        {int(run.state["parameters"]) for run in runs if run.state and "parameters" in run.state}
    )
    examples = sorted(int(run.data["train"]["examples"]) for run in runs if run.data)
    told = []
    undecided = [
        name
        for name in dict.fromkeys(name for found in compared for name in found["merges"])
        if all(
            findings.verdict(*one) == findings.APART
            for one in _tested(name, compared, "mean_member")
        )
    ]
    if undecided:
        told.append(
            f"Not shown: any difference of {', '.join(undecided)} to the mean member. That is not equality: see the intervals of each run."
        )
    if sizes and examples:
        told.append(
            f"Not shown: what larger models do. These have {' and '.join(f'{size:,}' for size in sizes)} parameters and "
            f"{examples[0]} to {examples[-1]} training examples a run."
        )
    told.append(
        "Not shown: another population. Each run is one set of orders; the errors are over test items for these trained models, and what "
        "another training would add is seen in the spread of the members alone. Holm's correction is within a run, not over the runs."
    )
    if not any(model.get("tasks") for run in runs for model in _models(run).values()):
        told.append(
            "Not shown: right answers. Held-out loss is all that was measured, and a lower loss need not answer better."
        )
    return told


# --- of one run -------------------------------------------------------------------------------------------------------------


def _setting(run: Run) -> str:
    config, data = run.config, run.data or {}
    training, population = config["training"], config["population"]
    counts = ", ".join(
        f"{part['examples']} {split} examples"
        for split, part in data.items()
        if isinstance(part, Mapping)
    )
    long = data.get("train", {}).get("counts", {}).get("dropped_too_long", 0)
    counts += (
        f" ({long} of {data['train']['counts']['read']} read for training were above {config['data']['max_length']} tokens)"
        if long
        else ""
    )
    state = run.state or {}
    took = f" Trained in {state['seconds']:.0f} s." if "seconds" in state else ""
    return (
        f"{_last(config['model']['base'])} ({state.get('parameters', 0):,} parameters) on {_last(config['data']['train'])}: {counts}; "
        f"{population['members']} orders of level {population['level']}, {training['epochs']} epochs, batch {training['batch']}, "
        f"{training['optimizer']}, learning rate {training['learning_rate']:g} ({training['schedule']}), seed {config['seed']}, merged in "
        f"{config['merge']['dtype']}.{took}"
    )


def _last(path: str) -> str:
    return Path(path).name if Path(path).is_absolute() else path


def _positions(run: Run, found: findings.Comparison) -> Table:
    """Return the gap between early and late samples, and the slope by position, in the members and after each merge."""
    assert run.analysis is not None
    effects, gaps = _effects(run), run.analysis["pooled"]["early_late"]
    merged = run.analysis["merged"]
    rows = [
        ["members", *(_estimate([gap]) for gap in gaps), *(_estimate([row]) for row in effects)]
    ]
    for name, row in found["merges"].items():
        own = [merged[one] for one in row["names"] if one in merged]
        if own:
            halves = [
                [one["early_late"][epoch].get("merged", one["early_late"][epoch]) for one in own]
                for epoch in range(len(gaps))
            ]
            left = [one["after"].get("coefficients", []) for one in own]
            slopes = [
                [rows_of[number] for rows_of in left if number < len(rows_of)]
                for number in range(len(effects))
            ]
            rows.append([name, *map(_estimate, halves), *map(_estimate, slopes)])
    labels = [" = ".join(map(str, row["epochs"])) for row in effects]
    return Table(
        [
            "",
            *(f"gap, epoch {epoch + 1}" for epoch in range(len(gaps))),
            *(f"slope, epoch {label}" for label in labels),
        ],
        rows,
        f"Position effects on the training samples in {run.loss_unit}. Gap: the half that a member saw early less the half that it saw late, mean "
        "over the members' orders. Slope: from the first place to the last; of a merge by a sample's mean position in all members. Averaging "
        "over orders alone divides the gap by the number of members and leaves the slope. Of several merge seeds mean estimate ± mean error.",
    )


def _estimate(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows or any("estimate" not in row for row in rows):
        return "–"
    return f"{fmean(row['estimate'] for row in rows):+.4f} ± {fmean(row['se'] for row in rows):.4f}"


def _effects(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (
        (run.analysis or {}).get("fixed_effects", {}).get("coefficients", [])
    )
    return found


def _models(run: Run) -> dict[str, dict[str, Any]]:
    return {model["name"]: model for model in run.models}
