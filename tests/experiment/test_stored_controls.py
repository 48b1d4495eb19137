"""Losses and answers of controls that are stored are used for equal candidates only."""

import contextlib
import types

import numpy as np
import pytest

from jax_ordermerge.config import make_config
from jax_ordermerge.evaluate import harness
from jax_ordermerge.experiment import controls, models, subset_scores
from jax_ordermerge.layout import RunLayout, read_json, write_json, write_npz
from jax_ordermerge.search import subsets
from jax_ordermerge.search.candidates import Candidate
from jax_ordermerge.search.controls import Control


def merges(seed):
    """Averages and selections of subsets of three members; names do not say the seed."""
    return subsets.make_controls(3, Candidate("selection", seed=seed), seed=0)


@pytest.fixture
def context(tmp_path):
    tasks = [{"name": "swap", "data": "swap.jsonl", "max_new_tokens": 2}]
    return types.SimpleNamespace(
        config=make_config({"evaluation": {"tasks": tasks}}),
        layout=RunLayout(tmp_path),
        splits={},
        model=None,
        tokenizer=None,
        mesh=None,
        log=lambda line: None,
    )


@pytest.fixture
def measured(monkeypatch):
    """Return the list of the candidates that were built; an item is right by their seed."""
    built = []

    @contextlib.contextmanager
    def build(candidate):
        built.append(candidate)
        yield candidate

    def run(task, model, *args, **named):
        return types.SimpleNamespace(items=[{"correct": model.seed == 1}])

    monkeypatch.setattr(models, "make_eval_model", lambda *args, name: args[2])
    monkeypatch.setattr(harness, "run", run)
    return built, lambda: types.SimpleNamespace(build_temporarily=build)


def test_answers_of_another_seed_are_measured_again(context, measured):
    built, population = measured
    write_json(context.layout.subset_answers, {"earlier": {"any key": [True]}})
    first = subset_scores.measure(context, population, merges(1), {})
    assert len(built) == 7  # averages of three pairs; selections of those and of all
    assert not any(first["swap"][f"average of members {pair}"][0] for pair in ("0, 1", "0, 2"))
    assert first["swap"]["selection of members 0, 1"] == [True]
    built.clear()
    assert subset_scores.measure(context, population, merges(1), {}) == first
    assert built == []
    second = subset_scores.measure(context, population, merges(2), {})
    assert [x.method for x in built] == ["selection"] * 4
    assert second["swap"].keys() == first["swap"].keys()
    assert second["swap"]["selection of members 0, 1"] == [False]
    # and both are kept, beside the task that is not listed
    built.clear()
    assert subset_scores.measure(context, population, merges(1), {}) == first
    assert built == []
    assert read_json(context.layout.subset_answers)["earlier"] == {"any key": [True]}


def test_scores_without_a_task_or_members_are_named_as_absent(context, measured):
    built, population = measured
    lines = []
    context.log = lines.append
    assert subset_scores.measure(context, population, [], {}) == {}
    context.config = make_config({})
    assert subset_scores.measure(context, population, merges(1), {}) == {}
    assert built == []
    assert len(lines) == 2
    assert all("subset_scores are not measured" in line for line in lines)


def test_losses_of_another_seed_are_measured_again(tmp_path):
    layout = RunLayout(tmp_path)
    listed = merges(1)
    rows = [
        {"name": x.name, "candidate": x.candidate.to_dict(), "validation_loss": None}
        for x in listed
    ]
    rows.append({"name": "ensemble", "candidate": None, "validation_loss": 0.5})
    write_json(layout.controls, {"split": "test", "rows": rows})
    names = [row["name"] for row in rows]
    arrays = {"names": np.array(names), "losses": np.arange(len(rows))[:, None]}
    write_npz(layout.control_losses, arrays)

    def reused(listed: list[Control], split: str = "test") -> set[str]:
        return set(controls._measured_before(layout, split, listed))

    assert reused(listed) == set(names)
    averages = {name for name in names if name.startswith("average")}
    assert reused(merges(2)) == averages | {"ensemble"}
    assert reused(listed, "validation") == set()
