"""Perplexities of texts: numbers of evaluations.json, and differences against a plain formula."""

import math
from pathlib import Path

import numpy as np
from scipy import stats

from jax_ordermerge.layout import RunLayout
from jax_ordermerge.report.chapters import models
from jax_ordermerge.report.document import Table
from jax_ordermerge.report.run import Run

SIZES = [10, 40, 25]


def model(name, kind, logps):
    share = -sum(logps) / sum(SIZES)
    perplexities = dict.fromkeys(("word_perplexity", "token_perplexity"), 5.0) | {
        "byte_perplexity": math.exp(share)
    }
    summary = {
        "name": name,
        "kind": kind,
        "texts": {
            "pages": {"bits_per_byte": share / math.log(2), "se": 0.1, "n": 3} | perplexities
        },
    }
    items = [
        {"id": at, "logp": logp, "bytes": size}
        for at, (logp, size) in enumerate(zip(logps, SIZES, strict=True))
    ]
    return summary, {"texts": {"pages": items}}


def texts(summaries, items):
    """Return the tables of the chapter."""
    config = {"evaluation": {"bootstrap": 200}}
    run = Run(RunLayout(Path("run")), config, evaluations={"models": summaries}, items=items)
    return [block for block in models.texts(run) if isinstance(block, Table)]


def tables(**logps):
    kinds = {"base": "base", "average": "merge"}
    by_name = {
        name: model(name, kinds.get(name, "member"), values) for name, values in logps.items()
    }
    return texts(
        [summary for summary, _ in by_name.values()],
        {name: items for name, (_, items) in by_name.items()},
    )


def test_merges_against_the_mean_member_by_bytes():
    values, gaps = tables(
        base=[-30, -90, -50],
        member_0=[-20, -60, -40],
        member_1=[-22, -64, -38],
        average=[-19, -60, -37],
    )
    assert [row[1] for row in values.rows] == ["base", "member_0", "member_1", "average"]
    expected = (19 + 60 + 37 - (42 + 124 + 78) / 2) / sum(SIZES) / math.log(2)
    assert gaps.rows[0][:2] == ["pages", "average"]
    cell = gaps.rows[0][2]
    assert cell.estimate == f"{expected:+.4f}"
    left = (np.array([19, 60, 37]) - np.array([21, 62, 39])) / math.log(2) - expected * np.array(
        SIZES
    )
    error = math.sqrt((left**2).sum() / 2 / 3) / np.mean(SIZES)
    # three texts: the t-test has two degrees of freedom
    p = 2 * stats.t.sf(abs(expected) / error, 2)
    assert cell.p == f"{p:.2g}"


def test_nothing_to_compare_with():
    assert len(tables(base=[-30, -90, -50])) == 1
    assert texts([{"name": "base", "kind": "base", "tasks": {}}], {}) == []
