"""Training on packed rows: gradients, isolation of documents, and orders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.data import order, pack
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import batches, loop, members, objective
from jax_ordermerge.train.orders import draw_orders, epoch_order

ROW = 40  # tokens; examples have 4 to 23


@pytest.fixture(scope="module")
def packed_spec(tiny_spec):
    """Return `(kind, **sections) -> TrainingSpec` with rows of `ROW` tokens."""

    def build(kind, **sections):
        data = {"packing": kind, "max_length": ROW, "buckets": []}
        training = {"batch": 4, "microbatch": 2}
        return tiny_spec(**{"training": training, **sections, "data": data})

    return build


# ---------------------------------------------------------------------- orders


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        (kind, level)
        for kind in ("packs", "bins")
        for level in order.LEVELS
        if (kind, level) != ("bins", "batch")
    ],  # which is refused
)
def test_every_sample_once_an_epoch(packed_spec, tiny_examples, kind, level):
    spec = packed_spec(kind, population={"members": 4, "level": level})
    plan = batches.make_plan(spec, tiny_examples)
    assert plan.orders.shape[:2] == (4, 2)
    assert plan.lengths == (ROW,)
    for member_orders in plan.orders:
        for epoch in member_orders:
            places = order.locate(epoch, 21)
            assert places.shape == (21, 3)
            assert [epoch[tuple(place)] for place in places] == list(range(21))
            assert (epoch >= 0).any((1, 2)).all()  # no step is empty
    assert (
        sum(plan.sequence_lengths(step).sum() for step in range(plan.steps))
        == 4 * 2 * tiny_examples.lengths.sum()
    )
    assert plan.packing["filled"] == tiny_examples.lengths.sum() / (plan.epoch_steps * 4 * ROW)


def rows_of(epoch):
    return sorted(tuple(row) for row in epoch.reshape(-1, epoch.shape[-1]).tolist())


def test_packs_are_the_same_rows_for_all_and_bins_follow_the_order(packed_spec, tiny_examples):
    packs, bins = (
        draw_orders(packed_spec(kind, population={"members": 3}), tiny_examples.lengths, range(3))
        for kind in ("packs", "bins")
    )
    assert all(rows_of(epoch) == rows_of(packs[0, 0]) for epochs in packs for epoch in epochs)
    assert any(rows_of(epoch) != rows_of(bins[0, 0]) for epochs in bins for epoch in epochs)
    for member in range(3):
        for epoch in range(2):
            spec = packed_spec("bins", population={"members": 3})
            sequence = epoch_order(spec, 21, member, epoch).reshape(-1)
            sequence = sequence[sequence >= 0]
            expected = sequence[pack.pack_in_order(tiny_examples.lengths[sequence], ROW)[:, 0]]
            rows = bins[member, epoch].reshape(-1, bins.shape[-1])
            np.testing.assert_array_equal(rows[rows[:, 0] >= 0, 0], expected)


@pytest.mark.parametrize("kind", ["packs", "bins"])
def test_members_alone_have_the_same_batches(packed_spec, tiny_examples, kind):
    spec = packed_spec(kind, population={"members": 3})
    trained, single = (batches.make_plan(spec, tiny_examples, members) for members in (None, (2,)))
    for step in range(trained.steps):
        for name, array in single.batch(step, 0).items():
            np.testing.assert_array_equal(array, trained.batch(step, 2)[name])


def test_orders_of_very_different_numbers_of_rows_are_refused(packed_spec):
    # with one row a step a member that needs fewer rows would have an empty step
    spec = packed_spec("bins", training={"batch": 1, "microbatch": None}, population={"members": 4})
    sizes = np.random.default_rng(0).integers(4, 40, 60)
    with pytest.raises(
        UserError,
        match=r"data.packing = bins: an epoch fills \d+ rows, too few for \d+ steps; set packs",
    ):
        draw_orders(spec, sizes, range(4))


# ---------------------------------------------------------------------- gradients


@pytest.fixture(scope="module")
def step_of(tiny_model, tiny_base):
    """Return `batch -> (gradients, sums)` of the supervised objective in float32."""
    gradient = jax.jit(jax.grad(objective.sft(tiny_model, dtype="float32"), has_aux=True))
    return lambda batch: gradient(tiny_base, batch)


def test_gradients_and_losses_are_those_of_rows_of_one(packed_spec, tiny_examples, step_of):
    plan = batches.make_plan(packed_spec("packs"), tiny_examples)
    rows = plan.rows(0)[0]
    packed, sums = step_of(pack.collate(tiny_examples, rows, ROW))
    unpacked, expected = step_of(pack.collate(tiny_examples, rows[rows >= 0], 24))
    for gradient, expected_gradient in zip(
        jax.tree.leaves(packed), jax.tree.leaves(unpacked), strict=True
    ):
        np.testing.assert_allclose(
            gradient,
            expected_gradient,
            rtol=1e-5,
            atol=1e-5 * float(jnp.abs(expected_gradient).max()),
        )
    np.testing.assert_allclose(sums.losses[rows >= 0], expected.losses, rtol=1e-5)
    np.testing.assert_array_equal(sums.weights[rows >= 0], expected.weights)
    assert not sums.losses[rows < 0].any()
    assert not sums.weights[rows < 0].any()


def test_a_document_changes_nothing_of_the_others(tiny_examples, step_of):
    rows = np.array([[0, 1], [2, -1]])
    batch = pack.collate(tiny_examples, rows, ROW + 8)
    batch["weights"] = batch["weights"] * (
        batch["segments"] == 2
    )  # the loss of the second document alone
    changed = {
        **batch,
        "tokens": np.where(
            batch["segments"] == 1, (batch["tokens"] + 5) % 32, batch["tokens"]
        ).astype(np.int32),
    }
    (gradient, sums), (gradient_2, sums_2) = step_of(batch), step_of(changed)
    np.testing.assert_array_equal(sums.losses, sums_2.losses)
    assert sums.losses[0, 1] > 0
    flat, flat_2 = tree.flatten(gradient), tree.flatten(gradient_2)
    for path in flat:
        if path != "embed/weight":
            np.testing.assert_array_equal(flat[path], flat_2[path], err_msg=path)
    document_tokens = np.unique(batch["tokens"][0][batch["segments"][0] == 2])
    absent_tokens = np.setdiff1d(np.arange(32), document_tokens)
    for table in (gradient, gradient_2):
        assert not np.asarray(table["embed"]["weight"])[absent_tokens].any()


# ---------------------------------------------------------------------- the trainer


@pytest.fixture(scope="module", params=["packs", "bins"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def train_packed(tiny_train):
    def run(directory, kind, **named):
        data = {"packing": kind, "max_length": ROW, "buckets": []}
        return tiny_train(
            directory,
            make_mesh(),
            data=data,
            training={"batch": 4, "microbatch": 2, "checkpoint_every": 2},
            **named,
        )

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train_packed, kind):
    return train_packed(tmp_path_factory.mktemp("whole"), kind)


def weights(run, model):
    return members.restore_members(run.spec, model, make_mesh(), run.layout)


def test_member_alone_is_the_member_of_the_population(
    trained, tmp_path, train_packed, kind, tiny_model, same_bits
):
    single = train_packed(tmp_path, kind, members=(1,))
    assert same_bits(
        tree.member(weights(single, tiny_model), 0), tree.member(weights(trained, tiny_model), 1)
    )
    np.testing.assert_array_equal(single.losses()[0], trained.losses()[1])


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(
    trained, tmp_path, train_packed, kind, tiny_model, same_bits
):
    with pytest.raises(KeyboardInterrupt):
        train_packed(tmp_path, kind, stop_at=3)
    resumed = train_packed(tmp_path, kind)
    assert resumed.watch.messages[0].startswith("continuing from step 2 of ")
    assert same_bits(weights(resumed, tiny_model), weights(trained, tiny_model))
    np.testing.assert_array_equal(resumed.losses(), trained.losses())


def test_losses_and_orders_are_stored_by_sample(trained, tiny_examples):
    losses = trained.losses()
    assert np.isfinite(losses).all()
    counts = np.array([answers[1:].sum() for answers in tiny_examples.answers])
    orders = draw_orders(trained.spec, tiny_examples.lengths, range(2))
    steps = orders.shape[2]
    for step, line in enumerate(trained.lines()):
        for member in range(2):
            rows = orders[member, step // steps, step % steps]
            mean = (
                losses[member, step // steps, rows[rows >= 0]] * counts[rows[rows >= 0]]
            ).sum() / counts[rows[rows >= 0]].sum()
            assert line["loss"][member] == pytest.approx(mean, rel=1e-5)
    for member in range(2):
        with np.load(trained.file(f"orders/member_{member}.npz")) as saved:
            for epoch in range(2):
                np.testing.assert_array_equal(
                    saved[f"epoch_{epoch}"],
                    np.where(orders[member, epoch] < 0, -1, orders[member, epoch] + 100),
                )


@pytest.mark.slow
def test_training_on_a_mesh(tmp_path, tiny_train, kind, trained):
    data = {"packing": kind, "max_length": ROW, "buckets": []}
    on_mesh = tiny_train(
        tmp_path, make_mesh(2, 2, sequence=2), data=data, training={"batch": 4, "microbatch": 2}
    )
    np.testing.assert_allclose(on_mesh.losses(), trained.losses(), rtol=1e-3, atol=1e-4)


def test_another_packing_is_another_training(trained, kind, tiny_spec, tiny_model, tiny_examples):
    other_kind = {"packs": "bins", "bins": "packs"}[kind]
    data = {"packing": other_kind, "max_length": ROW, "buckets": []}
    training = {"batch": 4, "microbatch": 2, "checkpoint_every": 2}
    spec = tiny_spec(data=data, training=training)
    with pytest.raises(UserError, match="is of another training"):
        loop.train(spec, tiny_model, dict, tiny_examples, make_mesh(), trained.layout)
