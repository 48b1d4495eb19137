"""What a published card or recipe calls a model: its hub name, or its real name, and no path."""

import huggingface_hub
import pytest
from huggingface_hub.utils import validate_repo_id

from jax_ordermerge.merge.manifest import _with_names
from jax_ordermerge.merge.sources.public_names import PublicName, public_name, short_names


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory: a model, a link to it, a hub's cache, and a run."""
    for name in ("data/SmolLM2-135M", "hub/models--org--base/snapshots/0a1b2c", "runs/first"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "hub/models--gpt2/snapshots/9f").mkdir(parents=True)
    (tmp_path / "base").symlink_to(tmp_path / "data/SmolLM2-135M")
    (tmp_path / "runs/first/config.yaml").write_text("")
    (tmp_path / "runs/first/merged/average").mkdir(parents=True)
    (tmp_path / "runs/first/merged/average/config.json").write_text("{}")
    (tmp_path / "latest").symlink_to(tmp_path / "runs/first")
    (tmp_path / "odd+name").mkdir()
    (tmp_path / "runs+1/second").mkdir(parents=True)
    (tmp_path / "runs+1/second/config.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path


NAMES = {
    # what the user typed -> public name, kind, name in base_model
    "meta-llama/Llama-2-7b-hf": ("meta-llama/Llama-2-7b-hf", "hub", "meta-llama/Llama-2-7b-hf"),
    "gpt2": ("gpt2", "hub", "gpt2"),
    "embedded:quickstart": ("quickstart", "embedded", "quickstart"),
    "data/SmolLM2-135M": ("SmolLM2-135M", "directory", "SmolLM2-135M"),
    "./data/SmolLM2-135M/": ("SmolLM2-135M", "directory", "SmolLM2-135M"),
    "base": ("SmolLM2-135M", "directory", "SmolLM2-135M"),
    "hub/models--org--base/snapshots/0a1b2c": ("org/base", "hub", "org/base"),
    "hub/models--gpt2/snapshots/9f": ("gpt2", "hub", "gpt2"),
    "runs/first/member_2": ("first/member_2", "run", "first-member_2"),
    "runs/first/merged/average": ("first/merged/average", "run", "first-merged-average"),
    "latest/average": ("first/merged/average", "run", "first-merged-average"),
    "latest/member_0": ("first/member_0", "run", "first-member_0"),
    "gs://bucket/models/tuned": ("tuned", "bucket", "tuned"),
    "/nowhere/my model (v2)": ("my model (v2)", "directory", "my-model-v2"),
    "/nowhere/a--b..c": ("a--b..c", "directory", "a-b.c"),
}


@pytest.mark.parametrize("model", NAMES)
def test_public_names(home, model):
    name = public_name(model)
    assert (name.text, name.kind, name.card_id) == NAMES[model]
    validate_repo_id(name.card_id)
    assert str(home) not in name.origin
    card = huggingface_hub.ModelCard(f"---\nbase_model: {name.card_id}\n---\n")
    assert card.data.base_model == name.card_id


def test_names_of_a_recipe_are_distinct_and_say_no_more_than_that_takes(home):
    for name in ("one/final", "two/final", "two/other"):
        (home / name).mkdir(parents=True)
    models = [str(home / "one/final"), "two/final", "two/other", "org/b+two/other", "odd+name"]
    # split where opening a model splits it
    models += ["runs+1/second/member_2", "runs+1/second/member_2+two/other"]
    assert short_names(models) == {
        models[0]: "one/final",
        "two/final": "two/final",
        "two/other": "other",
        "org/b+two/other": "org/b+other",
        "odd+name": "odd+name",
        "runs+1/second/member_2": "second/member_2",
        "runs+1/second/member_2+two/other": "second/member_2+other",
    }
    # model and adapter of a recipe, which were never one text
    (home / "data+1").mkdir()
    assert short_names(["data+1+org/z"]) == {"data+1+org/z": "data+1+org/z"}
    # one model under two spellings has one name
    assert set(short_names(["base", "data/SmolLM2-135M"]).values()) == {"SmolLM2-135M"}


def test_notes_name_models_without_their_paths():
    names = {"/home/me/a": "a", "/home/me/a/b": "b", "base": "SmolLM2"}
    note = "/home/me/a and /home/me/a/b differ; base has base_model, rebase and base/x"
    expected = "a and b differ; SmolLM2 has base_model, rebase and base/x"
    assert _with_names(note, names) == expected


def test_a_name_of_no_allowed_character_is_left_out():
    assert PublicName("模型", "directory").card_id == ""
