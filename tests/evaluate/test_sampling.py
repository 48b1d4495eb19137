"""Draws of tokens: masks against transformers, frequencies against probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import sampling
from jax_ordermerge.evaluate.sampling import Sampling

LOGITS = np.random.default_rng(0).normal(size=(16, 50)).astype(np.float32) * 3


def naive(row, top_k, top_p):
    """The tokens of one row that may be drawn, in a loop."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
    shares = np.exp(row[order].astype(np.float64) - row.max())
    shares /= shares.sum()
    drawable, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if top_p is not None and total >= top_p:
            break
        drawable.append(token)
        total += share
    return set(drawable)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, None), (7, None), (500, None), (None, 0.01), (None, 0.9), (None, 1.0), (9, 0.7)],
)
def test_mask(top_k, top_p):
    masked = np.asarray(sampling.mask_unlikely(jnp.asarray(LOGITS), top_k, top_p))
    for logits, row in zip(LOGITS, masked, strict=True):
        assert set(np.flatnonzero(np.isfinite(row))) == naive(logits, top_k, top_p)
        assert (row[np.isfinite(row)] == logits[np.isfinite(row)]).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.8), (12, 0.6)])
def test_mask_equals_that_of_transformers(top_k, top_p):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    from transformers.generation import logits_process

    scores = torch.tensor(LOGITS)
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    if top_p:
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    masked = np.asarray(sampling.mask_unlikely(jnp.asarray(LOGITS), top_k, top_p))
    assert (masked == scores.numpy()).all()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    settings, n = Sampling(temperature=0.7, top_k=6), 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (n, 50))
    key_bits = sampling.row_key_bits(settings.seed, range(n))
    drawn = np.asarray(sampling.next_token(logits, key_bits, 3, settings))
    best = np.argsort(-LOGITS[0])[:6]
    shares = np.exp(LOGITS[0][best] / 0.7)
    counts = np.bincount(drawn, minlength=50)
    assert counts.sum() == counts[best].sum() == n
    assert stats.chisquare(counts[best], n * shares / shares.sum()).pvalue > 1e-3


def test_steps_and_rows_are_independent():
    settings, n = Sampling(temperature=1.0), 2000
    logits = jnp.zeros((n, 4))
    key_bits = sampling.row_key_bits(0, range(n))
    steps = [np.asarray(sampling.next_token(logits, key_bits, step, settings)) for step in (0, 1)]
    for first, second in (steps, (steps[0][:-1], steps[0][1:])):
        table = np.histogram2d(first, second, bins=4)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_draw_is_a_pinned_function_of_seed_name_and_step():
    settings = Sampling(temperature=1.0, seed=3)
    key_bits = sampling.row_key_bits(3, ["first", 7])
    logits = jnp.zeros((2, 1000))
    drawn = [sampling.next_token(logits, key_bits, step, settings).tolist() for step in (0, 1)]
    key = jax.random.wrap_key_data(jnp.asarray(key_bits[1]), impl="threefry2x32")
    key = jax.random.fold_in(key, 1)
    assert drawn[1][1] == int(jnp.argmax(jax.random.gumbel(key, (1000,))))
    assert drawn == [[506, 164], [135, 117]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0 is not a finite number of at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0 must be at least 1"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5 must be above 0 and at most 1"),
        ({"top_p": 0.5}, "give a temperature above 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


@pytest.mark.parametrize("temperature", [1e-38, 1e-40, 5e-324, 0.0])
def test_a_temperature_that_float32_cannot_hold_is_greedy(temperature):
    settings, logits = Sampling(temperature), jnp.array([[1.0, 60.0, 59.0], [-80.0, -90.0, -70.0]])
    assert settings.is_greedy
    bits = sampling.row_key_bits(0, range(2))
    assert sampling.next_token(logits, bits, 0, settings).tolist() == [1, 2]
    with pytest.raises(UserError, match="give a temperature above 0"):
        Sampling(temperature, top_k=2)


@pytest.mark.parametrize("temperature", [1e-37, 1e-36, 1e-33, 1e-31, 1e-20])
@pytest.mark.parametrize("restriction", [{}, {"top_k": 2}, {"top_p": 0.9}])
def test_a_tiny_temperature_draws_the_most_likely_token(temperature, restriction):
    # divided by 1e-36 both 500 and 600 are beyond float32
    logits = jnp.array([[500.0, 600.0, -600.0], [600.0, 500.0, 1.0], [-3.0, -2.0, -1.0]])
    bits = sampling.row_key_bits(0, range(3))
    settings = Sampling(temperature, **restriction)
    for step in range(3):
        assert sampling.next_token(logits, bits, step, settings).tolist() == [1, 0, 2]
