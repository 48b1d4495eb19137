"""The chapters of the report about a search and about controls."""

import json

import numpy as np
import pytest

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import SearchLayout, read_search
from jax_ordermerge.report import search_findings
from jax_ordermerge.report.chapters import merges
from jax_ordermerge.report.document import Picture, Table, render_markdown
from jax_ordermerge.search import claim as claims
from jax_ordermerge.search import controls, subsets
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
    results = {
        "tried": 3,
        "examples": 64,
        "measured_fully": 2,
        "winner": 0,
        "best_member": 1,
        "scaled_member": 1,
        "scaled_average": 0,
        "edges": [],
        "settings": {"space": {"measure": ["loss"]}},
        "guard": {"leader": 0, "measures": {}, "unmeasured": {}, "worse": []},
        "candidates": rows,
    }
    made = claims.make_claim(
        {
            claims.WINNER: losses(0),
            claims.WINNER_AT_ONE: losses(0),
            claims.BEST_MEMBER: losses(0.1, seed=1),
            claims.SCALED_MEMBER: losses(0.1, seed=1),
            claims.MEAN_MEMBER: losses(0.0, seed=2),
            claims.AVERAGE: losses(0),
            claims.SCALED_AVERAGE: losses(0),
        },
        np.ones(100),
        is_merge=True,
    )
    correct = np.arange(100) < 60, np.arange(100) < 90
    tasks = {
        "sums": {
            "accuracy": [0.6, 0.9],
            "difference": asdict(paired.difference(*correct)),
            "mcnemar": asdict(paired.mcnemar(*correct)),
        }
    }
    document = {"examples": 100, **asdict(made), "tasks": tasks}
    return results | {"claim": document if claim else None}


def test_the_report_of_a_search_says_what_was_chosen_and_what_may_be_claimed():
    text = render_markdown("search", merges.search(search(), "nats per token"), pictures=".")
    text = text.replace("\\", "")  # escapes of marks
    assert (
        "The search chose average among 3 candidates on 64 validation examples (loss 1.2500; "
        "the best member by loss, member_0, 1.5000)" in text
    )
    assert "clearly better (-0.0969 [" in text
    assert "than the best member by loss; not distinguishable (" in text
    assert "identical in every loss to the average" in text
    assert "Merging helps; that another length of the task vector helps by itself" in text
    # by hand: 30 of 100 answers are right under the member alone
    worse = "sums: 60.0 % right, 90.0 % of the best member: clearly worse (-30.0"
    gap = paired.difference(np.arange(100) < 60, np.arange(100) < 90)
    # the interval of the file, by the bootstrap: not symmetric, as 1.96 errors would be
    assert f"{worse} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}] points" in text
    assert abs((gap.low + gap.high) / 2 - gap.estimate) > 1e-3
    assert "On test these measures got worse: sums." in text
    assert "| ties | 16 | – | – |  | – |  | 1 |" in text
    sentences = search_findings.sentences(search(claim=False))
    assert "There is no test split, so nothing is claimed." in sentences
    assert merges.search(None, "nats per token") == []


def test_a_rival_at_its_own_lambda_is_named_with_its_claim():
    results = search()
    scaled = results["candidates"][1] | {"number": 3, "name": "member_0 lambda=1.1"}
    results["candidates"].append(scaled | {"kind": "scaled member"})
    results["scaled_member"] = 3
    gap = results["claim"]["against"]["best_member"]
    results["claim"]["against"]["scaled_member"] = gap | {"estimate": 0.01, "holm": 0.2}
    results["claim"] |= {"length": gap, "merging_helps": False, "length_helps": True}
    results["claim"]["at_one"] = {"mean_member": gap}
    text = " ".join(search_findings.sentences(results))
    assert "from the best member at its own lambda (member_0 lambda=1.1)" in text
    assert "With every lambda at 1 it is clearly better (-0.0969" in text
    assert "Another length of the task vector helps; that merging helps beside it is not" in text
    assert "Length alone: member_0 lambda=1.1 less the best member -0.0969" in text


def test_a_leader_that_the_guard_refuses_is_named_with_what_it_makes_worse():
    results = search(claim=False)
    results["winner"] = 1
    row = {"candidate": 0.958, "best_member": 0.9, "margin": 0.01}
    fine = {"candidate": 0.928, "best_member": 1.167, "margin": 0.005}
    results["guard"] |= {"measures": {"loss": fine, "sums": row}, "worse": ["sums"]}
    assert (
        "average has the lower loss, but it is worse than that member on validation: sums 4.2 % "
        "right against 10.0 % (margin 1.0 points). So the member is chosen."
    ) in search_findings.sentences(results)


def test_results_of_a_search_without_members_at_other_lambdas_are_refused(tmp_path):
    layout = SearchLayout(tmp_path)
    assert read_search(layout) is None
    old = {key: value for key, value in search().items() if key != "scaled_member"}
    layout.results.write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"of a search of version 1.*no rival of another length"):
        read_search(layout)
    layout.results.write_text(json.dumps(search() | {"version": 2}))
    assert read_search(layout)["tried"] == 3


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
    assert any(row[0] == "member_0 (best by loss on validation)" for row in table.rows)


GROUPS = ["lambda_line", "lambda_members", "lambda_selections"]


def curved(control):
    """Return the losses of a control: lowest at another lambda for each kind of model."""
    best = {"member": 1.2, "task_arithmetic": 1.4, "average": 1.4, "selection": 0.8}
    scale = control.at[0] if control.candidate.method != "base" else 0.0
    return (scale - best.get(control.candidate.method, 1.0)) ** 2


def test_every_side_is_compared_at_one_and_at_the_lambda_that_validation_prefers():
    listed = controls.make_controls(GROUPS, 2, {"pick": Candidate("selection")}, 0)
    # 7 lambdas beside 1 of two members and the average; a selection brings its own model at 1
    assert len(listed) == 2 + 1 + 1 + 3 * 7 + 8
    by_name = {
        # validation says what is best; the reported losses are noise around another place
        control.name: controls.ControlLosses(losses(number / 100, seed=number), curved(control))
        for number, control in enumerate(listed)
    }
    tokens = np.random.default_rng(5).integers(1, 50, 100).astype(float)
    compared = controls.compare(listed, by_name, tokens, resamples=50, seed=0)
    lambdas = compared["lambdas"]
    assert {name: row["lambda"] for name, row in lambdas["own"].items()} == {
        "member_0": 1.2, "member_1": 1.2, "average": 1.4, "pick": 0.8,
    }  # fmt: skip
    assert lambdas["own"]["average"]["edge"]
    assert not lambdas["own"]["pick"]["edge"]
    assert lambdas["best_member"]["control"] == "member_0, lambda 1.2"
    rows = {(row["model"], row["rival"]): row for row in lambdas["rows"]}

    def gap(model, rival):
        return asdict(
            paired.difference(
                by_name[model].losses, by_name[rival].losses, weights=tokens, resamples=50
            )
        )

    assert rows["average", "best_member"]["at_one"] == gap("average", "member_0")
    assert rows["average", "best_member"]["own"] == gap(
        "average, lambda 1.4", "member_0, lambda 1.2"
    )
    assert rows["pick", "average"]["own"] == gap("pick, lambda 0.8", "average, lambda 1.4")
    assert rows["average", "average"]["own"] == gap("average, lambda 1.4", "average")
    mean = np.mean([by_name[f"member_{m}, lambda 1.2"].losses for m in (0, 1)], axis=0)
    expected = paired.difference(
        by_name["average, lambda 1.4"].losses, mean, weights=tokens, resamples=50
    )
    assert rows["average", "mean_member"]["own"] == asdict(expected)
    blocks = merges.control_blocks({"split": "test", **compared}, "nats per token")
    first, _ = [block for block in blocks if isinstance(block, Table)]
    text = [" | ".join(map(str, row)) for row in first.rows]
    assert any("1.4 (edge) | 1.2 (member_0)" in row for row in text)
    assert any("itself at lambda 1" in row for row in text)


def test_no_lambda_is_chosen_on_the_reported_examples_or_for_one_side_alone():
    listed = controls.make_controls(GROUPS, 2, {}, 0)
    tokens = np.ones(100)

    def lambdas(listed, validation, **options):
        by_name = {
            control.name: controls.ControlLosses(losses(0, seed=number), validation)
            for number, control in enumerate(listed)
        }
        return controls.compare(listed, by_name, tokens, resamples=5, seed=0, **options)["lambdas"]

    assert lambdas(listed, 1.0) is not None
    assert lambdas(listed, 1.0, choose=False) is None
    assert lambdas(listed, None) is None
    assert lambdas(controls.make_controls(["lambda_line"], 2, {}, 0), 1.0) is None


def test_one_line_stands_for_the_seeds_of_a_selection():
    seeds = {f"pick-seed{seed}": Candidate("selection", seed=seed) for seed in range(3)}
    names = [c.name for c in controls.make_controls(["lambda_selections"], 2, seeds, 0)]
    assert len(names) == 4 + 8
    assert "pick-seed0, lambda 1.2" in names


@pytest.mark.parametrize("members", [2, 3])
def test_controls_show_how_many_members_are_worth_it(members):
    listed = controls.make_controls([], members, {}, 0)
    listed += subsets.make_controls(members, Candidate("selection"), 0)
    tokens = np.ones(100)
    by_name = {
        control.name: controls.ControlLosses(losses(0.0, 0.1, seed=number), 2.0)
        for number, control in enumerate(listed)
    }
    means = {name: control.losses for name, control in by_name.items()}
    compared = controls.compare(listed, by_name, tokens, resamples=20, seed=0)
    curves = asdict(subsets.curves(listed, means, tokens, resamples=20, seed=0))
    right = {name: (values < 2.2).astype(float) for name, values in means.items()}
    scores = asdict(subsets.curves(listed, right, tokens, resamples=20, seed=0))
    content = {"split": "test", **compared, "subsets": curves, "subset_scores": {"sums": scores}}
    before = json.dumps(content)
    text = render_markdown(
        "controls", merges.control_blocks(content, "nats per token"), pictures="."
    )
    assert json.dumps(content) == before
    # in a table of their own
    assert "average of members" not in text
    point = curves["selection"]["points"][1]
    gain = point["gain"]
    assert (
        f"| selection | 2 | {point['subsets']} | {point['loss']:.4f} | {gain['estimate']:+.4f} | "
        in text
    )
    point = scores["average"]["points"][1]
    singles = [100 * right[f"member_{member}"].mean() for member in range(members)]
    assert "How many members are worth it, by sums?" in text
    assert f"| average | 1 | {members} | {np.mean(singles):.1f} |" in text
    gap = 100 * point["loss"] - np.mean(singles)
    assert f"| average | 2 | {point['subsets']} | {100 * point['loss']:.1f} | {gap:+.1f} | " in text
    assert text.count("(extrapolated)") == (2 if members > 2 else 0)  # of losses alone
    assert ("No extrapolation: fewer than three members" in text) == (members == 2)
