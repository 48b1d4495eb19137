"""Learning rates step by step."""

import numpy as np
import pytest

from jax_ordermerge.config import (
    Training,
)
from jax_ordermerge.train import optimizer


def rate(step, *, peak, warmup, steps_, kind, last):
    """The learning rate, written out."""
    if step < warmup:
        return peak * step / warmup
    if kind == "wsd":
        return peak * (1 + (last - 1) * max(0.0, step - (steps_ - 8)) / 8)
    done = min((step - warmup) / (steps_ - warmup), 1.0)
    if kind == "cosine":
        return peak * ((1 - last) * 0.5 * (1 + np.cos(np.pi * done)) + last)
    return peak if kind == "constant" else peak * (1 + (last - 1) * done)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("warmup", "warmup_steps"), [(0, 0), (0.1, 4), (5, 5)])
def test_schedule(kind, warmup, warmup_steps):
    settings = {"kind": "wsd", "decay": 0.2} if kind == "wsd" else kind
    schedule = optimizer.make_schedule(
        Training(learning_rate=3e-4, schedule=settings, warmup=warmup, final_fraction=0.1), 40
    )
    expected = [
        rate(s, peak=3e-4, warmup=warmup_steps, steps_=40, kind=kind, last=0.1) for s in range(41)
    ]
    np.testing.assert_allclose(
        [float(schedule(s)) for s in range(41)], expected, rtol=2e-5, atol=1e-10
    )


def test_warmup_longer_than_the_training():
    schedule = optimizer.make_schedule(Training(learning_rate=1.0, warmup=100), 10)
    assert [round(float(schedule(s)), 3) for s in (0, 5, 10)] == [0.0, 0.5, 1.0]


def test_a_decay_longer_than_what_is_left_begins_after_the_warmup():
    schedule = optimizer.make_schedule(
        Training(learning_rate=1.0, schedule={"kind": "wsd", "decay": 100}, warmup=2), 10
    )
    assert [round(float(schedule(s)), 3) for s in (0, 2, 6, 10)] == [0.0, 1.0, 0.5, 0.0]
