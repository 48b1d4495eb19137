"""Errors of recipes: one line that names what is wrong."""

import pytest

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.recipe import planner
from tests.merge import recipe_models


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return recipe_models.make_all(tmp_path_factory.mktemp("models"))


MODELS = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
LINEAR = f"merge_method: linear\n{MODELS}"
TIES = f"merge_method: ties\nbase_model: base\n{MODELS}"
REFUSED = [
    # keys
    (
        "merge_metod: linear\nmodels: [{model: a}]",
        "unknown key merge_metod (did you mean 'merge_method'?)",
    ),
    (
        LINEAR + "normalize: false",
        "normalize is a parameter; write it below parameters:",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, weight: 1}]",
        "models[0].weight is a parameter; write it below parameters:",
    ),
    (
        LINEAR + "lambda: 2",
        "lambda is a parameter",
    ),
    (
        "merge_method: linear\nmodels: [{model: a, parmeters: {}}]",
        "unknown key models[0].parmeters (did you mean 'parameters'?)",
    ),
    (
        "merge_method: slerp\nslices:\n- sources: [{model: a, layer_rang: [0, 1]}]",
        "slices[0].sources[0].layer_rang (did you mean 'layer_range'?)",
    ),
    (
        "merge_method: slerp\nslices:\n- sources: [{model: a}]",
        "slices[0].sources[0].layer_range is missing",
    ),
    (
        "merge_method: slerp\nslices:\n"
        "- {sources: [{model: a, layer_range: [0, 1]}], residual_weight: 1}",
        "residual_weight is not offered: mergekit reads it",
    ),
    (
        LINEAR + "experts: []",
        "experts is not offered: mixtures of experts are not made here",
    ),
    (
        LINEAR + "trust_remote_code: true",
        "trust_remote_code is not offered: code that comes with a model is never run",
    ),
    (
        LINEAR + "random_seed: 1",
        "random_seed is not offered: it is called seed",
    ),
    (
        "merge_method: linear\nmodules: {encoder: {models: [{model: a}]}}",
        "modules: encoder: a decoder has one module, called default",
    ),
    (
        "merge_method: linear\nmodels: [{model: {model: {path: a, revision: main}}}]",
        "revision is not offered: download the revision",
    ),
    (
        "merge_method: linear\nmodels: [{model: {model: {path: a}, lra: b}}]",
        "unknown key lra (did you mean 'lora'?)",
    ),
    (
        "merge_method: linear\nmodels: [{model: a@main}]",
        "a revision (@) is not offered",
    ),
    (
        "merge_method: linear\nmodels: [{model: [3]}]",
        "models[0].model: ['3'] is no model",
    ),
    (
        "merge_method: linear",
        "give one of models, slices, modules",
    ),
    (
        "merge_method: linear\nmodels: []",
        "models = []: list should have at least 1 item",
    ),
    (
        "models: [{model: a}]\ndtype: float32",
        "merge_method is missing",
    ),
    (
        LINEAR + "slices:\n- sources: [{model: a, layer_range: [0, 1]}]",
        "the recipe has models and slices; give one of",
    ),
    (
        LINEAR + "dtype: float3",
        "dtype = 'float3': input should be 'float32', 'bfloat16' or 'float16'",
    ),
    (
        LINEAR + "rounding: up",
        "rounding = 'up': input should be 'nearest' or 'stochastic'",
    ),
    (
        LINEAR + "tokenizer_source: base\ntokenizer: {source: base}",
        "tokenizer and tokenizer_source say the same",
    ),
    (
        LINEAR + "tokenizer_source: c",
        "the tokenizer's source is c, which is none of the models of the recipe (a, b)",
    ),
    (
        LINEAR + "tokenizer: {source: base, tokens: {x: {source: {kind: nought}}}}",
        "kind 'nought': expected zero or model_token",
    ),
    (
        LINEAR + "merge_method: ties",
        "the key merge_method is given twice",
    ),
    (
        "merge_method: [",
        "is not valid YAML",
    ),
    (
        "- a\n- b",
        "expected keys such as merge_method and models, got list",
    ),
    # parameters
    (
        "merge_method: greedy_soup\nmodels: [{model: a}]",
        "merge method greedy_soup needs validation data",
    ),
    (
        "merge_method: fisher\nmodels: [{model: a}, {model: b}, {model: c}, {model: d}]",
        "merge method fisher needs gradients of training examples",
    ),
    (
        "merge_method: tis\nmodels: [{model: a}]",
        "unknown merge_method 'tis' (did you mean 'ties'?)",
    ),
    (
        TIES + "parameters: {densty: 1}",
        "merge_method ties has no parameter 'densty' (did you mean 'density'?)",
    ),
    (
        TIES + "parameters: {t: 1}",
        "merge_method ties has no parameter 't'",
    ),
    (
        "merge_method: model_stock\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: 1}}, {model: b}]",
        "merge_method model_stock has no parameter 'weight'; it takes none",
    ),
    (
        "merge_method: ties\nbase_model: base\n"
        "models: [{model: a, parameters: {weight: 1, normalize: false}}]",
        "normalize below a: it is a parameter of the whole merge",
    ),
    (
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}]",
        "needs the parameter weight of every model; it is given nowhere",
    ),
    (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}]",
        "merge_method slerp needs the parameter t; it is given nowhere",
    ),
    (
        TIES + "parameters: {density: [{filter: mlp, valu: 1}]}",
        "parameters: density: unknown key valu (did you mean 'value'?)",
    ),
    (
        TIES + "parameters: {density: [{filter: mlp}]}",
        "has no value",
    ),
    (
        TIES + "parameters: {density: [1, {value: 2}]}",
        "a list holds numbers, or entries {filter, value}, not both",
    ),
    (
        TIES + "parameters: {density: null}",
        "density: None is no number",
    ),
    (
        TIES + "parameters: {density: .nan}",
        "nan is not finite",
    ),
    (
        TIES + "parameters: {density: half}",
        "density = 'half': expected a number",
    ),
    (
        TIES + "parameters: {density: 0}",
        "density = 0.0: input should be greater than 0",
    ),
    (
        TIES + "parameters: {normalize: 0.5}",
        "normalize = 0.5: expected true or false",
    ),
    (
        TIES + "parameters: {rescale: some}",
        "rescale = 'some': input should be",
    ),
    (
        TIES + "parameters: [1]",
        "parameters are names with values",
    ),
    (
        "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: 2.5}",
        "max_iter = 2.5: expected a whole number",
    ),
    (
        "merge_method: linear\n"
        "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: [-1, "
        "1]}}]",
        "must have a positive sum",
    ),
    (
        "merge_method: selection\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]",
        "weight is given for some models and not for others",
    ),
    (
        "merge_method: selection\nmodels: [{model: a}, {model: b}]\nparameters: {resample: 1}",
        "merge_method selection needs base_model here",
    ),
    (
        "merge_method: selection\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {granularity: elemnt}",
        "granularity = 'elemnt'",
    ),
    # structure
    (
        "merge_method: ties\nmodels: [{model: a, parameters: {weight: 1}}]",
        "merge_method ties needs base_model",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: a}]\nparameters: {weight: 1}",
        "model a is given twice; give each once",
    ),
    (
        "merge_method: slerp\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {t: 0.5}",
        "slerp takes 2 models, 3 were given",
    ),
    (
        "merge_method: passthrough\nmodels: [{model: a}, {model: b}]",
        "passthrough takes 1 models, 2 were given",
    ),
    (
        "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}]",
        "model_stock takes at least 2 models, 1 were given",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: short}]\nparameters: {weight: 1}",
        "num_layers is 4 and 2",
    ),
    (
        "merge_method: linear\nmodels: [{model: a}, {model: wide}]\nparameters: {weight: 1}",
        "hidden_size is 4 and 8",
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [2, 5]}]",
        "layer_range [2, 5] of a, which has 4 layers",
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [2, 2]}]",
        "layer_range [2, 2]",
    ),
    (
        "merge_method: linear\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 1]}]",
        "b gives 1 layers and a 2",
    ),
    (
        "merge_method: passthrough\nbase_model: base\nslices:\n"
        "- sources: [{model: a, layer_range: [0, 2]}]",
        "slices[0] lacks its base_model base among the sources",
    ),
    (
        "merge_method: linear\nmodels: [{model: ./nowhere, parameters: {weight: 1}}]",
        "nowhere not found",
    ),
]


@pytest.mark.parametrize(("text", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_name_what_is_wrong(root, text, message):
    def resolve(name):
        return root / name if (root / name).is_dir() else convert.resolve(name)

    with pytest.raises(UserError) as error:
        planner.plan_recipe(f"{text}\n", resolve=resolve)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_is_named_in_its_errors(tmp_path):
    with pytest.raises(UserError, match=r"recipe .*absent\.yml not found"):
        planner.plan_recipe(tmp_path / "absent.yml")
    (tmp_path / "r.yml").write_text("merge_method: linear\nmodel: []")
    with pytest.raises(UserError, match=r"r\.yml: unknown key model \(did you mean 'models'\?\)"):
        planner.plan_recipe(str(tmp_path / "r.yml"))
