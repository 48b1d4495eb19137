"""Controls that merge subsets of the members."""

import itertools

import numpy as np
import pytest

from jax_ordermerge.search import controls, subsets
from jax_ordermerge.search.candidates import Candidate

SELECTION = Candidate("selection", {"resample": "exhaustive"}, seed=5)


def test_all_subsets_of_few_members():
    chosen = subsets.choose_subsets(6, seed=0)
    assert len(chosen) == len(set(chosen)) == 2**6 - 1


@pytest.mark.parametrize("members", [7, 12, 24])
def test_a_sample_of_the_subsets_of_many_members(members):
    chosen = subsets.choose_subsets(members, seed=0)
    assert chosen == subsets.choose_subsets(members, seed=0) != subsets.choose_subsets(members, 1)
    for size in {len(subset) for subset in chosen} - {1, members}:
        of_size = [subset for subset in chosen if len(subset) == size]
        assert 1 < len(set(of_size)) == len(of_size) <= subsets.SAMPLED
        counts = np.bincount(np.concatenate(of_size), minlength=members)
        # evenly, and each member is missing from some: what the jackknife needs
        assert np.ptp(counts) <= 1
        assert counts.max() < len(of_size)
    assert all(subset == tuple(sorted(set(subset))) for subset in chosen)


def test_each_model_once():
    listed = controls.make_controls([], 4, {}, 0) + subsets.make_controls(4, SELECTION, 0)
    names = [control.name for control in listed]
    assert len(set(names)) == len(names)
    averages = [c for c in listed if c.group == "subsets" and c.candidate.method == "average"]
    # the average of all is an anchor
    assert {c.at for c in averages} == {
        s for size in (2, 3) for s in itertools.combinations(range(4), size)
    }
    assert averages[0].candidate.weights == (0.5, 0.5, 0.0, 0.0)
    selections = [c for c in listed if c.candidate.method == "selection"]
    assert len(selections) == 11
    assert all(c.candidate.parameters == SELECTION.parameters for c in selections)


def test_curves_read_single_members_and_the_average_from_the_anchors():
    listed = controls.make_controls([], 3, {}, 0) + subsets.make_controls(3, SELECTION, 0)
    rng = np.random.default_rng(0)
    losses = {c.name: rng.exponential(1.0, 20) for c in listed}
    curves = subsets.curves(listed, losses, np.ones(20), resamples=10, seed=0)
    assert list(curves) == ["average", "selection"]
    for method, curve in curves.items():
        assert [point.subsets for point in curve.points] == [3, 3, 1]
        singles = [losses[f"member_{m}"].mean() for m in range(3)]
        assert curve.points[0].loss == pytest.approx(np.mean(singles))
        of_all = "average" if method == "average" else "selection of members 0, 1, 2"
        assert curve.points[2].loss == pytest.approx(losses[of_all].mean())
