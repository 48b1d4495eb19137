"""Training on preference pairs: a pair is a sample, and its reference is the base."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ordermerge import tree
from jax_ordermerge.config import Dpo
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.evaluate import scoring
from jax_ordermerge.layout import RunLayout, read_npz
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama, preference
from jax_ordermerge.train import batches, fisher, loop, members, objective
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.orders import epoch_order

NAMES = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)
DPO = {"objective": {"kind": "dpo", "beta": 0.5}}


def sequence_sums(model, params, examples):
    """Summed losses of all sequences, [n, 2]."""
    flat = examples.sequences
    sums, _ = scoring.losses(
        model, params, flat, batch=8, lengths=(24,), dtype="float32", mesh=make_mesh()
    )
    return sums[0].reshape(-1, 2)


@pytest.fixture(scope="module")
def pairs(tiny_model, tiny_base):
    """21 pairs of 4 to 23 tokens with prompts of 3 tokens; ids that are not row numbers."""
    random = np.random.default_rng(3)
    prompts = random.integers(1, tiny_model.vocab_size, (21, 3))

    def side():
        rows = [
            np.concatenate([p, random.integers(1, tiny_model.vocab_size, random.integers(1, 21))])
            for p in prompts
        ]
        masks = [np.arange(len(row)) >= 3 for row in rows]
        return Examples(Ragged.of(rows, np.int32), Ragged.of(masks, np.bool_), np.arange(21) + 100)

    both = dataclasses.replace(side(), rejected=side())
    return dataclasses.replace(both, reference=-sequence_sums(tiny_model, tiny_base, both))


@pytest.fixture(scope="module")
def train(pairs, tiny_model, tiny_base, tiny_spec, recorder):
    """Return `(directory, mesh, ...) -> (spec and layout, rows of metrics, losses)`."""

    def run(directory, mesh, *, members=None, stop_at=None, **sections):
        spec, layout = tiny_spec(**(DPO | sections)), RunLayout(directory)
        watch = recorder(stop_at)
        loop.train(spec, tiny_model, tiny_base, pairs, mesh, layout, members=members, watch=watch)
        return (spec, layout), watch.lines, read_npz(layout.training_losses)["losses"]

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, train):
    return train(tmp_path_factory.mktemp("whole"), make_mesh())


# ---------------------------------------------------------------------- the loss itself


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 2.0, "label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.3}]
)
def test_losses_and_scores_against_loops(settings):
    random = np.random.default_rng(0)
    logps, reference, tokens = (
        random.normal(-9, 3, (5, 2)),
        random.normal(-9, 3, (5, 2)),
        random.integers(1, 9, (5, 2)),
    )
    objective = Dpo(**settings)
    losses = preference.pair_losses(*map(jnp.float32, (logps, reference, tokens)), objective)
    scores = preference.scores(jnp.float32(logps), jnp.float32(reference), beta=objective.beta)
    for pair in range(5):
        chosen, rejected = logps[pair] - reference[pair]
        margin = objective.beta * (chosen - rejected)
        e = objective.label_smoothing
        expected = (1 - e) * np.log1p(np.exp(-margin)) + e * np.log1p(np.exp(margin))
        if objective.loss == "ipo":
            expected = (
                chosen / tokens[pair, 0] - rejected / tokens[pair, 1] - 1 / (2 * objective.beta)
            ) ** 2
        assert losses[pair] == pytest.approx(expected, rel=1e-5)
        assert [float(scores[name][pair]) for name in NAMES] == pytest.approx(
            [
                objective.beta * chosen,
                objective.beta * rejected,
                float(margin > 0),
                margin,
                *logps[pair],
            ],
            rel=1e-5,
        )


def test_a_margin_too_large_for_exp():
    losses = preference.pair_losses(
        jnp.array([[-1e4, 0.0], [0.0, -1e4]]),
        jnp.zeros((2, 2)),
        jnp.ones((2, 2)),
        Dpo(beta=1.0),
    )
    assert losses.tolist() == [1e4, 0.0]


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_the_gradient_is_that_of_the_plain_formula(tiny_model, pairs, kind):
    """The weights trick against differentiating through whole logits."""
    settings = Dpo(beta=0.5, loss=kind)
    params = llama.init_params(tiny_model, 1)
    batch = {
        name: jnp.asarray(array)
        for name, array in pack.collate(pairs, np.array([3, 7, -1, 0]), 24).items()
    }

    def plain(params):
        def logps(side):
            inputs = (batch[name][:, side] for name in ("tokens", "positions", "segments"))
            logits, _ = llama.forward(tiny_model, params, *inputs, dtype="float32")
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), batch["targets"][:, side, :, None], axis=-1
            )[..., 0]
            return (chosen * batch["weights"][:, side]).sum(-1)

        sums_of_logps = jnp.stack([logps(0), logps(1)], axis=1)
        losses = preference.pair_losses(
            sums_of_logps, batch["reference"], batch["weights"].sum(-1), settings
        )
        return losses[jnp.array([0, 1, 3])].sum()

    (total, sums), ours = jax.value_and_grad(
        objective.dpo(tiny_model, settings, dtype="float32"), has_aux=True
    )(params, batch)
    expected, theirs = jax.value_and_grad(plain)(params)
    assert total == pytest.approx(float(expected), rel=1e-5)
    assert (sums.losses[2], sums.weights.tolist()) == (0, [1, 1, 0, 1])
    for gradient, expected_gradient in zip(
        jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert jnp.linalg.norm(gradient - expected_gradient) < 1e-5 * jnp.linalg.norm(
            expected_gradient
        )


def test_accumulation_has_the_same_gradient(tiny_model, pairs):
    loss = objective.dpo(tiny_model, Dpo(), dtype="float32")
    params = llama.init_params(tiny_model, 1)
    seen = []
    for microbatch in (8, 2):
        batch = pack.step_batch(pairs, np.arange(8), microbatch=microbatch, lengths=(24,))
        tx = optax.sgd(1.0)
        state = steps.TrainState(params, tx.init(params), jnp.int32(0))
        seen.append(
            jax.jit(steps.train_step(loss, tx, lambda _: 1.0, lengths=(24,)))(state, batch, {})
        )
    (state, metrics), (accumulated_state, accumulated_metrics) = seen
    for start, a, b in zip(
        *map(jax.tree.leaves, (params, state.params, accumulated_state.params)), strict=True
    ):
        assert jnp.linalg.norm(a - b) < 1e-6 * jnp.linalg.norm(start - a) + 1e-7
    assert metrics.loss == pytest.approx(float(accumulated_metrics.loss), rel=1e-6)
    np.testing.assert_allclose(
        metrics.examples.losses.ravel(), accumulated_metrics.examples.losses.ravel(), rtol=1e-5
    )


@pytest.mark.slow
def test_fisher_of_pairs(tiny_model, pairs, tiny_base):
    loss = objective.dpo(tiny_model, Dpo(), dtype="float32", remat="none")
    information = fisher.diagonal(
        loss, tree.stack([tiny_base]), pairs, count=2, lengths=(24,), mesh=make_mesh(), seed=0
    )
    assert all(bool((leaf >= 0).all()) for leaf in jax.tree.leaves(information))
    assert max(float(leaf.max()) for leaf in jax.tree.leaves(information)) > 0


# ---------------------------------------------------------------------- the training


def test_training_starts_at_the_reference_and_learns_to_prefer(trained):
    _, lines, _ = trained
    assert set(NAMES) < set(lines[0])
    assert lines[0]["loss"] == pytest.approx([np.log(2)] * 2, rel=1e-4)
    assert lines[0]["rewards/margins"] == pytest.approx([0, 0], abs=1e-4)
    last = lines[-1]
    assert all(accuracy > 0.8 for accuracy in last["rewards/accuracies"])
    for member in range(2):
        assert last["rewards/margins"][member] > 0.05
        margin = last["rewards/chosen"][member] - last["rewards/rejected"][member]
        assert last["rewards/margins"][member] == pytest.approx(margin, rel=1e-4)


def test_losses_are_stored_by_pair(trained, pairs):
    (spec, _), lines, losses = trained
    assert np.isfinite(losses).all()
    for step, line in enumerate(lines):
        for member in range(2):
            rows = epoch_order(spec, len(pairs), member, step // 3)[step % 3]
            assert line["loss"][member] == pytest.approx(
                losses[member, step // 3, rows[rows >= 0]].mean(), rel=1e-5
            )


def test_what_is_measured_afterwards_is_what_was_trained(trained, pairs, tiny_model):
    """The loss of a pair from two sums over sequences, as in the analysis, is the objective."""
    (spec, layout), _, _ = trained
    params = tree.member(members.restore_members(spec, tiny_model, make_mesh(), layout), 0)
    sums = sequence_sums(tiny_model, params, pairs)
    tokens = np.array([mask.sum() for mask in pairs.sequences.answers]).reshape(-1, 2)
    losses = preference.pair_losses(
        *map(jnp.float32, (-sums, pairs.reference, tokens)), spec.objective
    )
    batch = pack.collate(pairs, np.arange(len(pairs)), 24)
    _, expected = objective.build(spec, tiny_model)(params, batch)
    np.testing.assert_allclose(losses, expected.losses, rtol=1e-4)


def same_weights(a, b, of_a, of_b, model, same_bits, mesh_a=None, mesh_b=None):
    weights = []
    for (spec, layout), mesh, member in ((a, mesh_a, of_a), (b, mesh_b, of_b)):
        population = members.restore_members(spec, model, mesh or make_mesh(), layout)
        weights.append(tree.member(population, member))
    return same_bits(*weights)


def test_member_alone_is_the_member_of_the_population(
    trained, tmp_path, train, tiny_model, same_bits
):
    single, lines, losses = train(tmp_path, make_mesh(), members=(1,))
    config, all_lines, all_losses = trained
    assert same_weights(single, config, 0, 1, tiny_model, same_bits)
    assert not same_weights(config, config, 0, 1, tiny_model, same_bits)
    np.testing.assert_array_equal(losses[0], all_losses[1])
    for name in ("loss", "grad_norm", *NAMES):
        assert [line[name][0] for line in lines] == [line[name][1] for line in all_lines]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_member_alone_is_the_member_on_a_mesh_of_groups(
    tmp_path, train, tiny_model, same_bits, dtype
):
    sections = {"training": {"epochs": 1}, "model": {"compute_dtype": dtype}}
    mesh, single_mesh = make_mesh(2, 2, 2), make_mesh(1, 2, 2)
    both, _, _ = train(tmp_path / "both", mesh, **sections)
    single, _, _ = train(tmp_path / "alone", single_mesh, members=(1,), **sections)
    assert same_weights(single, both, 0, 1, tiny_model, same_bits, single_mesh, mesh)


@pytest.mark.slow
def test_adapters_on_the_frozen_base(tmp_path, train):
    low = {
        "lora": {"rank": 4, "alpha": 16.0},
        "training": {"epochs": 20, "microbatch": 8, "learning_rate": 3e-2},
    }
    _, lines, losses = train(tmp_path / "both", make_mesh(), **low)
    assert lines[0]["loss"] == pytest.approx([np.log(2)] * 2, rel=1e-4)
    assert all(accuracy > 0.8 for accuracy in lines[-1]["rewards/accuracies"])
    _, single, single_losses = train(tmp_path / "alone", make_mesh(), members=(1,), **low)
    np.testing.assert_array_equal(single_losses[0], losses[1])
    assert [line["loss"][0] for line in single] == [line["loss"][1] for line in lines]


@pytest.mark.slow
def test_positions_divided_over_devices(trained, tmp_path, train):
    _, lines, _ = train(tmp_path, make_mesh(sequence=2), training={"epochs": 1})
    for line, expected in zip(lines, trained[1], strict=False):
        np.testing.assert_allclose(line["loss"], expected["loss"], rtol=1e-4)


@pytest.mark.slow
def test_killed_and_resumed_is_uninterrupted(trained, tmp_path, train, tiny_model, same_bits):
    # killed at step 3, the last checkpoint is at 2: the line of step 3 has a step from before the
    # kill
    changes = {"training": {"checkpoint_every": 2, "log_every": 3}}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, make_mesh(), stop_at=3, **changes)
    resumed, lines, losses = train(tmp_path, make_mesh(), **changes)
    config, all_lines, all_losses = trained
    for member in range(2):
        assert same_weights(resumed, config, member, member, tiny_model, same_bits)
    np.testing.assert_array_equal(losses, all_losses)
    for name in ("loss", *NAMES):
        single = np.array([line[name] for line in all_lines])
        np.testing.assert_allclose(
            [line[name] for line in lines], single.reshape(2, 3, 2).mean(1), rtol=1e-12
        )


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_batches_of_pairs_on_the_mesh(tiny_spec, pairs, shape):
    plan = batches.make_plan(tiny_spec(**DPO), pairs)
    abstract = batches.abstract_batch(plan, make_mesh(*shape))
    batch = batches.device_batch(plan, 1, abstract)
    for name, array in batch.items():
        np.testing.assert_array_equal(
            array, np.stack([plan.batch(1, place)[name] for place in range(2)])
        )
    assert {shard.data.shape for shard in batch["tokens"].addressable_shards} == {
        (2 // shape[0], 2, 4 // shape[1], 2, 24)
    }
    assert plan.sequence_lengths(1).sum() == sum(
        pairs.sequences.lengths.reshape(-1, 2).sum(1)[row]
        for row in plan.rows(1).ravel()
        if row >= 0
    )


@pytest.mark.slow
def test_fused_adapters_have_the_losses_of_adapters_one_after_another(train, tmp_path):
    losses = [
        train(tmp_path / str(fused), make_mesh(1, 2), lora={"rank": 3, "fused": fused})[2]
        for fused in (False, True)
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
    assert np.ptp(losses[0][0]) > 1e-3
