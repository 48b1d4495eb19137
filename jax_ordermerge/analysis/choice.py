"""What was chosen, and beside what: the claim that a winner may make, and the tables and pictures of controls and of a search."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jax_ordermerge.analysis import paired
from jax_ordermerge.report import formatting, plots
from jax_ordermerge.report.document import Block, Heading, Paragraph, Picture, Table

RIVALS = {
    "best_member": "the best member",
    "mean_member": "the mean member",
    "average": "the average",
}
SHOWN = 25  # candidates in the table of a search


def claim(
    winner: ArrayLike,
    rivals: Mapping[str, ArrayLike],
    weights: ArrayLike | None = None,
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Compare the one winner with its rivals on items that had no part in choosing it.

    However many candidates there were, one of them is tested here, so that searching needs no correction; the rivals are several, and
    p values are corrected for that by Holm's method.

    Args:
        winner: [n], losses of the winner on test items.
        rivals: by name, [n] of the same items.
        weights: [n], e.g. tokens an item.
        resamples, seed: of the bootstrap.

    Returns:
        By name of the rival, `paired.difference` of winner less rival and `holm`; a rival with the same losses is left out.

    Example:
        >>> found = claim(
        ...     [1.0, 2.0, 3.0, 4.0],
        ...     {"best_member": [1.5, 2.4, 3.5, 4.4], "average": [1.0, 2.0, 3.0, 4.0]},
        ... )
        >>> list(found), round(found["best_member"]["estimate"], 2), better(found["best_member"])
        (['best_member'], -0.45, True)
    """
    gaps = {
        name: paired.difference(winner, losses, weights=weights, resamples=resamples, seed=seed)
        for name, losses in rivals.items()
        if not np.array_equal(winner, losses)
    }
    for gap, p in zip(gaps.values(), paired.holm([gap["p"] for gap in gaps.values()]), strict=True):
        gap["holm"] = p
    return gaps


def better(gap: Mapping[str, float]) -> bool:
    """Say whether a winner may be called better than a rival.

    Example:
        >>> better({"estimate": -0.1, "holm": 0.2}), better({"estimate": 0.1, "holm": 0.001})
        (False, False)
    """
    return bool(gap["estimate"] < 0 and gap["holm"] < formatting.WEAK)


def sentence(found: Mapping[str, Any]) -> str:
    """Return what a search found in one sentence.

    Args:
        found: results.json of a search.
    """
    winner, best = (found["candidates"][found[key]] for key in ("winner", "best_member"))
    start = (
        f"The search chose {winner['name']} among {found['tried']} candidates on {found['examples']} validation examples "
        f"({winner['loss']:.4f}; the best member, {best['name']}, {best['loss']:.4f})."
    )
    if found.get("edges"):
        start += (
            f" At the edge of what was tried: {', '.join(found['edges'])}; the best may lie beyond."
        )
    if not found.get("claim"):
        return f"{start} Nothing is claimed: there is no test split."
    told = [f"{_verdict(gap)} {RIVALS[name]}" for name, gap in found["claim"]["against"].items()]
    same = [whom for name, whom in RIVALS.items() if name not in found["claim"]["against"]]
    told += [f"the same as {whom}" for whom in same]
    return f"{start} On the {found['claim']['examples']} test examples, which had no part in that: {'; '.join(told)}."


def _verdict(gap: Mapping[str, float]) -> str:
    size = f"{gap['estimate']:+.4f} ± {gap['se']:.4f} [{gap['low']:+.4f}, {gap['high']:+.4f}], by Holm {formatting.p_text(gap['holm'])}"
    strength = formatting.strength(gap["holm"])
    if not strength:
        return f"not distinguishable ({size}) from"
    return f"{strength} {'better' if gap['estimate'] < 0 else 'worse'} ({size}) than"


def search_blocks(found: Mapping[str, Any] | None, unit: str) -> list[Block]:
    """Return the chapter of the report about a search; nothing where there was none.

    Args:
        found: results.json of a search.
        unit: of losses.
    """
    if not found:
        return []
    rows = sorted(
        found["candidates"],
        key=lambda row: (-row["examples"], row["loss"] if row["loss"] is not None else np.inf),
    )
    whole = [row for row in rows if row["examples"] == found["examples"]]
    shown = [*whole, *(row for row in rows if row["examples"] < found["examples"])][:SHOWN]
    cells = [
        [
            row["name"],
            str(row["examples"]),
            formatting.number(row["loss"], 4),
            *(_gap(row[key]) for key in ("to_winner", "to_best_member")),
            "" if row["dropped"] is None else str(row["dropped"]),
        ]
        for row in shown
    ]
    caption = (
        f"{found['tried']} candidates, of which {found['measured_fully']} were measured on all {found['examples']} validation examples; "
        f"the best {len(shown)} of those that came furthest. Differences are paired, on the examples that both saw, ± standard error, and "
        "on the data that chose: they flatter the winner. Dropped: the round after which a candidate went no further."
    )
    header = [
        "candidate",
        "examples",
        f"validation loss ({unit})",
        "less the winner's",
        "less the best member's",
        "dropped",
    ]
    strong = [place for place, row in enumerate(shown) if row["number"] == found["winner"]]
    return [
        Heading("The chosen merge"),
        Paragraph(sentence(found)),
        Table(header, cells, caption, strong=strong),
        Picture(
            "search",
            plots.candidates(found["candidates"], found["winner"], unit),
            "Candidates by the loss on all validation examples, or as estimated from those they saw.",
        ),
    ]


def _gap(gap: Mapping[str, float] | None) -> str:
    return "–" if gap is None else f"{gap['estimate']:+.4f} ± {gap['se']:.4f}"


def control_blocks(
    found: Mapping[str, Any] | None, unit: str, chosen: Mapping[str, Any] | None = None
) -> list[Block]:
    """Return the chapter of the report about the controls; nothing where there are none.

    Args:
        found: controls.json.
        unit: of losses.
        chosen: the row of the chosen merge, for the picture of both splits.
    """
    if not found:
        return []
    rows = [row for row in found["rows"] if row["group"] != "plane"]
    best, split = found["best_member"], found["split"]
    cells = []
    for row in rows:
        mark = f" (best on {best['chosen_on']})" if row["name"] == best["name"] else ""
        gaps = [
            formatting.interval(row["against"][rival], 1, 4) if rival in row["against"] else ""
            for rival in RIVALS
        ]
        cells.append(
            [
                row["name"] + mark,
                formatting.number(row["loss"], 4),
                formatting.number(row["validation_loss"], 4),
                *gaps,
            ]
        )
    losses = [row["loss"] for row in rows if row["kind"] == "member"]
    held = [row["validation_loss"] for row in rows if row["kind"] == "member"]
    mean = [
        "mean member (sd between members)",
        formatting.mean_sd(losses, 4),
        formatting.mean_sd(held, 4),
        "",
        "",
        "",
    ]
    place = 1 + max(number for number, row in enumerate(rows) if row["kind"] == "member")
    cells.insert(place, mean)
    blocks: list[Block] = [
        Heading("Controls"),
        Table(
            [
                "model",
                f"{split} loss ({unit})",
                "validation loss",
                *(f"less {whom}" for whom in RIVALS.values()),
            ],
            cells,
            f"On {found['examples']} {split} examples. Difference ± standard error [95 % paired bootstrap interval], p of the paired t-test, "
            "not corrected for their number. All were made in device memory; none was written.",
            strong=[place],
        ),
    ]
    return [*blocks, *_pictures(found, split, unit, chosen)]


def _pictures(
    found: Mapping[str, Any], split: str, unit: str, chosen: Mapping[str, Any] | None
) -> list[Block]:
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    blocks: list[Block] = []
    line = sorted(
        (
            row
            for row in rows
            if row["group"] == "lambda_line" or row["name"] in ("base", "average")
        ),
        key=_at,
    )
    if len(line) > 2:
        blocks.append(
            Picture(
                "lambda-line",
                plots.lambda_line(line, split, unit),
                "From the base (0) to the average (1) and beyond.",
            )
        )
    between = [row for row in rows if row["group"] == "barrier"]
    if between:
        ends = [
            dict(row, at=[float(number)])
            for number in (0, 1)
            for row in rows
            if row["name"] == f"member_{number}"
        ]
        line = sorted([*between, *ends], key=_at)
        blocks.append(
            Picture(
                "barrier",
                plots.barrier(line, split, unit),
                "On the straight line from one member to another.",
            )
        )
    plane = [row for row in rows if row["group"] == "plane"]
    if plane:
        blocks.append(
            Picture(
                "plane", plots.plane(plane, split, unit), "The plane of the base and two members."
            )
        )
    both = [row for row in rows if row["validation_loss"] is not None and row["group"] != "plane"]
    if split == "test" and both:
        blocks.append(
            Picture(
                "splits",
                plots.splits(both, chosen, unit),
                "Does validation order the models as the test does?",
            )
        )
    return blocks


def _at(row: Mapping[str, Any]) -> float:
    return float(row["at"][0])
