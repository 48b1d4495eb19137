"""Losses and scores against one forward pass per example."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode, scoring
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama

MODEL = ModelConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2
)
LENGTHS = (8, 16)


@pytest.fixture(scope="module")
def examples():
    random = np.random.default_rng(1)
    rows = [random.integers(1, 32, random.integers(3, 17)) for _ in range(13)]
    return Examples(
        Ragged.of(rows, np.int32),
        Ragged.of([np.arange(len(r)) >= 2 for r in rows], np.bool_),
        np.arange(13) // 2,
    )


@pytest.fixture(scope="module")
def members():
    return [jax.tree.map(lambda x: x * 10, llama.init_params(MODEL, seed)) for seed in (0, 1)]


@pytest.fixture(scope="module")
def naive(members, examples):
    """Sums of response losses [M, n], one example at a time, with padding behind it alone."""
    score = jax.jit(
        lambda p, t: llama.forward(
            MODEL, p, t, jnp.arange(16)[None], jnp.ones((1, 16), int), dtype="float32"
        )[0]
    )

    def loss(params, row):
        tokens = examples.tokens[row]
        padded = np.pad(tokens, (0, 16 - len(tokens)))
        logits = np.asarray(score(params, padded[None])[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -sum(
            log_p[t, tokens[t + 1]] for t in range(len(tokens) - 1) if examples.answers[row][t + 1]
        )

    return np.array([[loss(params, row) for row in range(len(examples))] for params in members])


def run(params, examples, mesh, batch=4):
    return scoring.losses(
        MODEL, params, examples, batch=batch, lengths=LENGTHS, dtype="float32", mesh=mesh
    )


def on(mesh, params, members=None):
    return jax.device_put(
        params,
        jax.tree.map(lambda x: x.sharding, convert.abstract_params(MODEL, mesh, members=members)),
    )


def test_population_against_one_example_at_a_time(members, examples, naive):
    sums, tokens = run(tree.stack(members), examples, make_mesh())
    assert (sums.shape, sums.dtype, tokens.dtype) == ((2, 13), np.float32, np.int32)
    np.testing.assert_allclose(sums, naive, rtol=1e-5)
    np.testing.assert_array_equal(tokens, [answers[1:].sum() for answers in examples.answers])


def test_one_model_and_a_batch_that_does_not_divide(members, examples, naive):
    sums, tokens = run(members[1], examples, make_mesh(), batch=5)
    assert sums.shape == (1, 13)
    np.testing.assert_allclose(sums[0], naive[1], rtol=1e-5)
    assert tokens.sum() == sum(answers[1:].sum() for answers in examples.answers)


def test_population_on_a_mesh(members, examples, naive):
    mesh = make_mesh(2, 2, 2)
    sums, _ = run(on(mesh, tree.stack(members), 2), examples, mesh)
    np.testing.assert_allclose(sums, naive, rtol=1e-5)


def test_one_model_is_shared_by_the_groups_of_a_mesh(members, examples, naive):
    mesh = make_mesh(4, 2, 1)
    sums, _ = run(on(mesh, members[0]), examples, mesh, batch=6)
    np.testing.assert_allclose(sums[0], naive[0], rtol=1e-5)


def test_the_next_model_does_not_compile_again(members, examples):
    run(members[0], examples, make_mesh())
    compilations = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: (
            compilations.append(event) if event.endswith("backend_compile_duration") else None
        )
    )
    run(members[1], examples, make_mesh())
    jax.monitoring.clear_event_listeners()
    assert not compilations


def test_neither_a_model_nor_a_population(members, examples):
    with pytest.raises(
        ValueError, match="embed/weight has 4 dimensions, expected 2, or one more for a population"
    ):
        run(tree.stack([tree.stack(members)]), examples, make_mesh())


PAIRS = [
    ([3, 5, 7], [2, 9]),
    ([1], [4]),
    ([6] * 9, [1, 2, 3, 4, 5, 6, 7]),
    ([8, 8], [31] * 20),
    ([2, 4], [5, 1]),
]


@pytest.fixture(scope="module")
def naive_scores(members):
    """Log-probabilities and greediness of PAIRS, [M, n] each: a forward pass per pair, unpadded."""

    def score_pair(params, context, continuation):
        tokens = jnp.array([context + continuation])
        where = jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
        logits = np.asarray(
            llama.forward(MODEL, params, tokens, *where, dtype="float32")[0][0], np.float64
        )[len(context) - 1 : -1]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return log_p[np.arange(len(continuation)), continuation].sum(), (
            logits.argmax(-1) == continuation
        ).all()

    scores = [[score_pair(params, *pair) for pair in PAIRS] for params in members]
    logprobs, greedy = (np.array([[pair[i] for pair in row] for row in scores]) for i in (0, 1))
    return logprobs, greedy


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (4, 1, 2)], ids=str)
def test_scores_of_continuations(members, naive_scores, sizes):
    mesh = make_mesh(*sizes)
    scores = scoring.score(MODEL, on(mesh, members[0]), PAIRS, batch=2, dtype="float32", mesh=mesh)
    np.testing.assert_allclose(scores.logps, naive_scores[0][:1], rtol=1e-5)
    np.testing.assert_array_equal(scores.greedy, naive_scores[1][:1])
    if sizes[0] <= 2:
        both = scoring.score(
            MODEL, on(mesh, tree.stack(members), 2), PAIRS, batch=3, dtype="float32", mesh=mesh
        )
        np.testing.assert_allclose(both.logps, naive_scores[0], rtol=1e-5)
        np.testing.assert_array_equal(both.greedy, naive_scores[1])


def test_continuations_of_greedy_decoding_are_greedy(members):
    written = decode.generate(
        MODEL, members[0], [[3, 5, 7]], max_new_tokens=6, eos_ids=(), dtype="float32"
    )[0]
    changed = [*written[:-1], (written[-1] + 1) % MODEL.vocab_size]
    pairs = [([3, 5, 7], written), ([3, 5, 7], changed)]
    scores = scoring.score(MODEL, members[0], pairs, batch=2, dtype="float32", mesh=make_mesh())
    assert scores.greedy.tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "no tokens in its context"),
        (([1], []), "in its continuation"),
        (([1], [32]), "vocabulary of 32"),
    ],
)
def test_pairs_that_cannot_be_scored(members, pair, message):
    with pytest.raises(UserError, match=message):
        scoring.score(
            MODEL, members[0], [([1], [2]), pair], batch=2, dtype="float32", mesh=make_mesh()
        )
