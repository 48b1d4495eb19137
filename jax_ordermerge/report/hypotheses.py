"""Hypotheses that were written down before the runs, tested on what the runs have found."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Literal

import numpy as np

from jax_ordermerge.analysis.equivalence import detectable, equivalence
from jax_ordermerge.analysis.populations import (
    population_contrast,
    random_effects,
    t_test,
    unpaired_contrast,
)
from jax_ordermerge.analysis.result import Estimate, Missing, Undetermined, or_missing
from jax_ordermerge.config.hypotheses import Hypotheses, Hypothesis, Part, Plan
from jax_ordermerge.config.merge import LOSS
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import JsonValue
from jax_ordermerge.report import formatting
from jax_ordermerge.report.document import (
    Block,
    Bullets,
    Heading,
    Interval,
    Paragraph,
    Picture,
    Table,
)
from jax_ordermerge.report.measures import loss_at_own_lambda, measured, names_of
from jax_ordermerge.report.plots.forest import Row, draw_forest
from jax_ordermerge.report.run import Run

Outcome = Literal["supported", "contradicted", "not determined"]


@dataclass(frozen=True)
class Tested:
    """A part of a hypothesis in one run or pair of runs, or over them.

    Attributes:
        size: the estimate with its 95 % interval.
        freedom: degrees of freedom of Student's t.
        p: of the stated test; two-sided where the part asks for that and for equivalence.
        margin: of equivalence; None where the part has none.
        p_equivalent: of equivalence within the margin.
        populations: the estimate of each population; of a pair those of its first run less the
            mean of its second.
        outcome: at the level of the hypotheses.
        finding: which of several results that support the claim was found: lower, higher,
            equivalent; empty where the claim has one direction.
    """

    size: Estimate
    freedom: float
    p: float
    margin: float | None
    p_equivalent: float | None
    populations: Sequence[float]
    outcome: Outcome
    finding: str

    @property
    def verdict(self) -> str:
        """The outcome, with what was found."""
        return f"{self.outcome} ({self.finding})" if self.finding else self.outcome


@dataclass(frozen=True)
class PartResult:
    """A part of a hypothesis by run or pair of runs, and the mean over them."""

    part: Part
    runs: Mapping[str, Tested | Missing]
    mean: Tested | Missing


@dataclass(frozen=True)
class HypothesisResult:
    """A hypothesis with its outcome; `blocked_by` names the one before it that failed."""

    hypothesis: Hypothesis
    parts: Sequence[PartResult]
    secondary: Sequence[PartResult]
    outcome: Outcome | None  # None: nothing decides
    blocked_by: str | None = None


def evaluate(plan: Hypotheses, runs: Sequence[Run]) -> list[HypothesisResult]:
    """Test the hypotheses in their order on runs.

    Raises:
        UserError: runs other than those that the hypotheses name, or a model, task or epoch that
            none of them has.
    """
    by_name = {run.name: run for run in runs}
    # fewer would be a choice made after the results were there; more would change the mean
    if set(by_name) != set(plan.runs):
        raise UserError(
            f"the hypotheses are about the runs {', '.join(plan.runs)}; given "
            f"{', '.join(by_name)}; give these runs and no others"
        )
    for hypothesis in plan.hypotheses:
        names = [x for run in hypothesis.runs for x in ([run] if isinstance(run, str) else run)]
        for part in (*hypothesis.parts, *hypothesis.secondary):
            _check_exists(part, hypothesis.name, [by_name[name] for name in names])
    results: list[HypothesisResult] = []
    failed: str | None = None
    for hypothesis in plan.hypotheses:
        parts, secondary = (
            [_test_part(part, hypothesis, by_name, plan.level) for part in listed]
            for listed in (hypothesis.parts, hypothesis.secondary)
        )
        outcome = _decide(hypothesis, parts)
        results.append(HypothesisResult(hypothesis, parts, secondary, outcome, failed))
        # a fixed order needs no correction of p, as long as it stops at the first failure
        if failed is None and outcome not in (None, "supported"):
            failed = hypothesis.name
    return results


def _check_exists(part: Part, where: str, runs: Sequence[Run]) -> None:
    """Refuse a name that no run has: a misspelt one would never be determined."""
    epochs = max(run.config["training"]["epochs"] for run in runs)
    if part.slope is not None and part.slope > epochs:
        raise UserError(f"{where}: slope = {part.slope}; the runs have {epochs} epochs")
    models = list(dict.fromkeys(name for run in runs for name in names_of(run)))
    for key, name in (("model", part.model), ("rival", part.rival)):
        if name is not None and name not in models:
            raise UserError(f"{where}: {key} = {name}: no run has it{did_you_mean(name, models)}")
    measures = [LOSS, *dict.fromkeys(task for run in runs for task in run.tasks)]
    if part.measure not in measures:
        raise UserError(
            f"{where}: measure = {part.measure}: no run has it"
            f"{did_you_mean(part.measure, measures)}"
        )


def _decide(hypothesis: Hypothesis, parts: Sequence[PartResult]) -> Outcome | None:
    if hypothesis.decide == "told":
        return None
    tests = [test for part in parts for test in _deciding(hypothesis, part).values()]
    # what a run lacks cannot support a claim: a hypothesis asks for all of its runs
    outcomes = {"not determined" if isinstance(x, Missing) else x.outcome for x in tests}
    if "contradicted" in outcomes:
        return "contradicted"
    return "supported" if outcomes == {"supported"} else "not determined"


def _deciding(hypothesis: Hypothesis, part: PartResult) -> Mapping[str, Tested | Missing]:
    """Return the tests that decide, by run; that of the mean over runs has no name."""
    # one run has no mean over runs: it decides itself
    if hypothesis.decide == "mean" and len(part.runs) > 1:
        return {"": part.mean}
    return part.runs


def _test_part(
    part: Part, hypothesis: Hypothesis, runs: Mapping[str, Run], level: float
) -> PartResult:
    tested: dict[str, Tested | Missing] = {}
    for item in hypothesis.runs:
        if isinstance(item, str):
            tested[item] = or_missing(_of_run, part, runs[item], level)
        else:
            first, second = (runs[name] for name in item)
            tested[" less ".join(item)] = or_missing(_of_pair, part, first, second, level)
    missing = [name for name, test in tested.items() if isinstance(test, Missing)]
    # a mean over the runs that happen to have it would be another quantity
    if missing:
        return PartResult(part, tested, Missing(f"{', '.join(missing)} lack it"))
    present = [test for test in tested.values() if not isinstance(test, Missing)]
    return PartResult(part, tested, or_missing(_over_runs, part, present, level))


def _of_run(part: Part, run: Run, level: float) -> Tested:
    values = _values(part, run)
    size = population_contrast(values)
    return _test(part, size, size.populations - 1, part.stated_margin, values, level)


def _of_pair(part: Part, first: Run, second: Run, level: float) -> Tested:
    values, baseline = _values(part, first), _values(part, second)
    size = unpaired_contrast(values, baseline)
    margin = abs(fmean(baseline)) / 2 if part.margin == "half" else part.stated_margin
    # so that their mean is the estimate
    differences = [value - fmean(baseline) for value in values]
    return _test(part, size, size.freedom, margin, differences, level)


def _over_runs(part: Part, tests: Sequence[Tested], level: float) -> Tested:
    size = random_effects([test.size.estimate for test in tests], [test.size.se for test in tests])
    # margins that are shares of something differ between runs, and their mean is no margin
    estimates = [test.size.estimate for test in tests]
    return _test(part, size, size.data_sets - 1, part.stated_margin, estimates, level)


def _test(
    part: Part,
    size: Estimate,
    freedom: float,
    margin: float | None,
    populations: Sequence[float],
    level: float,
) -> Tested:
    # equivalence is tested by its own p below; beside it stands that of a difference
    alternative = "two-sided" if part.test == "equivalent" else part.test
    p = t_test(size.estimate, size.se, freedom, alternative)
    equal = None
    if margin is not None:
        equal = equivalence(size.estimate, size.se, freedom, margin=margin).p
    # contrasts are of three classes; what pages and tables show is common to them
    plain = Estimate(size.estimate, size.se, size.low, size.high)
    outcome = _outcome(part, plain, freedom, p, equal, margin, level)
    finding = _finding(part, plain, p, equal, level)
    return Tested(plain, freedom, p, margin, equal, populations, outcome, finding)


def _finding(part: Part, size: Estimate, p: float, equal: float | None, level: float) -> str:
    # a claim with one direction says itself what was found
    if part.test in ("less", "greater"):
        return ""
    findings = []
    if part.test == "two-sided" and p < level:
        findings.append("lower" if size.estimate < 0 else "higher")
    if equal is not None and equal < level:
        findings.append("equivalent")
    return ", ".join(findings)


def _outcome(
    part: Part,
    size: Estimate,
    freedom: float,
    p: float,
    equal: float | None,
    margin: float | None,
    level: float,
) -> Outcome:
    if part.test in ("less", "greater"):
        # the test in the other direction
        return "supported" if p < level else "contradicted" if 1 - p < level else "not determined"
    # before the difference: a small one that is shown to exist is equivalent all the same
    if equal is not None and equal < level:
        return "supported"
    if part.test == "two-sided":
        return "supported" if p < level else "not determined"
    # equivalence is contradicted where the difference is shown to be beyond the margin
    beyond = t_test(abs(size.estimate) - (margin or 0.0), size.se, freedom, "greater")
    return "contradicted" if margin is not None and beyond < level else "not determined"


def _values(part: Part, run: Run) -> list[float]:
    """Return the quantity in each population of a run."""
    values = []
    for number, population in enumerate([run, *run.populations]):
        try:
            value = _value(part, population)
        except Undetermined as error:
            raise Undetermined(f"population {number}: {error}") from None
        # left out it would be a choice of populations by their results
        if not np.isfinite(value):
            raise Undetermined(f"population {number}: {value} (diverged)")
        values.append(value)
    return values


def _value(part: Part, run: Run) -> float:
    if part.slope is not None:
        for row in run.coefficients:
            if formatting.epochs(row) == str(part.slope):
                return float(row["estimate"])
        raise Undetermined(f"no slope of epoch {part.slope}")
    assert part.model is not None  # the schema asks for a slope or a model
    of = loss_at_own_lambda if part.at == "own" else partial(measured, measure=part.measure)
    return of(run, part.model) - (of(run, part.rival) if part.rival else 0.0)


# ------------------------------------------------------------------------ as a file


def to_csv(results: Sequence[HypothesisResult]) -> str:
    """Return a line per tested quantity, run and population; `all` stands for the mean over them.

    Intervals are of 95 %. A line of one population has an estimate alone.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = ["hypothesis", "quantity", "run", "population", "estimate", "low", "high", "p"]
    writer.writerow([*header, "margin", "p_equivalent", "decides"])
    for result in results:
        for part in (*result.parts, *result.secondary):
            decides = "yes" if part in result.parts else "no"
            for run, test in [*part.runs.items(), ("all runs", part.mean)]:
                if isinstance(test, Missing):
                    continue
                key = [result.hypothesis.name, part.part.label, run]
                # the estimates of a mean over runs stand in the lines of the runs
                if run != "all runs":
                    for number, value in enumerate(test.populations):
                        writer.writerow([*key, number, f"{value:.9g}", *[""] * 5, decides])
                numbers = (test.size.estimate, test.size.low, test.size.high, test.p)
                equal = (test.margin, test.p_equivalent)
                cells = ["" if x is None else f"{x:.9g}" for x in (*numbers, *equal)]
                writer.writerow([*key, "all", *cells, decides])
    return text.getvalue()


# ------------------------------------------------------------------------ on pages


def build(
    plan: Plan, results: Sequence[HypothesisResult], runs: Sequence[Run], picture: str
) -> list[Block]:
    """Return the blocks on the hypotheses: outcomes, a picture, where runs deviate, a table each.

    Args:
        plan: the file of hypotheses.
        results: of `evaluate`.
        runs: the runs.
        picture: name of the picture, without ending.
    """
    blocks: list[Block] = [
        Paragraph(
            f"The hypotheses, their tests and sizes were written down in {plan.file} (SHA-256 "
            f"{plan.digest}). They are tested in their order, each at "
            f"{100 * plan.hypotheses.level:g} %; after the first that is not supported the others "
            "are reported and not tested. An estimate of a run is the mean over its populations, "
            "with Student's t; over runs it is the mean of random effects."
        ),
        _outcomes(results),
        Bullets(_deviations(plan.hypotheses, runs)),
        Picture(
            picture,
            forest(results, picture),
            "What decides: estimates with 95 % intervals, a dot for each population, and the mean "
            "over runs. Shaded: within the margin of equivalence.",
        ),
    ]
    for result in results:
        blocks += [
            Heading(f"{result.hypothesis.name}: {result.hypothesis.claim}", 3),
            _details(result, runs[0].loss_unit),
        ]
    return blocks


def forest(results: Sequence[HypothesisResult], name: str) -> str:
    """Draw the parts that decide as SVG text, one panel each."""
    panels = {}
    for result in results:
        # of a hypothesis that decides nothing, its first secondary part
        for part in result.parts or result.secondary[:1]:
            rows = [
                Row(run, test.size, test.populations, test.margin)
                for run, test in part.runs.items()
                if not isinstance(test, Missing)
            ]
            if not isinstance(part.mean, Missing):
                rows.append(Row("mean over runs", part.mean.size, (), part.mean.margin))
            if rows:
                panels[f"{result.hypothesis.name} · {part.part.label}"] = rows
    return draw_forest(panels, name)


def _outcomes(results: Sequence[HypothesisResult]) -> Table:
    rows = []
    for result in results:
        verdict: str = "reported" if result.outcome is None else result.outcome
        if findings := _findings(result):
            verdict += f" ({findings})"
        if result.outcome is not None and result.blocked_by:
            verdict = f"not tested, since {result.blocked_by} failed; by itself {verdict}"
        rows.append([result.hypothesis.name, result.hypothesis.claim, verdict])
    return Table(["hypothesis", "claim", "outcome"], rows, text=(0, 1, 2))


def _findings(result: HypothesisResult) -> str:
    """Return what the parts that decide found, where a claim has more than one direction."""
    labels: dict[str, list[str]] = {}
    for part in result.parts:
        for run, test in _deciding(result.hypothesis, part).items():
            if not isinstance(test, Missing) and part.part.test not in ("less", "greater"):
                label = ", ".join(filter(None, (part.part.label, run)))
                labels.setdefault(test.finding or test.outcome, []).append(label)
    count = sum(map(len, labels.values()))
    return "; ".join(
        f"{len(those)} of {count}: {finding}" if len(those) > 1 else f"{those[0]}: {finding}"
        for finding, those in labels.items()
    )


def _details(result: HypothesisResult, unit: str) -> Table:
    rows: list[list[str | Interval]] = []
    for part, decides in [(x, True) for x in result.parts] + [(x, False) for x in result.secondary]:
        # of one run the mean is the run itself
        mean = {"mean over runs": part.mean} if len(part.runs) > 1 else {}
        for name, test in (*part.runs.items(), *mean.items()):
            if isinstance(test, Missing):
                rows.append([part.part.label, name, f"– ({test.reason})", "", "", "", ""])
                continue
            size = test.size
            equal = ""
            if test.p_equivalent is not None:
                equal = f"{formatting.p_value(test.p_equivalent)} (± {test.margin:.4g})"
            rows.append(
                [
                    part.part.label,
                    name,
                    Interval(
                        f"{size.estimate:+.4f}",
                        formatting.bounds(size.low, size.high),
                        formatting.p_value(test.p),
                    ),
                    equal,
                    f"{detectable(size.se, test.freedom):.4f}",
                    # by data set the outcome is shown where the mean decides, but not the reverse
                    test.verdict
                    if decides and (name in part.runs or result.hypothesis.decide == "mean")
                    else "reported",
                    ", ".join(f"{value:+.4f}" for value in test.populations),
                ]
            )
    header = ["quantity", "run", "estimate", "equivalent, p", "detectable", "outcome"]
    tests = {f"{x.part.label}: {x.part.test}" for x in (*result.parts, *result.secondary)}
    caption = (
        f"In {unit}. Tests: {'; '.join(sorted(tests))}. Detectable: the smallest difference that a "
        "two-sided 5 % test finds four times in five. Last column: each population (of a pair "
        "of runs those of the first less the mean of the second), or each run."
    )
    return Table([*header, "populations"], rows, caption, text=(0, 1, 5, 6))


def _deviations(plan: Hypotheses, runs: Sequence[Run]) -> list[str]:
    """Return where the runs differ from what was written down."""
    texts = []
    for run in runs:
        texts += [f"Deviation: {run.name} has {text}." for text in other_settings(plan, run)]
        missing = [
            str(number)
            for number, population in enumerate([run, *run.populations])
            if not (population.evaluations and population.analysis)
        ]
        if missing:
            texts.append(
                f"Deviation: {run.name} has no results of population {', '.join(missing)}."
            )
    # said as well: silence would look like a check that was not made
    return texts or ["All runs have the settings that were written down, and all populations."]


def other_settings(plan: Hypotheses, run: Run) -> list[str]:
    """Return the settings of a run that differ from those that were written down."""
    texts = []
    for key, value in (plan.settings | plan.runs[run.name]).items():
        actual: JsonValue = run.config
        for name in key.split("."):
            actual = actual.get(name) if isinstance(actual, dict) else None
        if actual != value:
            texts.append(f"{key} = {actual}, written down was {value}")
    return texts
