"""How well models predict whole texts: a table of their perplexities, and merges against members text by text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.report import formatting
from jax_ordermerge.report.document import Block, Heading, Table


def blocks(
    models: Sequence[Mapping[str, Any]],
    items: Mapping[str, Mapping[str, Any]],
    *,
    resamples: int,
    seed: int,
) -> list[Block]:
    """Return a chapter of the report, empty where no task measured texts.

    Args:
        models: of evaluations.json, with `texts`.
        items: for each model its evaluations/{name}.json.
        resamples: bootstrap resamples of the texts.
        seed: of the run.

    Example:
        >>> texts = {
        ...     "pages": {
        ...         "bits_per_byte": 1.5,
        ...         "se": 0.1,
        ...         "word_perplexity": 90.0,
        ...         "byte_perplexity": 2.8,
        ...         "token_perplexity": 9.0,
        ...         "n": 4,
        ...     }
        ... }
        >>> [
        ...     type(one).__name__
        ...     for one in blocks(
        ...         [{"name": "base", "kind": "base", "texts": texts}], {}, resamples=9, seed=0
        ...     )
        ... ]
        ['Heading', 'Table']
    """
    having = [model for model in models if model.get("texts")]
    if not having:
        return []
    rows = []
    for task in having[0]["texts"]:
        for model in having:
            one = model["texts"][task]
            perplexities = [
                formatting.number(one[f"{unit}_perplexity"], 3)
                for unit in ("word", "byte", "token")
            ]
            rows.append(
                [
                    task,
                    model["name"],
                    formatting.plus_minus(one["bits_per_byte"], one["se"], 4),
                    *perplexities,
                ]
            )
    header = ["texts", "model", "bits a byte ± se", "perplexity a word", "a byte", "a token"]
    counts = ", ".join(f"{task} {one['n']}" for task, one in having[0]["texts"].items())
    found: list[Block] = [
        Heading("Perplexity of texts"),
        Table(header, rows, f"Number of texts: {counts}.", text=(0, 1)),
    ]
    compared = _compared(having, items, resamples, seed)
    if compared:
        caption = "Bits a byte, merge less the mean member; ± standard error [95 % paired bootstrap interval] over texts, p not corrected."
        found.append(
            Table(["texts", "merge", "against the mean member"], compared, caption, text=(0, 1))
        )
    return found


def _compared(
    models: Sequence[Mapping[str, Any]],
    items: Mapping[str, Mapping[str, Any]],
    resamples: int,
    seed: int,
) -> list[list[str]]:
    members = [model["name"] for model in models if model["kind"] == "member"]
    rows = []
    for model in models:
        if (
            model["kind"] != "merge"
            or not members
            or any(name not in items for name in (model["name"], *members))
        ):
            continue
        for task in model["texts"]:
            own, *others = [
                items[name].get("texts", {}).get(task, []) for name in (model["name"], *members)
            ]
            sizes = np.array([text["bytes"] for text in own], float)
            ids = [text["id"] for text in own]
            if (
                len(own) < 2
                or not sizes.all()
                or any([text["id"] for text in other] != ids for other in others)
            ):
                continue
            bits, mean = (
                _bits(own, sizes),
                np.mean([_bits(other, sizes) for other in others], axis=0),
            )
            gap = paired.difference(bits, mean, weights=sizes, resamples=resamples, seed=seed)
            rows.append([task, model["name"], formatting.interval(gap, 1, 4)])
    return rows


def _bits(texts: Sequence[Mapping[str, Any]], sizes: np.ndarray) -> np.ndarray:
    return np.array([-text["logp"] for text in texts]) / sizes / math.log(2)
