"""Files of recipes: anchors, several recipes in one, and one model under several spellings."""

import os

import numpy as np
import pytest

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.commands import merge as command
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner, schema
from tests.merge.recipe_models import make

Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Models a, b and base in the working directory."""
    for seed, name in enumerate(("base", "a", "b")):
        make(tmp_path / name, 2, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(directory, name=Q):
    return Reader(directory).read(name).astype(np.float64)


def write(merge_plan, out):
    engine.merge_plan(merge_plan, out)


def test_a_recipe_is_told_from_a_config(tmp_path):
    for name, text, expected in (
        ("a.yml", "merge_method: linear\nmodels: []", True),
        ("b.yml", "slices: []", True),
        ("c.yml", "training: {epochs: 1}\nmerge: {dtype: float32}", False),
        ("d.yml", "- 1", False),
        ("e.yml", "training: {}\n---\n", False),
        ("f.yml", "name: x\n---\nname: y", True),
    ):
        (tmp_path / name).write_text(text)
        assert schema.is_recipe(tmp_path / name) is expected
    (tmp_path / "g.yml").write_text(": :\n-")
    with pytest.raises(UserError, match=r"g\.yml is not valid YAML"):
        schema.is_recipe(tmp_path / "g.yml")


# ---------------------------------------------------------------------------------------- anchors


def test_merge_keys_and_keys_that_hold_anchors(folder):
    plan = planner.plan_recipe("""
strength: &strength 0.5
defaults: &defaults
  model: a
  parameters: {scale: *strength}
slices:
- sources: [{<<: *defaults, layer_range: [0, 1]}]
- sources: [{<<: *defaults, model: b, layer_range: [1, 2]}]
merge_method: passthrough
""")
    engine.merge_plan(plan, folder / "out")
    last = "model.layers.1.self_attn.q_proj.weight"
    np.testing.assert_array_equal(read("out"), read("a") / 2)
    np.testing.assert_array_equal(read("out", last), read("b", last) / 2)
    assert "defaults" not in plan.recipe


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # an anchor that nothing refers to does not excuse a misspelt key
        ("merge_method: linear\nmodel: &a []\nmodels: [{model: a}]", "unknown key model "),
        # nor does a reference to an anchor elsewhere
        (
            "merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 1}}]\nparameter: *p",
            "unknown key parameter ",
        ),
        ("merge_method: linear\nmerge_method: ties\nmodels: [{model: a}]", "is given twice"),
    ],
)
def test_other_unknown_keys_are_refused(folder, text, message):
    with pytest.raises(UserError, match=message):
        planner.plan_recipe(text)


# ----------------------------------------------------------------------------------------- stages

STAGES = """
name: half
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
name: far
merge_method: task_arithmetic
base_model: base
models: [{model: half, parameters: {weight: 2}}]
---
merge_method: linear
models: [{model: far, parameters: {weight: 3}}, {model: a, parameters: {weight: 1}}]
"""


def test_several_recipes_in_one_file_are_merged_in_their_order(folder, capsys):
    (folder / "stages.yml").write_text(STAGES)
    # a directory that is named as a stage is not what later stages mean
    make(folder / "half", 2, 9)
    command.merge_recipe(folder / "stages.yml", folder / "out", write)
    half = (read("a") + read("b")) / 2
    far = read("base") + 2 * (half - read("base"))
    np.testing.assert_allclose(read("out"), (3 * far + read("a")) / 4, rtol=0, atol=1e-6)
    assert not list(folder.glob("out.*"))
    assert capsys.readouterr().out.splitlines()[:2] == ["wrote half", "wrote far"]


@pytest.mark.parametrize("name", ["half", "../outside", "{folder}/outside", "a/b"])
def test_results_of_stages_touch_nothing_of_others(folder, name):
    name = name.format(folder=folder)
    (folder / "stages.yml").write_text(STAGES.replace("half", name))
    notes = folder / "out.stages" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("of another program")
    before = {*folder.iterdir(), *folder.parent.iterdir()}
    command.merge_recipe(folder / "stages.yml", folder / "out", write)
    assert {*folder.iterdir(), *folder.parent.iterdir()} == before | {folder / "out"}
    assert notes.read_text() == "of another program"


def test_a_dry_run_plans_the_first_recipe(folder, capsys):
    (folder / "stages.yml").write_text(STAGES)
    command.merge_recipe(folder / "stages.yml", None, command.print_plan)
    printed = capsys.readouterr().out
    assert "half, the first of 3 recipes" in printed
    assert not (folder / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("name: half\n", ""), "recipe 1 of 3 has no name"),
        (("name: far", "name: half"), "two recipes have the name half"),
        (("name: half", "name: half+far"), "the name half\\+far has a \\+"),
        (
            (
                "{model: a, parameters: {weight: 1}}, {model: b",
                "{model: far, parameters: {weight: 1}}, {model: b",
            ),
            "takes far",
        ),
        (("base_model: base\nmodels: [{model: half", "models: [{modle: half"), "unknown key"),
        (
            (
                "merge_method: linear\nmodels: [{model: far",
                "merge_method: liner\nmodels: [{model: far",
            ),
            "liner",
        ),
    ],
)
def test_every_recipe_of_a_file_is_checked_before_the_first_is_merged(folder, change, message):
    (folder / "stages.yml").write_text(STAGES.replace(*change))
    with pytest.raises(UserError, match=message):
        command.merge_recipe(folder / "stages.yml", folder / "out", write)
    assert not list(folder.glob("out*"))


# -------------------------------------------------------------------------------------- spellings


@pytest.mark.parametrize("spelling", ["./base", "../{here}/base", "{folder}/base", "link"])
def test_the_base_under_another_spelling_is_the_base(folder, spelling):
    os.symlink(folder / "base", folder / "link")
    spelling = spelling.format(folder=folder, here=folder.name)
    text = (
        "merge_method: model_stock\nbase_model: {}\nmodels: [{{model: a}}, {{model: b}},"
        " {{model: {}}}]\n"
    )
    plans = [planner.plan_recipe(text.format("base", name)) for name in ("base", spelling)]
    for merge_plan, out in zip(plans, ("plain", "spelled"), strict=True):
        assert len(merge_plan.sources) == 3
        engine.merge_plan(merge_plan, folder / out)
    np.testing.assert_array_equal(read("spelled"), read("plain"))


def test_a_model_twice_under_two_spellings_is_refused(folder):
    text = "merge_method: linear\nmodels: [{model: a}, {model: ./a}]\nparameters: {weight: 1}"
    with pytest.raises(UserError, match="model a is given twice"):
        planner.plan_recipe(text)


def test_the_tokenizer_of_a_model_under_another_spelling(folder):
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    merge_plan = planner.plan_recipe(f"{text}tokenizer_source: ./b\n")
    assert merge_plan.tokenizer_from.resolve() == (folder / "b").resolve()
    with pytest.raises(UserError, match="base, which is none of the models"):
        planner.plan_recipe(f"{text}tokenizer_source: {folder}/base\n")
