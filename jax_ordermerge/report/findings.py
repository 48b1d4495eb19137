"""The findings of a run in sentences, which claim no more than the numbers support."""

from collections.abc import Mapping, Sequence

import numpy as np

from jax_ordermerge.analysis.paired import FEW_ITEMS, holm
from jax_ordermerge.analysis.position_curves import excess_p
from jax_ordermerge.json_types import Json
from jax_ordermerge.report import contrasts
from jax_ordermerge.report.differences import BEST_MEMBER, RIVALS, Measure, seed_groups
from jax_ordermerge.report.formatting import (
    INDISTINGUISHABLE,
    detectable_text,
    epochs,
    late_less_early,
    mean_row,
    p_text,
    p_texts,
    signed,
    spread,
    strength,
    undetected,
)
from jax_ordermerge.report.run import Run, pair_cosines, percentages


def sentences(run: Run) -> list[str]:
    """Return the summary of a run.

    "Clearly" means p < 0.01, "weakly" p < 0.05, both corrected over all comparisons of the run.
    Otherwise two models are not distinguishable, and the smallest difference that this comparison
    finds four times in five stands beside; they are never called equal.
    """
    sentences = contrasts.sentences(run)
    if run.analysis is not None:
        sentences += _position(run.analysis, run.loss_unit)
        sentences += _mitigation(run.analysis, run.merge)
    if run.merge is not None:
        sentences += _task_vectors(run.merge)
    if run.evaluations is not None:
        merges = run.comparison.merges
        sentences += [*_members(run), *(text for name in merges for text in _merge(run, name))]
        # counted, because a reader has to weigh p values by their number
        tests = sum(
            len(measure.gaps) for merge in merges.values() for measure in merge.measures.values()
        )
        # one or two comparisons need no remark on their number
        if tests > 2:
            sentences.append(
                f"These are {tests} comparisons. The verdicts follow p values corrected by Holm's "
                "method over all of them. Detectable: the smallest true difference that a single "
                "such test finds in 80 of 100 repetitions. The errors are over test items, for "
                "these trained models. Another training seed adds the spread that the members show "
                "among themselves. Where a merge has several seeds, their spread is in its errors."
            )
    return sentences


def _position(analysis: Json, unit: str) -> list[str]:
    effects = analysis["fixed_effects"]
    if "reason" in effects:
        return [f"No fixed-effects estimate of the position effect: {effects['reason']}."]
    sentences = []
    corrected = holm([row["p"] for row in effects["coefficients"]])
    for row, p in zip(effects["coefficients"], corrected, strict=True):
        outcome = "no effect on the final loss is distinguishable from zero"
        outcome += undetected(p, row["se"], effects.get("clusters", np.inf) - 1)
        if word := strength(p):
            # position 0 is the first step: a negative slope is a higher loss of early samples
            end = "early" if row["estimate"] < 0 else "late"
            outcome = f"samples seen {end} end with the higher loss, {word}"
        sentences.append(
            f"Position in epoch {epochs(row)}: {outcome} (slope "
            f"{signed(row)} {unit} from first to last, z {row['z']:.1f}, "
            f"{p_texts(row['p'], p)}"
            + (f", {row['percent']:+.2f} % of the mean loss)." if "percent" in row else ").")
        )
    sentences += _any_shape(analysis)
    # A significant slope may still be small: samples differ far more from each other.
    sd = np.mean([row["sd_loss"] for row in analysis["members"]])
    largest = max(abs(row["estimate"]) for row in effects["coefficients"])
    sentences.append(
        f"For scale: the largest of these slopes is {100 * largest / sd:.1f} % of the standard "
        f"deviation of the loss between samples ({sd:.3f})."
    )
    return sentences


def _any_shape(analysis: Json) -> list[str]:
    """Return what the omnibus tests say, and how much of the order's effect position explains."""
    tests, share = analysis.get("omnibus", []), analysis.get("explained", {})
    sentences = []
    if isinstance(tests, list) and tests:
        clauses = "; ".join(
            f"epoch {epochs(test)} {strength(test['holm']) or INDISTINGUISHABLE + ' from none'} "
            f"({p_text(test['holm'])})"
            for test in tests
        )
        sentences.append(
            "Position effect of any shape, straight line or not (p by Holm over the epochs): "
            f"{clauses}."
        )
    if "lines" in share:
        sentences.append(
            f"Of what the order changes in a sample's loss (standard deviation {share['sd']:.4f}), "
            f"position explains {100 * share['lines']:.1f} % of the variance by slopes and "
            f"{100 * share['bins']:.1f} % by the means of bins."
        )
    return sentences


def _mitigation(analysis: Json, merge: Json | None) -> list[str]:
    gaps = late_less_early(analysis["pooled"]["early_late"])
    merges = {name: late_less_early(row["early_late"]) for name, row in analysis["merged"].items()}
    if not merges or any("reason" in gap for gap in gaps):
        return []
    # one epoch, chosen by the members alone: the merges had no part in the choice
    epoch = max(range(len(gaps)), key=lambda e: abs(gaps[e]["estimate"]))
    before = gaps[epoch]
    # a gap that is noise shrinks in any average, which would look like a success
    if before["low"] <= 0 <= before["high"]:
        return [
            "After merging: the members show no gap between early and late samples that a merge "
            "could close."
        ]
    # The plain average keeps a part of the gap that the orders decide. A merge is tested against
    # that value: against the members' gap, any average would look like a success.
    groups = seed_groups(merges, merge)

    def of_groups(key: str) -> dict[str, Json]:
        return {
            group: mean_row([merges[name][epoch][key] for name in names])
            for group, names in groups.items()
        }

    parts = [
        f"{group} {signed(row)}"
        + (f" (mean of {len(groups[group])} merge seeds)" if len(groups[group]) > 1 else "")
        for group, row in of_groups("merged").items()
    ]
    sentences = [
        f"After merging: the gap is largest in epoch {epoch + 1}, where the late half of a "
        "member's samples differs from its early half by "
        f"{signed(before)}. In the merges, by the same orders: "
        f"{'; '.join(parts)}."
    ]
    # analyses of earlier versions have no expected gap
    if "expected" in before:
        sentences[0] += (
            " A plain average of the losses of these members keeps "
            f"{100 * before['share_left']:.1f} % of it: {before['expected']['estimate']:+.4f} is"
            " expected."
        )
        sentences.append(_beyond_averaging(of_groups("excess"), before))
    return sentences


def _beyond_averaging(rows: Mapping[str, Json], before: Json) -> str:
    """Compare the gap of each merge with that of a plain average.

    Args:
        rows: gap less the expected one, by merge or group of seeds.
        before: gap of the members.
    """
    p_values = [excess_p(row["estimate"], row["se"], before["estimate"]) for row in rows.values()]
    clauses = []
    for (group, row), p in zip(rows.items(), holm(p_values), strict=True):
        outcome = f"{INDISTINGUISHABLE} from it, {detectable_text(row['se'], np.inf)}"
        if word := strength(p):
            size = "smaller" if row["estimate"] * before["estimate"] < 0 else "larger"
            outcome = f"{word} {size}"
        clauses.append(f"{group} {outcome} ({signed(row)}, {p_text(p)})")
    correction = ", p by Holm over the merges" if len(rows) > 1 else ""
    return f"Against the gap that is expected of a plain average{correction}: {'; '.join(clauses)}."


def _task_vectors(merge: Json) -> list[str]:
    totals = [row.get("diagnostics", {}).get("total", {}) for row in merge["merges"]]
    # of the members, so the same in every merge that measured them
    total = next((t for t in totals if t.get("cosines") and t.get("unchanged")), None)
    if total is None or len(total["cosines"]) < 2:
        return []
    cosines = pair_cosines(total["cosines"])
    vectors = (
        f"have a mean cosine of {np.mean(cosines):.3f} between pairs" if cosines else "are zero"
    )
    low, high = 100 * min(total["unchanged"]), 100 * max(total["unchanged"])
    # a selection draws again where the drawn member did not change the base
    resampling = ", so resampling has almost nothing to draw again" if high < 1 else ""
    return [
        f"The members' task vectors {vectors}; {low:.1f} to {high:.1f} % of a member's elements "
        f"are exactly those of the base in {merge.get('dtype')}{resampling}."
    ]


def _members(run: Run) -> list[str]:
    base = [model for model in run.models if model["kind"] == "base"]

    def between(sd: float | None, digits: int, unit: str = "") -> str:
        return "" if sd is None else f" (standard deviation between members {sd:.{digits}f}{unit})"

    sentences = []
    losses, base_loss = (
        [model["loss"] for model in models if model.get("loss") is not None]
        for models in (run.members, base)
    )
    if losses:
        mean, sd = spread(losses)
        before = "".join(f", base {loss:.4f}" for loss in base_loss)
        name = run.loss_name.capitalize()
        sentences.append(f"{name}: mean member {mean:.4f}{between(sd, 4)}{before}.")
    # all members have the same tasks
    for task in run.members[0].get("tasks", {}) if run.members else ():
        mean, sd = spread(percentages(run.members, task))
        before = "".join(f", base {share:.1f} %" for share in percentages(base, task))
        sentences.append(
            f"{task}: mean member {mean:.1f} % correct{between(sd, 1, ' points')}{before}."
        )
    return sentences


def _few_items(measure: Measure) -> str:
    """Warn where a mean difference in loss is that of a few items."""
    clauses = [
        f"{100 * gap.top_share:.0f} % of the variance of the difference from {RIVALS[rival]} "
        f"(median {gap.median:+.4f}, Wilcoxon {p_text(gap.wilcoxon_p)})"
        for rival, gap in measure.gaps.items()
        if gap.top_share is not None
        and gap.top_share > FEW_ITEMS
        and gap.median is not None
        and gap.wilcoxon_p is not None
    ]
    return f" Caution: five items make up {'; '.join(clauses)}." if clauses else ""


def _merge(run: Run, name: str) -> list[str]:
    assert run.comparison.best is not None  # there are members, else no merge is compared
    best, split = run.comparison.best.name, run.comparison.best.chosen_on
    optimism = "" if split == "validation" else ": optimistic"
    # the best of several on the test split is lucky in part, which the sentence has to say
    rivals = RIVALS | {
        BEST_MEMBER: f"the best member by loss ({best}, chosen on {split}{optimism})"
    }
    merge = run.comparison.merges[name]
    seeds = [model for model in run.models if model["name"] in merge.names]

    def level(values: Sequence[float], digits: int, unit: str = "") -> str:
        mean, sd = spread(values)
        note = "" if sd is None else f" (mean of {len(values)} merge seeds, sd {sd:.{digits}f})"
        return f"{mean:.{digits}f}{unit}{note}"

    sentences = []
    for task, measure in merge.measures.items():
        clauses = contrasts.verdicts(measure, task, rivals)
        if task is None:
            loss = level([model["loss"] for model in seeds], 4)
            sentences.append(f"{name}, {run.loss_name} {loss}: {clauses}.{_few_items(measure)}")
        else:
            share = level(percentages(seeds, task), 1, " %")
            exact = ", by McNemar's mid-p against single models" if measure.mcnemar else ""
            sentences.append(f"{name}, {task} {share}: {clauses}{exact}.")
    return sentences
