"""One number of a model in one population: a measure at lambda 1, or the loss at its own lambda."""

from statistics import fmean

from jax_ordermerge.analysis.result import Undetermined
from jax_ordermerge.config.merge import LOSS, unmerged_controls
from jax_ordermerge.json_types import Json
from jax_ordermerge.report.differences import BEST_MEMBER, MEAN_MEMBER, best_member, seed_groups
from jax_ordermerge.report.run import Run


def measured(run: Run, name: str, measure: str) -> float:
    """Return a measure of a model as it is: of a merge with several seeds their mean.

    Args:
        run: one population.
        name: a merge, a control, `mean_member` or `best_member` (chosen on validation).
        measure: `loss`, or the name of a task (share of right answers).

    Raises:
        Undetermined: there is no such model, measure or finite number.
    """
    models = {model["name"]: model for model in run.models}
    members = [model["name"] for model in run.members]
    merges = [model["name"] for model in run.models if model["kind"] == "merge"]
    groups = seed_groups(merges, run.merge)
    if name == MEAN_MEMBER:
        names = members
    elif name == BEST_MEMBER:
        best = best_member(run.members)
        if best.chosen_on != "validation":
            raise Undetermined("no validation loss: the best member would be chosen on test")
        names = [best.name]
    else:
        names = groups.get(name, [name] if name in models else [])
    if names:
        return fmean(_number(models[name], measure) for name in names)
    rows = {row["name"]: row for row in (run.controls or {"rows": []})["rows"]}
    control = unmerged_controls(run.config["population"]["members"]).get(name, name)
    if measure == LOSS and control in rows:
        return _number(rows[control], LOSS)
    raise Undetermined(f"no {measure} of {name}")


def names_of(run: Run) -> list[str]:
    """Return the names that `measured` may find in a run."""
    merges = [model["name"] for model in run.models if model["kind"] == "merge"]
    controls = (row["name"] for row in (run.controls or {"rows": []})["rows"])
    names = [MEAN_MEMBER, BEST_MEMBER, *seed_groups(merges, run.merge)]
    names += [model["name"] for model in run.models]
    names += [*unmerged_controls(run.config["population"]["members"]), *controls]
    return list(dict.fromkeys(names))


def _number(row: Json, measure: str) -> float:
    value = row.get("loss")
    if measure != LOSS:
        value = row.get("tasks", {}).get(measure, {}).get("accuracy")
    if value is None:  # JSON has no numbers that are not finite
        raise Undetermined(f"no finite {measure} of {row['name']}")
    return float(value)


def loss_at_own_lambda(run: Run, name: str) -> float:
    """Return the test loss of a model at the lambda of its lowest validation loss.

    Of a merge with several seeds it is that of the first: the controls have one line for all.

    Args:
        run: one population.
        name: as for `measured`.

    Raises:
        Undetermined: there is no such lambda line.
    """
    lambdas = (run.controls or {}).get("lambdas")
    if lambdas is None:
        raise Undetermined("no model at its own lambda: there are no validation examples")
    rows = {row["name"]: row for row in (run.controls or {})["rows"]}
    members = [member["name"] for member in run.members]
    merges = [model["name"] for model in run.models if model["kind"] == "merge"]
    if name == MEAN_MEMBER:
        lines = members
    elif name == BEST_MEMBER:
        lines = [lambdas["best_member"]["line"]]
    else:
        lines = [x for x in seed_groups(merges, run.merge).get(name, [name]) if x in lambdas["own"]]
    if not lines or not set(lines) <= set(lambdas["own"]):
        raise Undetermined(f"no lambda line of {name}")
    return fmean(_number(rows[lambdas["own"][line]["control"]], LOSS) for line in lines)
