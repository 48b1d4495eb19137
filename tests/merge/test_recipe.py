"""Recipes become plans: every scope, filter and gradient. See test_recipe_refused.py for errors."""

import json
import textwrap

import numpy as np
import pytest
import yaml

from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.recipe import planner, rules
from jax_ordermerge.merge.recipe.settings import parse_setting
from jax_ordermerge.merge.sources.storage import Directory
from tests.merge import recipe_models
from tests.merge.recipe_models import make

Q, UP, NORM, EMBED, HEAD = (
    "model.layers.{}.self_attn.q_proj.weight",
    "model.layers.{}.mlp.up_proj.weight",
    "model.norm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return recipe_models.make_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def read(root):
    """A recipe, as text without the indentation of the test, against these models."""
    return lambda text, **at: planner.plan_recipe(
        textwrap.dedent(text) + "\n", resolve=lambda name: root / name
    )


def output(recipe_plan, name):
    return next(out for out in recipe_plan.outputs if out.name == name)


def weights(recipe_plan, name):
    return output(recipe_plan, name).weights.tolist()


# -------------------------------------------------------------------------------------- parameters


def test_the_nearest_scope_wins(read):
    recipe_plan = read("""
        merge_method: dare_linear
        base_model: base
        slices:
        - sources:
          - {model: base, layer_range: [0, 2]}
          - model: a
            layer_range: [0, 2]
            parameters: {weight: 1, density: [{filter: mlp, value: 0.1}]}
          - {model: b, layer_range: [0, 2]}
          parameters: {weight: 2, density: [{filter: self_attn, value: 0.2}], lambda: 3}
        - sources:
          - {model: base, layer_range: [2, 4]}
          - {model: a, layer_range: [2, 4]}
          - {model: b, layer_range: [2, 4]}
        parameters: {weight: 5, density: 0.5, lambda: 7, normalize: true}
        """)
    first, second = output(recipe_plan, Q.format(1)), output(recipe_plan, Q.format(2))
    assert first.weights.tolist() == [1, 2]
    assert second.weights.tolist() == [5, 5]
    assert output(recipe_plan, UP.format(0)).parameters["density"] == [0.1, 0.5]
    assert first.parameters["density"] == [
        0.2,
        0.2,
    ]  # falls through the model's filters to the slice's
    assert first.parameters["scale"] == 3
    assert second.parameters["scale"] == 7
    assert first.parameters["normalize"] is True
    assert output(recipe_plan, EMBED).parameters["scale"] == 3
    assert (
        output(recipe_plan, NORM).parameters["scale"]
        == output(recipe_plan, HEAD).parameters["scale"]
        == 7
    )


def test_module_scope_lies_between_slice_and_recipe(read):
    recipe_plan = read("""
        merge_method: task_arithmetic
        base_model: base
        modules:
          default:
            models: [{model: a}, {model: b, parameters: {weight: 3}}]
            parameters: {weight: 2}
        parameters: {weight: 1, lambda: 0.5}
        """)
    assert weights(recipe_plan, NORM) == [2, 3]
    assert output(recipe_plan, NORM).parameters["scale"] == 0.5


def test_gradients_run_over_the_layers_of_a_slice(read):
    recipe_plan = read("""
        merge_method: linear
        slices:
        - sources: [{model: a, layer_range: [0, 4], parameters: {weight: [1, 2, 7]}}]
        - sources: [{model: b, layer_range: [1, 2], parameters: {weight: [1, 2, 9]}}]
        """)
    layer_weights = [weights(recipe_plan, Q.format(layer))[0] for layer in range(5)]
    np.testing.assert_allclose(
        layer_weights, [1, 5 / 3, 11 / 3, 7, 9]
    )  # one layer alone is the end
    assert weights(recipe_plan, EMBED) == [1]
    assert (
        weights(recipe_plan, NORM) == weights(recipe_plan, HEAD) == [1]
    )  # beside the layers a gradient has its first value


@pytest.mark.parametrize(
    ("raw", "name", "position", "expected"),
    [
        (0.5, "x", 0.3, 0.5),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 10, 20], "x", 0.75, 15),
        ([0, 1, 2, 3, 4, 5, 6], "x", 5 / 6, 5),
        ([1, 2, 3], "x", 1.0, 3),
        (["1e-4", 1], "x", 0.0, 1e-4),
        ([True, False], "x", 0.99, True),
        ([True, False], "x", 1.0, False),
        ([], "x", 0.5, None),
        ([{"filter": "mlp", "value": 1}, {"filter": "up", "value": 2}], "mlp.up", 0, 1),
        ([{"filter": "MLP", "value": 1}], "mlp.up", 0, None),
        ([{"filter": "*", "value": [1, 3]}], "anything", 0.5, 2),
        ({"value": 4}, "x", 0, 4),
        ({"filter": "a.b", "value": 4}, "axb", 0, None),
        ([{"filter": "x", "value": []}, {"value": 2}], "x", 0, None),
    ],
    ids=str,
)
def test_settings(raw, name, position, expected):
    value = parse_setting(raw).at(name, position)
    assert value == expected
    assert type(value) is type(expected) or isinstance(expected, float)


def test_filters_of_models_see_their_own_names_and_shared_ones_the_result(read):
    recipe_plan = read("""
        merge_method: linear
        slices:
        - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}]
        - sources:
          - model: b
            layer_range: [3, 4]
            parameters: {weight: [{filter: layers.3., value: 2}, {value: 9}]}
        parameters: {normalize: [{filter: layers.1., value: false}, {value: true}]}
        """)
    tensor = output(recipe_plan, Q.format(1))
    assert [view.name for view in tensor.members] == [Q.format(3)]
    assert tensor.weights.tolist() == [2]
    assert tensor.parameters["normalize"] is False
    assert output(recipe_plan, NORM).parameters["normalize"] is True
    assert weights(recipe_plan, NORM) == [9]


def test_the_base_in_the_list_is_the_base_and_its_parameters_are_noted(read):
    recipe_plan = read("""
        merge_method: ties
        base_model: base
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: base, parameters: {weight: 4}}
        - {model: b, parameters: {weight: 2}}
        """)
    tensor = output(recipe_plan, NORM)
    labels = [recipe_plan.sources[view.source].label for view in (*tensor.members, tensor.base)]
    assert labels == ["a", "b", "base"]
    assert tensor.weights.tolist() == [1, 2]
    assert "weight of base is not used: it is the base" in recipe_plan.notes


def test_the_base_of_linear_is_a_model_only_where_it_has_a_weight(read):
    models = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 2}}]"
    aside = read(f"merge_method: linear\nbase_model: base\n{models}")
    assert weights(aside, NORM) == [1, 2]
    assert (
        aside.sources[output(aside, NORM).base.source].label == "base"
    )  # task vectors are measured from it
    merged = read(f"merge_method: linear\nbase_model: base\n{models}\nparameters: {{weight: 0.5}}")
    assert weights(merged, NORM) == [1, 2, 0.5]


def test_slerp_goes_from_the_base_whatever_the_order(read):
    for models in ("[{model: a}, {model: base}]", "[{model: base}, {model: a}]", "[{model: a}]"):
        recipe_plan = read(
            f"merge_method: slerp\nbase_model: base\nmodels: {models}\nparameters: {{t: 0.25}}"
        )
        assert [
            recipe_plan.sources[view.source].label for view in output(recipe_plan, NORM).members
        ] == [
            "base",
            "a",
        ]


def test_parameters_of_ours_go_with_a_method_of_mergekit(read):
    text = (
        "merge_method: {}\nbase_model: base\nmodels: [{{model: a}}, {{model: b}}]\nparameters: {}"
    )
    recipe_plan = read(text.format("model_stock", "{t_floor: 0}"))
    assert output(recipe_plan, NORM).parameters == table.check_parameters(
        "model_stock", {"norm_floor": 1e-6, "t_floor": 0}
    )
    recipe_plan = read(text.format("dare_ties", "{weight: 1, density: 0.5, rescale: density}"))
    assert output(recipe_plan, NORM).parameters["rescale"] == "density"


# -------------------------------------------------------------------------------------------- ours


def test_parameter_selection(read, root, tmp_path):
    recipe_plan = read("""
        merge_method: parameter_selection
        base_model: base
        models: [{model: a, parameters: {weight: 3}}, {model: b, parameters: {weight: 1}}]
        parameters:
          resample: [0, 1, 2, 3]
          resample_from: others
          granularity: [{filter: mlp, value: row}, {value: element}]
        seed: 5
        """)
    assert recipe_plan.seed == 5
    assert weights(recipe_plan, NORM) == [3, 1]
    assert [output(recipe_plan, Q.format(layer)).parameters["resample"] for layer in range(4)] == [
        0,
        1,
        2,
        3,
    ]
    assert output(recipe_plan, UP.format(0)).parameters["granularity"] == "row"
    recipe_plan = read("""
        merge_method: selection
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {resample: exhaustive}
        seed: 7
        """)
    engine.merge_plan(recipe_plan, tmp_path / "recipe")
    members, base = [Directory(root / name) for name in "ab"], Directory(root / "base")
    same = plan.uniform(
        members, base, method="selection", parameters={"resample": "exhaustive"}, seed=7
    )
    engine.merge_plan(same, tmp_path / "uniform")
    from_recipe, uniform = Reader(tmp_path / "recipe"), Reader(tmp_path / "uniform")
    assert all(
        from_recipe.read(name).tobytes() == uniform.read(name).tobytes()
        for name in from_recipe.names
    )


@pytest.mark.parametrize(
    "method", [name for name in sorted(table.METHODS) if table.METHODS[name].needs is None]
)
def test_every_method_of_ours_can_be_named(read, method):
    rule = rules.find_rule(method)
    most = table.METHODS[method].members[1] - (rule.base == "first")
    models = [{"model": name} for name in "abc"[: min(3, most)]]
    needed = {
        name: 0.5
        for name, parameter in {**rule.per_member, **rule.shared}.items()
        if parameter.required
    }
    base = {} if method == "passthrough" else {"base_model": "base"}
    recipe_plan = read(
        json.dumps({"merge_method": method, **base, "models": models, "parameters": needed})
    )
    assert {out.method for out in recipe_plan.outputs} == {method}


def test_thresholds_of_consensus_may_be_each_models_own(read):
    recipe_plan = read("""
        merge_method: consensus
        base_model: base
        models:
        - {model: a, parameters: {threshold: 0.2}}
        - {model: b, parameters: {threshold: [0.3, 0.6]}}
        """)
    assert output(recipe_plan, Q.format(3)).parameters["threshold"] == [0.2, 0.6]
    assert output(recipe_plan, NORM).weights is None


# --------------------------------------------------------------------------------------- structure


def test_stacked_slices_are_numbered_through(read, tmp_path, root):
    recipe_plan = read("""
        merge_method: passthrough
        slices:
        - sources: [{model: long, layer_range: [4, 6]}]
        - sources: [{model: short, layer_range: [0, 1]}]
        """)
    assert recipe_plan.config.num_layers == 3
    places = [
        (recipe_plan.sources[out.members[0].source].label, out.members[0].name)
        for out in recipe_plan.outputs
    ]
    assert places[0] == ("long", EMBED)
    assert [place for place in places if "q_proj" in place[1]] == [
        ("long", Q.format(4)),
        ("long", Q.format(5)),
        ("short", Q.format(0)),
    ]
    assert places[-2:] == [("short", NORM), ("short", HEAD)]
    engine.merge_plan(recipe_plan, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert (
        Reader(tmp_path / "out").read(Q.format(1)).tobytes()
        == Reader(root / "long").read(Q.format(5)).tobytes()
    )


def test_a_slice_may_have_a_base_of_its_own(read, tmp_path):
    recipe_plan = read("""
        merge_method: task_arithmetic
        base_model: base
        slices:
        - sources:
          - {model: base, layer_range: [0, 2]}
          - {model: a, layer_range: [1, 3]}
          - {model: b, layer_range: [1, 3]}
        - sources: [{model: c, layer_range: [0, 1]}, {model: a, layer_range: [3, 4]}]
          base_model: c
        parameters: {weight: 0.5}
        """)
    assert recipe_plan.sources[output(recipe_plan, EMBED).base.source].label == "base"
    assert recipe_plan.sources[output(recipe_plan, NORM).base.source].label == "c"
    assert len(output(recipe_plan, EMBED).members) == 2
    engine.merge_plan(recipe_plan, tmp_path / "out", with_diagnostics=False)
    assert set(Reader(tmp_path / "out").names) == {out.name for out in recipe_plan.outputs}


def test_dtypes(read):
    recipe_plan = read(
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
        "dtype: float16\nout_dtype: bfloat16"
    )
    assert (recipe_plan.dtype.name, recipe_plan.out_dtype.name) == ("float16", "bfloat16")
    mixed = "merge_method: {}\nmodels: [{{model: a}}, {{model: half}}]\nparameters: {{weight: 1}}"
    with pytest.raises(UserError, match="stored in bfloat16 and float32; choose one of"):
        read(mixed.format("linear"))
    assert read(mixed.format("linear") + "\ndtype: bfloat16").dtype.name == "bfloat16"
    recipe_plan = read(
        "merge_method: task_arithmetic\nbase_model: a\n"
        "models: [{model: half, parameters: {weight: 1}}]"
    )
    assert recipe_plan.dtype.name == "bfloat16"
    assert "a is stored in float32 and rounded to bfloat16" in recipe_plan.notes


def test_stochastic_rounding(read):
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nrounding: stochastic"
    )
    assert read(f"{text}\nout_dtype: bfloat16").stochastic
    with pytest.raises(
        UserError, match="rounding: stochastic is for bfloat16, the output is float32"
    ):
        read(text)


def test_a_tied_and_an_untied_model_become_an_untied_one(read, tmp_path):
    recipe_plan = read(
        "merge_method: linear\nmodels: [{model: tied}, {model: a}]\nparameters: {weight: 1}"
    )
    assert not recipe_plan.config.tie_embeddings
    assert (
        "tied ties its output head to its embedding: the head is the embedding there"
        in recipe_plan.notes
    )
    engine.merge_plan(recipe_plan, tmp_path / "out")
    merged, tied, untied = Reader(tmp_path / "out"), recipe_plan.sources[0], recipe_plan.sources[1]
    head = np.empty((6, 4), np.float32)
    tied.read_into(EMBED, 0, head)
    expected = head.copy()
    untied.read_into(HEAD, 0, head)
    np.testing.assert_allclose(merged.read(HEAD), (expected + head) / 2, rtol=1e-6)


def test_vocabularies_of_different_sizes(read, tmp_path):
    text = "merge_method: linear\nmodels: [{model: a}, {model: padded}]\nparameters: {weight: 1}"
    recipe_plan = read(text)
    assert recipe_plan.config.vocab_size == 6
    assert any(note.startswith("padded has row 6") for note in recipe_plan.notes)
    recipe_plan = read(f"{text}\ntokenizer_source: padded")
    assert recipe_plan.config.vocab_size == 7
    assert (
        "a lacks row 6: taken from the first model that has it, the base first" in recipe_plan.notes
    )
    engine.merge_plan(recipe_plan, tmp_path / "out")
    merged, padded = Reader(tmp_path / "out").read(EMBED), np.empty((7, 4), np.float32)
    recipe_plan.sources[1].read_into(EMBED, 0, padded)
    assert merged[6].tobytes() == padded[6].tobytes()
    assert (
        read(f"{text}\ntokenizer: {{source: base, pad_to_multiple_of: 4}}").config.vocab_size == 8
    )


def test_the_union_of_tokenizers_is_written(root, tmp_path):
    def write(name, *added):
        directory = make(tmp_path / name, 2, 1, vocab_size=3 + len(added))
        vocabulary = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []}}
        vocabulary["added_tokens"] = [
            {"id": 3 + i, "content": token} for i, token in enumerate(added)
        ]
        (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
        return directory

    first, second = write("one", "<x>"), write("two", "<y>")
    recipe_plan = planner.plan_recipe(
        f"merge_method: linear\nmodels: [{{model: {first}}}, {{model: {second}}}]\n"
        "parameters: {weight: 1}\ntokenizer_source: union\n"
    )
    assert recipe_plan.config.vocab_size == 5
    engine.merge_plan(recipe_plan, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert [entry["content"] for entry in written["added_tokens"]] == ["<x>", "<y>"]
    assert yaml.safe_load((tmp_path / "out" / "merge_config.yaml").read_text())["models"] == [
        {"model": "one"},
        {"model": "two"},
    ]


def test_chat_templates(root, tmp_path):
    directories = [make(tmp_path / name, 2, 1) for name in "abc"]
    for directory, template in zip(directories, ("{{ 1 }}", "{{ 2 }}", "{{ 2 }}"), strict=True):
        (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (directories[2] / "tokenizer_config.json").unlink()
    (directories[2] / "chat_template.jinja").write_text("{{ 2 }}")
    models = ", ".join(f"{{model: {directory}}}" for directory in directories)
    text = f"merge_method: linear\nmodels: [{models}]\nparameters: {{weight: 1}}\n"
    assert planner.plan_recipe(text).chat_template is None
    assert planner.plan_recipe(f"{text}chat_template: auto").chat_template == "{{ 2 }}"
    # the tag is an extension of transformers
    own = "{% generation %}{% break %}{{ x }}{% endgeneration %}"
    assert planner.plan_recipe(f"{text}chat_template: '{own}'").chat_template == own
    with pytest.raises(
        UserError, match="chat_template 'mistral' is not offered; give auto, chatml, llama3"
    ):
        planner.plan_recipe(f"{text}chat_template: mistral")
    engine.merge_plan(planner.plan_recipe(f"{text}chat_template: auto"), tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ 2 }}"


def test_what_is_written_of_a_recipe_has_no_paths_of_this_machine(root):
    recipe_plan = planner.plan_recipe(
        f"merge_method: task_arithmetic\nbase_model: {root}/base\n"
        f"models:\n- {{model: {root}/a, parameters: {{weight: 1}}}}\n"
        f"- {{model: {{model: {{path: {root}/b}}}}, parameters: {{weight: 2}}}}\n"
    )
    assert str(root) not in json.dumps(recipe_plan.recipe)
    assert recipe_plan.recipe == {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": {"model": {"path": "b"}}, "parameters": {"weight": 2}},
        ],
        "seed": 0,
        "dtype": "float32",
        "out_dtype": "float32",
    }


def test_the_recipe_beside_a_merge_can_be_read_again(read, root, tmp_path):
    recipe_plan = read(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: [1, 2]}\nseed: 3"
    )
    engine.merge_plan(recipe_plan, tmp_path / "out")
    again = planner.plan_recipe(
        tmp_path / "out" / "merge_config.yaml", resolve=lambda name: root / name
    )
    assert again.recipe.pop("jax_ordermerge")
    assert again.recipe == recipe_plan.recipe
    assert [out.parameters for out in again.outputs] == [
        out.parameters for out in recipe_plan.outputs
    ]
