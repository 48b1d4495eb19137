"""Samplers: the grid is complete, draws stay in range, seeds repeat them, errors are one line."""

import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config.merge import Search
from jax_ordermerge.errors import UserError
from jax_ordermerge.search import sampling
from jax_ordermerge.search.search import check_space

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
MODEL = ModelConfig(vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1)
MIXED = {"method": "average", "weights": "simplex", "scale": {"low": 0.8, "high": 1.6}}


def search(*methods, **settings):
    return Search(methods=methods, **settings)


def sample_all(space, loss):
    sampler, candidates = sampling.make_sampler(space, 3, seed=1), []
    while batch := sampler.ask():
        candidates += batch
        sampler.tell([loss(candidate) for candidate in batch])
    return candidates


def test_the_grid_is_every_combination_once():
    candidates = sample_all(search(LENGTH, TIES), lambda _: 0.0)
    assert len({x.key for x in candidates}) == len(candidates) == 3 + 2 * 2 * 2
    assert [x.parameters["scale"] for x in candidates[:3]] == [0.5, 1.0, 1.5]
    assert {(x.parameters["density"], x.scale, x.groups["mlp"]) for x in candidates[3:]} == {
        (density, scale, mlp)
        for density in (0.2, 0.5)
        for scale in (1.0, 2.0)
        for mlp in (0.5, 2.0)
    }


def test_a_parameter_of_the_name_scale_and_the_scale_of_the_entry_are_two_ranges():
    both = LENGTH | {"scale": {"low": 1, "high": 2, "steps": 2}}
    candidates = sample_all(search(both), lambda _: 0.0)
    assert [(x.parameters["scale"], x.scale) for x in candidates] == [
        (parameter, scale) for parameter in (0.5, 1.0, 1.5) for scale in (1.0, 2.0)
    ]


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_draws_stay_in_their_ranges_and_repeat_with_the_seed(sampler):
    if sampler == "tpe":
        pytest.importorskip("optuna", reason="needs the extra search")
    space = search(LENGTH, TIES, MIXED, sampler=sampler, budget=40)
    candidates, repeated = (sample_all(space, lambda x: abs(x.scale - 1.3)) for _ in range(2))
    assert len(candidates) == 40
    assert [x.key for x in candidates] == [x.key for x in repeated]
    assert {x.method for x in candidates} == {"task_arithmetic", "ties", "average"}
    for candidate in candidates:
        if candidate.method == "average":
            assert sum(candidate.weights) == pytest.approx(1, abs=1e-6)
            assert 0.8 <= candidate.scale <= 1.6
        if candidate.method == "ties":
            assert candidate.parameters["density"] in (0.2, 0.5)
            assert 0.5 <= candidate.groups["mlp"] <= 2


def test_weights_are_spread_evenly_over_the_simplex():
    candidates = sample_all(search(MIXED, sampler="random", budget=3000), lambda _: 0.0)
    weights = np.array([candidate.weights for candidate in candidates])
    # A uniform point of the simplex of three: mean 1/3, variance 1/18.
    np.testing.assert_allclose(weights.mean(0), 1 / 3, atol=0.02)
    np.testing.assert_allclose(weights.var(0), 1 / 18, atol=0.005)


@pytest.mark.parametrize("sampler", ["tpe", "cma-es"])
def test_an_optimizer_beats_random_draws(sampler):
    pytest.importorskip("optuna", reason="needs the extra search")
    if sampler == "cma-es":
        pytest.importorskip("cmaes", reason="needs the extra search")

    def loss(candidate):
        return (candidate.scale - 1.234) ** 2 + (candidate.groups["mlp"] - 0.777) ** 2

    entry = {
        "method": "average",
        "scale": {"low": 0, "high": 4},
        "groups": {"mlp": {"low": 0, "high": 4}},
    }
    proposed = [loss(x) for x in sample_all(search(entry, sampler=sampler, budget=96), loss)]
    drawn = [loss(x) for x in sample_all(search(entry, sampler="random", budget=96), loss)]
    assert min(proposed[48:]) < 0.02
    assert np.median(proposed[48:]) < 0.5 * np.median(drawn)


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
def test_a_space_that_a_sampler_does_not_support_is_refused(space, message):
    if space.sampler == "cma-es":
        pytest.importorskip("optuna", reason="needs the extra search")
    with pytest.raises(UserError) as caught:
        sampling.make_sampler(space, 3, 0)
    assert message in str(caught.value)


def entry(method, **parameters):
    return {"method": method, "parameters": parameters}


# a space of three members, of which only a later candidate is wrong, and what is wrong with it
WRONG_LATER = {
    "end of a range": (
        search(entry("ties", density={"low": 0.5, "high": 1.5}), sampler="random", budget=1),
        "merge method ties: density = 1.5: input should be less than or equal to 1",
    ),
    "choice": (search(entry("sce", select_topk=[0.5, 5.0])), "select_topk = 5.0: input should be"),
    "choice of weights": (
        search({"method": "average", "weights": [[1, 1, 1], [1, 2]]}),
        "2 weights for 3 members",
    ),
    "two values together": (
        search(entry("selection", resample=[0, 1], granularity=["element", "layer"])),
        "resample with granularity layer is not offered",
    ),
    "number of members": (search(entry("selection", child=[0, 3])), "children 0 to 2"),
}


@pytest.mark.parametrize("name", WRONG_LATER)
def test_every_value_of_a_space_is_checked_before_the_search(name):
    space, message = WRONG_LATER[name]
    check_space(search(LENGTH, TIES), 3, MODEL, 0)
    with pytest.raises(UserError) as caught:
        check_space(space, 3, MODEL, 0)
    assert message in str(caught.value)


def test_weights_on_the_simplex_are_no_mistake():
    space = search({"method": "average", "weights": "simplex"}, sampler="random")
    check_space(space, 3, MODEL, 0)
