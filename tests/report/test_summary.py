"""The first screen: what it says follows from planted differences."""

import xml.etree.ElementTree as ET
from dataclasses import asdict

import numpy as np
import pytest

from jax_ordermerge.analysis import paired
from jax_ordermerge.report.chapters import summary
from jax_ordermerge.report.document import Bullets, Heading, Paragraph, Picture, Table
from tests.report.test_findings import make_items, make_model, make_run

LOSSES = np.random.default_rng(0).normal(2, 0.5, 120)


def run_of(shifts, *, validation=None, right=None, controls=None, analysis=None):
    """Return a run whose models have the losses LOSSES + shift, and shares of right answers."""
    rng = np.random.default_rng(1)
    models, items = [], {}
    for name, shift in shifts.items():
        kind = "base" if name == "base" else "member" if name.startswith("m") else "merge"
        losses = LOSSES + shift + rng.normal(0, 0.02, 120)
        share = (right or {}).get(name)
        correct = None if share is None else np.arange(120) < 120 * share
        tasks = {} if share is None else {"sums": {"accuracy": share, "se": 0.04, "n": 120}}
        values = {"loss": losses.mean(), "tasks": tasks}
        values["validation_loss"] = (validation or {}).get(name)
        models.append(make_model(name, kind, **values))
        items[name] = make_items(losses, correct)
    return make_run(models, items, controls=controls, analysis=analysis)


def parts(run):
    heading, sentences, *rest = summary.summary(run)
    assert heading == Heading("What was found")
    return list(sentences.sentences), rest


def test_four_sentences_a_table_and_a_picture():
    slopes = [(-0.04, 1e-9), (0.03, 0.4), (0.02, 0.01)]
    coefficients = [
        {"epochs": [epoch], "estimate": b, "se": 0.01, "p": p}
        | {"low": b - 0.0196, "high": b + 0.0196}
        for epoch, (b, p) in enumerate(slopes, start=1)
    ]
    run = run_of(
        {"base": 3, "m0": 0, "m1": 0.05, "average": -0.1, "selection": -0.1},
        analysis={"fixed_effects": {"coefficients": coefficients}},
    )
    sentences, (table, picture) = parts(run)
    position, average, selection, ship = sentences
    assert position == (
        "Position: samples seen early end with the higher loss in epoch 1 (clearly: slope -0.0400 "
        "[-0.0596, -0.0204], p < 0.0001); samples seen late end with the higher loss in epoch 3 "
        "(weakly: slope +0.0200 [+0.0004, +0.0396], p = 0.02); no slope is distinguishable from 0 "
        "in epoch 2. p is corrected over the epochs by Holm's method."
    )
    assert "clearly better" in average
    assert "the best member by loss (m0, chosen on test: optimistic)" in average
    assert selection.startswith("Selection (selection): held-out loss not distinguishable (")
    assert ship == (
        "What to ship: average, which needs no choice: it is better in loss than the mean member, "
        "and worse in no measure."
    )
    assert isinstance(table, Table)
    assert [row[0] for row in table.rows] == [
        "base",
        "mean of 2 members",
        "best member on test",
        "average",
        "selection",
    ]
    assert table.strong == [3]
    gap = run.comparison.merges["average"].loss.gaps["best_member"]
    cells = table.rows[3]
    assert f"{gap.estimate:+.4f}" in cells
    # the interval and p have columns of their own
    assert f"[{gap.low:+.4f}, {gap.high:+.4f}]" in cells
    assert cells[-2:] == ["< 0.0001", "clearly better"]
    assert isinstance(picture, Picture)
    text = ET.fromstring(picture.svg).find("{http://www.w3.org/2000/svg}desc").text
    assert f"average {gap.estimate:+.4g} [{gap.low:+.4g}, {gap.high:+.4g}]" in text


@pytest.mark.parametrize(
    ("shift", "right", "shipped", "reason"),
    [
        (-0.1, 0.5, "ties", "better in loss than the best member by loss, and worse in no measure"),
        (-0.1, 0.2, "m1", "is worse in sums on test"),
        (0.0, 0.5, "m1", "is not distinguishable in any measure on test"),
        (0.1, 0.5, "m1", "is worse in loss on test"),
    ],
)
def test_with_validation_a_merge_ships_only_if_it_is_better_and_in_nothing_worse(
    shift, right, shipped, reason
):
    run = run_of(
        {"m0": 0, "m1": 0, "ties": shift},
        validation={"m0": 2.0, "m1": 1.9, "ties": 1.8},
        right={"m0": 0.5, "m1": 0.5, "ties": right},
    )
    name, why = summary.shipped(run)
    assert name == shipped
    assert reason in why


def test_the_choice_of_a_search_is_what_ships():
    shifts = {"m0": 0, "m1": 0, "auto": -0.1, "ties": -0.2}
    name, why = summary.shipped(
        run_of(shifts, validation={"m0": 2, "m1": 2, "auto": 1.9, "ties": 1})
    )
    assert name == "auto"
    assert "the search chose on validation" in why


def control(at, shift, validation=None):
    losses = LOSSES + shift + np.random.default_rng(3).normal(0, 0.01, 120)
    against = {
        "best_member": asdict(paired.difference(losses, LOSSES)),
        "mean_member": asdict(paired.difference(losses, LOSSES)),
    }
    name = f"average, lambda {at}"
    values = {"loss": float(losses.mean()), "validation_loss": validation, "at": [at]}
    return {"name": name, "group": "lambda_line", "kind": "merge", "against": against, **values}


def controls_of(*rows, split="test"):
    return {"split": split, "rows": list(rows)}


def test_a_lambda_that_beats_the_best_member_is_on_the_first_screen():
    # validation prefers 1.1, and the test examples 1.2
    rows = [control(0.5, 0.3, 2.3), control(1.1, -0.2, 1.8), control(1.2, -0.3, 1.9)]
    run = run_of({"m0": 0, "m1": 0, "average": 0}, controls=controls_of(*rows))
    sentences, (table, _) = parts(run)
    assert "task vector helps by itself: average, lambda 1.1 has loss" in sentences[-1]
    assert table.rows[-1][0] == "average, lambda 1.1 (control)"
    assert "of the control, which validation chose, not corrected" in table.caption
    run = run_of({"m0": 0, "m1": 0, "average": 0}, controls=controls_of(rows[0]))
    sentences, _ = parts(run)
    assert "task vector" not in sentences[-1]


@pytest.mark.parametrize(("split", "validation"), [("test", None), ("validation", 1.8)])
def test_no_lambda_is_chosen_by_the_examples_that_judge_it(split, validation):
    rows = [control(0.5, 0.3, validation), control(1.1, -0.2, validation)]
    rows.append(control(1.2, -0.3, validation))
    run = run_of({"m0": 0, "m1": 0, "average": 0}, controls=controls_of(*rows, split=split))
    sentences, (table, picture) = parts(run)
    assert "2 of the 3 models at other lambdas are better than the best member" in sentences[-1]
    assert "None of them is chosen: that takes validation examples" in sentences[-1]
    assert all("lambda" not in row[0] for row in table.rows)
    assert "lambda" not in picture.svg
    assert "control" not in table.caption


@pytest.mark.parametrize(("p", "better"), [(0.004, False), (0.0001, True)])
def test_a_lambda_that_nothing_chose_pays_for_all_controls(p, better):
    # the gain is real to one test of its own, and nothing among 42
    rows = [control(0.5 + at / 100, 0.3) for at in range(20)] + [control(1.1, -0.2)]
    for row in rows:
        for gap in row["against"].values():
            gap["p"] = 0.5
    rows[-1]["against"]["best_member"]["p"] = p
    run = run_of({"m0": 0, "m1": 0, "average": 0}, controls=controls_of(*rows))
    sentences, _ = parts(run)
    # by hand: 42 p = 0.17 and 0.0042
    assert ("1 of the 21 models at other lambdas" in sentences[-1]) == better


def test_the_table_has_at_most_eight_rows_and_says_what_it_leaves_out():
    shifts = {"base": 3, "m0": 0, "m1": 0} | {f"x{i}": 0.1 * i for i in range(9)} | {"average": 0.5}
    _, (table, picture) = parts(run_of(shifts, controls=controls_of(control(1.1, 0.1, 2.0))))
    assert len(table.rows) == summary.ROWS
    names = [row[0] for row in table.rows]
    assert names[3:] == ["x0", "x1", "x2", "average", "average, lambda 1.1 (control)"]
    assert "More merges, 6 of them, stand in Models and merges" in table.caption
    # one far beyond the others is named at the edge and does not squeeze them
    assert "+0." in picture.svg


def test_a_difference_far_beyond_the_others_is_written_and_not_drawn():
    run = run_of({"m0": 0, "m1": 0, "average": -0.01, "a": 0.01, "b": 0.02, "ties": 3})
    _, (_, picture) = parts(run)
    gap = run.comparison.merges["ties"].loss.gaps["mean_member"]
    assert f"{gap.estimate:+.4f} →" in picture.svg


def test_nothing_yet():
    assert summary.summary(make_run())[1] == Paragraph(
        "Nothing yet: neither the analysis nor the evaluation has been run."
    )


def test_members_without_merges():
    sentences = [x for x in summary.summary(run_of({"m0": 0, "m1": 0})) if isinstance(x, Bullets)]
    assert sentences == []
