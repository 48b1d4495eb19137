"""Samplers: the grid is complete, draws stay in their ranges, the same seed gives the same, refusals are one line."""

import numpy as np
import pytest

from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.search import sampling

LENGTH = {
    "method": "task_arithmetic",
    "parameters": {"scale": {"low": 0.5, "high": 1.5, "steps": 3}},
}
TIES = {
    "method": "ties",
    "parameters": {"density": [0.2, 0.5]},
    "scale": {"low": 1, "high": 2, "steps": 2},
    "groups": {"mlp": {"low": 0.5, "high": 2, "log": True, "steps": 2}},
}
MIXED = {"method": "average", "weights": "simplex", "scale": {"low": 0.8, "high": 1.6}}


def search(*methods, **settings):
    return Search(methods=methods, **settings)


def everything(space, losses):
    source, found = sampling.sampler(space, 3, seed=1), []
    while asked := source.ask():
        found += asked
        source.tell([losses(one) for one in asked])
    return found


def test_the_grid_is_every_combination_once():
    found = everything(search(LENGTH, TIES), lambda one: 0.0)
    assert len({one.key for one in found}) == len(found) == 3 + 2 * 2 * 2
    assert [one.parameters["scale"] for one in found[:3]] == [0.5, 1.0, 1.5]
    assert {(one.parameters["density"], one.scale, one.groups["mlp"]) for one in found[3:]} == {
        (density, scale, mlp)
        for density in (0.2, 0.5)
        for scale in (1.0, 2.0)
        for mlp in (0.5, 2.0)
    }


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_stay_in_their_ranges_and_repeat_with_the_seed(sampler):
    if sampler == "tpe":
        pytest.importorskip("optuna", reason="needs the extra search")
    space = search(LENGTH, TIES, MIXED, sampler=sampler, budget=40)
    found = everything(space, lambda one: abs(one.scale - 1.3))
    assert len(found) == 40
    assert [one.key for one in found] == [
        one.key for one in everything(space, lambda one: abs(one.scale - 1.3))
    ]
    assert {one.method for one in found} == {"task_arithmetic", "ties", "average"}
    for one in found:
        if one.method == "average":
            assert sum(one.weights) == pytest.approx(1, abs=1e-6)
            assert 0.8 <= one.scale <= 1.6
        if one.method == "ties":
            assert one.parameters["density"] in (0.2, 0.5)
            assert 0.5 <= one.groups["mlp"] <= 2


def test_weights_are_spread_evenly_over_the_simplex():
    found = everything(search(MIXED, sampler="random", budget=3000), lambda one: 0.0)
    weights = np.array([one.weights for one in found])
    # a uniform point of the simplex of three: mean 1/3, variance 1/18
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(weights.var(0), 1 / 18, atol=0.005)


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_an_optimizer_comes_nearer_than_chance(sampler):
    pytest.importorskip("optuna", reason="needs the extra search")
    if sampler == "cma-es":
        pytest.importorskip("cmaes", reason="needs the extra search")

    def loss(one):
        return (one.scale - 1.234) ** 2 + (one.groups["mlp"] - 0.777) ** 2

    entry = {
        "method": "average",
        "scale": {"low": 0, "high": 4},
        "groups": {"mlp": {"low": 0, "high": 4}},
    }
    found = everything(search(entry, sampler=sampler, budget=96), loss)
    assert min(map(loss, found[48:])) < 0.02
    drawn = everything(search(entry, sampler="random", budget=96), loss)
    assert np.median([loss(one) for one in found[48:]]) < 0.5 * np.median(
        [loss(one) for one in drawn]
    )


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (search(LENGTH, budget=2), "the grid has more candidates than the budget of 2"),
        (search(MIXED), "average: weights: simplex cannot be put on a grid"),
        (
            search(LENGTH, TIES, sampler="cma-es"),
            "sampler cma-es varies the numbers of one method, the space has 2",
        ),
        (
            search(TIES, sampler="cma-es"),
            "sampler cma-es varies numbers, density is a list of choices",
        ),
        (
            search(LENGTH, sampler="cma-es"),
            "sampler cma-es needs two numbers or more to vary, the space has 1",
        ),
    ],
)
def test_what_a_sampler_cannot_take_is_refused(space, message):
    if space.sampler == "cma-es":
        pytest.importorskip("optuna", reason="needs the extra search")
    with pytest.raises(UserError) as caught:
        sampling.sampler(space, 3, 0)
    assert message in str(caught.value)
