"""What a run found: paired comparisons of the models, and sentences that claim no more than the numbers bear."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.report.formatting import p_text, spread, strength

APART = "not told apart"
AVERAGE = "average"  # the merge that every other one has to beat

Model = Mapping[str, Any]
Comparison = dict[str, Any]


def groups(merge: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Return the merges that differ in nothing but their seed, under one name.

    Args:
        merge: merge.json. Names that end in `-seedS` are of one group where method, weights and parameters are the same.

    Returns:
        `{name: names of the merges}`; a merge that is alone keeps its name.

    Example:
        >>> drawn = [
        ...     {"name": f"drawn-seed{seed}", "method": "selection", "seed": seed}
        ...     for seed in (0, 1)
        ... ]
        >>> groups({"merges": [{"name": "average", "method": "average", "seed": 0}, *drawn]})
        {'average': ['average'], 'drawn': ['drawn-seed0', 'drawn-seed1']}
    """
    rows = (merge or {"merges": []})["merges"]
    alike: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        stem = row["name"].removesuffix(f"-seed{row.get('seed')}")
        alike.setdefault(
            (stem, row["method"], str(row.get("weights")), str(row.get("parameters"))), []
        ).append(row["name"])
    taken, found = {row["name"] for row in rows}, {}
    for (stem, *_), names in alike.items():
        together = ", ".join(names) if stem in taken else stem
        found[names[0] if len(names) == 1 else together] = names
        taken.add(together)
    return found


def compare(
    models: Sequence[Model],
    items: Mapping[str, Mapping[str, Any]],
    *,
    resamples: int,
    seed: int,
    merge: Mapping[str, Any] | None = None,
) -> Comparison:
    """Compare every merge with the mean member, with the best one and with the average, item by item.

    Merges that differ in nothing but their seed are compared as one, by their mean on each item, with their spread in the error.

    Args:
        models: of evaluations.json.
        items: for each model its evaluations/{name}.json: `losses`, `ids`, `tasks`; with `tokens`, one
            number an item, loss differences are means over tokens, as the losses of `models` are.
        resamples: bootstrap resamples of the items.
        seed: of the run.
        merge: merge.json, which says what differs in its seed alone; None takes every merge by itself.

    Returns:
        `best` (`name`, `chosen_on`: "validation" or "test"), and `merges`: for each name of `groups` the `names` in it, `loss` and `tasks`, both with
        `mean_member`, `best_member` and, where there is a merge of the name average and it is another one, `average` as
        `paired.difference`; tasks also with `mcnemar` and `mcnemar_average` against the best member and the average. `holm` has the
        p values of each of them, corrected over the merges.

    Raises:
        UserError: two models were evaluated on different items.
    """
    members = [model for model in models if model["kind"] == "member"]
    if not members:
        return {"best": None, "merges": {}}
    validated = all(model.get("validation_loss") is not None for model in members)
    key = "validation_loss" if validated else "loss"
    known = [model for model in members if model.get(key) is not None]
    best = min(known, key=lambda model: float(model[key]))["name"] if known else members[0]["name"]
    names = [model["name"] for model in members]
    known_merges = [
        model["name"] for model in models if model["kind"] == "merge" and model["name"] in items
    ]
    merges: Comparison = {}
    for name, alike in (
        _together(known_merges, merge).items() if all(one in items for one in names) else ()
    ):
        own, others = [items[one] for one in alike], {"best_member": items[best]}
        if name != AVERAGE and AVERAGE in known_merges:
            others["average"] = items[AVERAGE]
        of_members = [items[one] for one in names]
        merges[name] = {
            "names": alike,
            "loss": _losses(own, of_members, others, resamples, seed),
            "tasks": {
                task: _answers(task, own, of_members, others, resamples, seed)
                for task in own[0].get("tasks", {})
            },
        }
    _correct(merges)
    return {
        "best": {"name": best, "chosen_on": "validation" if validated else "test"},
        "merges": merges,
    }


def sentences(
    analysis: Mapping[str, Any] | None,
    evaluations: Mapping[str, Any] | None,
    comparison: Comparison,
    merge: Mapping[str, Any] | None = None,
    unit: str = "nats a token",
) -> list[str]:
    """Return the plain-words summary.

    Clearly: p < 0.01. Weakly: p < 0.05, corrected over the merges. Otherwise two things are said to be not distinguishable, and never to be equal.
    """
    found = (
        []
        if analysis is None
        else [*_positions(analysis, unit), *_mitigation(analysis, groups(merge))]
    )
    found += [] if merge is None else _vectors(merge)
    if evaluations is not None:
        models = evaluations["models"]
        found += _members(models)
        found += [
            text for name in comparison["merges"] for text in _merge(name, models, comparison)
        ]
        tests = sum(
            len(gaps["holm"])
            for row in comparison["merges"].values()
            for gaps in (row["loss"], *row["tasks"].values())
            if gaps
        )
        if tests > 2:
            found.append(
                f"These are {tests} comparisons. Words follow p values corrected by Holm's method over the merges, apart for each measure "
                "and each model compared with; over these nothing is corrected. The errors are over test items, for these trained "
                "models; another training seed adds the spread that the members show among themselves, the spread between merge seeds is in the errors where there are several."
            )
    return found


def _together(merges: Sequence[str], merge: Mapping[str, Any] | None) -> dict[str, list[str]]:
    """Return the groups of these merges in their order; one of a group that is not whole stands by itself."""
    whole = {name: alike for name, alike in groups(merge).items() if set(alike) <= set(merges)}
    of = {one: name for name, alike in whole.items() for one in alike}
    return {of.get(one, one): whole.get(of.get(one, one), [one]) for one in merges}


def _losses(
    own: Sequence[Model],
    members: Sequence[Model],
    others: Mapping[str, Model],
    resamples: int,
    seed: int,
) -> Comparison | None:
    ids = own[0].get("ids")
    others = {name: row for name, row in others.items() if name != AVERAGE or row.get("ids") == ids}
    if any(
        row.get("ids") != ids or not row.get("losses") for row in [*own, *members, *others.values()]
    ):
        return None
    against = {"mean_member": np.mean([row["losses"] for row in members], axis=0)}
    against |= {name: np.array(row["losses"]) for name, row in others.items()}
    values = np.array([row["losses"] for row in own])
    return {
        name: _difference(values, losses, own[0].get("tokens"), resamples=resamples, seed=seed)
        for name, losses in against.items()
    }


def _answers(
    task: str,
    own: Sequence[Model],
    members: Sequence[Model],
    others: Mapping[str, Model],
    resamples: int,
    seed: int,
) -> Comparison | None:
    def rows(model: Model) -> Sequence[Model]:
        found: Sequence[Model] = model.get("tasks", {}).get(task, ())
        return found

    def right(models: Sequence[Model]) -> np.ndarray:
        return np.array([[float(item["correct"]) for item in rows(model)] for model in models])

    ids = [item["id"] for item in rows(own[0])]
    others = {
        name: model
        for name, model in others.items()
        if name != AVERAGE or [item["id"] for item in rows(model)] == ids
    }
    if len(ids) < 2 or any(
        [item["id"] for item in rows(model)] != ids for model in [*own, *members, *others.values()]
    ):
        return None
    values, against = right(own), dict(zip(others, right(list(others.values())), strict=True))
    found: Comparison = {
        name: _difference(values, other, None, resamples=resamples, seed=seed)
        for name, other in ({"mean_member": right(members).mean(axis=0)} | against).items()
    }
    # right and wrong are of one model: several seeds are compared by the t-test alone
    tests = {"best_member": "mcnemar", "average": "mcnemar_average"} if len(own) == 1 else {}
    return found | {
        tests[name]: paired.mcnemar(values[0] > 0.5, other > 0.5)
        for name, other in against.items()
        if name in tests
    }


def _difference(
    values: np.ndarray, other: np.ndarray, weights: Any, *, resamples: int, seed: int
) -> dict[str, float]:
    """Compare the mean over seeds of values [S, n] with those of another model, [n]."""
    gap = paired.difference(
        values.mean(axis=0), other, weights=weights, resamples=resamples, seed=seed
    )
    return (
        gap
        if len(values) == 1
        else paired.over_seeds(gap, np.average(values - other, axis=1, weights=weights))
    )


def _correct(merges: Comparison) -> None:
    """Write beside the comparisons, as `holm`, their p values corrected over the merges: of one measure against one model."""
    families: dict[tuple[str, str], list[tuple[Comparison, float]]] = {}
    for row in merges.values():
        for measure, gaps in {"": row["loss"], **row["tasks"]}.items():
            for name in ("mean_member", "best_member", "average"):
                if gaps is not None and name in gaps:
                    families.setdefault((measure, name), []).append((gaps, _p(gaps, name)))
    for (_, name), family in families.items():
        for (gaps, _), p in zip(family, paired.holm([p for _, p in family]), strict=True):
            gaps.setdefault("holm", {})[name] = p


def _p(gaps: Comparison, name: str) -> float:
    test = gaps.get({"best_member": "mcnemar", "average": "mcnemar_average"}.get(name, ""))
    return float((test or gaps[name])["p"])


def _positions(analysis: Mapping[str, Any], unit: str) -> list[str]:
    effects = analysis["fixed_effects"]
    if "reason" in effects:
        return [f"No fixed-effects estimate of the position effect: {effects['reason']}."]
    found = []
    for row in effects["coefficients"]:
        where = "epoch " + " = ".join(str(epoch) for epoch in row["epochs"])
        size = f"{row['estimate']:+.4f} ± {row['se']:.4f} {unit} from first to last, z {row['z']:.1f}, {p_text(row['p'])}"
        if not strength(row["p"]):
            found.append(
                f"Position in {where}: no effect on the final loss can be told from zero (slope {size})."
            )
        else:
            end = (
                "early end with the higher loss"
                if row["estimate"] < 0
                else "late end with the higher loss"
            )
            found.append(
                f"Position in {where}: samples seen {end}, {strength(row['p'])} (slope {size})."
            )
    sd = np.mean([row["sd_loss"] for row in analysis["members"]])
    largest = max(abs(row["estimate"]) for row in effects["coefficients"])
    found.append(
        f"For scale: the largest of these is {100 * largest / sd:.1f} % of the standard deviation of the loss between samples ({sd:.3f})."
    )
    return found


def _mitigation(analysis: Mapping[str, Any], together: Mapping[str, Sequence[str]]) -> list[str]:
    gaps = analysis["pooled"]["early_late"]
    merges = {name: row["early_late"] for name, row in analysis["merged"].items()}
    of = {one: name for name, alike in together.items() for one in alike}
    if not merges or any("reason" in gap for gap in gaps):
        return []
    epoch = max(range(len(gaps)), key=lambda e: abs(gaps[e]["estimate"]))
    before = gaps[epoch]
    if before["low"] <= 0 <= before["high"]:
        return [
            "After merging: the members show no gap between early and late samples that a merge could close."
        ]
    parts = []
    for name in dict.fromkeys(of.get(one, one) for one in merges):
        own = [rows[epoch] for one, rows in merges.items() if of.get(one, one) == name]
        estimate, error = (
            np.mean([row["merged"][key] for row in own]) for key in ("estimate", "se")
        )
        told = all(row["difference"]["low"] > 0 or row["difference"]["high"] < 0 for row in own)
        seeds = f" (mean of {len(own)} merge seeds)" if len(own) > 1 else ""
        parts.append(
            f"{name} {estimate:+.4f} ± {error:.4f}{seeds}{'' if told else ' (not told from the members)'}"
        )
    return [
        f"After merging: where the gap is largest, in epoch {epoch + 1}, the early half of a member's samples differs from its late half by "
        f"{before['estimate']:+.4f} ± {before['se']:.4f}; by the same orders, in the merges: {'; '.join(parts)}. An average of "
        f"{len(analysis['members'])} members with unrelated orders would be expected at about "
        f"{before['estimate'] / len(analysis['members']):+.4f}."
    ]


def _vectors(merge: Mapping[str, Any]) -> list[str]:
    totals = [row.get("diagnostics", {}).get("total", {}) for row in merge["merges"]]
    known = next(
        (total for total in totals if total.get("cosines") and total.get("unchanged")), None
    )
    if known is None or len(known["cosines"]) < 2:
        return []
    cosines = [
        value
        for i, row in enumerate(known["cosines"])
        for value in row[i + 1 :]
        if value is not None
    ]
    low, high = 100 * min(known["unchanged"]), 100 * max(known["unchanged"])
    zeros = f"{low:.1f} to {high:.1f} % of a member's elements are exactly those of the base in {merge.get('dtype')}"
    use = ", so that resampling has next to nothing to draw again" if high < 1 else ""
    alike = (
        f"have a mean cosine of {np.mean(cosines):.3f} with each other" if cosines else "are zero"
    )
    return [f"The members' task vectors {alike}; {zeros}{use}."]


def _members(models: Sequence[Model]) -> list[str]:
    members = [model for model in models if model["kind"] == "member"]
    base = next((model for model in models if model["kind"] == "base"), None)
    found = []
    with_loss = [model["loss"] for model in members if model.get("loss") is not None]
    if with_loss:
        mean, sd = spread(with_loss)
        before = (
            f", base {base['loss']:.4f}"
            if base is not None and base.get("loss") is not None
            else ""
        )
        among = f" (standard deviation between members {sd:.4f})" if sd is not None else ""
        found.append(f"Held-out loss: mean member {mean:.4f}{among}{before}.")
    for task in members[0].get("tasks", {}) if members else ():
        mean, sd = spread(
            [100 * model["tasks"][task]["accuracy"] for model in members if task in model["tasks"]]
        )
        before = (
            f", base {100 * base['tasks'][task]['accuracy']:.1f} %"
            if base is not None and task in base["tasks"]
            else ""
        )
        among = f" (standard deviation between members {sd:.1f} points)" if sd is not None else ""
        found.append(f"{task}: mean member {mean:.1f} % right{among}{before}.")
    return found


def _merge(name: str, models: Sequence[Model], comparison: Comparison) -> list[str]:
    row, picked = comparison["merges"][name], comparison["best"]
    best = f"the best member ({picked['name']}, chosen on {picked['chosen_on']}{'' if picked['chosen_on'] == 'validation' else ': optimistic'})"
    own = [model for model in models if model["name"] in row["names"]]
    found = []
    if row["loss"] is not None:
        told = _verdicts(row["loss"], best, 1, 4, lower_is_better=True)
        found.append(
            f"{name}, held-out loss {_level([model['loss'] for model in own], 4)}: {told}."
        )
    for task, gap in row["tasks"].items():
        if gap is not None:
            shares = [100 * model["tasks"][task]["accuracy"] for model in own]
            told = _verdicts(gap, best, 100, 1, lower_is_better=False)
            exact = ", by McNemar's test against single models" if "mcnemar" in gap else ""
            found.append(f"{name}, {task} {_level(shares, 1, ' %')}: {told}{exact}.")
    return found


def _level(values: Sequence[float], digits: int, unit: str = "") -> str:
    mean, sd = spread(values)
    return f"{mean:.{digits}f}{unit}" + (
        "" if sd is None else f" (mean of {len(values)} merge seeds, sd {sd:.{digits}f})"
    )


def _verdicts(
    gaps: Comparison, best: str, scale: float, digits: int, *, lower_is_better: bool
) -> str:
    against = {"mean_member": "the mean member", "best_member": best, "average": "the average"}
    return "; ".join(
        f"{_verdict(gaps[name], _p(gaps, name), gaps['holm'][name], scale, digits, lower_is_better=lower_is_better)} {whom}"
        for name, whom in against.items()
        if name in gaps
    )


def _verdict(
    gap: Mapping[str, float],
    p: float,
    corrected: float,
    scale: float,
    digits: int,
    *,
    lower_is_better: bool,
) -> str:
    both = p_text(p) + (
        f", by Holm {p_text(corrected).removeprefix('p ')}" if corrected > p else ""
    )
    size = f"{scale * gap['estimate']:+.{digits}f} ± {scale * gap['se']:.{digits}f}, {both}"
    told = verdict(gap["estimate"], corrected, lower_is_better)
    return f"not distinguishable ({size}) from" if told == APART else f"{told} ({size}) than"


def verdict(estimate: float, corrected: float, lower_is_better: bool) -> str:
    """Return what a difference says, by its p value corrected over the merges.

    Example:
        >>> verdict(-0.1, 0.001, True), verdict(-0.1, 0.03, False), verdict(0.1, 0.2, True)
        ('clearly better', 'weakly worse', 'not told apart')
    """
    if not strength(corrected):
        return APART
    return f"{strength(corrected)} {'better' if (estimate < 0) == lower_is_better else 'worse'}"
