"""A run whose chat template prints today's date reads the same tokens on every day."""

import datetime as dt
import json

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.data import dates
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from jax_ordermerge.experiment.context import open_run
from tests.experiment import tiny
from tests.experiment.test_ends import CHATML, make_base

# the words of the tiny vocabulary count the days
DATED = "{{ 'abcdefgh'[strftime_now('%d') | int] }} " + CHATML


@pytest.fixture
def dated(tmp_path):
    make_base(tmp_path / "base", chat_template=DATED)
    return tiny.make_config(
        tmp_path,
        data={"template": "chat"},
        training={"epochs": 1},
        merge={"methods": [{"method": "average"}]},
        evaluation={"tasks": []},
    )


def recorded(directory):
    return json.loads((directory / "data.json").read_text())["train"]


def test_a_run_keeps_the_date_of_its_first_start(dated, monkeypatch):
    monkeypatch.setattr(dates, "today", lambda: dt.date(2031, 5, 1))
    directory = pipeline.run(load_config(dated), through="train", log=lambda line: None)
    first = recorded(directory)
    assert first["date"] == "2031-05-01"
    monkeypatch.setattr(dates, "today", lambda: dt.date(2031, 5, 2))
    # refused if it read other tokens
    pipeline.run(load_config(dated), through="merge", log=lambda line: None)
    assert recorded(directory) == first
    ctx = open_run(load_config(dated), print)
    assert ctx.tokenizer.decode(ctx.splits["train"].prompt(0)).startswith("b <|im_start|>")
    # served models print the date of their own day
    served = (directory / "merged" / "average" / "chat_template.jinja").read_text()
    assert served == DATED
    # a run that begins today differs
    other = load_config(dated, [f"output={directory}-other"])
    assert open_run(other, print).splits["train"].digest != first["digest"]
    fixed = load_config(dated, [f"output={directory}-other", "data.date=2031-05-01"])
    assert open_run(fixed, print).splits["train"].digest == first["digest"]
    with pytest.raises(UserError, match=r"data.date: None -> 2031-05-01"):
        pipeline.run(load_config(dated, ["data.date=2031-05-01"]), log=print)


def test_a_date_that_nothing_prints_is_refused(folder):
    config = load_config(folder / "tiny.yaml", ["data.date=2031-05-01", "output=nowhere"])
    with pytest.raises(UserError, match=r"data.date = 2031-05-01: the chat template does not read"):
        open_run(config, print)
