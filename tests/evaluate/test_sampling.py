"""Draws of tokens: which are kept, against transformers; how often each is drawn, against its probability."""

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
    """The kept tokens of one row, in a loop."""
    order = sorted(range(len(row)), key=lambda i: -row[i])[: top_k or len(row)]
    shares = np.exp(row[order].astype(np.float64) - row.max())
    shares /= shares.sum()
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if top_p is not None and total >= top_p:
            break
        kept.append(token)
        total += share
    return set(kept)


@pytest.mark.parametrize(
    ("top_k", "top_p"),
    [(1, None), (7, None), (500, None), (None, 0.01), (None, 0.9), (None, 1.0), (9, 0.7)],
)
def test_kept_tokens(top_k, top_p):
    found = np.asarray(sampling.kept(jnp.asarray(LOGITS), top_k, top_p))
    for row, own in zip(LOGITS, found, strict=True):
        assert set(np.flatnonzero(np.isfinite(own))) == naive(row, top_k, top_p)
        assert (own[np.isfinite(own)] == row[np.isfinite(own)]).all()


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.8), (12, 0.6)])
def test_kept_tokens_are_those_of_transformers(top_k, top_p):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    scores = torch.tensor(LOGITS)
    if top_k:
        scores = logits_process.TopKLogitsWarper(top_k)(None, scores)
    if top_p:
        scores = logits_process.TopPLogitsWarper(top_p)(None, scores)
    assert (np.asarray(sampling.kept(jnp.asarray(LOGITS), top_k, top_p)) == scores.numpy()).all()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    how, n = Sampling(temperature=0.7, top_k=6), 4000
    logits = jnp.broadcast_to(jnp.asarray(LOGITS[0]), (n, 50))
    drawn = np.asarray(sampling.choose(logits, sampling.row_words(how.seed, range(n)), 3, how))
    best = np.argsort(-LOGITS[0])[:6]
    shares = np.exp(LOGITS[0][best] / 0.7)
    counts = np.bincount(drawn, minlength=50)
    assert counts.sum() == counts[best].sum() == n
    assert stats.chisquare(counts[best], n * shares / shares.sum()).pvalue > 1e-3


def test_steps_and_rows_are_independent():
    how, n = Sampling(temperature=1.0), 2000
    logits = jnp.zeros((n, 4))
    words = sampling.row_words(0, range(n))
    one, two = (np.asarray(sampling.choose(logits, words, step, how)) for step in (0, 1))
    for first, second in ((one, two), (one[:-1], one[1:])):
        table = np.histogram2d(first, second, bins=4)[0]
        assert stats.chi2_contingency(table).pvalue > 1e-3


def test_a_draw_is_a_pinned_function_of_seed_name_and_step():
    how = Sampling(temperature=1.0, seed=3)
    words = sampling.row_words(3, ["first", 7])
    found = [sampling.choose(jnp.zeros((2, 1000)), words, step, how).tolist() for step in (0, 1)]
    key = jax.random.fold_in(
        jax.random.wrap_key_data(jnp.asarray(words[1]), impl="threefry2x32"), 1
    )
    assert found[1][1] == int(jnp.argmax(jax.random.gumbel(key, (1000,))))
    assert found == [[506, 164], [135, 117]]


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
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)
