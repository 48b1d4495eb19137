"""`lora.fused`: the members of a device group as one program, equal to the exact path but for rounding."""

import collections
import functools
import json
import math
import re
import types

import jax
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import orbax
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.plan.collectives import read_collectives
from jax_ordermerge.train import batches, loop, resume
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.programs import Programs
from jax_ordermerge.train.step import shardings
from tests.train.test_lora import state_of

LORA = {"rank": 5, "alpha": 12.0}
# Half of the examples are longer than the bucket, and members have different starts.
SECTIONS = {
    "population": {"members": 3, "vary": "all"},
    "data": {"buckets": [12]},
    "training": {"learning_rate": 3e-3, "epochs": 17, "log_every": 3, "checkpoint_every": 45},
}
STEPS = 51


@pytest.fixture(scope="module")
def base(tiny_base):
    """The tiny base with matrices as large as those of trained models.

    Gradients of the tiny one are of the size of their rounding, of which AdamW makes whole steps.
    """
    return jax.tree.map(lambda x: x if x.ndim < 2 or (x == 1).all() else 12 * x, tiny_base)


@pytest.fixture(scope="module")
def train(tiny_train, base):
    """`tiny_train` with adapters on two devices, three members, buckets and accumulation."""

    def run(directory, mesh=None, *, fused=True, **changes):
        sections = {
            name: {**SECTIONS.get(name, {}), **changes.get(name, {})}
            for name in {**SECTIONS, **changes}
            if name not in ("stop_at", "held_out")
        }
        rest = {name: changes[name] for name in ("stop_at", "held_out") if name in changes}
        lora = {**LORA, "fused": fused}
        mesh = mesh or make_mesh(1, 2)
        return tiny_train(directory, mesh, base=base, lora=lora, **sections, **rest)

    return run


@pytest.fixture(scope="module")
def fused(train, tmp_path_factory):
    """51 steps of a fused population."""
    return train(tmp_path_factory.mktemp("fused"))


def losses_of_steps(run):
    return np.array([row["loss"] for row in run.lines()])


def test_losses_of_fifty_steps_are_those_of_the_exact_path(fused, train, tmp_path):
    exact = train(tmp_path, fused=False)
    assert exact.lines()[-1]["step"] == STEPS
    expected, losses = losses_of_steps(exact), losses_of_steps(fused)
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(fused.losses(), exact.losses(), rtol=0, atol=1e-5)
    # what is compared has learned, and differs between members: hundreds of tolerances
    assert (expected[0] - expected[-1] > 0.1).all()
    assert np.abs(np.diff(expected[-1])).min() > 1e-3


def test_a_fused_training_continues_to_the_same_bits(fused, train, tiny_model, same_bits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, stop_at=48)
    assert orbax.latest(tmp_path / "checkpoints") == 45
    resumed = train(tmp_path)
    assert same_bits(state_of(resumed, tiny_model, 3), state_of(fused, tiny_model, 3))
    np.testing.assert_array_equal(resumed.losses(), fused.losses())


def test_the_record_says_that_it_is_not_bitwise(fused):
    (message,) = [text for text in fused.watch.messages if "lora.fused" in text]
    assert message.startswith("3 members at a time are one program")
    assert "not bit for bit" in message
    assert json.loads(fused.file("metrics/state.json").read_text())["fused_members"] == 3
    assert orbax.metadata(fused.file("checkpoints"), STEPS)["settings"]["lora"]["fused"] is True


# ---------------------------------------------------------------------- the program


@pytest.fixture(scope="module")
def programs(tiny_spec, tiny_examples, tiny_model):
    """Return a function that compiles a step of 3 members over two devices of fsdp."""

    @functools.cache
    def build(fused):
        spec = tiny_spec(**SECTIONS, lora={**LORA, "fused": fused})
        mesh = make_mesh(1, 2)
        plan = batches.make_plan(spec, tiny_examples, mesh=mesh)
        programs = Programs(tiny_model, plan, mesh)
        return programs, programs.compile_step()

    return build


def test_a_loss_that_is_not_finite_touches_no_other_member(programs, base, same_bits):
    built, step = programs(True)

    def last_of_three_steps(poison):
        state, frozen = built.initial_state(dict), built.load_frozen(lambda: base)
        for number in range(3):
            if number == 1:
                params = jax.tree.map(lambda x: x.at[1].add(poison), state.params)
                state = jax.device_put(state._replace(params=params), shardings(built.state))
            batch = batches.device_batch(built.plan, number, built.batch)
            state, metrics = step(state, batch, frozen)
        return state, metrics

    clean, poisoned = last_of_three_steps(0.0), last_of_three_steps(np.nan)
    losses = poisoned[1].loss
    assert np.isnan(losses[1])
    assert np.isfinite(clean[1].loss).all()
    for member in (0, 2):
        assert same_bits(tree.member(poisoned, member), tree.member(clean, member))
    assert all(np.isnan(leaf[1]).all() for leaf in jax.tree.leaves(poisoned[0].params))


def products(program):
    """Return how many products of each shape a program has."""
    shapes = re.findall(r"= f32\[([\d,]+)\]\S* dot\(", program.as_text())
    return collections.Counter(tuple(map(int, shape.split(","))) for shape in shapes)


def test_the_base_is_multiplied_once_and_gathered_once(programs, tiny_model):
    (built, fused), (_, exact) = programs(True), programs(False)
    assert len(built.plan.lengths) == 2
    rows = 2 * built.plan.lengths[-1]  # of a microbatch of 4 over two devices
    widths = {tiny_model.hidden_size, tiny_model.intermediate_size, 4, tiny_model.vocab_size}
    counts, exact_counts = products(fused), products(exact)
    for width in widths:
        # one product over the rows of all members in place of as many in each turn of the loop
        assert counts[3 * rows, width] > 0, width
        assert exact_counts[rows, width] > 0, width
        assert counts[rows, width] == exact_counts[3 * rows, width] == 0
    # those of adapters are one per member
    assert counts[3, rows, LORA["rank"]] > 0
    gathered = [
        math.fsum(
            size
            for (kind, _), (_, size) in read_collectives(program.as_text(), built.mesh).items()
            if kind == "all-gather"
        )
        for program in (fused, exact)
    ]
    assert gathered[0] < 0.6 * gathered[1]  # adapters, which are large here, are of each member


def test_a_device_group_with_one_member_is_the_exact_program(
    tiny_spec, tiny_examples, tiny_model, recorder, monkeypatch, tmp_path
):
    spec, mesh = tiny_spec(**SECTIONS, lora={**LORA, "fused": True}), make_mesh(3)
    programs = Programs(tiny_model, batches.make_plan(spec, tiny_examples, mesh=mesh), mesh)
    monkeypatch.setattr(steps, "fused_step", None)
    monkeypatch.setattr(steps, "compile_step", lambda *arguments, fused: fused)
    assert programs.compile_step() is False
    watch = recorder()
    loop.Training(programs, RunLayout(tmp_path), watch)._describe_members()
    assert watch.messages == [
        "lora.fused changes nothing here: each device group has one member (3 members, mesh.order"
        " = 3)"
    ]


def test_checkpoints_of_before_are_of_the_same_training(
    tiny_spec, tiny_examples, tiny_model, monkeypatch
):
    """With the key in their digest, trainings that were begun before it could not continue."""
    deciding = []

    def dumps(value, **options):
        deciding.append(value)
        return ""

    monkeypatch.setattr(resume, "json", types.SimpleNamespace(dumps=dumps))
    for fused in (False, True):
        spec = tiny_spec(lora={"rank": 2, "fused": fused})
        plan = batches.make_plan(spec, tiny_examples, mesh=make_mesh())
        resume.identity(Programs(tiny_model, plan, make_mesh()))
    assert [settings["lora"].get("fused") for settings in deciding] == [None, True]
    # a key that is added here ends every training that was begun before: leave it out at its default
    assert set(deciding[0]["training"]) == {
        *("batch", "checkpoint", "clip_norm", "decay_on", "ema", "epochs", "final_fraction"),
        *("learning_rate", "microbatch", "mixing", "moments", "optimizer", "schedule"),
        *("validate_every", "warmup", "weight_decay"),
    }


# ---------------------------------------------------------------------- what it works with


CASES = {
    "every axis, packed rows, Muon": (
        (2, 2, 2),
        {
            "population": {"members": 4},
            "data": {"packing": "packs", "max_length": 32, "buckets": []},
            "training": {"optimizer": "muon"},
        },
    ),
    "averages, validation, moments in bfloat16, mixing": (
        (1, 1),
        {
            "data": {"validation_examples": 3},
            "training": {
                "ema": 0.9,
                "checkpoint": "best",
                "moments": "bfloat16",
                "mixing": {"kind": "wash", "fraction": 0.2},
            },
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_works_with(case, train, tmp_path, tiny_examples):
    sizes, changes = CASES[case]
    training = {"epochs": 2, "log_every": 1, **changes["training"]}
    changes = {**changes, "training": training}
    if "validation" in case:
        changes["held_out"] = tiny_examples
    exact, fused = (
        train(tmp_path / str(is_fused), make_mesh(*sizes), fused=is_fused, **changes)
        for is_fused in (False, True)
    )
    expected = losses_of_steps(exact)
    np.testing.assert_allclose(losses_of_steps(fused), expected, rtol=0, atol=1e-5)
    assert len(np.unique(expected[-1])) == expected.shape[1]
    for key in ("best_validation_losses", "best_steps"):
        pair = [json.loads(run.file("metrics/state.json").read_text()) for run in (fused, exact)]
        assert ("validation" in case) == (key in pair[0])
        if key in pair[0]:
            np.testing.assert_allclose(*(state[key] for state in pair), rtol=0, atol=1e-5)
