import json
import signal

import jax
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.data import order
from jax_ordermerge.errors import Stopped, UserError
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import loop, members
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.optimizer import make_optimizer
from jax_ordermerge.train.orders import epoch_order

STEPS = 6  # 2 epochs of 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_train):
    """Both members, uninterrupted; float32, accumulation, buckets.

    `compiled` holds the number of compilations so far at each row of metrics.
    """
    compilations, seen = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    done = tiny_train(
        tmp_path_factory.mktemp("whole"),
        make_mesh(),
        on_line=lambda line: seen.append(len(compilations)),
    )
    jax.monitoring.clear_event_listeners()
    done.compiled = seen
    return done


def weights(run, model, mesh=None):
    return members.restore_members(run.spec, model, mesh or make_mesh(), run.layout)


# ---------------------------------------------------------------------- alone and in populations


def test_member_alone_is_the_member_of_the_population(
    trained, tmp_path, tiny_train, tiny_model, same_bits
):
    single = tiny_train(tmp_path, make_mesh(), members=(1,))
    assert same_bits(
        tree.member(weights(single, tiny_model), 0), tree.member(weights(trained, tiny_model), 1)
    )
    assert not same_bits(
        tree.member(weights(trained, tiny_model), 0), tree.member(weights(trained, tiny_model), 1)
    )
    np.testing.assert_array_equal(single.losses()[0], trained.losses()[1])
    assert [line["loss"][0] for line in single.lines()] == [
        line["loss"][1] for line in trained.lines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"data": 2, "sequence": 2}, {"data": 2, "fsdp": 2}])
def test_batches_and_positions_divided_over_devices_change_no_more_than_the_last_digits(
    trained, tmp_path, tiny_train, tiny_model, same_bits, axes
):
    divided = tiny_train(tmp_path / "both", make_mesh(2, **axes))
    np.testing.assert_allclose(divided.losses(), trained.losses(), rtol=1e-5)
    both = weights(divided, tiny_model, make_mesh(2, **axes))
    for divided_leaf, leaf in zip(
        jax.tree.leaves(both), jax.tree.leaves(weights(trained, tiny_model)), strict=True
    ):
        np.testing.assert_allclose(divided_leaf, leaf, rtol=1e-4, atol=2e-6)
    single = tiny_train(tmp_path / "alone", make_mesh(**axes), members=(1,))
    assert same_bits(tree.member(weights(single, tiny_model), 0), tree.member(both, 1))


# one padded length instead of two: half of what such a program takes to compile
WHOLE_BATCHES = {"training": {"microbatch": 8, "epochs": 1}, "data": {"buckets": []}}
ACCUMULATED = {"training": {"microbatch": 4, "epochs": 1}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "dtype", "sections"),
    [  # all pairs of two
        (((1, 1, 1), (1, 1, 1)), "float32", ACCUMULATED),
        (((1, 1, 1), (1, 1, 1)), "bfloat16", WHOLE_BATCHES),
        (((2, 1, 1), (1, 1, 1)), "float32", WHOLE_BATCHES),
        (((2, 1, 1), (1, 1, 1)), "bfloat16", ACCUMULATED),
        (((2, 2, 2), (1, 2, 2)), "float32", WHOLE_BATCHES),
        (
            ((2, 2, 2), (1, 2, 2)),
            "bfloat16",
            ACCUMULATED | {"population": {"members": 2}},
        ),  # one in each group
    ],
)
def test_member_alone_everywhere(
    tmp_path, tiny_train, tiny_model, same_bits, shapes, dtype, sections
):
    sections = {"population": {"members": 4}, "model": {"compute_dtype": dtype}} | sections
    chosen = sections["population"]["members"] // 2
    mesh, single_mesh = (make_mesh(*shape) for shape in shapes)
    both = tiny_train(tmp_path / "both", mesh, **sections)
    single = tiny_train(tmp_path / "alone", single_mesh, members=(chosen,), **sections)
    assert same_bits(
        tree.member(weights(single, tiny_model), 0),
        tree.member(weights(both, tiny_model, mesh), chosen),
    )


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "sgd", "muon"])
def test_member_alone_by_every_optimizer(tmp_path, tiny_train, tiny_model, same_bits, optimizer):
    sections = WHOLE_BATCHES | {"population": {"members": 4}}
    sections["training"] = sections["training"] | {
        "optimizer": optimizer,
        "ema": 0.9,
        "moments": "bfloat16",
    }
    mesh, single_mesh = make_mesh(2, 4, 1), make_mesh(1, 4, 1)
    both = tiny_train(tmp_path / "both", mesh, **sections)
    single = tiny_train(tmp_path / "alone", single_mesh, members=(2,), **sections)
    assert same_bits(
        tree.member(weights(single, tiny_model), 0),
        tree.member(weights(both, tiny_model, mesh), 2),
    )


# ---------------------------------------------------------------------- killed and continued


def everything(run, model, mesh):
    """Parameters, optimizer state, counters and losses of the last checkpoint."""
    tx = make_optimizer(run.spec.training, STEPS, tensor_table(model))
    state = steps.abstract_state(convert.abstract_params(model, mesh, members=2), tx, mesh)
    wanted = {"params": state.params, "optimizer": state.opt_state, "step": state.step}
    return orbax.restore(run.file("checkpoints"), STEPS, wanted)


def test_killed_and_resumed_is_uninterrupted(trained, tmp_path, tiny_train, tiny_model, same_bits):
    # killed at step 3, the last checkpoint is at 2: the line of step 3 goes, and the new one has
    # two steps from before the kill
    changes = {"training": {"checkpoint_every": 2, "log_every": 3}}
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), stop_at=3, **changes)
    assert orbax.latest(tmp_path / "checkpoints") == 2
    assert not (tmp_path / "metrics" / "state.json").exists()
    with (tmp_path / "metrics" / "train.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # half a line
    resumed = tiny_train(tmp_path, make_mesh(), **changes)
    assert resumed.watch.messages[0] == f"continuing from step 2 of {STEPS} ({tmp_path})"
    assert resumed.watch.messages[1:] == [
        f"{tmp_path}/metrics/train.jsonl ended within a line; repaired up to step 2",
    ]
    assert same_bits(
        everything(resumed, tiny_model, make_mesh()), everything(trained, tiny_model, make_mesh())
    )
    np.testing.assert_array_equal(resumed.losses(), trained.losses())
    assert [line["step"] for line in resumed.lines()] == [3, 6]
    for name in ("loss", "grad_norm"):  # a line is the mean over its steps
        values = np.array([line[name] for line in trained.lines()])
        np.testing.assert_allclose(
            [line[name] for line in resumed.lines()], values.reshape(2, 3, 2).mean(1), rtol=1e-12
        )
    state = json.loads(resumed.file("metrics/state.json").read_text())
    assert state["tokens"] == json.loads(trained.file("metrics/state.json").read_text())["tokens"]
    assert state["seconds"] == resumed.lines()[-1]["seconds"] > resumed.lines()[0]["seconds"]
    assert state["compilations"] == 2  # one per session


def test_checkpoints_by_time(trained, tmp_path, tiny_train, tiny_model, same_bits, monkeypatch):
    changes = {"checkpoint_every": STEPS, "log_every": 1, "checkpoint_minutes": 1e-9}
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), stop_at=3, training=changes)
    assert orbax.latest(tmp_path / "checkpoints") == 2  # none without checkpoint_minutes

    save = orbax.Checkpoints.save

    def save_slowly(*arguments):
        save(*arguments)
        return 60.0

    monkeypatch.setattr(orbax.Checkpoints, "save", save_slowly)
    changes |= {"checkpoint_minutes": 1000, "checkpoint_every": 2}
    resumed = tiny_train(tmp_path, make_mesh(), training=changes)
    # of two saves that it waited for, one is reported
    (warning,) = [text for text in resumed.watch.messages if "waited" in text]
    assert warning.startswith("training waited 60 s for a checkpoint")
    assert "training.checkpoint_every" in warning
    assert same_bits(
        everything(resumed, tiny_model, make_mesh()), everything(trained, tiny_model, make_mesh())
    )


def test_the_state_of_the_optimizer_may_live_on_the_host(
    trained, tmp_path, tiny_train, tiny_model, same_bits
):
    settings, mesh = {"optimizer_memory": "host"}, make_mesh()
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, mesh, stop_at=4, training=settings)
    resumed = tiny_train(tmp_path, mesh, training=settings)
    assert same_bits(everything(resumed, tiny_model, mesh), everything(trained, tiny_model, mesh))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory, tiny_train):
    """Both members with averages of their weights and bfloat16 moments; a checkpoint per step."""
    return tiny_train(tmp_path_factory.mktemp("averaged"), make_mesh(), training=AVERAGED)


AVERAGED = {
    "optimizer": "muon",
    "schedule": {"kind": "wsd", "decay": 2},
    "moments": "bfloat16",
    "ema": 0.7,
    "checkpoint_every": 1,
    "keep_checkpoints": STEPS,
}


@pytest.mark.slow
def test_with_averages_and_bfloat16_moments_killed_and_resumed_is_uninterrupted(
    averaged, tmp_path, tiny_train, tiny_model, same_bits
):
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), stop_at=4, training=AVERAGED)
    assert orbax.latest(tmp_path / "checkpoints") == 3
    resumed = tiny_train(tmp_path, make_mesh(), training=AVERAGED)
    assert same_bits(
        everything(resumed, tiny_model, make_mesh()), everything(averaged, tiny_model, make_mesh())
    )
    np.testing.assert_array_equal(resumed.losses(), averaged.losses())


def test_the_members_are_the_averages(averaged, tiny_model):
    assert (
        averaged.watch.messages[0]
        == "the members are averages of their weights (training.ema = 0.7)"
    )
    abstract = {"params": convert.abstract_params(tiny_model, make_mesh(), members=2)}
    checkpoints = [
        tree.flatten(orbax.restore(averaged.file("checkpoints"), step, abstract)["params"])
        for step in range(1, STEPS + 1)
    ]
    powers = 0.7 ** np.arange(STEPS)[::-1]
    for path, average in tree.flatten(weights(averaged, tiny_model)).items():
        expected = np.average(
            [np.asarray(params[path], np.float64) for params in checkpoints], axis=0, weights=powers
        )
        np.testing.assert_allclose(average, expected, rtol=1e-5, atol=1e-7)
        assert np.abs(average - checkpoints[-1][path]).max() > 1e-4


def test_complete_training_is_not_repeated(trained, tiny_model, tiny_examples, same_bits):
    watch = type(trained.watch)()
    before = trained.file("metrics/train.jsonl").read_text()
    trained.file(
        "losses/train.npz"
    ).unlink()  # killed between the last checkpoint and the files that follow from it

    def base():
        raise AssertionError("the base is not needed")

    loop.train(
        trained.spec, tiny_model, base, tiny_examples, make_mesh(), trained.layout, watch=watch
    )
    assert watch.messages == [f"training is already complete: {STEPS} steps ({trained.directory})"]
    assert trained.file("metrics/train.jsonl").read_text() == before
    assert np.isfinite(trained.losses()).all()


def test_resume_on_another_mesh_goes_on(trained, tiny_model, tiny_examples):
    mesh = make_mesh(2, 2, 2)
    state = loop.train(trained.spec, tiny_model, dict, tiny_examples, mesh, trained.layout)
    assert state["devices"] == 8


@pytest.mark.parametrize(
    ("name", "sections"),
    [
        ("config", {"training": {"learning_rate": 2e-2}}),
        ("level", {"population": {"level": "balanced"}}),
        ("config", {"model": {"compute_dtype": "bfloat16"}}),
    ],
)
def test_checkpoint_of_another_training_is_refused(
    trained, tiny_spec, tiny_model, tiny_examples, name, sections
):
    changed = tiny_spec(**sections)
    with pytest.raises(
        UserError, match=rf"is of another training \({name} differs\); choose another output"
    ):
        loop.train(changed, tiny_model, dict, tiny_examples, make_mesh(), trained.layout)


def test_members_must_fill_the_order_axis(tiny_spec, tiny_model, tiny_examples, tmp_path):
    layout, mesh = RunLayout(tmp_path / "new"), make_mesh(2, 1, 1)
    with pytest.raises(
        UserError, match=r"1 members cannot be divided over mesh.order = 2; choose a divisor"
    ):
        loop.train(tiny_spec(), tiny_model, dict, tiny_examples, mesh, layout, members=(0,))
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------- what is left


def test_one_compilation(trained):
    assert len(trained.compiled) == STEPS
    assert trained.compiled[0] > 0
    assert trained.compiled[0] == trained.compiled[-1]
    assert json.loads(trained.file("metrics/state.json").read_text())["compilations"] == 1


def test_metrics(trained, tiny_examples, tiny_model):
    lines = trained.lines()
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert lines[2]["epoch"] == 1.0
    assert all(len(line["loss"]) == len(line["grad_norm"]) == 2 for line in lines)
    assert lines == trained.watch.lines
    assert lines[-1]["loss"][0] < lines[0]["loss"][0]
    assert lines[0]["learning_rate"] == 0.0
    assert lines[1]["learning_rate"] == pytest.approx(1e-2)
    assert all(0 <= line["host_fraction"] <= 1 and line["mfu"] is None for line in lines)
    state = json.loads(trained.file("metrics/state.json").read_text())
    assert state["tokens"] == 2 * 2 * tiny_examples.lengths.sum()
    assert state["parameters"] == sum(
        x.size for x in jax.tree.leaves(convert.abstract_params(tiny_model))
    )
    assert set(state) == {
        "seconds",
        "tokens",
        "device",
        "devices",
        "compilations",
        "versions",
        "parameters",
    }


def test_losses_are_stored_by_sample(trained, tiny_examples):
    losses = trained.losses()
    assert losses.shape == (2, 2, len(tiny_examples))
    assert np.isfinite(losses).all()
    # the loss of a step is the token mean over its samples
    counts = np.array([answers[1:].sum() for answers in tiny_examples.answers])
    for step, line in enumerate(trained.lines()):
        for member in range(2):
            rows = epoch_order(trained.spec, len(tiny_examples), member, step // 3)[step % 3]
            rows = rows[rows >= 0]
            mean = (losses[member, step // 3, rows] * counts[rows]).sum() / counts[rows].sum()
            assert line["loss"][member] == pytest.approx(mean, rel=1e-5)


def test_orders_are_saved_by_sample_id(trained, tiny_examples):
    digests = json.loads(trained.file("orders/digests.json").read_text())
    for member in range(2):
        with np.load(trained.file(f"orders/member_{member}.npz")) as saved:
            for epoch in range(2):
                rows = epoch_order(trained.spec, len(tiny_examples), member, epoch)
                np.testing.assert_array_equal(
                    saved[f"epoch_{epoch}"], np.where(rows < 0, -1, rows + 100)
                )
                assert digests[f"member_{member}"][epoch] == order.digest(rows)


def test_checkpoints_say_what_they_are(trained):
    metadata = orbax.metadata(trained.file("checkpoints"), STEPS)
    assert metadata["members"] == [0, 1]
    assert (metadata["seed"], metadata["level"], metadata["steps"]) == (0, "sample", STEPS)
    assert metadata["mesh"] == {"order": 1, "data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    assert metadata["orders"] == json.loads(trained.file("orders/digests.json").read_text())


def test_members_are_restored_in_another_dtype(trained, tiny_model):
    full = weights(trained, tiny_model)
    half = members.restore_members(
        trained.spec, tiny_model, make_mesh(2, 2, 2), trained.layout, dtype="bfloat16"
    )
    for ours, theirs in zip(jax.tree.leaves(half), jax.tree.leaves(full), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs).astype(ours.dtype))


def test_members_of_no_training(tiny_spec, tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint in .*; run the training first"):
        members.restore_members(tiny_spec(), tiny_model, make_mesh(), RunLayout(tmp_path))


def test_sigterm_stops_after_a_step_with_a_checkpoint(
    trained, tmp_path, tiny_train, tiny_model, same_bits
):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(
        Stopped,
        match=f"stopped by SIGTERM after step 2 of {STEPS}, with a checkpoint; the same command",
    ) as caught:
        tiny_train(
            tmp_path,
            make_mesh(),
            on_line=lambda line: line["step"] == 1 and signal.raise_signal(signal.SIGTERM),
        )
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert orbax.latest(tmp_path / "checkpoints") == 2
    assert not (tmp_path / "metrics" / "state.json").exists()
    resumed = tiny_train(tmp_path, make_mesh())
    assert resumed.watch.messages[0] == f"continuing from step 2 of {STEPS} ({tmp_path})"
    assert same_bits(
        everything(resumed, tiny_model, make_mesh()), everything(trained, tiny_model, make_mesh())
    )
    np.testing.assert_array_equal(resumed.losses(), trained.losses())
    assert [line["loss"] for line in resumed.lines()] == [line["loss"] for line in trained.lines()]
