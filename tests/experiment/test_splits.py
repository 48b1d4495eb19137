"""Data that change under a run are refused, and so are splits that share examples."""

import functools
import json
import re
import shutil

import numpy as np
import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.config.merge import Search
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.splits import find_overlaps, refuse_overlaps
from tests.experiment.run_directory import digests


def ignore(line):
    """Take the place of the log."""


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A folder of its own with a run that is trained and goes no further."""
    copy = tmp_path_factory.mktemp("trained")
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(folder / name, copy)
    changes = [f"output={copy / 'run'}"]
    changes += [f"data.{name}={copy / name}.jsonl" for name in ("train", "test")]
    pipeline.run(load_config(folder / "tiny.yaml", changes), through="train", log=ignore)
    return copy


def change_file(path, change):
    """Rewrite a JSON Lines file, row by row."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)))


def reverse(rows):
    return rows[::-1]


def shorten(rows):
    return rows[:-3]


def answer_otherwise(rows):
    return [rows[0] | {"completion": "a a ."}, *rows[1:]]


@pytest.mark.parametrize(
    ("stage", "name", "change", "message"),
    [
        ("train", "train", reverse, "other content, 40 examples as before"),
        ("merge", "train", shorten, "40 examples -> 37"),
        ("analyze", "train", reverse, "other content, 40 examples as before"),
        ("evaluate", "test", shorten, "20 examples -> 17"),
        ("report", "test", answer_otherwise, "other content, 20 examples as before"),
        ("search", "train", reverse, "other content, 40 examples as before"),
    ],
)
def test_no_stage_takes_other_rows_for_those_of_the_training(
    trained, tmp_path, stage, name, change, message
):
    run, path = tmp_path / "run", trained / f"{name}.jsonl"
    shutil.copytree(trained / "run", run)
    if stage == "train":
        (run / "metrics" / "state.json").unlink()  # as where the training was stopped
    config, before, rows = read_config(run), digests(run), path.read_bytes()
    start = functools.partial(pipeline.run, config, through=stage)
    if stage == "search":
        start = functools.partial(pipeline.search, config, Search())
    change_file(path, change)
    try:
        with pytest.raises(UserError, match=re.escape(f"{name} ({path}: {message})")) as error:
            start(log=ignore)
    finally:
        path.write_bytes(rows)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"the data of {run} changed since its training began: ")
    # validation examples are set aside from the training file, so they change with its order
    assert ("validation (" in str(error.value)) == (change is reverse)
    assert digests(run) == before


def test_a_split_that_appears_is_named(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    recorded = json.loads((run / "data.json").read_text())
    del recorded["validation"]
    (run / "data.json").write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="training began: validation was absent; restore them"):
        pipeline.run(read_config(run), log=ignore)


def test_a_benchmark_does_not_read_the_run_directory(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "copy")
    run = tmp_path / "copy" / "run"
    (run / "data.json").write_text('{"train": {"digest": "of other data", "examples": 1}}')
    assert pipeline.benchmark(read_config(run), steps=2).step > 0


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def overlapping(folder, tmp_path):
    """Overrides for a test file whose rows 1 and 3 are training examples of another file."""
    train, test = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    )
    write_rows(tmp_path / "test.jsonl", [test[0], train[7], test[1], train[7], test[2]])
    return [
        f"data.test={tmp_path / 'test.jsonl'}",
        f"output={tmp_path / 'run'}",
        "data.validation_examples=0",
    ]


def test_a_test_split_with_training_examples_is_refused(folder, tmp_path, overlapping):
    message = (
        "2 of 5 test examples are train examples too (the first: row 1, row 3): a loss on learned "
        "examples is not held out; remove them from one of the files, or set data.allow_overlap"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        pipeline.run(load_config(folder / "tiny.yaml", overlapping), log=ignore)
    assert not (tmp_path / "run").exists()


def test_an_overlap_that_is_allowed_is_counted_and_reported(folder, overlapping):
    changes = [*overlapping, "data.allow_overlap=true", "training.epochs=1"]
    lines = []
    directory = pipeline.run(load_config(folder / "tiny.yaml", changes), log=lines.append)
    assert "  test: overlapping, not held out: 2 of 5 examples are train examples too" in lines
    recorded = json.loads((directory / "data.json").read_text())
    assert recorded["test"]["overlaps"] == {"train": {"examples": 2, "first_ids": [1, 3]}}
    assert "overlaps" not in recorded["train"]
    report = (directory / "report.md").read_text()
    assert "held-out" not in report.lower()
    assert "Loss on overlapping test examples: mean member" in report
    assert "overlapping: 2 of its examples are train examples too" in report


def test_overlaps_are_of_tokens_between_every_two_splits():
    def examples(*rows):
        masks = [[True] * len(row) for row in rows]
        ids = np.arange(len(rows)) + 10
        return Examples(Ragged.of(rows, np.int32), Ragged.of(masks, np.bool_), ids)

    splits = {
        "train": examples([1, 2], [3], [4, 5]),
        # [1] and [2] are not [1, 2]: a row counts as one
        "validation": examples([1], [2], [3], [6]),
        "test": examples([6], [4, 5], [7]),
    }
    assert find_overlaps(splits) == [
        ("validation", "train", 1, 4, [12], ["row 12"]),
        ("validation", "test", 1, 4, [13], ["row 13"]),
        ("test", "train", 1, 3, [11], ["row 11"]),
        ("test", "validation", 1, 3, [10], ["row 10"]),
    ]
    with pytest.raises(UserError) as error:
        refuse_overlaps(find_overlaps(splits), "remove them")
    # validation and test once
    assert str(error.value).count("examples too") == 3
    refuse_overlaps(find_overlaps({"train": splits["train"]}), "remove them")
