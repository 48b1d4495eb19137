"""The reference of config keys and of the public API is complete, and its examples are valid."""

import inspect
import json
import re

import pytest
import yaml

import jax_ordermerge
from jax_ordermerge.config import load_config, reference
from jax_ordermerge.config.section import load_yaml
from jax_ordermerge.errors import UserError
from tests.commands.test_cli import call

KEYS = reference.list_keys()
# What an entry of a list, or a choice, needs beside the key itself.
ENTRIES = {
    "data.train[]": {"path": "a.jsonl"},
    "merge.methods[]": {"method": "average"},
    "merge.methods[].checkpoints": {"last": 2},
    "merge.auto.methods[]": {"method": "average"},
    "merge.auto.methods[].checkpoints": {"last": 2},
    "merge.auto.lambdas": {"low": 0.5, "high": 2.0},
    "evaluation.tasks[]": {"name": "task", "data": "a.jsonl"},
}
# What else makes a config valid in which one key has its example.
CONTEXT = {
    "merge.auto": ["data.validation_examples=8"],
    "training.checkpoint": ["data.validation_examples=8"],
    "training.validate_every": ["data.validation_examples=8"],
    "distributed": ["distributed.coordinator=auto"],
    "training.mixing": ["population.members=2"],
}
TOGETHER = {
    "top_k": {"temperature": 1},
    "top_p": {"temperature": 1},
    "prompt": {"response": "{{answer}}"},
    "response": {"prompt": "{{question}}"},
    "reference": {"prompt": "{{question}}", "response": "{{answer}}"},
    "shots_from": {"shots": 2},
    "base_block": {"base_dtype": "nf4"},
}


def test_every_key_has_a_meaning_and_numbers_a_unit():
    assert len(KEYS) > 180
    assert not [key.path for key in KEYS if not key.meaning]
    free = ("seed", "seeds", "index")  # numbers that count nothing
    numbers = [key for key in KEYS if {"integer", "number"} & {*key.type.split()}]
    assert len(numbers) > 60
    assert not [key.path for key in numbers if not key.unit and not key.path.endswith(free)]


def test_a_key_of_which_the_default_shows_nothing_has_an_example():
    empty = ("null", "[]", "{}", "required", "''")
    without = [key.path for key in KEYS if key.example in empty]
    # what a null means there is all that can be said
    assert set(without) <= {"merge.methods[].checkpoints.weights"}


def nested(key: reference.Key) -> dict:
    """Return a config with the key at its example."""
    node = load_yaml(key.example, key.path)
    kinds = re.match(r"kind ([\w, ]+)", key.goes_with)
    kind = kinds[1].split(", ")[0] if kinds else ""
    path = key.path.split(".")
    for depth in range(len(path), 0, -1):
        name, prefix = path[depth - 1], ".".join(path[: depth - 1])
        section = {name.removesuffix("[]"): [node] if name.endswith("[]") else node}
        if prefix:
            if depth == len(path):
                # multiple choice has a prompt, and no response
                with_it = {} if kind == "multiple_choice" else TOGETHER.get(name, {})
                section = with_it | ({"kind": kind} if kind else {}) | section
            section = ENTRIES.get(prefix, {}) | section
        node = section
    return node


@pytest.mark.parametrize(
    "key",
    [key for key in KEYS if key.example not in ("", "null", "required")],
    ids=lambda k: k.path,
)
def test_examples_are_valid(key, tmp_path):
    (tmp_path / "example.yaml").write_text(yaml.safe_dump(nested(key)))
    context = [
        item for prefix, items in CONTEXT.items() if key.path.startswith(prefix) for item in items
    ]
    if key.path == "distributed.coordinator":
        context = []
    assert load_config(tmp_path / "example.yaml", context)


def test_the_command_prints_them(capsys):
    assert call("config", "training.warmup") == 0
    assert "number at least 0 (share of all steps, or steps)" in capsys.readouterr().out
    assert call("config", "lora", "--json") == 0
    keys = json.loads(capsys.readouterr().out)
    assert {"lora.rank", "lora.alpha"} <= {key["path"] for key in keys}
    assert call("config") == 0
    assert "training.learning_rate" in capsys.readouterr().out


def test_an_unknown_key_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'training\.learning_rate'"):
        reference.describe("lr")
    with pytest.raises(UserError, match=r"did you mean 'data\.max_length'"):
        reference.describe("training.max_length")


PUBLIC = [name for name in jax_ordermerge.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_of_the_public_api_are_complete(name):
    thing = getattr(jax_ordermerge, name)
    doc = inspect.getdoc(thing) or ""
    if name != "Config":  # its keys are the reference of configs
        assert "Example:" in doc
    if inspect.isfunction(thing):
        signature = inspect.signature(thing)
        for parameter in signature.parameters:
            assert parameter in doc, f"{name} does not explain {parameter}"
        if signature.return_annotation not in (None, "None"):
            assert "Return" in doc
