"""Members, average and selections at lambda 1, and each at the lambda that validation prefers.

An average is shorter than its members. Compared at lambda 1 it shows what merging and the loss of
length do together; compared with each side at its own lambda, what merging does alone.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.result import asdict
from jax_ordermerge.json_types import Json
from jax_ordermerge.search.claim import AVERAGE, BEST_MEMBER, MEAN_MEMBER


class Point(NamedTuple):
    """A model at a lambda.

    Attributes:
        scale: the lambda.
        name: of the control.
        losses: float64[n], per token, of the items of the reported split.
        validation: mean loss on the validation examples.
    """

    scale: float
    name: str
    losses: np.ndarray
    validation: float


def own(line: Sequence[Point]) -> Point:
    """Return the point of a line that has the lowest loss on validation, of equal ones the first.

    Example:
        >>> line = [Point(x, f"lambda {x}", np.ones(2), (x - 1.2) ** 2) for x in (1.0, 1.1, 1.4)]
        >>> own(line).name
        'lambda 1.1'
    """
    return min(line, key=lambda point: point.validation)


def compare(
    members: Mapping[str, Sequence[Point]],
    merges: Mapping[str, Sequence[Point]],
    tokens: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> Json:
    """Compare merges with members, and selections with the average, at lambda 1 and at their own.

    Args:
        members: lines by name of the member.
        merges: lines by name, the average among them. Every line has a point at 1.
        tokens: [n], token count of each item.
        resamples, seed: of the bootstrap.

    Returns:
        JSON: `own` (by name of a line `lambda`, `control`, `edge`: whether it is the lowest or
        highest that was tried), `best_member` (the same of the best member, and the name of the
        line), and `rows` with `model`, `rival`, and the differences `at_one` and `own`. A row
        whose rival is the model is its own lambda less 1: what length does alone.
    """
    lines = {**members, **merges}
    chosen = {name: own(line) for name, line in lines.items()}
    at_one = {name: next(x for x in line if x.scale == 1) for name, line in lines.items()}
    # chosen anew at each length: the best member at 1 need not be the best at its own lambda
    best_at_one = min(members, key=lambda name: at_one[name].validation)
    best_own = min(members, key=lambda name: chosen[name].validation)
    losses_at_one, losses_at_own = (
        {name: points[name].losses for name in merges}
        | {
            BEST_MEMBER: points[best].losses,
            # by item, so that differences to it stay paired
            MEAN_MEMBER: np.mean([points[name].losses for name in members], axis=0),
        }
        for points, best in ((at_one, best_at_one), (chosen, best_own))
    )

    def difference(model: np.ndarray, rival: np.ndarray) -> Json | None:
        # the same model: a test of zero differences has no meaning
        if np.array_equal(model, rival):
            return None
        gap = paired.difference(model, rival, weights=tokens, resamples=resamples, seed=seed)
        plain: Json = asdict(gap)
        return plain

    pairs = [(name, rival) for name in merges for rival in (BEST_MEMBER, MEAN_MEMBER)]
    pairs += [(name, AVERAGE) for name in merges if name != AVERAGE]
    rows = [
        {
            "model": model,
            "rival": rival,
            "at_one": difference(losses_at_one[model], losses_at_one[rival]),
            "own": difference(losses_at_own[model], losses_at_own[rival]),
        }
        for model, rival in pairs
    ]
    rows += [
        {
            "model": name,
            "rival": name,
            "at_one": None,
            "own": difference(losses_at_own[name], losses_at_one[name]),
        }
        for name in (BEST_MEMBER, MEAN_MEMBER, *merges)
    ]

    def describe(name: str) -> Json:
        scales = [point.scale for point in lines[name]]
        point = chosen[name]
        # at an edge the best lambda may lie beyond those that were tried
        edge = len(scales) > 1 and point.scale in (min(scales), max(scales))
        return {"lambda": point.scale, "control": point.name, "edge": edge}

    return {
        "own": {name: describe(name) for name in lines},
        "best_member": {"line": best_own, **describe(best_own)},
        "rows": rows,
    }
