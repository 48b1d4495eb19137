import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.data import pack
from jax_ordermerge.model import llama
from jax_ordermerge.train import objective


def test_sums_of_each_example(tiny_model, tiny_base, tiny_examples):
    batch = pack.collate(tiny_examples, np.array([3, 7, -1, 0]), 24)
    total, sums = objective.sft(tiny_model, dtype="float32")(tiny_base, batch)
    logits, _ = llama.forward(
        tiny_model,
        tiny_base,
        *(jnp.asarray(batch[n]) for n in ("tokens", "positions", "segments")),
        dtype="float32",
    )
    logits = np.asarray(logits, np.float64)
    for place, row in enumerate((3, 7, None, 0)):
        if row is None:
            assert (sums.losses[place], sums.weights[place]) == (0, 0)
            continue
        tokens, answers = tiny_examples.tokens[row], tiny_examples.answers[row]
        expected = 0.0
        for at in range(len(tokens) - 1):
            if answers[at + 1]:
                scores = logits[place, at]
                expected -= scores[tokens[at + 1]] - np.log(np.exp(scores).sum())
        assert sums.losses[place] == pytest.approx(expected, rel=1e-5)
        assert sums.weights[place] == answers[1:].sum()
    assert total == pytest.approx(float(sums.losses.sum()), rel=1e-6)
