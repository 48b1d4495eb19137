"""Differences of merges to their rivals, in each population of a run and over all of them.

In one population the errors are over test items: they speak about these trained models. Over
populations they are those of Student's t on P - 1: they speak about the method.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.paired import Difference
from jax_ordermerge.analysis.populations import (
    PopulationContrast,
    RandomEffects,
    population_contrast,
    random_effects,
)
from jax_ordermerge.analysis.result import Missing, or_missing
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.config.merge import LOSS
from jax_ordermerge.report import formatting
from jax_ordermerge.report.differences import MEAN_MEMBER, RIVALS, Measure, of_populations
from jax_ordermerge.report.document import Block, Heading, Table
from jax_ordermerge.report.run import Run

SLOPE = "slope"
OUTSIDE_THE_TABLE = ("plane", "subsets")  # groups of controls with a picture or table of their own
_COLUMNS = ("measure", "model", "rival", "population", "errors_over", "n")
_NUMBERS = ("estimate", "se", "low", "high", "p")


@dataclass(frozen=True)
class Key:
    """What is compared.

    Attributes:
        measure: `loss`, the name of a task (share of correct answers), or `slope, epoch E`.
        model: name of a merge or control; of a slope `members`.
        rival: of `differences.RIVALS`; of a slope ``.
        control: whether the model is a control, which pages show in a table of their own.
    """

    measure: str
    model: str
    rival: str
    control: bool = False

    @property
    def is_slope(self) -> bool:
        """Whether it is a slope by position, which has no rival."""
        return self.rival == ""

    @property
    def label(self) -> str:
        """Name in tables."""
        if self.is_slope:
            return f"{self.measure} of the {self.model}"
        return f"{self.measure}: {self.model} less {RIVALS[self.rival]}"


@dataclass(frozen=True)
class Contrast:
    """One contrast.

    Attributes:
        key: what is compared.
        populations: of each population, with errors over items.
        over: over populations; Missing where there is one, or where one of them lacks it.
    """

    key: Key
    populations: Mapping[int, Difference]
    over: PopulationContrast | Missing


def contrasts(run: Run) -> list[Contrast]:
    """Return every contrast of a run: of merges, controls and slopes."""
    runs = [run, *run.populations]
    by_population = [_of_population(population) for population in runs]
    result = []
    # in the order of the first population that has them
    for key in dict.fromkeys(key for rows in by_population for key in rows):
        rows = {number: part[key] for number, part in enumerate(by_population) if key in part}
        over: PopulationContrast | Missing
        # a mean over some of the populations would hang on which of them are there
        if len(rows) < len(runs):
            over = Missing(f"{len(runs) - len(rows)} of {len(runs)} populations lack it")
        else:
            over = or_missing(population_contrast, [row.estimate for row in rows.values()])
        result.append(Contrast(key, rows, over))
    return result


def _of_population(run: Run) -> dict[Key, Difference]:
    rows = {}
    for name, merge in run.comparison.merges.items():
        for task, measure in merge.measures.items():
            for rival, gap in measure.gaps.items():
                rows[Key(LOSS if task is None else task, name, rival)] = gap
    for row in (run.controls or {"rows": []})["rows"]:
        # the members of two populations have nothing in common but their numbers
        if row["kind"] in ("member", "scaled member") or row["group"] == "subsets":
            continue
        for rival, gap in row["against"].items():
            # a merge of the config may be measured again as a control: once is enough
            if Key(LOSS, row["name"], rival) not in rows:
                names = [field.name for field in fields(Difference)]
                values = {name: gap[name] for name in names if name in gap}
                rows[Key(LOSS, row["name"], rival, control=True)] = Difference(**values)
    for row in ((run.controls or {}).get("lambdas") or {"rows": []})["rows"]:
        # a model less itself at lambda 1 has no rival of the tables
        if row["own"] and row["rival"] != row["model"]:
            key = Key(LOSS, f"{row['model']}, both at their own lambda", row["rival"], control=True)
            rows[key] = Difference(**row["own"])
    for method, curve in (run.controls or {}).get("subsets", {}).items():
        for point in curve["points"][1:]:  # the first is the mean member itself
            key = Key(LOSS, f"{method} of {point['size']} members", MEAN_MEMBER, control=True)
            rows[key] = Difference(**point["gain"])
    for task, by_method in (run.controls or {}).get("subset_scores", {}).items():
        for method, curve in by_method.items():
            for point in curve["points"][1:]:
                key = Key(task, f"{method} of {point['size']} members", MEAN_MEMBER, control=True)
                rows[key] = Difference(**point["gain"])
    for label, gap in _slopes(run):
        rows[Key(f"{SLOPE}, {label}", "members", "")] = gap
    return rows


def _slopes(run: Run) -> list[tuple[str, Difference]]:
    samples = (run.analysis or {}).get("design", {}).get("samples", 0)
    return [
        (
            f"epoch {formatting.epochs(row)}",
            Difference(**{name: row[name] for name in _NUMBERS}, n=samples),
        )
        for row in run.coefficients
    ]


def slopes(run: Run) -> list[tuple[str, Difference]]:
    """Return the slopes of a run by epoch: over populations where there are several."""
    # one population: errors over samples, the only ones that there are
    if not run.populations:
        return _slopes(run)
    return [
        (row.key.measure.removeprefix(f"{SLOPE}, "), of_populations(row.over))
        for row in contrasts(run)
        if row.key.is_slope and not isinstance(row.over, Missing)
    ]


def of_controls(run: Run) -> dict[str, dict[str, Difference]]:
    """Return the differences of the controls to their rivals, by name and rival.

    They are those over populations where there are several. Models that are made for a picture or
    for the loss by number of members are left out, as in the table of the controls.
    """
    rows = [
        row
        for row in (run.controls or {"rows": []})["rows"]
        if row["group"] not in OUTSIDE_THE_TABLE
    ]
    if not run.populations:
        return {
            row["name"]: {rival: Difference(**gap) for rival, gap in row["against"].items()}
            for row in rows
        }
    gaps: dict[str, dict[str, Difference]] = {row["name"]: {} for row in rows}
    for contrast in contrasts(run):
        key = contrast.key
        if key.measure == LOSS and key.model in gaps and not isinstance(contrast.over, Missing):
            gaps[key.model][key.rival] = of_populations(contrast.over)
    return gaps


# ---------------------------------------------------------------------------------- as a file


def to_csv(rows: Sequence[Contrast]) -> str:
    """Return a line per contrast and population, and with `population` = all the mean of all.

    Intervals are of 95 %. `errors_over` says what `n` and the errors count: items or populations.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_COLUMNS, *_NUMBERS])
    for row in rows:
        key = (row.key.measure, row.key.model, row.key.rival)
        for number, gap in row.populations.items():
            writer.writerow([*key, number, "items", gap.n, *_numbers(gap)])
        if not isinstance(row.over, Missing):
            over = row.over
            writer.writerow([*key, "all", "populations", over.populations, *_numbers(over)])
    return text.getvalue()


def _numbers(gap: Difference | PopulationContrast) -> list[str]:
    # nine digits: enough for a table, and a bit of noise in the last does not change the file
    return [f"{getattr(gap, name):.9g}" for name in _NUMBERS]


def write(run: Run) -> None:
    """Write contrasts.csv of a run."""
    atomic.replace(run.layout.contrasts, to_csv(contrasts(run)).encode())


# ---------------------------------------------------------------------------------- on pages


def chapter(run: Run) -> list[Block]:
    """Return the table of the contrasts over populations; empty where there is one population."""
    if not run.populations:
        return []
    rows = []
    for contrast in contrasts(run):
        # controls are many; the caption names the file that has them
        if contrast.key.control:
            continue
        scale, digits = _scale(contrast.key, run)
        values = [f"{scale * gap.estimate:+.{digits}f}" for gap in contrast.populations.values()]
        rows.append([contrast.key.label, *_cells(contrast, scale, digits), ", ".join(values)])
    count = 1 + len(run.populations)
    caption = (
        f"Means of {count} paired contrasts, one for each population, with 95 % intervals by "
        f"Student's t on {count - 1}. Test items and merge seeds are means within a contrast. "
        "Shares of correct answers in points. The controls are in contrasts.csv. All other tables "
        "are about the models of population 0, with errors over items."
    )
    header = ["contrast", "mean", "95 % interval", "p", "sd between populations"]
    table = Table([*header, "populations"], rows, caption, text=(0, 5))
    return [Heading(f"Over {count} populations", 3), table]


# Shares of correct answers are shown in points, losses as they are.
def _scale(key: Key, run: Run) -> tuple[float, int]:
    return (100, 1) if key.measure in run.tasks else (1, 4)


def _cells(contrast: Contrast, scale: float, digits: int) -> list[str]:
    over = contrast.over
    if isinstance(over, Missing):
        return [f"– ({over.reason})", "", "", ""]
    return [
        f"{scale * over.estimate:+.{digits}f}",
        formatting.bounds(scale * over.low, scale * over.high, digits),
        formatting.p_value(over.p),
        formatting.number(scale * over.sd, digits),
    ]


def verdicts(measure: Measure, task: str | None, rivals: Mapping[str, str]) -> str:
    """Return what one measure of a merge says about it and each rival.

    Args:
        measure: differences in the loss, or in the answers of a task.
        task: its name; None for the loss.
        rivals: their names in sentences.
    """
    scale, digits = (1, 4) if task is None else (100, 1)
    return "; ".join(
        formatting.versus(
            formatting.verdict(gap.estimate, measure.holm[rival], lower_is_better=task is None),
            f"{formatting.signed_interval(gap, scale, digits)}, "
            f"{formatting.p_texts(measure.p(rival), measure.holm[rival])}"
            + formatting.undetected(measure.holm[rival], scale * gap.se, gap.n - 1, digits),
            rivals[rival],
        )
        for rival, gap in measure.gaps.items()
    )


def sentences(run: Run) -> list[str]:
    """Return what the populations say about each merge; empty where there is one population."""
    if not run.populations:
        return []
    count = 1 + len(run.populations)
    texts = []
    for model, merge in run.claims.merges.items():
        for task, measure in merge.measures.items():
            name = run.loss_name if task is None else task
            clauses = verdicts(measure, task, RIVALS)
            texts.append(f"Over {count} populations, {model}, {name}: {clauses}.")
    if texts:
        texts.append(
            f"The sentences that follow are about the models of population 0 of 0 to {count - 1}."
        )
    return texts


# ---------------------------------------------------------------------------------- over runs


@dataclass(frozen=True)
class RunMean:
    """A contrast over runs: that of each, and their random-effects mean."""

    key: Key
    estimates: Sequence[float]
    mean: RandomEffects | Missing


def run_means(runs: Sequence[Run]) -> list[RunMean]:
    """Return the random-effects means of the contrasts that all runs have, without controls."""
    by_run = [{row.key: row for row in contrasts(run)} for run in runs]
    means = []
    for key in by_run[0]:
        # means over different runs could not be compared with each other
        if key.control or not all(key in rows for rows in by_run):
            continue
        estimates, errors = zip(*(_summary(rows[key]) for rows in by_run), strict=True)
        mean: RandomEffects | Missing = Missing("in one run it has no error")
        # one population without items that differ: no weight can be given to it
        if all(error > 0 for error in errors):
            mean = or_missing(random_effects, estimates, errors)
        means.append(RunMean(key, estimates, mean))
    return means


def over_runs(runs: Sequence[Run]) -> list[Block]:
    """Return the table of `run_means`; empty where the runs have no contrast in common."""
    rows = []
    for row in run_means(runs):
        scale, digits = _scale(row.key, runs[0])
        each = ", ".join(f"{scale * estimate:+.{digits}f}" for estimate in row.estimates)
        mean = row.mean
        if isinstance(mean, Missing):
            cells = [f"– ({mean.reason})", "", "", "", "", ""]
        else:
            cells = [
                f"{scale * mean.estimate:+.{digits}f}",
                formatting.bounds(scale * mean.low, scale * mean.high, digits),
                formatting.p_value(mean.p),
                formatting.number(scale * mean.tau2**0.5, digits),
                f"{100 * mean.i2:.0f}",
                formatting.p_value(mean.q_p),
            ]
        rows.append([row.key.label, *cells, each])
    if not rows:
        return []
    caption = (
        f"Random effects over {len(runs)} runs, of equal weight, with the interval of Hartung and "
        "Knapp. Between runs: standard deviation of the true contrasts (Paule and Mandel), share "
        "of the variance that is not error (I²), and p of Cochran's test that the contrasts are "
        f"equal. {_error_unit(runs)}"
    )
    header = ["contrast", "mean", "95 % interval", "p", "sd between runs", "I², %", "equal, p"]
    return [Heading("Over the runs"), Table([*header, "runs"], rows, caption, text=(0, 7))]


def _error_unit(runs: Sequence[Run]) -> str:
    single = [run.name for run in runs if not run.populations]
    if not single:
        return "The error of a run is over its populations."
    return (
        f"{', '.join(single)} trained one population: the error of such a run is over items, and "
        "what another population would add counts as a difference between runs."
    )


def run_sentences(runs: Sequence[Run]) -> list[str]:
    """Return what the runs together say about the loss of each merge."""
    texts = []
    rows = [row for row in run_means(runs) if row.key.measure == LOSS]
    # corrected over all of these sentences: a reader scans them for the best merge
    means = [(row.key, row.mean) for row in rows if not isinstance(row.mean, Missing)]
    for (key, mean), p in zip(means, paired.holm([mean.p for _, mean in means]), strict=True):
        size = f"{mean.estimate:+.4f} {formatting.bounds(mean.low, mean.high)}, "
        clause = formatting.versus(
            formatting.verdict(mean.estimate, p),
            size
            + formatting.p_texts(mean.p, p)
            + formatting.undetected(p, mean.se, mean.data_sets - 1),
            RIVALS[key.rival],
        )
        differ = "differ" if mean.q_p < paired.WEAK else "are not shown to differ"
        texts.append(
            f"{key.model}: {clause} over {mean.data_sets} runs, which {differ} "
            f"(I² {100 * mean.i2:.0f} %, {formatting.p_text(mean.q_p)})."
        )
    return texts


def _summary(contrast: Contrast) -> tuple[float, float]:
    if isinstance(contrast.over, Missing):
        # one population has no error but this one; `_error_unit` says so on the page
        first = next(iter(contrast.populations.values()))
        return first.estimate, first.se
    return contrast.over.estimate, contrast.over.se
