"""Names that become names of files stay in their directory and differ."""

import re

import pytest

from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError

TASK_NAMES = {
    "../x": "holds a slash",
    "a/b": "holds a slash",
    "/etc/x": "holds a slash",
    ".": "stands for a directory",
    "..": "stands for a directory",
    "": "is empty",
    "a\nb": "cannot be printed",
    "a\0b": "cannot be printed",
    "b\udcff": "(cannot be printed|unable to parse raw data)",
    "ü" * 101: "is 202 bytes long, at most 200 are allowed",
    "results": "is that of the summary, results.json",
    "Results": "is that of the summary, results.json",
}


@pytest.mark.parametrize("name", TASK_NAMES)
def test_names_that_would_leave_their_directory(name):
    with pytest.raises(UserError) as caught:
        make_config({"evaluation": {"tasks": [{"name": name}]}})
    assert re.search(TASK_NAMES[name], str(caught.value))
    assert "\n" not in str(caught.value)
    merge = {"method": "average", "name": name}
    if name and "results" not in name.lower():
        with pytest.raises(UserError, match=TASK_NAMES[name]):
            make_config({"merge": {"methods": [merge]}})


@pytest.mark.parametrize("name", ["gsm8k, 5 shots", "a|b", "é", ".x", "a\\b", "summary", "x" * 200])
def test_names_of_files(name):
    assert make_config({"evaluation": {"tasks": [{"name": name}]}}).evaluation.tasks[0].name == name


def test_two_tasks_of_one_name():
    with pytest.raises(UserError, match="the name a is used twice"):
        make_config({"evaluation": {"tasks": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}})
