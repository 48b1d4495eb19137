"""Several runs on one page of Markdown: the findings of each, and those of all together."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.config.hypotheses import read_hypotheses
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.report import (
    contrasts,
    document,
    findings,
    formatting,
    hypotheses,
    results_tables,
)
from jax_ordermerge.report.chapters import models
from jax_ordermerge.report.differences import MEAN_MEMBER
from jax_ordermerge.report.document import (
    Block,
    Bullets,
    Cell,
    Heading,
    Interval,
    Paragraph,
    Picture,
    Table,
)
from jax_ordermerge.report.formatting import INDISTINGUISHABLE
from jax_ordermerge.report.plots import imbalance
from jax_ordermerge.report.run import Run, compare_models, loss_name, read_runs

_WRITTEN = (
    "Written by ordermerge results from the run directories: every number and every verdict is "
    "computed, none is typed. Brackets hold 95 % intervals."
)


def write(
    directories: Sequence[str | Path], out: str | Path, hypotheses_file: str | Path | None = None
) -> Path:
    """Write one page about several runs.

    With hypotheses the page says first what became of them, and beside it are written their
    picture, `{stem}_hypotheses.svg`, that of positions, `{stem}_positions.svg`, and every
    estimate, `{stem}_hypotheses.csv`.

    The page does not depend on where the runs or their data lie: of paths only the last part is
    shown.

    Args:
        directories: run directories that are evaluated.
        out: the file, which ends in `.md`.
        hypotheses_file: YAML of `config.hypotheses`, about exactly these runs.

    Raises:
        UserError: hypotheses that are not valid or about other runs, no run directory, one that was
            not evaluated, two of one name, or losses of different kinds.
    """
    page = Path(out)
    if page.suffix != ".md":
        raise UserError(f"--out {out}: expected a file that ends in .md")
    runs = read_runs(directories)
    for run in runs:
        # all runs before the first file is written: a page about some of them would look complete
        if not (run.evaluations and run.analysis):
            raise UserError(
                f"the run {run.name} was not analyzed and evaluated; "
                "let ordermerge run finish it first"
            )
    compare_models(runs, "results")
    blocks = build(runs)
    if hypotheses_file is not None:
        plan = read_hypotheses(hypotheses_file)
        tested = hypotheses.evaluate(plan.hypotheses, runs)
        picture = f"{page.stem}_hypotheses"
        blocks = [
            Heading(plan.hypotheses.title),
            *hypotheses.build(plan, tested, runs, picture),
            *_trajectories(runs, f"{page.stem}_positions"),
            *results_tables.lambda_table(runs),
            *results_tables.members_table(runs),
            *_provenance(runs),
        ]
        table = page.with_name(f"{picture}.csv")  # not {stem}.csv, which may be the user's data
        atomic.replace(table, hypotheses.to_csv(tested).encode())
    # pictures first: a page never refers to a file that is not there
    for drawn in document.pictures_of(blocks):
        atomic.replace(page.parent / f"{drawn.name}.svg", f"{drawn.svg}\n".encode())
    atomic.replace(page, document.render_markdown("Results", blocks, pictures=".").encode())
    return page


def _trajectories(runs: Sequence[Run], name: str) -> list[Block]:
    """Return the picture of the effect of position over the steps of each run."""
    analyses = {
        run.name: [x.analysis for x in (run, *run.populations) if x.analysis] for run in runs
    }
    picture = imbalance.trajectories(analyses, name, runs[0].loss_unit)
    if picture is None:
        return []
    caption = (
        "What the step in which a sample was seen changes in its final loss: each population, and "
        "their mean. Levels are known within an epoch only."
    )
    return [Heading("Position over the steps"), Picture(name, picture, caption)]


def _provenance(runs: Sequence[Run]) -> list[Block]:
    """Return what stands below hypotheses: no further test, since each may be made once."""
    return [
        Heading("The runs"),
        Paragraph(_WRITTEN),
        Bullets([f"{run.name}: {_setup(run)}" for run in runs]),
        Heading("What is not shown"),
        Bullets(_limits(runs)),
    ]


def build(runs: Sequence[Run]) -> list[Block]:
    """Return the blocks of the page, for runs that are analyzed and evaluated."""
    blocks: list[Block] = [
        Paragraph(
            f"{_WRITTEN} Clearly: p < 0.01 after Holm's correction over all comparisons of a run; "
            "weakly: p < 0.05."
        ),
        Heading("All runs"),
        _overview(runs),
        *(contrasts.over_runs(runs) if len(runs) > 1 else []),
        Heading("What is shown, and what is not"),
        Bullets(
            [*_position_effects(runs), *_merge_effects(runs), *_undecided(runs), *_limits(runs)]
        ),
    ]
    for run in runs:
        blocks += [
            Heading(run.name),
            Paragraph(_setup(run)),
            Bullets(findings.sentences(run)),
            models.result_table(run),
            models.difference_table(run.comparison),
            _position_table(run),
        ]
    return blocks


# ---------------------------------------------------------------------- over all runs


def _overview(runs: Sequence[Run]) -> Table:
    rows: list[list[Cell]] = []
    for run in runs:
        best, merge = run.comparison.best, _best_merge(run)
        member_cell, merge_cell = "–", "not chosen: no validation losses"
        gap: Cell = "–"
        if best:
            loss = formatting.mean_sd(_values(run, [best.name], "loss"), 4)
            member_cell = f"{loss} ({best.name}, by {best.chosen_on})"
        if best and merge:
            comparison = run.comparison.merges[merge]
            loss = formatting.mean_sd(_values(run, comparison.names, "loss"), 4)
            merge_cell = f"{loss} ({merge}, by validation)"
            if comparison.loss:
                gap = formatting.interval(comparison.loss.gaps[MEAN_MEMBER])
        rows.append(
            [
                run.name,
                formatting.number(_values(run, ["base"], "loss")[0], 4),
                formatting.mean_sd([member.get("loss") for member in run.members], 4),
                member_cell,
                merge_cell,
                gap,
                formatting.number(run.mean_cosine, 3),
            ]
        )
    # `read_runs` refuses runs of different units, so that one unit stands above each column
    header = ["run", "base", "mean member (sd)", "best member", "best merge"]
    header += ["best merge less mean member", "cosine"]
    caption = (
        f"{loss_name(runs).capitalize()} in {runs[0].loss_unit}. "
        "Best: of the lowest loss on the split that the cell names, reported on test examples; of "
        "several merge seeds the mean. The difference with its 95 % studentized bootstrap "
        "interval. Cosine: mean over pairs of the members' task vectors."
    )
    return Table(header, rows, caption, text=(0, 3, 4))


def _values(run: Run, names: Sequence[str], key: str) -> list[float | None]:
    models = {model["name"]: model for model in run.models}
    return [models[name].get(key) for name in names]


def _best_merge(run: Run) -> str | None:
    """Return the merge of the lowest mean validation loss over its seeds.

    None without validation losses: the lowest of several test losses is low by chance.
    """
    means = {}
    for name, merge in run.comparison.merges.items():
        # several seeds are one method: the luckiest seed must not stand for it
        losses = [loss for loss in _values(run, merge.names, "validation_loss") if loss is not None]
        if len(losses) == len(merge.names):
            means[name] = fmean(losses)
    return min(means, key=lambda name: means[name], default=None)


def _merge_names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.comparison.merges))


def _verdicts(runs: Sequence[Run], name: str, rival: str) -> list[str]:
    """Return the verdict on a merge's loss against a rival in each run that has both."""
    # runs need not have the same merges, nor an average to compare with
    merges = [run.comparison.merges.get(name) for run in runs]
    measures = [merge.loss for merge in merges if merge and merge.loss]
    return [
        formatting.verdict(measure.gaps[rival].estimate, measure.holm[rival])
        for measure in measures
        if rival in measure.gaps
    ]


def _position_effects(runs: Sequence[Run]) -> list[str]:
    sentences = []
    rows = [row for run in runs for row in run.coefficients]
    for label in dict.fromkeys(map(formatting.epochs, rows)):
        of_epoch = [row for row in rows if formatting.epochs(row) == label]
        # each run by itself: no correction over epochs or runs, as the sentence says
        significant = [row for row in of_epoch if formatting.strength(row["p"])]
        early = sum(row["estimate"] < 0 for row in significant)
        late = len(significant) - early
        slopes = ", ".join(f"{row['estimate']:+.3f}" for row in of_epoch)
        sentences.append(
            f"Position in epoch {label}: samples seen early end with the higher loss in {early} "
            f"of {len(of_epoch)} runs, those seen late in {late}; no effect is distinguishable "
            f"in {len(of_epoch) - len(significant)} (slopes {slopes} {runs[0].loss_unit}; "
            "p < 0.05 in each run by itself)."
        )
    return sentences


def _merge_effects(runs: Sequence[Run]) -> list[str]:
    """Return the random-effects mean of each merge, in place of a count of verdicts."""
    return contrasts.run_sentences(runs) if len(runs) > 1 else []


def _undecided(runs: Sequence[Run]) -> list[str]:
    # absence of evidence is listed, since a reader takes silence for equality
    undecided = [
        name
        for name in _merge_names(runs)
        if set(_verdicts(runs, name, MEAN_MEMBER)) <= {INDISTINGUISHABLE}
    ]
    if not undecided:
        return []
    return [
        f"Not shown: any difference of {', '.join(undecided)} to the mean member. That is not "
        "equality: see the intervals of each run."
    ]


def _limits(runs: Sequence[Run]) -> list[str]:
    limits = []
    states = [run.state for run in runs if run.state]
    sizes = sorted({int(state["parameters"]) for state in states if "parameters" in state})
    examples = sorted(int(run.data["train"]["examples"]) for run in runs if run.data)
    # what the runs cannot show is computed, too, so that no reader has to remember it
    if sizes and examples:
        limits.append(
            f"Not shown: larger models. These have {' and '.join(f'{size:,}' for size in sizes)} "
            f"parameters and {' to '.join(dict.fromkeys(map(str, (examples[0], examples[-1]))))} "
            "training examples per run."
        )
    if single := [run.name for run in runs if not run.populations]:
        each = "Each run" if len(single) == len(runs) else f"Each of {', '.join(single)}"
        limits.append(
            f"Not shown: another population. {each} is one set of orders, and the errors are over "
            "test items for these trained models. Only the spread of the members shows what "
            "another training would add. Holm's correction is within a run, not over the runs."
        )
    if not any(run.tasks for run in runs):
        limits.append(
            f"Not shown: correct answers. Only the {loss_name(runs)} was measured, and a lower "
            "loss need not mean better answers."
        )
    return limits


# ---------------------------------------------------------------------- of one run


def _setup(run: Run) -> str:
    config, data, state = run.config, run.data or {}, run.state or {}
    training, population = config["training"], config["population"]
    counts = ", ".join(
        f"{part['examples']} {split} examples"
        for split, part in data.items()
        if isinstance(part, Mapping)
    )
    # dropped samples change what the losses mean, so they are not left out
    read = data.get("train", {}).get("counts", {})
    if dropped := read.get("dropped_too_long", 0):
        counts += (
            f" ({dropped} of {read['read']} read for training were above "
            f"{config['data']['max_length']} tokens)"
        )
    count = 1 + len(run.populations)
    of_populations = f" in each of {count} populations" if count > 1 else ""
    duration = f" Trained in {state['seconds']:.0f} s." if "seconds" in state else ""
    return (
        f"{_last_part(config['model']['base'])} ({state.get('parameters', 0):,} parameters) on "
        f"{_last_part(config['data']['train'])}: {counts}; {population['members']} orders"
        f"{of_populations} of level {population['level']}, {training['epochs']} epochs, "
        f"batch {training['batch']}, {training['optimizer']['kind']}, "
        f"learning rate {training['learning_rate']:g} ({training['schedule']['kind']}), "
        f"seed {config['seed']}, merged in {config['merge']['dtype']}.{duration}"
    )


def _last_part(path: str) -> str:
    # hub names have a slash as well, and are shown in full
    return Path(path).name if Path(path).is_absolute() else path


def _position_table(run: Run) -> Table:
    """Return the gaps of early and late samples and the slopes, in members and merges."""
    assert run.analysis is not None
    # both measures of the effect: halves assume no shape, slopes use all samples
    slopes, gaps = (
        run.coefficients,
        formatting.late_less_early(run.analysis["pooled"]["early_late"]),
    )
    merged = run.analysis["merged"]
    rows: list[list[Cell]] = [["members", *(_mean_estimate([row]) for row in (*gaps, *slopes))]]
    expected = (_mean_estimate([gap.get("expected", {})]) for gap in gaps)
    rows.append(["expected of a plain average", *expected, *("–" for _ in slopes)])
    for name, merge in run.comparison.merges.items():
        seeds = [merged[seed] for seed in merge.names if seed in merged]
        if not seeds:
            continue
        # in the place of a gap that is undetermined stands its reason, without an estimate
        halves = (
            [formatting.late_less_early(seed["early_late"][e]).get("merged", {}) for seed in seeds]
            for e in range(len(gaps))
        )
        # the slope that is left after merging; a fit may be undetermined, or have fewer epochs
        left = [seed["after"].get("coefficients", []) for seed in seeds]
        after = ([fit[index] for fit in left if index < len(fit)] for index in range(len(slopes)))
        rows.append([name, *map(_mean_estimate, halves), *map(_mean_estimate, after)])
    header = ["", *(f"gap, epoch {epoch + 1}" for epoch in range(len(gaps)))]
    header += [f"slope, epoch {formatting.epochs(row)}" for row in slopes]
    caption = (
        f"Position effects on the training samples in {run.loss_unit}. Gap: the half that "
        "a member saw late less the half that it saw early, mean over the members' orders. Slope: "
        "from the first place to the last; of a merge by a sample's mean position in all members. "
        "A plain average leaves the expected gap, the part that the orders do not cancel, and the "
        "slope. Of several merge seeds the means of estimates and bounds."
    )
    return Table(header, rows, caption)


def _mean_estimate(rows: Sequence[Json]) -> Cell:
    # a mean over some of the seeds would not be comparable with that of another row
    if not rows or any("estimate" not in row for row in rows):
        return "–"
    mean = formatting.mean_row(rows)
    return Interval(f"{mean['estimate']:+.4f}", formatting.bounds(mean["low"], mean["high"]))
