"""The chapters of the report about a search and about controls."""

import numpy as np
import pytest

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.report.chapters import merges
from jax_ordermerge.report.document import Picture, Table, render_markdown
from jax_ordermerge.report.findings import search_sentence
from jax_ordermerge.search import controls
from jax_ordermerge.search.candidates import Candidate


def losses(shift, noise=0.02, seed=0):
    difficulty = np.random.default_rng(9).normal(2, 0.5, 100)
    return difficulty + shift + np.random.default_rng(seed).normal(0, noise, 100)


def search(claim=True):
    rows = [
        {
            "number": 0,
            "name": "average",
            "kind": "merge",
            "candidate": {"method": "average"},
            "loss": 1.25,
            "examples": 64,
            "dropped": None,
        },
        {
            "number": 1,
            "name": "member_0",
            "kind": "member",
            "candidate": {"method": "member"},
            "loss": 1.5,
            "examples": 64,
            "dropped": None,
        },
        {
            "number": 2,
            "name": "ties",
            "kind": "merge",
            "candidate": {"method": "ties"},
            "loss": None,
            "examples": 16,
            "dropped": 1,
        },
    ]
    for row in rows:
        gap = {"estimate": (row["loss"] or 0) - 1.25, "se": 0.01, "examples": row["examples"]}
        row["to_winner"] = row["to_best_member"] = gap if row["loss"] else None
    against = paired.claim(
        losses(0), {"best_member": losses(0.1, seed=1), "mean_member": losses(0.0, seed=2)}
    )
    results = {
        "tried": 3,
        "examples": 64,
        "measured_fully": 2,
        "winner": 0,
        "best_member": 1,
        "candidates": rows,
    }
    return results | {"claim": {"examples": 100, "against": asdict(against)} if claim else None}


def test_the_report_of_a_search_says_what_was_chosen_and_what_may_be_claimed():
    text = render_markdown("search", merges.search(search(), "nats per token"), pictures=".")
    assert (
        "The search chose average among 3 candidates on 64 validation examples (loss 1.2500; "
        "the best member, member_0, 1.5000)" in text
    )
    assert "clearly better (-0.0969 ± 0.0026" in text
    assert "than the best member; not distinguishable (" in text
    assert "identical in every loss to the average" in text
    assert "| ties | 16 | – | – | – | 1 |" in text
    assert "There is no test split, so nothing is claimed" in search_sentence(search(claim=False))
    assert merges.search(None, "nats per token") == []


def test_controls_are_compared_with_members_and_average_item_by_item():
    population_controls = controls.make_controls(
        ["lambda_line", "barrier", "plane", "norm_matched"], 2, {"pick": Candidate("selection")}, 0
    )
    assert (
        len({control.name for control in population_controls})
        == len(population_controls)
        == 4 + 7 + 3 + 49 + 1
    )
    tokens = np.random.default_rng(5).integers(1, 50, 100).astype(float)
    shifts = {"member_0": 0.2, "member_1": 0.1, "average": 0.0, "base": 3.0}
    by_name = {
        control.name: controls.ControlLosses(
            losses(shifts.get(control.name, 0.05), seed=number), 2.0 - (control.name == "member_0")
        )
        for number, control in enumerate(population_controls)
    }
    compared = controls.compare(population_controls, by_name, tokens, resamples=50, seed=0)
    # member_1 has the lower loss here, but the best member is the control that validation says
    assert compared["best_member"] == {"name": "member_0", "chosen_on": "validation"}
    rows = {row["name"]: row for row in compared["rows"]}
    assert rows["average"]["loss"] == pytest.approx(
        (by_name["average"].losses * tokens).sum() / tokens.sum()
    )
    mean = (by_name["member_0"].losses + by_name["member_1"].losses) / 2
    expected = paired.difference(by_name["average"].losses, mean, weights=tokens, resamples=50)
    assert rows["average"]["against"]["mean_member"] == asdict(expected)
    assert "average" not in rows["average"]["against"]
    blocks = merges.control_blocks(
        {"split": "test", **compared}, "nats per token", {"validation_loss": 1.9, "loss": 2.0}
    )
    assert [block.name for block in blocks if isinstance(block, Picture)] == [
        "lambda-line",
        "barrier",
        "plane",
        "splits",
    ]
    (table,) = [block for block in blocks if isinstance(block, Table)]
    assert len(table.rows) == len(population_controls) - 49 + 1
    assert table.rows[table.strong[0]][0] == "mean member (sd between members)"
    assert any(row[0] == "member_0 (best on validation)" for row in table.rows)
