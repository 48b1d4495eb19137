"""Which controls a population gets."""

from jax_ordermerge.search import controls
from jax_ordermerge.search.candidates import Candidate


def test_selections_are_drawn_again_and_their_length_is_matched():
    one = Candidate("selection", {"resample": "exhaustive"}, seed=3)
    found = {
        c.name: c.candidate
        for c in controls.make_controls(
            ["lambda_matched", "seeds", "children"], 3, {"pick": one}, 0
        )
    }
    assert found["average as long as pick"] == Candidate(
        "lambda_matched", {"resample": "exhaustive"}, seed=3
    )
    draws = [found[f"pick, draw {draw}"] for draw in (2, 3, 4)]
    assert len({draw.seed for draw in [one, *draws]}) == 4
    assert all(draw.parameters == one.parameters for draw in draws)
    assert [found[f"selection, child {child} of 3"].parameters for child in range(3)] == [
        {"child": child} for child in range(3)
    ]
