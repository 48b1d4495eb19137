import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.model import loss


def naive(logits, targets):
    out = np.zeros(targets.shape)
    for place in np.ndindex(targets.shape):
        row = logits[place].astype(np.float64)
        out[place] = np.log(np.exp(row - row.max()).sum()) + row.max() - row[targets[place]]
    return out


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_token_losses(scale):
    generator = np.random.default_rng(0)
    logits = (generator.normal(size=(3, 5, 17)) * scale).astype(np.float32)
    targets = generator.integers(0, 17, (3, 5)).astype(np.int32)
    ours = loss.token_losses(logits, targets)
    np.testing.assert_allclose(ours, naive(logits, targets), rtol=1e-5, atol=1e-6)
    low = loss.token_losses(logits.astype(jnp.bfloat16), targets)
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, naive(logits.astype(jnp.bfloat16).astype(np.float32), targets), rtol=1e-5, atol=1e-6)


def test_gradient_is_softmax_less_target():
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(2, 3, 7)).astype(np.float32)
    targets = generator.integers(0, 7, (2, 3)).astype(np.int32)
    gradient = jax.grad(lambda x: loss.token_losses(x, targets).sum())(logits)
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True) - np.eye(7)[targets]
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_example_losses_ignore_what_has_no_weight():
    generator = np.random.default_rng(2)
    logits = generator.normal(size=(3, 4, 9)).astype(np.float32)
    targets = generator.integers(0, 9, (3, 4)).astype(np.int32)
    weights = np.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], np.float32)
    sums, counts = loss.example_losses(logits, targets, weights)
    np.testing.assert_allclose(sums, (naive(logits, targets) * weights).sum(-1), rtol=1e-5)
    assert counts.tolist() == [2, 4, 0]
    assert sums[2] == 0
