import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Training
from jax_ordermerge.data import pack
from jax_ordermerge.mesh import make_mesh, partition
from jax_ordermerge.train import objective, optimizer
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.objective import ExampleSums


def regression(params, batch, frozen=None):
    """A small objective with a known gradient: weighted squares of w * token - target."""
    errors = batch["weights"] * jnp.square(params["w"] * batch["tokens"] - batch["targets"])
    sums = ExampleSums(errors.sum(-1), batch["weights"].sum(-1))
    return sums.losses.sum(), sums


def rows(count, length, seed=0):
    random = np.random.default_rng(seed)
    sizes = random.integers(1, length + 1, count)
    batch = {
        name: random.integers(1, 5, (count, length)).astype(np.int32) for name in steps.SEQUENCES
    }
    batch["weights"] = (np.arange(length) < sizes[:, None]).astype(np.float32)
    return batch | {"ids": np.arange(count, dtype=np.int32)}


def cut(batch, microbatch, lengths=(8,)):
    """Sort by size and cut into microbatches, each with its bucket."""
    order = np.argsort(batch["weights"].sum(-1), kind="stable")
    out = {
        name: array[order].reshape(-1, microbatch, *array.shape[1:])
        for name, array in batch.items()
    }
    return out | {
        "bucket": np.searchsorted(lengths, out["weights"].sum(-1).max(-1)).astype(np.int32)
    }


@pytest.fixture
def run():
    """Return a function that takes steps of gradient descent on `regression`."""

    def take(batch, lengths=(8,), count=1):
        tx = optax.sgd(0.01)
        params = {"w": jnp.float32(0.5)}
        state = steps.TrainState(params, tx.init(params), jnp.int32(0))
        step = jax.jit(steps.train_step(regression, tx, lambda _: 0.01, lengths=lengths))
        for _ in range(count):
            state, metrics = step(state, batch, {})
        return state, metrics

    return take


def test_the_gradient_is_of_the_mean_over_all_tokens(run):
    batch = rows(8, 8)
    state, metrics = run(cut(batch, 8))
    w, x, y, weight = 0.5, batch["tokens"], batch["targets"], batch["weights"]
    gradient = (weight * 2 * x * (w * x - y)).sum() / weight.sum()
    assert metrics.loss == pytest.approx((weight * (w * x - y) ** 2).sum() / weight.sum(), rel=1e-6)
    assert metrics.grad_norm == pytest.approx(abs(gradient), rel=1e-6)
    assert state.params["w"] == pytest.approx(w - 0.01 * gradient, rel=1e-6)
    assert (int(state.step), float(metrics.learning_rate)) == (1, pytest.approx(0.01))


@pytest.mark.parametrize("microbatch", [1, 2, 4])
def test_accumulation_is_exact_in_tokens(run, microbatch):
    # microbatches of very different token counts: a mean of means would be wrong
    batch = rows(8, 8)
    whole, expected = run(cut(batch, 8), count=3)
    state, metrics = run(cut(batch, microbatch), count=3)
    assert state.params["w"] == pytest.approx(float(whole.params["w"]), rel=1e-6)
    assert metrics.loss == pytest.approx(float(expected.loss), rel=1e-6)


def test_buckets_change_nothing_but_the_work(run):
    batch = rows(8, 8)
    plain, expected = run(cut(batch, 2))
    state, metrics = run(cut(batch, 2, (2, 4, 8)), lengths=(2, 4, 8))
    assert state.params["w"] == pytest.approx(float(plain.params["w"]), rel=1e-6)
    np.testing.assert_array_equal(metrics.ids, expected.ids)
    np.testing.assert_allclose(metrics.examples.losses, expected.examples.losses, rtol=1e-6)


def test_buckets_cut_what_lies_behind_them(run):
    batch = cut(rows(8, 8), 2, (2, 4, 8))
    poisoned = {
        **batch,
        "tokens": np.where(batch["weights"] > 0, batch["tokens"], 10**6).astype(np.int32),
    }
    lengths = np.array((2, 4, 8))[batch["bucket"]]
    poisoned["weights"] = batch["weights"] + (np.arange(8) >= lengths[:, None, None])
    state, metrics = run(poisoned, lengths=(2, 4, 8))
    clean, expected = run(batch, lengths=(2, 4, 8))
    assert state.params["w"] == clean.params["w"]
    np.testing.assert_array_equal(metrics.examples.weights, expected.examples.weights)


def test_accumulated_model_gradients(tiny_model, tiny_base, tiny_examples):
    sums = jax.jit(jax.grad(objective.sft(tiny_model, dtype="float32"), has_aux=True))
    batch = pack.step_batch(tiny_examples, np.arange(8), microbatch=8, lengths=(24,))
    microbatches = pack.step_batch(tiny_examples, np.arange(8), microbatch=4, lengths=(24,))
    gradient, _ = sums(tiny_base, {k: v[0] for k, v in batch.items()})
    partial = [sums(tiny_base, {k: v[i] for k, v in microbatches.items()})[0] for i in range(2)]
    for expected, *terms in zip(*map(jax.tree.leaves, (gradient, *partial)), strict=True):
        np.testing.assert_allclose(
            sum(terms), expected, rtol=1e-5, atol=1e-6 * float(jnp.abs(expected).max())
        )


# ---------------------------------------------------------------------- placement


def test_optimizer_state_is_sharded_like_its_parameters(tiny_model, tiny_base):
    mesh = make_mesh(2, 2, 2)
    tx = optimizer.make_optimizer(Training(), 10, tensor_table(tiny_model))
    abstract = steps.abstract_state(convert.abstract_params(tiny_model, mesh, members=4), tx, mesh)
    state = steps.initial_state([tiny_base], tx, abstract)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    path = "layers/mlp/gate/weight"  # [M, L, F, D]
    adam = next(
        s
        for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    )
    for branch in (state.params, adam.mu, adam.nu):
        leaf = tree.flatten(branch)[path]
        assert leaf.shape == (4, 2, 16, 8)
        assert {shard.data.shape for shard in leaf.addressable_shards} == {(2, 2, 8, 4)}
    for placed, planned in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert placed.sharding.is_equivalent_to(planned.sharding, placed.ndim)
    assert {shard.data.shape for shard in adam.count.addressable_shards} == {(2,)}
    for member in range(4):
        np.testing.assert_array_equal(
            tree.flatten(state.params)[path][member], tree.flatten(tiny_base)[path]
        )


def test_specs_of_gradients_fit_the_table(tiny_model):
    mesh = make_mesh(2, 2, 2)
    specs = {s.path: partition(s.axes, s.shape, mesh) for s in tensor_table(tiny_model)}
    assert all("order" not in spec for spec in specs.values())
