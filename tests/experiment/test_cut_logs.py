"""A log whose last line was cut off is repaired from the checkpoint; no row of metrics is lost."""

import io
import json
import shutil

import numpy as np
import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.layout import read_npz, write_npz
from jax_ordermerge.report import run_report
from jax_ordermerge.train import loop

LOGS = ["metrics/train.jsonl", "metrics/samples.jsonl"]


def ignore(line):
    """Take the place of the log."""


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(log):
    times = ("seconds", "tokens_per_second", "host_fraction")
    return [{key: value for key, value in row.items() if key not in times} for row in log]


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.fixture(scope="module", params=[None, 1], ids=["at once", "in waves"])
def trained(request, folder, tmp_path_factory):
    """A finished training with ten steps, a row for every second one, answers after four."""
    run = tmp_path_factory.mktemp("trained") / "run"
    wave = f"population.wave={json.dumps(request.param)}"
    changes = [f"output={run}", "samples.every=4", "samples.max_new_tokens=4", wave]
    pipeline.run(load_config(folder / "tiny.yaml", changes), through="train", log=ignore)
    return run


@pytest.mark.parametrize("log", LOGS)
def test_a_finished_training_repairs_its_logs(trained, tmp_path, log, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = {name: rows(run / name) for name in LOGS}
    cut(run / log)
    if log == LOGS[0]:
        with pytest.raises(UserError, match=r"train.jsonl ends within a line; ordermerge train"):
            run_report.write(run)
    pipeline.run(read_config(run), through="train", log=ignore)
    assert {name: rows(run / name) for name in LOGS} == before
    lines = []
    pipeline.run(read_config(run), through="train", log=lines.append)
    assert lines == [f"everything is done: {run}"]
    if not (run / "waves").is_dir():
        assert capsys.readouterr().err.count(f"{run / log} ended within a line; repaired") == 1


@pytest.mark.parametrize("lost", ["the end of the last row", "the last row"])
def test_a_row_before_the_checkpoint_is_not_lost(folder, tmp_path, monkeypatch, lost):
    """A machine lost power: the checkpoint of step 4 is on the disk, the row of step 4 is not."""
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    log = tmp_path / "run" / "metrics" / "train.jsonl"
    original = loop.Display.metrics

    def fails(self, row):
        original(self, row)
        if row["step"] == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop.Display, "metrics", fails)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, through="train", log=ignore)
    before = rows(log)
    assert [row["step"] for row in before] == [2, 4, 6]
    text = log.read_text().splitlines(keepends=True)
    log.write_text(text[0] + (text[1][:-30] if "end" in lost else ""))
    pipeline.run(config, through="train", log=ignore)
    assert rows(log)[:2] == before[:2]
    assert [row["step"] for row in rows(log)] == [2, 4, 6, 8, 10]
    assert without_times(rows(log))[2] == without_times(before)[2]


def test_a_damaged_line_is_named_and_the_others_stay(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    log = run / "metrics" / "train.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + "\0" * 20 + "\n" + "".join(lines[2:]))
    with pytest.raises(
        UserError, match=r"train.jsonl: line 2 is not valid JSON \(.*\); remove this"
    ):
        run_report.write(run)


@pytest.mark.parametrize("damage", ["cut", "empty", "encrypted", "flipped", "no zip", "text"])
def test_damaged_arrays_are_one_clear_line(tmp_path, damage):
    file = tmp_path / "final.npz"
    write_npz(file, {"losses": np.arange(1000.0)})
    content = file.read_bytes()
    middle, directory = len(content) // 2, content.index(b"PK\1\2") + 8
    np.save(array := io.BytesIO(), np.arange(4))
    file.write_bytes(
        {
            "cut": content[:middle],
            "empty": b"",
            # the bit of the first flag in the directory at the end of the file
            "encrypted": content[:directory] + b"\1" + content[directory + 1 :],
            "flipped": content[:middle] + bytes(64) + content[middle + 64 :],
            "no zip": array.getvalue(),
            "text": b"no arrays",
        }[damage]
    )
    with pytest.raises(UserError, match=r"final\.npz is damaged \(.+\); restore it, or") as error:
        read_npz(file)
    assert "\n" not in str(error.value)
