"""The smallest runs: every stage ends, or the run is refused before it trains."""

import json

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline

NO_VALIDATION = "data.validation_examples=0"


SLOW = [
    ["training.epochs=1"],
    ["training.batch=64", "training.epochs=1"],  # one step
    ["data.limit=1", NO_VALIDATION],
    ["data.test_limit=1"],
    ["data.validation_examples=1"],
    ["data.limit=30", NO_VALIDATION, "training.warmup=0.5"],  # it covers epoch 1
]


@pytest.mark.parametrize(
    "changes",
    [
        *(pytest.param(changes, marks=pytest.mark.slow) for changes in SLOW),
        ["population.members=1"],
        [
            "data.limit=1",
            "data.test_limit=1",
            NO_VALIDATION,
            "population.members=1",
            "training.epochs=1",
            "training.batch=64",
        ],
    ],
    ids=lambda changes: ",".join(changes),
)
def test_a_small_run_ends_with_a_report(folder, tmp_path, changes):
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}", *changes])
    directory = pipeline.run(config, log=lambda line: None)
    assert (directory / "report.html").is_file()
    # NaN is no JSON, and a statistic that the data cannot determine is a reason
    for name in ("analysis.json", "evaluations.json", "merge.json"):
        json.loads((directory / name).read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("validation", [0, 4])
def test_a_report_without_test_data_has_no_empty_columns(folder, tmp_path, validation):
    changes = [f"output={tmp_path / 'run'}", "data.test=null", "evaluation.tasks=[]"]
    changes.append(f"data.validation_examples={validation}")
    directory = pipeline.run(load_config(folder / "tiny.yaml", changes), log=lambda line: None)
    report = (directory / "report.md").read_text()
    expected = "| model | validation loss |" if validation else "| model |"
    assert expected in report
    assert "best by loss on test" not in report
    assert ("best by loss on validation" in report) == bool(validation)
    assert "Paired differences" not in report


def test_a_run_without_merges_is_complete(folder, tmp_path):
    changes = [f"output={tmp_path / 'run'}", "merge.methods=[]", "training.epochs=1"]
    config, messages = load_config(folder / "tiny.yaml", changes), []
    directory = pipeline.run(config, log=lambda line: None)
    assert json.loads((directory / "merge.json").read_text())["merges"] == []
    pipeline.run(config, log=messages.append)
    assert messages == [f"everything is done: {directory / 'report.html'}"]


def test_a_task_without_data_is_refused_before_the_training(folder, tmp_path):
    changes = [f"output={tmp_path / 'run'}", "data.test=null"]
    with pytest.raises(UserError, match=r"evaluation task swap has no data; set data\.test"):
        pipeline.run(load_config(folder / "tiny.yaml", changes), log=lambda line: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("{method: ties, parameters: {density: 20}}", "density = 20: input should be less than or"),
        (
            "{method: ties, parameters: {density: [0.5, 0.5]}}",
            "one number for all of the 4 members",
        ),
        ("{method: della, parameters: {density: 0.9}}", "choose epsilon below 0.1"),
        ("{method: consensus, parameters: {k: 5}}", "k = 5 of 4 members keeps nothing"),
        ("{method: selection, parameters: {child: 4}}", "4 members have the children 0 to 3"),
    ],
)
def test_parameters_out_of_range_are_refused_before_the_training(folder, tmp_path, method, message):
    changes = [f"output={tmp_path / 'run'}", "population.members=4", f"merge.methods=[{method}]"]
    with pytest.raises(UserError, match=message):
        pipeline.run(load_config(folder / "tiny.yaml", changes), log=lambda line: None)
    assert not (tmp_path / "run").exists()
