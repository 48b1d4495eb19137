"""Controls: models that a merge is compared with. Which models they are, and their comparison."""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.search import lambdas
from jax_ordermerge.search.candidates import (
    BASE,
    MEMBER,
    Candidate,
    Population,
    baselines,
    members_at,
)
from jax_ordermerge.search.claim import AVERAGE, BEST_MEMBER, MEAN_MEMBER
from jax_ordermerge.search.lambdas import Point
from jax_ordermerge.tree import Tree

# Besides 0, the base, and 1, the average. Merges differ in the length of their task vectors as well
# as in their direction; this line shows what length alone does.
LAMBDAS = (0.5, 0.7, 0.8, 0.9, 1.1, 1.2, 1.4)
BARRIER = (0.25, 0.5, 0.75)  # positions between member 0 and member 1
PLANE = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)  # factors of the task vectors of members 0 and 1
SEEDS = 3  # further draws of each selection, for the spread between draws


class Control(NamedTuple):
    """One control.

    Attributes:
        name: name in tables.
        group: a `config.merge.Control`, or `anchor` for average, members and base.
        candidate: the model.
        at: position on the line or plane of its group: of a model at several lambdas, lambda.
        line: name of the model at lambda 1, of a model at several lambdas.
    """

    name: str
    group: str
    candidate: Candidate
    at: tuple[float, ...] = ()
    line: str | None = None


class ControlLosses(NamedTuple):
    """Losses of one model.

    Attributes:
        losses: float64[n], per token, of the items of the reported split.
        validation: mean loss on the validation examples, None where there are none.
    """

    losses: np.ndarray
    validation: float | None


def make_controls(
    groups: Collection[str], members: int, selections: Mapping[str, Candidate], seed: int
) -> list[Control]:
    """Return the controls of a population, each model once: average, members and base first.

    Args:
        groups: names of `config.merge.Control`. `ensemble` and `single` are no merges: they are
            not among the returned controls.
        members: number of members.
        selections: the reported selections by name. Controls match their lambda and repeat them
            with other seeds.
        seed: of the run.

    Example:
        >>> controls = make_controls(["lambda_line"], 1, {}, 0)
        >>> [control.name for control in controls][:4]
        ['average', 'member_0', 'base', 'average, lambda 0.5']
    """
    controls = [
        Control(x.name, "anchor", x, (0.0,) if x.method == BASE else (1.0,), x.name)
        for x in baselines(members, seed)
    ]

    def add(
        name: str, group: str, candidate: Candidate, *at: float, line: str | None = None
    ) -> None:
        if group in groups:
            controls.append(Control(name, group, candidate, at, line))

    for x in LAMBDAS:
        candidate = Candidate("task_arithmetic", {"scale": x}, seed=seed)
        add(f"average, lambda {x:g}", "lambda_line", candidate, x, line="average")
        for member in members_at(members, x):
            line = member.at_one().name
            add(f"{line}, lambda {x:g}", "lambda_members", member, x, line=line)
    add("average as long as the members", "norm_matched", Candidate("norm_matched", seed=seed))
    for name, selection in selections.items():
        controls += _selection_controls(groups, name, selection)
    # One line for the seeds of a selection: they differ by noise, and each costs eight models.
    lines: dict[str, str] = {}
    for name, selection in selections.items():
        lines.setdefault(dataclasses.replace(selection, seed=0).key, name)
    for name in lines.values():
        for x in sorted((1.0, *LAMBDAS)):
            scaled = dataclasses.replace(selections[name], scale=x)
            add(f"{name}, lambda {x:g}", "lambda_selections", scaled, x, line=name)
    # all that follow need a second member
    if members == 1:
        return controls
    if selections:
        for child in range(members):
            candidate = Candidate("selection", {"child": child}, seed=seed)
            add(f"selection, child {child} of {members}", "children", candidate)
    # The other members have weight 0: line and plane are those of members 0 and 1.
    rest = (0.0,) * (members - 2)
    for t in BARRIER:
        candidate = Candidate("average", weights=(1 - t, t, *rest), seed=seed)
        add(f"{1 - t:g} member_0 + {t:g} member_1", "barrier", candidate, t)
    for b in PLANE:
        for a in PLANE:
            candidate = Candidate("task_arithmetic", weights=(a, b, *rest), seed=seed)
            add(f"base + {a:g} tau_0 + {b:g} tau_1", "plane", candidate, a, b)
    return controls


def _selection_controls(groups: Collection[str], name: str, selection: Candidate) -> list[Control]:
    controls, parameters = [], selection.parameters
    # Without resampling a selection equals the average in expectation: its lambda is 1. The matched
    # lambda of a resampled one is defined by element.
    by_element = parameters.get("granularity", "element") == "element"
    if "lambda_matched" in groups and by_element and parameters.get("resample", 0) != 0:
        resampling = {
            key: value for key, value in parameters.items() if key in ("resample", "resample_from")
        }
        matched = Candidate("lambda_matched", resampling, selection.weights, selection.seed)
        controls.append(Control(f"average as long as {name}", "lambda_matched", matched))
    # A child has its own control, `children`: the other children of the same permutations.
    if "seeds" in groups and parameters.get("child") is None:
        for draw in range(1, SEEDS + 1):
            seed = int(stream_key_bits(selection.seed, "control", draw)[0])
            repeated = Candidate(selection.method, parameters, selection.weights, seed)
            controls.append(Control(f"{name}, draw {draw + 1}", "seeds", repeated))
    return controls


def measure(
    population: Population,
    controls: Sequence[Control],
    measured: Mapping[str, ControlLosses],
    measure_model: Callable[[Tree], ControlLosses],
    log: Callable[[str], None],
) -> dict[str, ControlLosses]:
    """Return the losses of every control by name. One at a time is built in device memory.

    Args:
        population: the members and their base.
        controls: the controls.
        measured: losses by name that need not be measured again.
        measure_model: losses of a model.
        log: takes messages of one line.
    """
    losses = {}
    for control in controls:
        if control.name in measured:
            losses[control.name] = measured[control.name]
        else:
            with population.build_temporarily(control.candidate) as params:
                losses[control.name] = measure_model(params)
        if not np.isfinite(losses[control.name].losses).all():
            raise UserError(
                f"control {control.name!r}: a loss is NaN or infinite; its weights overflow: leave "
                f"its group {control.group} out of merge.controls"
            )
    fresh = len(controls) - len(measured.keys() & losses.keys())
    log(f"  {len(controls)} controls, {fresh} of them measured now")
    return losses


def compare(
    controls: Sequence[Control],
    losses: Mapping[str, ControlLosses],
    tokens: np.ndarray,
    *,
    resamples: int,
    seed: int,
    choose: bool = True,
) -> Json:
    """Compare every control with the mean member, the best member and the average, item by item.

    Args:
        controls: the controls.
        losses: by name, of the controls and of models that are no merges.
        tokens: [n], token count of each item.
        resamples, seed: of the bootstrap.
        choose: whether the validation examples are others than the items, so that a lambda that was
            chosen on them can be compared on the items.

    Returns:
        JSON for the report: `best_member` (`name`, `chosen_on`), `examples`, and `rows` with
        `name`, `group`, `at`, `candidate` (None of what is no merge), `loss`, `validation_loss`
        and `against` (`paired.difference` by name of the rival); `lambdas`, see `lambdas.compare`,
        or None where nothing can choose a lambda.
    """
    members = [control.name for control in controls if control.candidate.kind == "member"]
    validated = all(losses[name].validation is not None for name in members)

    def mean_loss(name: str) -> float:
        return float((losses[name].losses * tokens).sum() / tokens.sum())

    def criterion(name: str) -> float:
        # Choosing on the reported split would favor the best member.
        validation = losses[name].validation
        return mean_loss(name) if validation is None else validation

    best = min(members, key=criterion)
    # The mean member is what a user gets who trains one model and does not choose.
    rivals = {
        MEAN_MEMBER: np.mean([losses[name].losses for name in members], axis=0),
        BEST_MEMBER: losses[best].losses,
        AVERAGE: losses["average"].losses,
    }
    by_name = {control.name: control for control in controls}
    rows = []
    for name, model_losses in losses.items():
        control = by_name.get(name)
        against = {
            rival: paired.difference(
                model_losses.losses, rival_losses, weights=tokens, resamples=resamples, seed=seed
            )
            for rival, rival_losses in rivals.items()
            # The same model: a test of zero differences has no meaning.
            if not np.array_equal(model_losses.losses, rival_losses)
        }
        rows.append(
            {
                "name": name,
                "group": control.group if control else name,
                "at": list(control.at) if control else [],
                "line": control.line if control else None,
                "candidate": control.candidate.to_dict() if control else None,
                "kind": control.candidate.kind if control else "other",
                "loss": mean_loss(name),
                "validation_loss": model_losses.validation,
                "against": asdict(against),
            }
        )
    return {
        "best_member": {"name": best, "chosen_on": "validation" if validated else "test"},
        "examples": len(tokens),
        "rows": rows,
        "lambdas": _compare_lambdas(controls, losses, tokens, resamples, seed)
        if validated and choose
        else None,
    }


def _compare_lambdas(
    controls: Sequence[Control],
    losses: Mapping[str, ControlLosses],
    tokens: np.ndarray,
    resamples: int,
    seed: int,
) -> Json | None:
    """Compare members, average and selections, each at its own lambda.

    None where members or average were measured at 1 alone: the other side would have chosen its
    length, and only one of them.
    """
    members, merges = dict[str, list[Point]](), dict[str, list[Point]]()
    for control in controls:
        if control.line is None or control.candidate.method == BASE:
            continue
        values = losses[control.name]
        assert values.validation is not None  # all models have it, or none
        lines = members if control.candidate.method == MEMBER else merges
        point = Point(control.at[0], control.name, values.losses, values.validation)
        lines.setdefault(control.line, []).append(point)
    if any(len(line) == 1 for line in (*members.values(), *merges.values())):
        return None
    return lambdas.compare(members, merges, tokens, resamples=resamples, seed=seed)
