"""Mistakes of a merge are found before a model is downloaded."""

import huggingface_hub
import pytest

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.recipe import planner, rules
from tests.commands.test_cli import call
from tests.merge.recipe_models import make

MODELS = "models: [{model: org/a, parameters: {weight: 1}}, {model: org/b}]\n"
TIES = (
    f"merge_method: ties\nbase_model: org/base\n{MODELS}parameters: {{weight: 1, density: 0.5}}\n"
)
SLICES = (
    "merge_method: slerp\nbase_model: org/a\nparameters: {t: 0.5}\nslices:\n"
    "- sources: [{model: org/a, layer_range: [0, 2]}, {model: org/b, layer_range: [0, 2]}]\n"
)
# recipe -> part of the error
RECIPES = {
    TIES.replace("ties", "tise"): "unknown merge_method 'tise' (did you mean 'ties'?)",
    TIES.replace("density", "densty"): "no parameter 'densty' (did you mean 'density'?)",
    TIES.replace("0.5", "half"): "density = 'half': expected a number",
    TIES.replace("0.5", "true"): "density = True: expected a number",
    TIES.replace("weight: 1, ", "weight: 1e39, "): "must be finite numbers in float32",
    TIES.replace("0.5", "-1"): "density = -1.0: input should be greater than 0",
    # percent, say; mergekit takes it as 1
    TIES.replace("0.5", "20"): "density = 20.0: input should be less than or equal to 1",
    TIES.replace("0.5", "[{filter: mlp, value: [0.5, 1.1]}, {value: 1}]"): "density = 1.1: input",
    TIES.replace("{weight: 1}", "{density: 1.5}"): "density = 1.5: input should be less than",
    TIES.replace("0.5", "[0.5, {value: 1}]"): "not both",
    TIES.replace("0.5", "[{filter: mlp, value: [0.5, wide]}]"): "density = 'wide'",
    TIES.replace("base_model: org/base\n", ""): "merge_method ties needs base_model",
    TIES.replace("weight: 1, ", "").replace("{weight: 1}", "{}"): "needs the parameter weight",
    TIES + "dtype: bfloat61\n": "dtype",
    TIES + "rounding: stochastic\ndtype: float32\n": "rounding: stochastic is for bfloat16",
    TIES + "chat_template: chatlm\n": "chat_template 'chatlm' is not offered",
    TIES + "chat_template: '{% for m in messages %}{{ m.content }}'\n": "line 1: Unexpected end",
    TIES + "tokenizer_source: org/bse\n": "the tokenizer's source is org/bse, which is none of",
    TIES + "tokenizer: {source: org/bse}\n": "the tokenizer's source is org/bse",
    TIES + "tokenizer: {source: union, tokens: {x: {source: org/c}}}\n": "the source of token 'x'",
    TIES + "tokenizer: {tokens: {x: {source: {kind: model_token, model: org/c, token: y}}}}\n": (
        "the source of token 'x' is org/c"
    ),
    TIES + "tokeniser_source: union\n": "unknown key tokeniser_source",
    TIES.replace("{model: org/b}", "{model: org/b, parameters: {lambda: 1}}"): (
        "lambda below org/b: it is a parameter of the whole merge"
    ),
    "merge_method: average\nmodels: [{model: org/a, parameters: {normalize: 1}}]\n": (
        "normalize below org/a: it is a parameter of the whole merge"
    ),
    "merge_method: slerp\nbase_model: org/a\nmodels: [{model: org/a}, {model: org/b}]\n": (
        "needs the parameter t"
    ),
    "merge_method: slerp\nbase_model: org/a\nparameters: {t: .5}\n"
    "models: [{model: org/a}, {model: org/b}, {model: org/c}]\n": "takes 2 models, 3 were given",
    "merge_method: selection\nbase_model: org/a\nparameters: {resample: sometimes}\n"
    "models: [{model: org/b}, {model: org/c}]\n": "resample = 'sometimes'",
    "merge_method: linear\nmodels: [{model: org/a, parameters: {weight: 1}},"
    " {model: org/b, parameters: {weight: -1}}]\n": "must have a positive sum",
    "merge_method: average\nmodels: [{model: org/a, parameters: {weight: heavy}},"
    " {model: org/b, parameters: {weight: 1}}]\n": "weight = 'heavy': expected a number",
    "merge_method: selection\nbase_model: org/a\nmodels: [{model: org/b}, {model: org/c}]\n"
    "parameters: {resample: 1, granularity: layer}\n": "resample with granularity layer",
    "merge_method: greedy_soup\nmodels: [{model: org/b}, {model: org/c}]\n": (
        "greedy_soup needs validation data"
    ),
    "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: org/a}, {model: org/a}]\n": (
        "model org/a is given twice"
    ),
    SLICES.replace("[0, 2]}, {", "[2, 2]}, {"): "layer_range [2, 2] of org/a",
    SLICES.replace("[0, 2]}]", "[0, 3]}]"): "org/b gives 3 layers and org/a 2",
    SLICES.replace("base_model: org/a", "base_model: org/c"): "lacks its base_model org/c",
    SLICES.replace("t: 0.5", "t: {value: high}"): "t = 'high': expected a number",
    SLICES.replace("0.5", "5"): "t = 5.0: input should be less than or equal to 1",
    SLICES.replace("0.5", "[0, 0.5, -0.1]"): "t = -0.1: input should be greater than or equal to 0",
}
# method -> parameters of a recipe, and part of the error
PARAMETERS = {
    "breadcrumbs": ("gamma: 1", "gamma = 1.0: input should be less than 1"),
    "breadcrumbs_ties": ("gamma: -0.1", "gamma = -0.1: input should be greater than or equal to 0"),
    "dare_linear": ("density: 0", "density = 0.0: input should be greater than 0"),
    "dare_ties": ("density: 1.01", "density = 1.01: input should be less than or equal to 1"),
    # mergekit: density - epsilon and density + epsilon lie within (0, 1)
    "della": ("density: 0.9", "density = 0.9 and epsilon = 0.15 give probabilities from 0.75 to"),
    "della_linear": ("density: 0.5, epsilon: 0.5", "choose epsilon below 0.5"),
    "sce": ("select_topk: 2", "select_topk = 2.0: input should be less than or equal to 1"),
    "ram": ("epsilon: -1", "epsilon = -1.0: input should be greater than or equal to 0"),
    "ramplus_tl": ("alpha: -1", "alpha = -1.0: input should be greater than or equal to 0"),
    "karcher": ("max_iter: -1", "max_iter = -1: input should be greater than or equal to 0"),
    "multislerp": ("eps: -1", "eps = -1.0: input should be greater than or equal to 0"),
    "nuslerp": ("lerp_above: 2", "lerp_above = 2: input should be less than or equal to 1"),
    "model_stock": ("norm_floor: -1", "norm_floor = -1: input should be greater than or equal"),
    "consensus": ("k: 3", "k = 3 of 2 members keeps nothing"),
    "selection": ("child: 2", "child = 2, but 2 members have the children 0 to 1"),
}
RECIPES |= {
    f"merge_method: {method}\nbase_model: org/base\nmodels: [{{model: org/a}}, {{model: org/b}}]\n"
    f"parameters: {{{'weight: 1, ' if 'weight' in rules.find_rule(method).per_member else ''}"
    f"{parameters}}}\n": message
    for method, (parameters, message) in PARAMETERS.items()
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a local model, and a hub that must not be asked."""

    def download(name, **options):
        raise AssertionError(f"{name} was downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    make(tmp_path / "local", 2, 1)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_refused(capsys, expected, *arguments):
    assert call(*arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert expected in error


@pytest.mark.parametrize("text", RECIPES, ids=range(len(RECIPES)))
def test_a_wrong_recipe_costs_no_download(folder, capsys, text):
    (folder / "recipe.yml").write_text(text)
    assert_refused(capsys, RECIPES[text], "merge", "recipe.yml", "out")
    # nor does a mistake in the last recipe of several
    first = "name: first\nmerge_method: linear\nmodels: [{model: org/x, parameters: {weight: 1}}]\n"
    (folder / "stages.yml").write_text(f"{first}---\n{text}")
    assert_refused(capsys, RECIPES[text], "merge", "stages.yml", "out")
    assert sorted(path.name for path in folder.iterdir()) == ["local", "recipe.yml", "stages.yml"]


COMMANDS = {
    "merge org/a org/b --out out --method avrage": "unknown merge method 'avrage'",
    "merge org/a org/b --out out --method ties": "ties needs the base model",
    "merge org/a org/b --out out --method slerp --param t=high": "t = 'high'",
    "merge org/a org/b --out out --method average --param normalise=true": "'normalise'",
    "merge org/a org/b --out out --method slerp --param t=1.5": "t = 1.5: input should be less",
    "merge org/a org/b --out out --method ties --base org/c --param density=[0.5,2]": (
        "density = 2: input should be less than or equal to 1"
    ),
    "merge org/a org/b --out out --method ties --base org/c --param density=[0.5,0.5,1]": (
        "density = [0.5, 0.5, 1.0]: give one number for all of the 2 members, or one per member"
    ),
    "merge org/a org/b --out out --method average --weights 1": "1 weights for 2 members",
    "merge org/a org/b --out out --method average --weights 1,-1": "must have a positive sum",
    "merge org/a org/b org/c --out out --method nearswap --base org/a --param t=1": "takes 1 models",
    "merge org/a org/b --out out --method average --dtype half": "--dtype half",
    "merge org/a org/b --out out --method average --to gguf": "--to gguf: expected hf or orbax",
    "merge org/a org/b --out local --method average": "local is not empty",
    "merge recipe.yml .": ". is not empty",
    "merge recipe.yml /": "/ is not empty",
    "merge recipe.yml local": "local is not empty",
    # 255 bytes are a name, but files are written beside it first
    f"merge org/a org/b --out {'x' * 256}": "cannot be written (File name too long)",
    f"merge recipe.yml {'x' * 250}": "cannot be written (File name too long)",
    f"convert org/a {'x' * 250}": "cannot be written (File name too long)",
    "convert org/a new/..": "new/.. ends in ..",
    "merge recipe.yml out --to gguf": "--to gguf: expected hf or orbax",
    "merge org/a ./missing --out out --method average": "./missing not found",
    "merge org/a local+./missing --out out --method average": "./missing not found",
    "merge org/a org/b@main --out out --method average": "a revision (@) is not offered",
    "merge org/a org/b+c+d --out out --method average": "with one adapter",
    "diff org/a ./missing": "missing",
    "convert org/a out --to gguf": "out: expected a file that ends in .gguf",
    "convert org/a out --to onnx": "--to onnx",
    "convert org/a out --to peft": "--to peft goes with a member of a run",
    "convert org/a out --dtype half": "--dtype half",
    "convert org/a local": "local exists already",
    "convert org/a local/config.json/out": "which is a file; give a new directory",
    "convert org/a out --member 1": "--member goes with a run directory",
    "generate org/a --prompt x --dtype half": "--dtype half",
    "generate org/a": "neither is given",
    "evaluate org/a": "there are no tasks",
}


@pytest.mark.parametrize("line", COMMANDS)
def test_a_wrong_command_costs_no_download(folder, capsys, line):
    (folder / "recipe.yml").write_text(TIES)
    assert_refused(capsys, COMMANDS[line], *line.split())
    assert sorted(path.name for path in folder.iterdir()) == ["local", "recipe.yml"]


def test_what_is_on_this_machine_is_opened_first(folder, capsys):
    """A local model that is damaged costs no download either, wherever it is listed."""
    (folder / "local" / "model.safetensors").write_bytes(b"")
    (folder / "recipe.yml").write_text(TIES.replace("org/base", "./local"))
    assert_refused(capsys, "local/model.safetensors", "merge", "recipe.yml", "out")


def test_values_of_different_tensors_need_not_go_together(folder):
    """Resampling goes with no granularity `layer`; here they are of different tensors."""
    make(folder / "other", 2, 2)
    make(folder / "base", 2, 3)
    text = """
    merge_method: selection
    base_model: ./base
    models: [{model: local}, {model: other}]
    parameters:
      resample: [{filter: mlp, value: exhaustive}, {value: 0}]
      granularity: [{filter: mlp, value: element}, {value: layer}]
    """
    plan = planner.plan_recipe(text)
    seen = {(out.parameters["resample"], out.parameters["granularity"]) for out in plan.outputs}
    assert seen == {("exhaustive", "element"), (0, "layer")}
    together = text.replace("[{filter: mlp, value: exhaustive}, {value: 0}]", "exhaustive")
    with pytest.raises(UserError, match="resample with granularity layer"):
        planner.plan_recipe(together)


def test_two_spellings_of_one_model_are_one(folder):
    """The check without models must not refuse what is right once they are opened."""
    plan = planner.plan_recipe(
        "merge_method: slerp\nbase_model: ./local\nparameters: {t: 0.5}\n"
        "models: [{model: local}, {model: other}]\ntokenizer_source: ../"
        f"{folder.name}/local\n",
        resolve=lambda name: folder / "local" if "local" in name else make_other(folder),
    )
    assert len(plan.sources) == 2


def make_other(folder):
    return folder / "other" if (folder / "other").exists() else make(folder / "other", 2, 2)
