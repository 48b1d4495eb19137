"""Filters of a recipe that no tensor has a value from are reported by name."""

import pytest
import safetensors

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.merge.recipe import planner
from tests.commands.test_cli import call
from tests.merge import recipe_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return recipe_models.make_all(tmp_path_factory.mktemp("models"))


@pytest.fixture
def notes(root, monkeypatch):
    """Return the notes on filters of a recipe."""
    monkeypatch.chdir(root)

    def notes(text):
        plan = planner.plan_recipe(text, resolve=lambda name: convert.resolve(str(root / name)))
        return [note for note in plan.notes if note.startswith("filter")]

    return notes


def linear(setting, model="a"):
    """A recipe of one model; the last entry is for all other tensors."""
    return (
        f"merge_method: linear\nmodels: [{{model: {model}}}]\nparameters: {{weight: {setting}}}\n"
    )


@pytest.mark.parametrize("model", ["a", "tied"])
@pytest.mark.parametrize(
    "pattern",
    ["self_attn", "mlp.up_proj", "lm_head", "layers.3.", "layers.4.", "MLP", "attn", "weight", "*"],
)
def test_a_filter_is_reported_where_it_is_part_of_no_tensor_name(notes, root, model, pattern):
    with safetensors.safe_open(root / model / "model.safetensors", "np") as file:
        is_used = pattern == "*" or any(pattern in name for name in file.keys())  # noqa: SIM118
    reported = notes(linear(f"[{{filter: '{pattern}', value: 1}}, {{value: 2}}]", model))
    assert len(reported) == (0 if is_used else 1)
    prefix = f"filter '{pattern}' of weight is not used: it is part of no tensor's name ("
    assert all(note.startswith(prefix) for note in reported)


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("self_atn", "(did you mean 'self_attn'?)"),
        ("self_atn.qproj", "(did you mean 'self_attn.q_proj'?)"),
        ("block_sparse_moe", "(known: down_proj, embed_tokens, gate_proj, "),
    ],
)
def test_the_nearest_part_of_a_name_is_suggested(notes, pattern, hint):
    (note,) = notes(linear(f"[{{filter: {pattern}, value: 1}}, {{value: 2}}]"))
    assert hint in note


@pytest.mark.parametrize(
    "first", ["{value: 1}", "{filter: '*', value: 1}", "{filter: ml, value: 1}"]
)
def test_a_filter_behind_one_that_fits_first_is_reported(notes, first):
    assert notes(linear(f"[{first}, {{filter: mlp, value: 3}}, {{value: 2}}]")) == [
        "filter 'mlp' of weight is not used: an earlier filter fits all of its tensors"
    ]


def test_filters_of_models_and_slices_are_used_where_one_of_their_tensors_has_them(notes):
    slices = """
        merge_method: linear
        slices:
        - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]
        - sources:
          - model: b
            layer_range: [3, 4]
            parameters: {weight: [{filter: layers.FILTER., value: 2}, {value: 9}]}
        parameters: {normalize: [{filter: layers.1., value: false}, {value: true}]}
        """
    # a model's filter sees the layers of the model, of which the slice takes one
    assert notes(slices.replace("FILTER", "3")) == []
    (note,) = notes(slices.replace("FILTER", "1"))
    assert note.startswith("filter 'layers.1.' of weight of b is not used")


def test_the_note_is_printed_and_the_merge_is_written(root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(root)
    (tmp_path / "recipe.yml").write_text(linear("[{filter: mpl, value: 0.5}, {value: 1}]"))
    assert call("merge", tmp_path / "recipe.yml", tmp_path / "out") == 0
    assert "note: filter 'mpl' of weight is not used: " in capsys.readouterr().err
    assert (tmp_path / "out" / "model.safetensors").is_file()
