"""Validation losses disturb nothing, and each member is what it was where its own was lowest."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import make_config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.provenance import SourceInfo
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import loop, members, objective

STEPS = 9
BEST = {
    "training": {
        "checkpoint": "best",
        "validate_every": 1,
        "epochs": 3,
        "learning_rate": 0.1,
        "schedule": "constant",
        "checkpoint_every": 1,
        "keep_checkpoints": STEPS,
        "log_every": 4,
    },
    "data": {"validation_examples": 6},
}


@pytest.fixture(scope="module")
def held_out(tiny_model):
    """6 examples of random tokens: what fits the training examples fits them worse and worse."""
    random = np.random.default_rng(1)
    rows = [random.integers(1, tiny_model.vocab_size, n) for n in (5, 9, 12, 18, 22, 23)]
    return Examples(
        Ragged.of(rows, np.int32),
        Ragged.of([np.arange(len(row)) >= 2 for row in rows], np.bool_),
        np.arange(6),
    )


@pytest.fixture(scope="module")
def best(tmp_path_factory, tiny_train, held_out):
    return tiny_train(tmp_path_factory.mktemp("best"), make_mesh(), held_out=held_out, **BEST)


def weights(run, model):
    return members.restore_members(run.spec, model, make_mesh(), run.layout)


def at_step(run, model, step):
    like = {"params": convert.abstract_params(model, make_mesh(), members=2)}
    return orbax.restore(run.file("checkpoints"), step, like)["params"]


def test_each_member_is_what_it_was_at_its_lowest_loss(best, tiny_model, same_bits):
    lines = best.lines()
    assert [line["step"] for line in lines] == list(
        range(1, STEPS + 1)
    )  # a line wherever a loss was measured
    losses = np.array([line["validation_loss"] for line in lines])
    state = json.loads(best.file("metrics/state.json").read_text())
    assert state["best_steps"] == (losses.argmin(0) + 1).tolist()
    assert state["best_validation_losses"] == losses.min(0).tolist()
    assert min(state["best_steps"]) < STEPS
    assert state["compilations"] == 2  # the training step and the validation losses
    for member, step in enumerate(state["best_steps"]):
        assert same_bits(
            tree.member(weights(best, tiny_model), member),
            tree.member(at_step(best, tiny_model, step), member),
        )
    assert (
        "each member is what it was at its lowest validation loss (training.checkpoint = best)"
        in best.watch.messages
    )


def test_the_loss_is_that_of_all_examples_together(best, tiny_model, held_out):
    from jax_ordermerge.data import pack

    batch = pack.collate(held_out, np.arange(6), 24)
    for step in (1, STEPS):
        for member in range(2):
            _, sums = objective.sft(tiny_model, dtype="float32")(
                tree.member(at_step(best, tiny_model, step), member), batch
            )
            expected = float(sums.losses.sum() / sums.weights.sum())
            assert best.lines()[step - 1]["validation_loss"][member] == pytest.approx(
                expected, rel=1e-5
            )


def test_losses_of_the_sources_of_the_examples(tmp_path, best, tiny_train, tiny_model, held_out):
    from jax_ordermerge.data import pack

    names = ["a", "b", "none of it", "c/d"]
    rows = {"a": [0, 4], "b": [1, 2, 3], "c/d": [5]}
    mixed = dataclasses.replace(
        held_out,
        source=np.array([0, 1, 1, 1, 0, 3], np.int32),
        sources=tuple(SourceInfo(name, name) for name in names),
    )
    run = tiny_train(tmp_path, make_mesh(), held_out=mixed, **BEST)
    for line, plain in zip(run.lines(), best.lines(), strict=True):
        assert line["validation_loss"] == plain["validation_loss"]
        assert {name for name in line if name.startswith("validation_loss/")} == {
            f"validation_loss/{name}" for name in rows
        }
    for name, part in rows.items():
        batch = pack.collate(held_out, np.array(part), 24)
        for member in range(2):
            _, sums = objective.sft(tiny_model, dtype="float32")(
                tree.member(at_step(run, tiny_model, STEPS), member), batch
            )
            expected = float(sums.losses.sum() / sums.weights.sum())
            measured = run.lines()[-1][f"validation_loss/{name}"][member]
            assert measured == pytest.approx(expected, rel=1e-5)


def test_training_does_not_see_it(best, tmp_path, tiny_train, tiny_model, same_bits):
    plain = {**BEST["training"], "checkpoint": "last", "validate_every": None}
    without = tiny_train(tmp_path, make_mesh(), training=plain)
    assert same_bits(weights(without, tiny_model), at_step(best, tiny_model, STEPS))
    np.testing.assert_array_equal(without.losses(), best.losses())


@pytest.mark.slow
def test_a_member_alone_is_best_with_the_same_bits(
    best, tmp_path, tiny_train, tiny_model, held_out, same_bits
):
    single = tiny_train(tmp_path, make_mesh(), members=(1,), held_out=held_out, **BEST)
    assert same_bits(
        tree.member(weights(single, tiny_model), 0), tree.member(weights(best, tiny_model), 1)
    )
    assert [line["validation_loss"][0] for line in single.lines()] == [
        line["validation_loss"][1] for line in best.lines()
    ]


def test_killed_and_resumed_is_uninterrupted(
    best, tmp_path, tiny_train, tiny_model, held_out, same_bits
):
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), held_out=held_out, stop_at=STEPS - 1, **BEST)
    resumed = tiny_train(tmp_path, make_mesh(), held_out=held_out, **BEST)
    assert same_bits(weights(resumed, tiny_model), weights(best, tiny_model))
    assert [line["validation_loss"] for line in resumed.lines()] == [
        line["validation_loss"] for line in best.lines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"lora": {"rank": 2}}, {"training": BEST["training"] | {"ema": 0.5}}]
)
def test_on_device_groups_with_adapters_and_with_averages(
    tmp_path, tiny_train, tiny_base, tiny_model, held_out, same_bits, changes
):
    sections = BEST | changes
    both = tiny_train(tmp_path / "both", make_mesh(2, 2), held_out=held_out, **sections)
    single = tiny_train(
        tmp_path / "alone", make_mesh(1, 2), members=(1,), held_out=held_out, **sections
    )
    branch = orbax.metadata(both.file("checkpoints"), STEPS)["weights"]
    assert branch == "best/weights"
    lowest = []
    for run, member in ((both, 1), (single, 0)):
        store = orbax.restore(
            run.file("checkpoints"),
            STEPS,
            {"best": {"loss": jax.ShapeDtypeStruct((2 - (run is single),), "float32")}},
        )
        lowest.append(float(store["best"]["loss"][member]))
    assert lowest[0] == lowest[1] == min(line["validation_loss"][1] for line in both.lines())


def test_losses_alone_may_be_asked_for(tmp_path, tiny_train, tiny_model, held_out, same_bits):
    run = tiny_train(
        tmp_path, make_mesh(), held_out=held_out, training={"validate_every": 3}, data=BEST["data"]
    )
    assert [line["step"] for line in run.lines() if "validation_loss" in line] == [3, 6]
    assert orbax.metadata(run.file("checkpoints"), 6)["weights"] == "params"
    assert same_bits(weights(run, tiny_model), at_step(run, tiny_model, 6))


def test_validation_needs_examples(
    tmp_path, tiny_train, tiny_spec, tiny_model, tiny_examples, held_out
):
    with pytest.raises(
        UserError,
        match=r"training.validate_every measure validation losses: set data.validation_examples",
    ):
        make_config({"training": {"checkpoint": "best"}})
    layout = RunLayout(tmp_path / "new")
    with pytest.raises(UserError, match="need validation examples"):
        loop.train(tiny_spec(**BEST), tiny_model, dict, tiny_examples, make_mesh(), layout)
    assert not (tmp_path / "new").exists()
