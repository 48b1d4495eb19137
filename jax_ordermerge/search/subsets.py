"""Controls that merge subsets of the members: how many members are worth it?"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from jax_ordermerge.analysis.subset_curve import SubsetCurve, subset_curve
from jax_ordermerge.rng import stream_key_bits
from jax_ordermerge.search.candidates import Candidate
from jax_ordermerge.search.controls import Control

GROUP = "subsets"
SCORES = "subset_scores"
ALL_UP_TO = 6  # members; 6 have 63 subsets
SAMPLED = 8  # subsets of each size, of more members


def choose_subsets(members: int, seed: int) -> list[tuple[int, ...]]:
    """Return subsets of the members by size: all, or of more than six members some.

    The sampled sizes are powers of two; all single members and the set of all are always there.

    Example:
        >>> choose_subsets(3, seed=0)
        [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2)]
        >>> sorted({len(subset) for subset in choose_subsets(12, seed=0)})
        [1, 2, 4, 8, 12]
    """
    if members <= ALL_UP_TO:
        sizes = range(1, members + 1)
        return [s for size in sizes for s in itertools.combinations(range(members), size)]
    subsets = [(member,) for member in range(members)]
    for size in (2**power for power in range(1, members.bit_length())):
        if size >= members:
            break
        # Windows on a circle of the members in random order: every member is in as many of them as
        # every other, up to one, and is missing from some.
        bits = stream_key_bits(seed, "control", GROUP, size)
        circle = np.random.default_rng(bits).permutation(members)
        starts = sorted({window * members // SAMPLED for window in range(SAMPLED)})
        subsets += [tuple(sorted(np.roll(circle, -start)[:size].tolist())) for start in starts]
    return [*subsets, tuple(range(members))]


def make_controls(members: int, selection: Candidate, seed: int) -> list[Control]:
    """Return averages and selections of subsets of two members and more.

    The average of all members and single members are anchors of any controls.

    Args:
        members: number of members.
        selection: whose parameters the selections have.
        seed: of the run, that samples subsets of more than six members.
    """
    controls = []
    for subset in choose_subsets(members, seed):
        if len(subset) == 1:
            continue
        # A weight of 0 leaves a member out: one program for all subsets.
        weights = tuple(float(member in subset) / len(subset) for member in range(members))
        average = Candidate("average", weights=weights, seed=seed)
        drawn = Candidate(selection.method, selection.parameters, weights, selection.seed)
        if len(subset) < members:
            controls.append(Control(_name("average", subset), GROUP, average, subset))
        controls.append(Control(_name(selection.method, subset), GROUP, drawn, subset))
    return controls


def _name(method: str, subset: Sequence[int]) -> str:
    return f"{method} of members {', '.join(map(str, subset))}"


def curves(
    controls: Sequence[Control],
    values: Mapping[str, np.ndarray],
    weights: np.ndarray,
    *,
    resamples: int,
    seed: int,
) -> dict[str, SubsetCurve]:
    """Return the loss, or the share of right answers, by number of members of each method.

    Args:
        controls: of `make_controls`, among others.
        values: float64[n] by name: loss of each item, or 1 where it is answered rightly.
        weights: [n], of the items: their token counts, or 1.
        resamples, seed: of the bootstrap.
    """
    of_group = [control for control in controls if control.group == GROUP]
    singles = {
        (control.candidate.parameters["number"],): values[control.name]
        for control in controls
        if control.candidate.kind == "member"
    }
    if not of_group:
        return {}
    result = {}
    # the average of two members is an anchor, and no control of the group
    for method in dict.fromkeys(["average", *(control.candidate.method for control in of_group)]):
        merged = {
            tuple(int(member) for member in control.at): values[control.name]
            for control in of_group
            if control.candidate.method == method
        }
        if method == "average":
            merged[tuple(range(len(singles)))] = values["average"]
        result[method] = subset_curve(singles | merged, weights, resamples=resamples, seed=seed)
    return result
