"""Subsets of a search that one forward pass measures: fewer passes, the same sums."""

import contextlib

import numpy as np
import pytest

from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.search import search
from jax_ordermerge.search.candidates import Candidate
from jax_ordermerge.search.loss_cache import LossCache
from jax_ordermerge.search.measures import Measure

EXAMPLES = Examples(
    Ragged.of([[number] for number in range(10)], np.int32),
    Ragged.of([[True]] * 10, np.bool_),
    np.arange(10),
)
SIZES = [2, 4, 6, 10]


class Models:
    """Models whose loss on an example is their scale times its number."""

    @contextlib.contextmanager
    def build_temporarily(self, candidate):
        yield candidate.scale


@pytest.fixture
def sums_of(tmp_path):
    """Make a function to sums on subsets, and the list of the examples of each pass."""
    with contextlib.ExitStack() as open_caches:
        yield lambda measured: make_sums(tmp_path, measured, open_caches)


def make_sums(path, measured, open_caches):
    passes = []

    def measure(scale, examples):
        passes.append(examples.ids.tolist())
        return scale * examples.ids.astype(float)

    batched = {
        name: Measure(measure, lambda examples: np.ones(len(examples)), **batch)
        for name, batch in measured.items()
    }
    cache = open_caches.enter_context(LossCache(path / "journal.jsonl", {"seed": 0}))
    return search._Sums(Models(), batched, cache).on_subsets(list(batched), EXAMPLES, SIZES), passes


def test_the_first_pass_measures_all_subsets_that_fit(sums_of, tmp_path):
    sums, passes = sums_of({"loss": {"batch": 6}})
    for candidate in (Candidate("average", scale=2.0), Candidate("average", scale=3.0)):
        got = [sums(candidate, subset).tolist() for subset in range(4)]
        ids = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 7.0, 8.0, 9.0]]
        assert got == [[[candidate.scale * x for x in subset]] for subset in ids]
    assert passes == 2 * [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9]]
    # one line for each subset that was asked for, and the header
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 9


def test_a_subset_that_nobody_asks_for_is_not_recorded(sums_of, tmp_path):
    sums, _ = sums_of({"loss": {"batch": 6}})
    sums(Candidate("average"), 0)
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 2


def test_a_search_that_continues_repeats_the_same_pass(sums_of):
    """The recorded subset is read; for the next one all examples of the pass are measured again."""
    sums_of({"loss": {"batch": 4}})[0](Candidate("average"), 0)
    sums, passes = sums_of({"loss": {"batch": 4}})
    assert sums(Candidate("average"), 0).tolist() == [[0.0, 1.0]]
    assert passes == []
    assert sums(Candidate("average"), 1).tolist() == [[2.0, 3.0]]
    assert passes == [[0, 1, 2, 3]]


@pytest.mark.parametrize("measured", [{"sums": {}}, {"loss": {"batch": 10}, "sums": {}}])
def test_a_measure_whose_items_cost_one_by_one_looks_at_no_more_than_it_must(sums_of, measured):
    sums, passes = sums_of(measured)
    sums(Candidate("average"), 0)
    assert passes == [[0, 1]] * len(measured)


@pytest.mark.parametrize(
    ("sizes", "batch", "passes"),
    [
        ([10], 64, [range(1)]),
        ([25, 50, 100], 64, [range(2), range(2), range(2, 3)]),
        ([16, 32, 64, 128], 8, [range(1), range(1, 2), range(2, 3), range(3, 4)]),
        ([16, 32, 64, 128], 128, 4 * [range(4)]),
    ],
)
def test_subsets_by_pass(sizes, batch, passes):
    assert search.subsets_by_pass(sizes, batch) == passes
