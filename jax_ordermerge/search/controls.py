"""Controls: what a merge has to be seen beside. Which models they are, and what the numbers about them say."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.search.candidates import BASE, Candidate, Population, anchors
from jax_ordermerge.tree import Tree

LAMBDAS = (0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4)  # beside 0, the base, and 1, the average
BARRIER = (0.25, 0.5, 0.75)  # of the way from member 0 to member 1
PLANE = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # of the task vectors of members 0 and 1
SEEDS = 3  # more draws of each selection


class Control(NamedTuple):
    """One control.

    Attributes:
        name: what tables call it.
        group: of `merge_config.Control`, or `anchor`.
        candidate: the model.
        at: where it lies on the line or the plane of its group.
    """

    name: str
    group: str
    candidate: Candidate
    at: tuple[float, ...] = ()


class Measured(NamedTuple):
    """Losses of one model.

    Attributes:
        losses: float64[n], a token, of the items of the split that is reported.
        validation: mean loss on the validation examples, None where there are none.
    """

    losses: np.ndarray
    validation: float | None


def controls(
    groups: Collection[str], members: int, selections: Mapping[str, Candidate], seed: int
) -> list[Control]:
    """Return the controls of a population, each model once: average, members and base first.

    Args:
        groups: which of `merge_config.Control`; `ensemble` and `single` are no merges and are not among those returned.
        members: their number.
        selections: the selections that are reported, by name: their lambdas are matched, and they are drawn with other seeds.
        seed: of the run.

    Example:
        >>> [one.name for one in controls(["lambda_line"], 1, {}, 0)][:4]
        ['average', 'member_0', 'base', 'average, lambda 0.5']
    """
    found = [
        Control(one.name, "anchor", one, {"average": (1.0,), BASE: (0.0,)}.get(one.method, ()))
        for one in anchors(members, seed)
    ]
    if "lambda_line" in groups:
        found += [
            Control(
                f"average, lambda {x:g}",
                "lambda_line",
                Candidate("task_arithmetic", {"scale": x}, seed=seed),
                (x,),
            )
            for x in LAMBDAS
        ]
    if "norm_matched" in groups:
        found.append(
            Control(
                "average as long as the members",
                "norm_matched",
                Candidate("norm_matched", seed=seed),
            )
        )
    for name, one in selections.items():
        found += _of_selection(groups, name, one)
    if "children" in groups and selections and members > 1:
        found += [
            Control(
                f"selection, child {child} of {members}",
                "children",
                Candidate("selection", {"child": child}, seed=seed),
            )
            for child in range(members)
        ]
    if "barrier" in groups and members > 1:
        rest = (0.0,) * (members - 2)
        found += [
            Control(
                f"{1 - t:g} member_0 + {t:g} member_1",
                "barrier",
                Candidate("average", weights=(1 - t, t, *rest), seed=seed),
                (t,),
            )
            for t in BARRIER
        ]
    if "plane" in groups and members > 1:
        rest = (0.0,) * (members - 2)
        found += [
            Control(
                f"base + {a:g} tau_0 + {b:g} tau_1",
                "plane",
                Candidate("task_arithmetic", weights=(a, b, *rest), seed=seed),
                (a, b),
            )
            for b in PLANE
            for a in PLANE
        ]
    return found


def _of_selection(groups: Collection[str], name: str, one: Candidate) -> list[Control]:
    found, plain = [], one.parameters.get("granularity", "element") == "element"
    if "lambda_matched" in groups and plain and one.parameters.get("resample", 0) != 0:
        given = {
            key: value
            for key, value in one.parameters.items()
            if key in ("resample", "resample_from")
        }
        found.append(
            Control(
                f"average as long as {name}",
                "lambda_matched",
                Candidate("lambda_matched", given, one.weights, one.seed),
            )
        )
    if "seeds" in groups and one.parameters.get("child") is None:
        for draw in range(1, SEEDS + 1):
            other = int(stream_key_bits(one.seed, "control", draw)[0])
            found.append(
                Control(
                    f"{name}, draw {draw + 1}",
                    "seeds",
                    Candidate(one.method, one.parameters, one.weights, other),
                )
            )
    return found


def measure(
    stock: Population,
    listed: Sequence[Control],
    known: Mapping[str, Measured],
    measured: Callable[[Tree], Measured],
    log: Callable[[str], None],
) -> dict[str, Measured]:
    """Return the losses of every control by name: made one at a time in device memory, nothing is written.

    Args:
        stock: the population.
        listed: the controls.
        known: by name, what need not be measured again.
        measured: measures a model.
        say: where one-line messages go.
    """
    found = {}
    for one in listed:
        if one.name not in known:
            params = stock.build(one.candidate)
            found[one.name] = measured(params)
            if one.candidate.kind != "base":
                jax.tree.map(lambda leaf: leaf.delete(), params)
        else:
            found[one.name] = known[one.name]
    log(
        f"  {len(listed)} controls, {len(listed) - len(known.keys() & found.keys())} of them measured now"
    )
    return found


def compare(
    listed: Sequence[Control],
    found: Mapping[str, Measured],
    tokens: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Return rows for the report: every control against the mean member, the best member and the average, item by item.

    Args:
        listed: the controls, and `found` their losses, with others that are no merges after them.
        found: by name.
        tokens: [n], what the loss of an item was divided by.
        resamples, seed: of the bootstrap.

    Returns:
        `best_member` (`name`, `chosen_on`), `examples`, and `rows` with `name`, `group`, `at`, `candidate` (None of what is no merge),
        `loss`, `validation_loss` and `against` (`paired.difference` by name of the rival). Plain data.
    """
    members = [one.name for one in listed if one.candidate.kind == "member"]
    validated = all(found[name].validation is not None for name in members)

    def loss(name: str) -> float:
        return float((found[name].losses * tokens).sum() / tokens.sum())

    def chosen_by(name: str) -> float:
        held = found[name].validation
        return loss(name) if held is None else held

    best = min(members, key=chosen_by)
    rivals = {
        "mean_member": np.mean([found[name].losses for name in members], axis=0),
        "best_member": found[best].losses,
    }
    rivals["average"] = found["average"].losses
    known = {one.name: one for one in listed}
    rows = []
    for name, one in found.items():
        own = known.get(name)
        gaps = {
            rival: paired.difference(
                one.losses, losses, weights=tokens, resamples=resamples, seed=seed
            )
            for rival, losses in rivals.items()
            if not np.array_equal(one.losses, losses)
        }
        rows.append(
            {
                "name": name,
                "group": own.group if own else name,
                "at": list(own.at) if own else [],
                "candidate": own.candidate.to_dict() if own else None,
                "kind": own.candidate.kind if own else "other",
                "loss": loss(name),
                "validation_loss": one.validation,
                "against": gaps,
            }
        )
    return {
        "best_member": {"name": best, "chosen_on": "validation" if validated else "test"},
        "examples": len(tokens),
        "rows": rows,
    }
