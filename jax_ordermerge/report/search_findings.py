"""The findings of a search in sentences: what was chosen, and what may be claimed of it."""

from collections.abc import Mapping

from jax_ordermerge.analysis.paired import WEAK
from jax_ordermerge.config.merge import LOSS
from jax_ordermerge.json_types import Json
from jax_ordermerge.report.differences import RIVALS
from jax_ordermerge.report.formatting import (
    bounds,
    number,
    p_text,
    signed,
    undetected,
    verdict,
    versus,
)

# The parts of a claim, see `search.claim`.
_SCALED_MEMBER, _SCALED_AVERAGE = "scaled_member", "scaled_average"


def sentences(search: Json) -> list[str]:
    """Return what a search chose and what may be claimed of it.

    Args:
        search: results.json of a search.
    """
    return [*_choice(search), *_claims(search), *_tasks(search)]


def criterion(measure: list[str]) -> str:
    """Return the name of what a search has minimized.

    Example:
        >>> criterion(["loss"]), criterion(["sums"])
        ('loss', 'wrong answers to sums')
        >>> criterion(["loss", "sums"])
        'mean of loss and wrong answers to sums, each over that of the mean member'
    """
    names = [name if name == LOSS else f"wrong answers to {name}" for name in measure]
    if len(names) == 1:
        return names[0]
    return f"mean of {', '.join(names[:-1])} and {names[-1]}, each over that of the mean member"


def worse_measures(search: Json) -> list[str]:
    """Return the measures in which a winner is worse than the best member on test, p below 0.05."""
    if not (claim := search.get("claim")):
        return []
    gap = claim["against"].get("best_member")
    losses = [LOSS] if gap and gap["estimate"] > 0 and gap["holm"] < WEAK else []
    tasks = [
        name
        for name, row in claim["tasks"].items()
        if row["difference"] and row["difference"]["estimate"] < 0 and row["mcnemar"]["p"] < WEAK
    ]
    return losses + tasks


def _choice(search: Json) -> list[str]:
    measure = search["settings"]["space"]["measure"]
    candidates, name = search["candidates"], criterion(measure)
    winner, best = (candidates[search[key]] for key in ("winner", "best_member"))
    lines = [
        f"The search chose {winner['name']} among {search['tried']} candidates on "
        f"{search['examples']} validation examples ({name} {winner['loss']:.4f}; the best member "
        f"by {name}, {best['name']}, {best['loss']:.4f})."
    ]
    guard = search["guard"]
    if guard["worse"]:
        rows = (_values(key, guard["measures"][key]) for key in guard["worse"])
        lines.append(
            f"{candidates[guard['leader']]['name']} has the lower {name}, but it is worse than "
            f"that member on validation: {'; '.join(rows)}. So the member is chosen."
        )
    if search["edges"]:
        lines.append(
            f"These settings lie at the edge of the search space: {', '.join(search['edges'])}; "
            "the best value may lie beyond."
        )
    return lines


def _values(name: str, row: Json) -> str:
    values = [row["candidate"], row["best_member"], row["margin"]]
    if name == LOSS:
        return "loss {} against {} (margin {})".format(*(number(x, 4) for x in values))
    # the search minimizes shares of wrong answers; readers expect those of right ones
    right = [None if x is None else 100 * (1 - x) for x in values[:2]]
    shares = [*(number(x, 1) for x in right), number(100 * row["margin"], 1)]
    return f"{name} " + "{} % right against {} % (margin {} points)".format(*shares)


def _claims(search: Json) -> list[str]:
    # the validation loss of a winner is too good, so without a test split nothing is claimed
    if not (claim := search["claim"]):
        return ["There is no test split, so nothing is claimed."]
    scaled = {
        _SCALED_MEMBER: search["candidates"][search["scaled_member"]]["name"],
        _SCALED_AVERAGE: search["candidates"][search["scaled_average"]]["name"],
    }
    best = search["candidates"][search["best_member"]]["name"]
    rivals = {
        **RIVALS,
        _SCALED_MEMBER: f"the best member at its own lambda ({scaled[_SCALED_MEMBER]})",
        _SCALED_AVERAGE: f"the average at its own lambda ({scaled[_SCALED_AVERAGE]})",
    }
    # At lambda 1 the best of its kind is the rival that is there already.
    twins = {_SCALED_MEMBER: best, _SCALED_AVERAGE: "average"}
    rivals = {key: text for key, text in rivals.items() if scaled.get(key) != twins.get(key, "")}
    clauses = _clauses(claim["against"], rivals)
    # A rival with the same losses is not tested. It is the same model as far as anyone can tell,
    # as where the search chose the average itself.
    clauses += [
        f"identical in every loss to {text}"
        for key, text in rivals.items()
        if key not in claim["against"]
    ]
    lines = [
        f"On the {claim['examples']} test examples, which had no part in the choice, its loss is "
        f"{'; '.join(clauses)}."
    ]
    if claim["at_one"]:
        lines.append(
            f"With every lambda at 1 it is {'; '.join(_clauses(claim['at_one'], rivals))}."
        )
    return [*lines, _effects(search)]


def _clauses(gaps: Mapping[str, Json], rivals: Mapping[str, str]) -> list[str]:
    return [
        versus(
            verdict(gap["estimate"], gap["holm"]),
            f"{gap['estimate']:+.4f} {bounds(gap['low'], gap['high'])}, "
            f"by Holm {p_text(gap['holm'])}" + undetected(gap["holm"], gap["se"], gap["n"] - 1),
            rivals[rival],
        )
        for rival, gap in gaps.items()
        if rival in rivals
    ]


def _effects(search: Json) -> str:
    """Return which of merging and length is shown to help."""
    claim = search["claim"]
    texts = {
        (True, True): "Merging helps, and so does another length of the task vector.",
        (True, False): "Merging helps; that another length of the task vector helps by itself is "
        "not shown.",
        (False, True): "Another length of the task vector helps; that merging helps beside it is "
        "not shown.",
        (False, False): "Neither merging nor another length of the task vector is shown to help.",
    }
    text = texts[claim["merging_helps"], claim["length_helps"]]
    if length := claim.get("length"):
        scaled = search["candidates"][search["scaled_member"]]["name"]
        size = f"{signed(length)}, by Holm {p_text(length['holm'])}"
        text += f" Length alone: {scaled} less the best member {size}."
    return text


def _tasks(search: Json) -> list[str]:
    claim = search["claim"]
    lines = []
    for name, row in (claim["tasks"] if claim else {}).items():
        if row["difference"]:
            winner, best = (100 * share for share in row["accuracy"])
            p = row["mcnemar"]["p"]
            word = verdict(row["difference"]["estimate"], p, lower_is_better=False)
            size = f"{signed(row['difference'], 100, 1)} points, {p_text(p)}"
            clause = versus(word, size, RIVALS["best_member"])
            lines.append(
                f"{name}: {winner:.1f} % right, {best:.1f} % of the best member: {clause}."
            )
    if worse := worse_measures(search):
        lines.append(f"On test these measures got worse: {', '.join(worse)}.")
    return lines
