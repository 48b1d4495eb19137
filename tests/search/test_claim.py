"""A search tells merging from length: planted effects, its guard, and several measures."""

import hashlib

import numpy as np
import pytest

from jax_ordermerge.analysis import paired
from jax_ordermerge.config.merge import Search
from jax_ordermerge.search import claim, measures, sampling
from jax_ordermerge.search.candidates import Candidate, members_at
from jax_ordermerge.search.results import range_edges
from jax_ordermerge.search.search import SearchLoop
from jax_ordermerge.search.successive_halving import subset_sizes

MEMBERS, VALIDATION, TEST = 4, 256, 400


class Simulation:
    """One search over the default space, on losses that are drawn around a planted effect.

    Args:
        seed: of all draws.
        effect: true loss of a candidate, less that of a member.
    """

    def __init__(self, seed, effect):
        generator = np.random.default_rng(seed)
        self.seed, self.effect = seed, effect
        self.difficulty = generator.normal(2, 0.5, VALIDATION + TEST)
        self.tokens = generator.integers(1, 40, VALIDATION + TEST).astype(float)
        self.sizes = subset_sizes(VALIDATION, 16)

    def losses(self, candidate):
        """Return [n] losses: validation items first."""
        # Noise of its own for every model, the same whenever it is asked for.
        digest = hashlib.sha256(f"{self.seed} {candidate.key}".encode()).digest()
        noise = np.random.default_rng(list(digest[:8])).normal(0, 0.1, VALIDATION + TEST)
        return self.difficulty + self.effect(candidate) + noise

    def sums(self, candidate, subset):
        rows = slice(0 if subset == 0 else self.sizes[subset - 1], self.sizes[subset])
        return (self.losses(candidate) * self.tokens)[None, rows]

    def search(self, space):
        loop = SearchLoop(
            MEMBERS,
            self.tokens[None, :VALIDATION],
            self.sizes,
            self.sums,
            lambda candidate: None,
            lambda line: None,
        )
        loop.run(sampling.make_sampler(space, MEMBERS, 0), space, 0)
        return loop

    def claim(self, loop):
        best = loop.best()
        winner = loop.candidates[best.leader]
        test = {
            candidate: self.losses(loop.candidates[candidate])[VALIDATION:] for candidate in best
        }
        members = [self.losses(member)[VALIDATION:] for member in members_at(MEMBERS, 1.0)]
        return claim.make_claim(
            {
                claim.WINNER: test[best.leader],
                claim.WINNER_AT_ONE: self.losses(winner.at_one())[VALIDATION:],
                claim.BEST_MEMBER: test[best.member],
                claim.SCALED_MEMBER: test[best.scaled_member],
                claim.MEAN_MEMBER: np.mean(members, axis=0),
                claim.AVERAGE: self.losses(Candidate("average"))[VALIDATION:],
                claim.SCALED_AVERAGE: test[best.scaled_average],
            },
            self.tokens[VALIDATION:],
            is_merge=winner.kind == "merge",
            resamples=1,
        )


def length_of(candidate):
    """Return lambda; a factor of a group of tensors counts for a third."""
    return candidate.length * np.prod([x ** (1 / 3) for x in candidate.groups.values()])


def curve(candidate, best):
    """Return the loss of a length, 0 at 1, lowest at `best`."""
    return 0.5 * ((length_of(candidate) - best) ** 2 - (1 - best) ** 2)


def merging(candidate):
    return curve(candidate, best=1.0) - 0.04 * (candidate.kind == "merge")


def length(candidate):
    return curve(candidate, best=1.3)


def both(candidate):
    return curve(candidate, best=1.3) - 0.04 * (candidate.kind == "merge")


def neither(candidate):
    return curve(candidate, best=1.0)


@pytest.mark.parametrize(
    ("effect", "expected"),
    [
        (merging, (True, False)),
        pytest.param(length, (False, True), marks=pytest.mark.slow),
        pytest.param(both, (True, True), marks=pytest.mark.slow),
        (neither, (False, False)),
    ],
)
def test_merging_and_length_are_told_apart_in_95_of_100_searches(effect, expected):
    space, right = Search(), 0
    for seed in range(100):
        simulation = Simulation(seed, effect)
        claimed = simulation.claim(simulation.search(space))
        right += (claimed.merging_helps, claimed.length_helps) == expected
    assert right >= 95


def test_against_members_at_lambda_one_length_passes_for_merging():
    """What the rival is there for: without it the same searches call length a gain of merging."""
    simulation = Simulation(0, length)
    claimed = simulation.claim(simulation.search(Search()))
    assert claimed.against["best_member"].is_better
    assert not claimed.merging_helps


def test_members_compete_at_the_lambdas_of_the_winner_by_group():
    def grouped(candidate):
        return -0.2 * (candidate.groups.get("mlp") == 1.3)

    loop = Simulation(0, grouped).search(Search())
    best = loop.best()
    assert loop.candidates[best.scaled_member].groups == {"mlp": 1.3}
    assert len(loop.halving.standings[best.scaled_member].losses) == VALIDATION


def test_every_kind_has_a_best_of_its_own_that_was_measured_on_all_items():
    """Also where merges are so much better that no member would have come far."""
    loop = Simulation(1, lambda x: curve(x, 1.2) - 5.0 * (x.method == "ties")).search(Search())
    best = loop.best()
    assert loop.candidates[best.leader].method == "ties"
    assert loop.candidates[best.scaled_member].length == pytest.approx(1.2, abs=0.15)
    assert loop.candidates[best.scaled_average].length == pytest.approx(1.2, abs=0.15)
    for number in best:
        assert len(loop.halving.standings[number].losses) == VALIDATION
    names = [candidate.name for candidate in loop.candidates]
    assert len(names) == len(set(names))
    # 15 lambdas beside 1 of four members; the default space has the same of the average
    assert sum(candidate.kind == "scaled member" for candidate in loop.candidates) >= 15 * MEMBERS


def test_all_comparisons_of_a_claim_are_one_family():
    generator = np.random.default_rng(0)
    parts = (
        claim.WINNER, claim.WINNER_AT_ONE, claim.BEST_MEMBER, claim.SCALED_MEMBER,
        claim.MEAN_MEMBER, claim.AVERAGE, claim.SCALED_AVERAGE,
    )  # fmt: skip
    losses = {part: generator.normal(2, 0.5, 50) for part in parts}
    weights = np.ones(50)
    claimed = claim.make_claim(losses, weights, is_merge=True, resamples=10)
    rows = [*claimed.against.values(), *claimed.at_one.values(), claimed.length]
    assert len(rows) == 5 + 3 + 1
    assert [row.holm for row in rows] == paired.holm([row.p for row in rows])
    same = claim.make_claim(
        losses | {claim.SCALED_MEMBER: losses[claim.BEST_MEMBER]},
        weights,
        is_merge=False,
        resamples=10,
    )
    assert same.length is None
    assert not same.length_helps
    assert not same.merging_helps


def test_several_measures_are_a_mean_of_ratios():
    counts = np.array([[3.0, 1.0, 4.0], [1.0, 1.0, 1.0]])
    members = [np.array([[3.0, 2.0, 1.0], [1.0, 0.0, 0.0]]), np.array([[3.0, 2.0, 5.0], [1, 1, 0]])]
    criterion = measures.make_criterion(counts, lambda: members)
    # by hand: the mean member has loss (6 + 10) / 2 / 8 = 1 and wrong answers (1 + 2) / 2 / 3 = 1/2
    np.testing.assert_allclose(criterion.references, [1.0, 0.5])
    sums = np.array([[2.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    values = criterion.values(sums)
    assert values.mean() == pytest.approx((4 / 8 / 1.0 + (1 / 3) / 0.5) / 2)
    alone = measures.make_criterion(counts[:1], list)
    assert alone.values(sums[:1]).tolist() == [2.0, 1.0, 1.0]
    assert alone.weights.tolist() == [3.0, 1.0, 4.0]


def test_members_that_are_right_everywhere_leave_the_criterion_finite():
    counts = np.ones((2, 4))
    members = [np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])]
    criterion = measures.make_criterion(counts, lambda: members)
    assert np.isfinite(criterion.values(np.ones((2, 4)))).all()


@pytest.mark.parametrize(
    ("candidate", "worse"),
    [
        ({"loss": 0.9, "sums": 0.958}, ["sums"]),  # the case of the quickstart after one epoch
        ({"loss": 1.2, "sums": 0.9}, ["loss"]),
        ({"loss": 1.171, "sums": 0.909}, []),  # within both margins
        ({"loss": float("nan"), "sums": 0.5}, ["loss"]),
        ({"loss": float("inf"), "sums": 0.5}, ["loss"]),
    ],
)
def test_a_measure_worse_than_its_margin_is_named(candidate, worse):
    rows = measures.guard_measures(candidate, {"loss": 1.167, "sums": 0.9}, Search())
    assert [name for name, row in rows.items() if row.is_worse] == worse


def test_a_lambda_at_the_edge_is_named_for_members_too():
    tried = [member for scale in (0.5, 1.0, 2.0) for member in members_at(3, scale)]
    assert range_edges(tried[-1], tried) == ["lambda = 2"]
    assert range_edges(tried[4], tried) == []
