"""Two small run directories, written here, side by side."""

import json

import numpy as np
import pytest
import yaml
from scipy import stats

from jax_ordermerge.config import make_config, to_dict
from jax_ordermerge.errors import UserError
from jax_ordermerge.report import comparison


def dump(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, allow_nan=False))


def coefficient(epoch, estimate, se, p):
    return {
        "epochs": [epoch],
        "estimate": estimate,
        "se": se,
        "z": estimate / se,
        "p": p,
        "low": estimate - se,
        "high": estimate + se,
    }


def make(directory, name, level, slope, gain, cosine=0.9):
    """Write a run of two members that differ by noise; the average is better by `gain`."""
    directory.mkdir()
    config = make_config(
        {
            "name": name,
            "population": {"members": 2, "level": level},
            "evaluation": {"bootstrap": 100},
        }
    )
    (directory / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    dump(
        directory / "analysis.json",
        {
            "fixed_effects": {
                "coefficients": [
                    coefficient(1, slope, 0.003, 0.01),
                    coefficient(2, 0.0, 0.004, 1.0),
                ]
            }
        },
    )
    rng = np.random.default_rng(0)
    difficulty, models = rng.normal(2, 0.5, 50), []
    for model, kind, shift in (
        ("member_0", "member", 0.0),
        ("member_1", "member", 0.0),
        ("average", "merge", -gain),
    ):
        losses = difficulty + shift + rng.normal(0, 1e-6, 50)
        dump(
            directory / "evaluations" / f"{model}.json",
            {"losses": losses.tolist(), "ids": list(range(50)), "tasks": {}},
        )
        models.append(
            {"name": model, "kind": kind, "loss": losses.mean(), "loss_se": 0.07, "tasks": {}}
        )
    dump(directory / "evaluations.json", {"models": models, "split": "test"})
    average = {
        "name": "average",
        "method": "average",
        "diagnostics": {"total": {"cosines": [[1.0, cosine], [cosine, 1.0]]}},
    }
    dump(directory / "merge.json", {"merges": [average]})
    return directory


def test_the_numbers_of_both_runs_and_their_difference(tmp_path):
    free = make(tmp_path / "a", "free", "sample", -0.010, 0.05, cosine=0.7)
    fixed = make(tmp_path / "b", "fixed", "batch", -0.022, 0.02, cosine=0.95)
    page = comparison.write([free, fixed], tmp_path / "out")
    # without the escapes of marks
    text = (tmp_path / "out" / "comparison.md").read_text().replace("\\", "")
    rows = {
        cells[1]: cells[2:]
        for line in text.splitlines()
        if len(cells := [x.strip(" *") for x in line.split("|")]) > 3
    }
    assert rows["population.level"][:2] == ["sample", "batch"]
    assert "population.members" not in text
    assert "seed" not in rows
    assert rows["free, epoch 1"][:4] == ["-0.0100", "[-0.0130, -0.0070]", "0.01", ""]
    # two errors of 0.003 in quadrature; 0.012 / 0.00424 is 2.83 of them
    # margin: half of 0.010; the upper test has (0.012 - 0.005) / 0.00424 = 1.65 against it
    assert rows["fixed, epoch 1"][3:7] == [
        "-0.0120",
        "[-0.0203, -0.0037]",
        "0.0047",
        "not shown to be equivalent within 0.0050 (p = 0.95)",
    ]
    # 0 against a slope of 0 has no margin; two errors of 0.004 detect 2.8 times 0.0057
    zero = ["+0.0000", "[-0.0111, +0.0111]", "1", "detectable from 0.0158"]
    assert rows["fixed, epoch 2"][3:7] == zero
    assert rows["free: average"][2].startswith("-0.0500")
    assert rows["fixed: average"][2].startswith("-0.0200")
    assert [rows[f"{name}: mean member (sd)"][5] for name in ("free", "fixed")] == [
        "0.700",
        "0.950",
    ]
    assert (tmp_path / "out" / "slopes.svg").read_text().lstrip().startswith("<svg")
    assert page.read_text().count("<svg") == 1
    # random effects over the two runs, of equal weight: the t-test of -0.05 and -0.02 over runs
    low, high = stats.ttest_1samp([-0.05, -0.02], 0).confidence_interval(0.95)
    mean = rows["loss: average less the mean member"]
    assert mean[:2] == ["-0.0350", f"[{low:+.4f}, {high:+.4f}]"]
    assert mean[-2] == "-0.0500, -0.0200"
    assert "free, fixed trained one population: the error of such a run is over items" in text
    # members of one population, who differ by 1e-6 in every item
    assert rows["free: members (differ in order)"][0] == "2"
    assert rows["free: members (differ in order)"][2:4] == ["[0.0000, 0.0000]", "0.0000"]


def test_incomplete_runs_name_what_is_missing(tmp_path):
    complete = make(tmp_path / "a", "complete", "sample", -0.01, 0.05)
    part = make(tmp_path / "b", "part", "sample", -0.01, 0.05)
    (part / "evaluations.json").unlink()
    comparison.write([complete, part], tmp_path / "out")
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert "part has no evaluations.json yet" in text
    assert "part: average" not in text
    assert "The configs are the same but for their names." in text


def test_what_cannot_be_compared_is_refused(tmp_path):
    first = make(tmp_path / "a", "same", "sample", 0.1, 0)
    second = make(tmp_path / "b", "same", "batch", 0.1, 0)
    with pytest.raises(UserError, match="1 run was given; a comparison takes two or more"):
        comparison.write([first], tmp_path / "out")
    with pytest.raises(UserError, match="the same name"):
        comparison.write([first, second], tmp_path / "out")
    with pytest.raises(UserError, match="is not a run directory"):
        comparison.write([first, tmp_path / "none"], tmp_path / "out")
    config = yaml.safe_load((second / "config.yaml").read_text())
    config |= {"name": "pairs", "objective": {"kind": "dpo"}}
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        UserError,
        match=r"different kinds \(nats per pair, nats per token\); give runs of one objective",
    ):
        comparison.write([first, second], tmp_path / "out")
    assert not (tmp_path / "out").exists()
