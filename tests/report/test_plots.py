"""Pictures: well-formed, the same bytes twice, unique ids, the right marks for the numbers."""

import itertools
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from jax_ordermerge.analysis.imbalance import analyze
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.analysis.subset_curve import subset_curve
from jax_ordermerge.report.plots import controls, imbalance, models

UNIT = "nats per token"
SVG = "{http://www.w3.org/2000/svg}"
LINES = [{"step": s, "loss": [3 / s, 4 / s], "learning_rate": 1e-3 / s} for s in range(1, 9)]
MODELS = [
    {
        "name": name,
        "kind": kind,
        "loss": loss,
        "loss_se": 0.01,
        "tasks": {"sums": {"accuracy": share, "se": 0.03, "n": 200}},
    }
    for name, kind, loss, share in [
        ("base", "base", 5.25, 0.0),
        ("member_0", "member", 1.82, 0.412),
        ("member_1", "member", 1.86, 0.455),
        ("ties", "merge", 1.9, 0.5),
    ]
]


def analysis(members=2, samples=80, epochs=2):
    rng = np.random.default_rng(0)
    x = np.stack(
        [[rng.permutation(samples) / (samples - 1) for _ in range(epochs)] for _ in range(members)]
    )
    losses = rng.normal(2, 0.3, samples) + rng.normal(0, 0.1, (members, samples))
    merged = {"ties": losses.mean(axis=0) ** 1.01}
    return asdict(analyze(losses, x, merged, warmup_fraction=0.1, bootstrap=40, permutations=9))


def control(name, group, at, loss, kind="merge"):
    return {
        "name": name,
        "group": group,
        "at": at,
        "loss": loss,
        "validation_loss": loss + 0.01,
        "kind": kind,
    }


def subset_curves(members=3):
    rng = np.random.default_rng(1)
    items, parameters = 2 + rng.random(40), rng.normal(0, 1, (members, 40))
    losses = {
        subset: items + parameters[list(subset)].mean(axis=0) ** 2
        for size in range(1, members + 1)
        for subset in itertools.combinations(range(members), size)
    }
    return {"average": asdict(subset_curve(losses, np.ones(40), resamples=20))}


LINE = [control(f"lambda {x}", "lambda_line", [x], 1 + abs(x - 1.2)) for x in (0.0, 0.5, 1.0, 1.5)]
LINES_BY_LAMBDA = {
    "average": LINE[1:],
    **{
        f"member_{m}": [row | {"kind": "member", "loss": row["loss"] + 0.1} for row in LINE[1:]]
        for m in (0, 1)
    },
    "selection": [row | {"loss": row["loss"] + 0.05} for row in LINE[1:]],
}
GRID = [
    control("", "plane", [a, b], 1 + (a - 0.5) ** 2 + (b - 0.5) ** 2)
    for a in (0.0, 0.5, 1.0)
    for b in (0.0, 0.5, 1.0)
]
TRIED = [
    {
        "number": i,
        "kind": kind,
        "loss": 1 + i / 10,
        "dropped": None if i < 3 else 1,
        "candidate": {"method": method},
        "to_winner": {"estimate": i / 10, "se": 0.01},
    }
    for i, (kind, method) in enumerate(
        [("merge", "average"), ("member", "member"), ("base", "base"), ("merge", "ties")]
    )
]

DRAWN = {
    "lambda line": lambda: controls.lambda_line(LINES_BY_LAMBDA, LINE[0], "test", UNIT),
    "barrier": lambda: controls.barrier(LINE, "validation", UNIT),
    "plane": lambda: controls.plane(GRID, "test", UNIT),
    "splits": lambda: controls.splits(
        [*LINE, control("member_0", "anchor", [], 1.1, "member")],
        MODELS[1] | {"validation_loss": 1.9},
        UNIT,
    ),
    "subsets": lambda: controls.subsets(subset_curves(), "test loss"),
    "splits without a choice": lambda: controls.splits(LINE, None, UNIT),
    "candidates": lambda: controls.candidates(TRIED, 0, UNIT),
    "training": lambda: imbalance.training(LINES, UNIT),
    "many": lambda: imbalance.training(
        [line | {"loss": [line["loss"][0]] * 12} for line in LINES], UNIT
    ),
    "positions": lambda: imbalance.positions(analysis(), UNIT),
    "trajectories": lambda: imbalance.trajectories(
        {"a": [analysis(), analysis()], "b": [analysis()]}, "positions", UNIT
    ),
    "effects": lambda: imbalance.effects(analysis(), LINES, UNIT),
    "effects without a log": lambda: imbalance.effects(analysis(), [], UNIT),
    "merging": lambda: imbalance.merging(analysis(), UNIT),
    "cosines": lambda: models.cosines([[1, -0.25], [-0.25, 1]]),
    "accuracies": lambda: models.accuracies(MODELS, "sums"),
    "losses": lambda: models.losses(MODELS, UNIT),
    "one model": lambda: models.losses(MODELS[:1], UNIT),
}


@pytest.mark.parametrize("name", list(DRAWN))
def test_is_svg_alone_and_the_same_twice(name):
    text = DRAWN[name]()
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert text == DRAWN[name]()
    assert "<metadata" not in text
    assert not re.search(r"\d\d:\d\d:\d\d", text)
    ids = [node.get("id") for node in root.iter() if node.get("id")]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", text)) <= {
        (i, "") for i in ids
    } | {("", i) for i in ids}


def words(svg):
    return [" ".join(node.itertext()).strip() for node in ET.fromstring(svg).iter(f"{SVG}text")]


def description(svg):
    """Return the text for readers who cannot see the picture, which the picture names."""
    root = ET.fromstring(svg)
    title, text = (root.find(f"{SVG}{tag}") for tag in ("title", "desc"))
    assert root.get("role") == "img"
    assert root.get("aria-labelledby").split() == [title.get("id"), text.get("id")]
    assert title.text
    return text.text


@pytest.mark.parametrize("name", list(DRAWN))
def test_every_picture_has_a_text(name):
    assert len(description(DRAWN[name]())) > 20


def test_the_text_of_a_picture_has_its_numbers():
    bars = description(DRAWN["accuracies"]())
    # 1.96 errors of 3 points
    assert "member_0 41.2 [35.32, 47.08]; member_1 45.5 [39.62, 51.38]; ties 50 [44.1" in bars
    assert "member_1 +1.86 [+1.84, +1.88]; ties +1.9 [" in description(DRAWN["losses"]())
    text = description(DRAWN["training"]())
    assert "member 1: from 4 at 1 to 0.5 at 8, lowest 0.5 at 8" in text
    row = analysis()["fixed_effects"]["coefficients"][0]
    numbers = f"{row['estimate']:+.4g} [{row['low']:+.4g}, {row['high']:+.4g}]"
    assert f"epoch 1 {numbers}" in description(DRAWN["effects"]())
    assert "0 and 1 -0.25" in description(DRAWN["cosines"]())


def test_pictures_have_colours_for_the_dark():
    svg = DRAWN["losses"]()
    assert "@media screen and (prefers-color-scheme: dark)" in svg
    # whatever is drawn in ink would vanish there
    assert 'svg [style*="fill: #222222"] { fill: #dcdcdc' in svg
    assert "fill: #222222" in svg.partition("</style>")[2]


def test_ids_of_two_pictures_differ():
    pictures = [DRAWN[name]() for name in ("training", "losses", "accuracies", "cosines")]
    ids = [name for text in pictures for name in set(re.findall(r'id="([^"]+)"', text))]
    assert len(ids) == len(set(ids))


def test_numbers_are_written_on_the_marks():
    assert {"0.0", "41.2", "45.5", "50.0"} <= set(words(DRAWN["accuracies"]()))
    assert words(DRAWN["cosines"]()).count("-0.25") >= 2
    slope = analysis()["fixed_effects"]["coefficients"][0]["estimate"]
    assert f"{slope:+.4f}" in words(DRAWN["effects"]())


def test_a_base_far_away_does_not_squeeze_the_others():
    shown = words(DRAWN["losses"]())
    assert "base" not in shown
    assert "the base, at 5.250, lies outside" in description(DRAWN["losses"]())
    assert "base" in words(models.losses([MODELS[0] | {"loss": 1.84}, *MODELS[1:]], UNIT))


def test_many_epochs_are_drawn_below_each_other():
    # warnings are errors here: matplotlib gives up where twelve panels stand side by side
    drawn = imbalance.merging(analysis(epochs=12), UNIT)
    assert all(f"epoch {number}" in words(drawn) for number in range(1, 13))


def test_what_was_not_determined_is_not_drawn():
    few = analysis(samples=10)
    assert imbalance.positions(few, UNIT) is None
    assert imbalance.merging(few, UNIT) is None
    assert imbalance.effects(analysis(members=1), LINES, UNIT) is None
    assert imbalance.positions(analysis(members=1), UNIT) is not None
    assert imbalance.merging(analysis() | {"merged": {}}, UNIT) is None


def test_a_base_far_outside_the_lambda_line_is_named_and_not_drawn():
    far = [LINE[0] | {"loss": 9.5}, *LINE[1:]]
    text = description(controls.lambda_line({"average": far[1:]}, far[0], "test", UNIT))
    assert "the base, at 9.500, lies outside" in text
    assert not any("outside" in word for word in words(DRAWN["lambda line"]()))


def test_bars_have_the_intervals_of_the_table():
    shares = [("base", "base", 0.0, 0.0, 96), ("one", "merge", 1.0, None, 1)]
    shares += [("ties", "merge", 0.5, 0.03, 278)]
    rows = [
        {"name": name, "kind": kind, "tasks": {"sums": {"accuracy": share, "se": se, "n": n}}}
        for name, kind, share, se, n in shares
    ]
    text = description(models.accuracies(rows, "sums"))
    # none of 96 is right: Wilson's interval ends at 1.96^2 / (96 + 1.96^2)
    assert "base 0 [0, 3.848]; one 100; ties 50 [44.12, 55.88]" in text
