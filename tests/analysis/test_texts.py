"""The chapter on texts: the numbers of evaluations.json, and paired differences that a plain computation gives too."""

import math

import numpy as np

from jax_ordermerge.analysis import texts
from jax_ordermerge.report.document import Table

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


def run(**logps):
    kinds = {"base": "base", "average": "merge"}
    made = {name: model(name, kinds.get(name, "member"), values) for name, values in logps.items()}
    items = {name: items for name, (_, items) in made.items()}
    return [
        one
        for one in texts.blocks([one for one, _ in made.values()], items, resamples=200, seed=0)
        if isinstance(one, Table)
    ]


def test_merges_against_the_mean_member_by_bytes():
    values, gaps = run(
        base=[-30, -90, -50],
        member_0=[-20, -60, -40],
        member_1=[-22, -64, -38],
        average=[-19, -60, -37],
    )
    assert [row[1] for row in values.rows] == ["base", "member_0", "member_1", "average"]
    expected = (19 + 60 + 37 - (42 + 124 + 78) / 2) / sum(SIZES) / math.log(2)
    assert gaps.rows[0][:2] == ["pages", "average"]
    assert gaps.rows[0][2].startswith(f"{expected:+.4f} ± ")
    left = (np.array([19, 60, 37]) - np.array([21, 62, 39])) / math.log(2) - expected * np.array(
        SIZES
    )
    error = math.sqrt((left**2).sum() / 2 / 3) / np.mean(SIZES)
    assert f"± {error:.4f} [" in gaps.rows[0][2]


def test_nothing_to_compare_with():
    assert len(run(base=[-30, -90, -50])) == 1
    assert (
        texts.blocks([{"name": "base", "kind": "base", "tasks": {}}], {}, resamples=9, seed=0) == []
    )
