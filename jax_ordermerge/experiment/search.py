"""Which merge to ship: a search over the population of a run with the claim of its winner, and the controls of the report."""

import dataclasses
import functools
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jax_ordermerge.analysis import choice
from jax_ordermerge.config import Config
from jax_ordermerge.config.merge import Search, merge_name
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import waves
from jax_ordermerge.experiment.layout import write_bytes, write_json
from jax_ordermerge.layout import SearchLayout
from jax_ordermerge.search import controls, search
from jax_ordermerge.search.candidates import BASE, MEMBER, Candidate, LossFn, Population
from jax_ordermerge.train import members as trained
from jax_ordermerge.tree import Tree

if TYPE_CHECKING:
    from jax_ordermerge.experiment.stages import RunContext

# what a model, whatever it is, says of examples: (summed losses, what they are divided by), float64[n] each
Losses = Callable[[Examples], tuple[np.ndarray, np.ndarray]]


def check(config: Config, splits: Mapping[str, Examples], space: Search, model: Any) -> None:
    """Refuse a search that could not begin, before anything is trained for it.

    Raises:
        UserError: there are no validation examples, they are also in another split, or the space is wrong.
    """
    validation = splits.get("validation")
    if validation is None:
        raise UserError(
            "a merge is chosen on validation examples: set data.validation_examples, or give ordermerge search --validation FILE"
        )
    search.check_disjoint(
        validation, {name: one for name, one in splits.items() if name != "validation"}
    )
    search.check_space(space, config.population.members, model, _seed(config, space))


def search_space(
    ctx: "RunContext", stock: Population, space: Search, measure: LossFn, directory: Path
) -> search.SearchResult:
    """Choose a merge on the validation examples, then say what may be claimed of it on the test examples.

    Writes journal.jsonl while it goes on and results.json at its end, nothing else.
    """
    layout = SearchLayout(directory)
    found = search.run_search(
        stock,
        space,
        ctx.splits["validation"],
        measure,
        seed=_seed(ctx.config, space),
        layout=layout,
        provenance={
            "dtype": str(stock.dtype),
            "train": ctx.splits["train"].digest,
            "run": ctx.config.name,
            "run_seed": ctx.config.seed,
        },
        log=ctx.log,
    )
    claimed = _claim(ctx, stock, found, measure) if len(ctx.splits.get("test") or ()) > 1 else None
    found = dataclasses.replace(found, claim=claimed)
    write_json(layout.results, found.to_dict())
    ctx.log(f"  {choice.sentence(found.to_dict())}")
    return found


def _seed(config: Config, space: Search) -> int:
    return config.seed if space.seed is None else space.seed


def _claim(
    ctx: "RunContext", stock: Population, found: search.SearchResult, measure: LossFn
) -> dict[str, Any]:
    """Measure the winner and its rivals on the test examples: the first time that these are looked at."""
    test = ctx.splits["test"]
    measured = [
        measure(stock.build(Candidate(MEMBER, {"number": number})), test)
        for number in range(stock.count)
    ]
    tokens = measured[0][1]
    members = [sums / tokens for sums, _ in measured]
    winner, average = (
        measure(stock.build(candidate), test)[0] / tokens
        for candidate in (found.winning_candidate, Candidate("average"))
    )
    rivals = {
        "best_member": members[found.best_member_number],
        "mean_member": np.mean(members, axis=0),
        "average": average,
    }
    against = choice.claim(
        winner, rivals, tokens, resamples=ctx.config.evaluation.bootstrap, seed=ctx.config.seed
    )
    loss = {
        name: float((own * tokens).sum() / tokens.sum())
        for name, own in {"winner": winner, **rivals}.items()
    }
    return {"examples": len(test), "loss": loss, "against": against}


def story(found: search.SearchResult) -> str:
    """Return what a model card says of a chosen merge."""
    one = found.winning_candidate
    same = {"base": "It is the base itself.", "member": "It is one of the members itself."}.get(
        one.kind, ""
    )
    return f"{choice.sentence(found.to_dict())} {same}".strip()


def settings(one: Candidate) -> dict[str, Any]:
    """Return method, seed, weights and parameters of a candidate, its lambdas among the latter, as merge.json has them."""
    lambdas = {
        **({} if one.scale == 1 else {"lambda": one.scale}),
        **{f"lambda({group})": x for group, x in one.groups.items()},
    }
    return {
        "method": one.method,
        "seed": one.seed,
        "weights": one.weights,
        "parameters": {**one.parameters, **lambdas},
    }


def recipe(found: search.SearchResult) -> dict[str, Any]:
    """Return what a recipe says of a chosen merge: what `Candidate` has, and how it was found."""
    one = found.winning_candidate
    return {
        "merge_method": one.method,
        **{
            key: value
            for key, value in one.to_dict().items()
            if key in ("weights", "parameters", "seed")
        },
        "scale": one.scale,
        "groups": dict(one.groups),
        "chosen": {
            "among": len(found.candidates),
            "validation_examples": found.examples,
            "seed": found.seed,
        },
    }


# ------------------------------------------------------------------------------------------------------------------------ controls


def measure_controls(
    ctx: "RunContext",
    stock: Callable[[], Population],
    measure: LossFn,
    evaluated: Mapping[str, Any],
    more: Mapping[str, Callable[[Population], Losses]],
) -> None:
    """Measure the controls that the config asks for and write controls.json, and their losses by example to losses/controls.npz.

    Args:
        w: the workshop.
        stock: gives the population.
        measure: gives the losses of a model on examples.
        evaluated: what was measured already: evaluations/{name}.json by name.
        more: controls that are no merges, by name: each is made from the population.
    """
    groups = ctx.config.merge.controls
    split = (
        "test"
        if ctx.splits.get("test") is not None and ctx.config.evaluation.loss
        else "validation"
    )
    examples = ctx.splits.get(split)
    if (
        not groups
        or examples is None
        or len(examples) < 2
        or (ctx.directory / "controls.json").is_file()
    ):
        return
    population = stock()
    listed = controls.make_controls(
        groups, population.count, _selections(ctx.config), ctx.config.seed
    )
    validation = ctx.splits.get("validation")

    def measured(of: Losses) -> controls.ControlLosses:
        sums, counts = of(examples)
        held = None
        if validation is not None:
            held_sums, held_counts = of(validation)
            held = float(held_sums.sum() / held_counts.sum())
        return controls.ControlLosses(sums / counts, held)

    tokens = measure(population.base, examples)[1]
    known = _known(evaluated, listed) if split == "test" else {}
    found = controls.measure(
        population, listed, known, lambda one: measured(functools.partial(measure, one)), ctx.log
    )
    for name, made in more.items():
        found[name] = measured(made(population))
        ctx.log(f"  {name}: {float((found[name].losses * tokens).sum() / tokens.sum()):.4f}")
    compared = controls.compare(
        listed, found, tokens, resamples=ctx.config.evaluation.bootstrap, seed=ctx.config.seed
    )
    whole = io.BytesIO()
    losses = np.stack([one.losses for one in found.values()])
    np.savez(whole, names=np.array(list(found)), ids=examples.ids, losses=losses, tokens=tokens)
    write_bytes(ctx.directory / "losses" / "controls.npz", whole.getvalue())
    write_json(ctx.directory / "controls.json", {"split": split, **compared})


def unmerged(
    ctx: "RunContext", measure: Callable[..., Any], base: Callable[[], Tree]
) -> dict[str, Callable[[Population], Losses]]:
    """Return the controls that the config asks for and that are no merges, by name: the logit ensemble, and the long single run.

    Args:
        w: the workshop.
        measure: gives the losses of a model on examples, or with `members="ensemble"` of a population as an ensemble.
        base: gives what the single run starts from.
    """
    members = ctx.config.population.members

    def ensemble(stock: Population) -> Losses:
        return functools.partial(measure, stock.members, members="ensemble")

    def single(stock: Population) -> Losses:
        config = _long_run(ctx.config, ctx.mesh.shape["order"])
        if not (config.directory / "metrics" / "state.json").is_file():
            ctx.log(f"  training of one run of {config.training.epochs} epochs")
            waves.train(
                config,
                ctx.model,
                base,
                ctx.splits["train"],
                ctx.mesh,
                ctx.log,
                held_out=ctx.splits.get("validation"),
            )
        home = waves.home(config, 0)
        return functools.partial(
            measure,
            trained.restore_member(
                config, ctx.model, ctx.mesh, 0, dtype=str(stock.dtype), directory=home
            ),
        )

    known = {
        "ensemble": ("logit ensemble of the members", ensemble),
        "single": (f"one run of {members} times the epochs", single),
    }
    return dict(known[group] for group in ctx.config.merge.controls if group in known)


def _long_run(config: Config, groups: int) -> Config:
    """Return the config of a run that costs as much as the population: k times the epochs, in `single` of the run directory.

    Each of the device groups trains a member, as it must; the first is the one that counts.
    """
    return config.model_copy(
        update={
            "output": str(config.directory / "single"),
            "population": config.population.model_copy(update={"members": groups, "wave": None}),
            "training": config.training.model_copy(
                update={
                    "epochs": config.population.members * config.training.epochs,
                    "mixing": None,
                }
            ),
        }
    )


def _selections(config: Config) -> dict[str, Candidate]:
    return {
        merge_name(one, config.seed): Candidate(
            one.method,
            dict(one.parameters),
            one.weights,
            config.seed if one.seed is None else one.seed,
        )
        for one in config.merge.methods
        if one.method == "selection"
    }


def _known(
    evaluated: Mapping[str, Any], listed: list[controls.Control]
) -> dict[str, controls.ControlLosses]:
    """Return what was evaluated under the name of a control that is the same model: base, members, and an average of equal weights."""
    found = {}
    for one in listed:
        row = evaluated.get(one.name)
        if one.candidate.method in (BASE, MEMBER) and row is not None:
            found[one.name] = controls.ControlLosses(
                np.asarray(row["losses"], np.float64), row["summary"]["validation_loss"]
            )
    return found
