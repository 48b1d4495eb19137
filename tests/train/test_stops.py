"""What ends a training before its last step, and what a checkpoint of it may take."""

import signal
import threading

import numpy as np
import pytest

from jax_ordermerge.arch import parameter_count
from jax_ordermerge.checkpoint import orbax
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import loop
from jax_ordermerge.train import step as steps


def diverging(at, place, bad=np.nan):
    """A step that is no model but reports a bad loss, by default one that is not finite."""

    def compile_step(step, mesh, state, batch, frozen, options, *, fused):
        def fake(state, batch, frozen):
            sums = np.ones(batch["ids"].shape, np.float32)
            loss, counted = np.ones(2, np.float32), int(fake.calls)
            if counted == at:
                sums[place, 0, 1] = bad
                loss[place] = bad
            fake.calls += 1
            ids = np.asarray(batch["ids"])
            metrics = steps.Metrics(
                loss,
                np.ones(2, np.float32),
                np.zeros(2, np.float32),
                ids,
                steps.ExampleSums(sums, np.ones_like(sums)),
            )
            fake.bad = ids[place, 0, 1] if counted == at else getattr(fake, "bad", None)
            return state, metrics

        fake.calls = 0
        compile_step.fake = fake
        return fake

    return compile_step


def test_a_loss_that_is_not_finite_stops_and_overwrites_nothing(tmp_path, tiny_train, monkeypatch):
    fake = diverging(at=4, place=1)
    monkeypatch.setattr(steps, "compile_step", fake)
    with pytest.raises(
        UserError, match="training diverged at step 5: member 1 has loss nan"
    ) as caught:
        tiny_train(tmp_path, make_mesh(), training={"log_every": 10})
    assert f"on samples {fake.fake.bad + 100};" in str(caught.value)
    assert orbax.latest(tmp_path / "checkpoints") == 3  # of the end of epoch 1
    assert not (tmp_path / "losses" / "train.npz").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize(
    ("at", "spike", "stops"),
    [(10, 3.0, True), (10, None, False), (10, 7.0, False), (9, 3.0, False)],
)
def test_a_loss_spike_stops_where_it_is_asked_for(
    tmp_path, tiny_train, monkeypatch, at, spike, stops
):
    """6 nats after ten steps of 1 nat are above 3 times the usual loss, and not above 7 times.

    Nine steps say too little.
    """
    fake = diverging(at, place=0, bad=6.0)
    monkeypatch.setattr(steps, "compile_step", fake)
    sections = {"training": {"epochs": 4, "spike": spike, "log_every": 5}}
    if not stops:
        tiny_train(tmp_path, make_mesh(), **sections)
        return
    with pytest.raises(
        UserError,
        match=r"loss spike at step 11: member 0 has loss 6, more than training.spike = 3 times the",
    ) as caught:
        tiny_train(tmp_path, make_mesh(), **sections)
    assert f"median 1 of the 10 steps before, on samples {fake.fake.bad + 100}, " in str(
        caught.value
    )
    assert orbax.latest(tmp_path / "checkpoints") == 9
    # the window of usual losses is kept in the checkpoint: continued, the same step is found
    monkeypatch.setattr(steps, "compile_step", diverging(at=1, place=0, bad=6.0))
    with pytest.raises(UserError, match=r"loss spike at step 11: .* of the 10 steps before"):
        tiny_train(tmp_path, make_mesh(), **sections)


@pytest.fixture
def interruptible():
    """A process that a shell started in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_ends_at_once(interruptible, tmp_path, tiny_train, monkeypatch):
    monkeypatch.setattr(steps, "compile_step", diverging(at=-1, place=0))

    def twice(line):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), on_line=twice)
    assert orbax.latest(tmp_path / "checkpoints") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_timeout_of_a_save_follows_from_its_bytes(
    tmp_path, tiny_train, tiny_model, monkeypatch
):
    class Asked(Exception):
        pass

    def open_checkpoints(directory, keep, *, steps, on_saved, timeout):
        raise Asked(timeout)

    monkeypatch.setattr(loop, "Checkpoints", open_checkpoints)
    with pytest.raises(Asked) as asked:
        tiny_train(tmp_path, make_mesh(), training={"checkpoint_bandwidth": 1e-4})
    # two members of parameters and two moments in float32, at 100 bytes per second, three times
    size = 2 * 3 * 4 * parameter_count(tiny_model)
    assert asked.value.args[0] == pytest.approx(3 * size / 100, rel=1e-3)
