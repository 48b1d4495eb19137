"""A training that is killed many times, at any moment, ends as an uninterrupted one."""

import json
import signal
import time

import numpy as np
import pytest

from tests.experiment.test_processes import assert_same, complete, result, training, wait_for_lines

KILLS, EACH = 20, 8  # one kill in each run of 8 steps
SETTINGS = "training.epochs=40", "training.log_every=1", "training.checkpoint_every=4"  # 200 steps


def lines(output):
    """Return the whole lines of the log."""
    log = output / "metrics" / "train.jsonl"
    return (
        [
            json.loads(line)
            for line in log.read_text().splitlines(keepends=True)
            if line.endswith("\n")
        ]
        if log.is_file()
        else []
    )


@pytest.mark.slow
def test_killed_at_20_random_moments(folder, tmp_path):
    random = np.random.default_rng(0)
    uninterrupted, output, keep_all = (
        tmp_path / "alone",
        tmp_path / "run",
        f"compilation_cache={tmp_path / 'compiled'}",
    )
    complete(folder, uninterrupted, *SETTINGS, keep_all, processes=1, devices=1)
    cut_off = 0
    for number in range(KILLS):
        moment = max(
            number * EACH + random.integers(EACH), len(lines(output)) + 1
        )  # after a step that this start has taken
        with training([folder], output, *SETTINGS, keep_all, devices=1) as (process,):
            wait_for_lines(output, moment)
            time.sleep(random.uniform(0, 0.05))
            process.kill()
            assert process.wait() == -signal.SIGKILL
        cut_off += any((output / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
    assert cut_off > 0  # moments in which a checkpoint was being written
    complete(folder, output, *SETTINGS, keep_all, processes=1, devices=1)

    assert_same(result(folder, output), result(folder, uninterrupted))
    assert [line["step"] for line in lines(output)] == list(range(1, 201))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines(output)] == [
            line[name] for line in lines(uninterrupted)
        ]
    states = [
        json.loads((run / "metrics" / "state.json").read_text()) for run in (output, uninterrupted)
    ]
    assert states[0]["tokens"] == states[1]["tokens"]
    with np.load(output / "losses" / "train.npz") as saved:
        ids, losses = saved["ids"], saved["losses"]
    assert np.isfinite(losses).all()
    for member in range(2):
        with np.load(output / "orders" / f"member_{member}.npz") as orders:
            for epoch in orders.values():
                np.testing.assert_array_equal(
                    np.sort(epoch[epoch >= 0]), np.sort(ids)
                )  # each sample once
