"""Settings of the search for a merge, and of the controls beside it."""

import pytest

from jax_ordermerge.config import make_config, read_search
from jax_ordermerge.errors import UserError


def test_a_list_of_controls_may_hold_the_default_ones():
    defaults = make_config({}).merge.controls
    assert make_config({"merge": {"controls": "default"}}).merge.controls == defaults
    listed = make_config({"merge": {"controls": ["default", "single", "seeds"]}}).merge.controls
    assert listed == (*defaults, "single")
    assert make_config({"merge": {"controls": ["single", "default"]}}).merge.controls == (
        "single",
        *defaults,
    )


def test_the_measure_of_a_search_is_one_or_several():
    assert read_search(None, None, {}).measure == ("loss",)
    assert read_search(None, None, {"measure": "sums"}).measure == ("sums",)
    assert read_search(None, None, {"measure": ["loss", "sums"]}).measure == ("loss", "sums")
    for wrong in ([], ["loss", "loss"]):
        with pytest.raises(UserError, match="give loss, a task, or several of them, each once"):
            read_search(None, None, {"measure": wrong})
