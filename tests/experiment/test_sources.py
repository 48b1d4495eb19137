"""A run on several sources, with weights: what is trained, recorded and reported."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.layout import read_json, read_jsonl, read_npz

ROWS = [
    {"prompt": f"{a} plus {b} is ?", "completion": f"{b} {a} ."}
    for a in "abcdefgh"
    for b in "abcdefgh"
]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Three sources of training rows and two of test rows."""
    path = tmp_path_factory.mktemp("sources")
    write(path / "a.jsonl", ROWS[:16])
    write(path / "b/1.jsonl", ROWS[16:20])
    write(path / "b/2.jsonl", ROWS[20:32])
    (path / "b/README.md").write_text("# b")
    write(path / "c.jsonl", ROWS[32:42])
    write(path / "x.jsonl", ROWS[48:56])
    write(path / "y.jsonl", ROWS[56:])
    return path


def settings(sources):
    train = [
        {"path": f"{sources}/a.jsonl", "name": "a", "weight": 0.5},
        f"{sources}/b",
        {"path": f"{sources}/c.jsonl", "name": "c", "weight": 2.25},
    ]
    test = [{"path": f"{sources}/x.jsonl", "name": "x"}, f"{sources}/y.jsonl"]
    return [
        f"data.train={json.dumps(train)}",
        f"data.test={json.dumps(test)}",
        "data.validation_examples=6",
        "training.validate_every=4",
    ]


@pytest.fixture(scope="module")
def run(folder, sources, tmp_path_factory):
    log = []
    config = load_config(
        folder / "tiny.yaml", [f"output={tmp_path_factory.mktemp('run')}", *settings(sources)]
    )
    return pipeline.run(config, log=log.append), log


def test_data_json_describes_each_source(run, sources):
    directory, log = run
    data = read_json(directory / "data.json")
    a, b, c = data["train"]["sources"]
    held_out = [source["examples"] for source in data["validation"]["sources"]]
    assert sum(held_out) == 6
    left = [total - part for total, part in zip((16, 16, 10), held_out, strict=True)]
    assert (a["name"], a["weight"], a["format"]) == ("a", 0.5, "prompt_completion")
    assert a["examples"] == round(left[0] / 2)
    assert b["examples"] == left[1]
    assert c["examples"] == 2 * left[2] + round(left[2] / 4)
    assert c["counts"]["repeated_by_weight"] == c["examples"] - left[2]
    assert [(file["path"], file["rows"]) for file in b["files"]] == [
        (f"{sources}/b/1.jsonl", 4),
        (f"{sources}/b/2.jsonl", 12),
    ]
    assert [source["first_id"] for source in (a, b, c)] == [0, 16, 32]
    assert [source["weight"] for source in data["validation"]["sources"]] == [1, 1, 1]
    assert b["passed_over"] == [f"{sources}/b/README.md"]
    assert f"    {sources}/b: passed over {sources}/b/README.md" in log
    assert data["train"]["examples"] == sum(source["examples"] for source in (a, b, c))
    assert data["train"]["tokens"] == sum(source["tokens"] for source in (a, b, c))


def test_all_members_see_the_same_rows_in_each_epoch(run):
    directory, _ = run
    data = read_json(directory / "data.json")["train"]
    epochs = [
        np.sort(ids[ids >= 0])
        for member in range(2)
        for ids in read_npz(directory / f"orders/member_{member}.npz").values()
    ]
    assert len(epochs) == 4
    for ids in epochs:
        np.testing.assert_array_equal(ids, epochs[0])
    assert len(np.unique(epochs[0])) == len(epochs[0]) == data["examples"]
    # by the ids as documented: the copies of i are i + n, i + 2 n
    total = sum(source["id_count"] for source in data["sources"])
    rows, copies = np.unique(epochs[0] % total, return_counts=True)
    assert set(copies[rows >= 32]) == {2, 3}
    assert set(copies[rows < 32]) == {1}


def test_losses_and_effects_by_source(run, sources):
    directory, _ = run
    data = read_json(directory / "data.json")
    analysis = read_json(directory / "analysis.json")
    assert [(source["name"], source["samples"]) for source in analysis["sources"]] == [
        (source["name"], source["examples"]) for source in data["train"]["sources"]
    ]
    weights = np.array([source["samples"] for source in analysis["sources"]])
    means = [source["members"]["mean_loss"] for source in analysis["sources"]]
    members = np.mean([member["mean_loss"] for member in analysis["members"]])
    assert np.average(means, weights=weights) == pytest.approx(members)
    for model in read_json(directory / "evaluations.json")["models"]:
        parts = model["sources"]
        assert {name: part["examples"] for name, part in parts.items()} == {
            "x": 8,
            f"{sources}/y.jsonl": 8,
        }
        # all answers have equally many tokens
        assert np.mean([part["loss"] for part in parts.values()]) == pytest.approx(model["loss"])
        assert sum(part["examples"] for part in model["validation_sources"].values()) == 6
    lines = read_jsonl(directory / "metrics/train.jsonl")
    names = {name for line in lines for name in line if name.startswith("validation_loss/")}
    assert names == {
        f"validation_loss/{source['name']}"
        for source in data["validation"]["sources"]
        if source["examples"]
    }


def test_the_report_has_tables_by_source(run, sources):
    report = (run[0] / "report.md").read_text()
    c = read_json(run[0] / "data.json")["train"]["sources"][2]
    assert f"c: {c['examples']} examples, {c['tokens']} tokens, weight 2.25" in report
    assert report.count("### By source") == 2
    assert f"| model | x (8) | 95 % | {sources}/y.jsonl (8) | 95 % |" in report
    header = "| source | samples | base | mean member | average | selection | slope, epoch 1 |"
    assert header in report


LOAD = """
import sys
from jax_ordermerge.config import load_config
from jax_ordermerge.data import source, tokenizers
config = load_config(sys.argv[1], sys.argv[3:])
with tokenizers.without_torch():
    tokenizer = tokenizers.load_tokenizer(sys.argv[2])
splits = source.load_splits(config.data, tokenizer, seed=config.seed)
print({name: examples.digest for name, examples in splits.items()})
"""


@pytest.mark.slow
def test_two_processes_have_the_same_examples(folder, sources, tmp_path):
    digests = []
    for hash_seed in ("1", "2"):
        # files of a directory come in the order of their creation, or any other
        copy = tmp_path / hash_seed / "data"
        for path in sorted(sources.rglob("*.jsonl"), reverse=hash_seed == "2"):
            target = copy / path.relative_to(sources)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        result = subprocess.run(
            [sys.executable, "-c", LOAD, folder / "tiny.yaml", folder / "base", *settings("data")],
            cwd=copy.parent,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        digests.append(result.stdout)
    assert digests[0] == digests[1]
    assert digests[0].count(":") == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('data.train=["{a}", "{a}"]', "twice; give weight: 2"),
        ('data.train=["{a}", {{"path": "{a}", "name": "a"}}]', "is read twice"),
        ('data.train=["{a}", "{a}.gz"]', "a.jsonl.gz not found"),
    ],
)
def test_what_is_refused_before_anything_is_written(folder, sources, tmp_path, change, message):
    change = change.format(a=f"{sources}/a.jsonl")
    with pytest.raises(UserError, match=message):
        pipeline.run(
            load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}", change]),
            log=lambda line: None,
        )
    assert not (tmp_path / "run").exists()
