"""Models that differ in positions, norms or windows: the base's values, with a note."""

import json
import shutil

import numpy as np
import pytest

from jax_ordermerge.arch import Rope
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources.storage import Directory
from tests.merge.recipe_models import make

YARN = Rope(theta=1e6, kind="yarn", factor=4.0, original_max_position_embeddings=64)
LLAMA3 = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_position_embeddings=64)
QWEN = {"family": "qwen2", "qkv_bias": True}


@pytest.fixture
def directory(tmp_path):
    make(tmp_path / "plain", 4, 0, max_position_embeddings=256)
    make(tmp_path / "theta", 4, 1, rope=Rope(theta=5e5), max_position_embeddings=1024)
    make(tmp_path / "llama3", 4, 2, rope=LLAMA3)
    make(tmp_path / "eps", 4, 3, rms_norm_eps=1e-5)
    make(tmp_path / "yarn", 4, 4, **QWEN, rope=YARN)
    make(tmp_path / "qwen", 4, 5, **QWEN, rope=Rope(theta=1e6))
    make(tmp_path / "window", 4, 6, **QWEN, sliding_window=9, full_attention_layers=(0, 1))
    make(tmp_path / "all", 4, 7, **QWEN, sliding_window=7)
    make(tmp_path / "mistral", 4, 8, family="mistral", sliding_window=128)
    make(tmp_path / "open", 4, 9, family="mistral", rope=Rope(theta=1e6))
    return tmp_path


@pytest.mark.parametrize(
    ("members", "base", "taken", "differences"),
    [
        (
            ["plain", "theta"],
            None,
            "plain",
            ["rope_theta 500000.0 and 10000.0", "max_position_embeddings 1024 and 256"],
        ),
        (
            ["plain", "theta"],
            "theta",
            "theta",
            ["rope_theta 10000.0 and 500000.0", "max_position_embeddings 256 and 1024"],
        ),
        (
            ["plain", "llama3"],
            "plain",
            "plain",
            [
                "rope_theta 500000.0 and 10000.0, rope_type 'llama3' and 'default',"
                " factor 8.0 and None, low_freq_factor 1.0 and None, high_freq_factor 4.0 and"
                " None, original_max_position_embeddings 64 and None"
            ],
        ),
        (["eps", "plain"], None, "eps", ["rms_norm_eps 1e-06 and 1e-05"]),
        (
            ["yarn", "qwen"],
            "yarn",
            "yarn",
            [
                "rope_type 'default' and 'yarn', factor None and 4.0,"
                " original_max_position_embeddings None and 64"
            ],
        ),
        (["qwen", "yarn"], "yarn", "yarn", ["rope_type 'default' and 'yarn'"]),
        (["mistral", "open"], None, "mistral", ["sliding_window None and 128", "rope_theta"]),
        (["mistral", "open"], "open", "open", ["sliding_window 128 and None", "rope_theta"]),
        (["qwen", "window"], "window", "window", ["sliding_window None and 9"]),
        (["window", "all"], "qwen", "qwen", ["sliding_window 9 and None", "7 and None"]),
        (["window", "all"], None, "window", ["sliding_window 7 and 9", "() and (0, 1)"]),
    ],
)
@pytest.mark.parametrize("form", ["models", "recipe"])
def test_the_base_decides_with_a_note(directory, form, members, base, taken, differences):
    def open_(name):
        return Directory(directory / name, name)

    if base is not None:
        shutil.copytree(directory / base, directory / "base")
    if form == "models":
        base_source = None if base is None else open_("base")
        merge_plan = plan.uniform([*map(open_, members)], base_source, method="average")
    else:
        recipe = {"merge_method": "linear", "models": [{"model": name} for name in members]}
        for entry in recipe["models"]:
            entry["parameters"] = {"weight": 1}
        if base is not None:
            recipe |= {"base_model": "base"}
        text = json.dumps(recipe, indent=1)
        merge_plan = planner.plan_recipe(text, resolve=lambda name: directory / name)
    expected, config = open_(taken).config, merge_plan.config
    for name in ("rope", "rms_norm_eps", "windows", "max_position_embeddings"):
        assert getattr(config, name) == getattr(expected, name)
    notes = "\n".join(merge_plan.notes)
    for difference in differences:
        assert difference in notes
    assert f"the merged model has the value of {taken if base is None else 'base'}" in notes


def test_models_that_agree_give_no_note(directory):
    make(directory / "yarn2", 4, 20, **QWEN, rope=YARN)
    sources = [Directory(directory / "yarn"), Directory(directory / "yarn2")]
    assert plan.uniform(sources, None, method="average").notes == ()


def test_yarn_is_carried_through_a_merge(directory):
    make(directory / "yarn2", 4, 20, **QWEN, rope=YARN)
    sources = [Directory(directory / "yarn"), Directory(directory / "yarn2")]
    engine.merge_plan(plan.uniform(sources, None, method="average"), directory / "out")
    raw = json.loads((directory / "out" / "config.json").read_text())
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert raw["rope_scaling"] == rope
    assert raw["rope_parameters"] == {**rope, "rope_theta": 1e6}
    assert raw["rope_theta"] == 1e6
    assert convert.load_config(directory / "out") == sources[0].config
    a, b, out = (Reader(directory / name) for name in ("yarn", "yarn2", "out"))
    for name in out.names:
        exact = (a.read(name).astype(np.float64) + b.read(name)) / 2
        np.testing.assert_array_equal(out.read(name), exact.astype(np.float32))


@pytest.mark.parametrize(
    ("slices", "full"),
    [
        # layers 0 and 1 of `window` see everything
        ([("window", 0, 4), ("window", 0, 4)], (0, 1, 4, 5)),
        ([("window", 2, 4), ("window", 1, 3)], (2,)),
        ([("window", 0, 2), ("all", 0, 2)], (0, 1)),
        ([("window", 2, 4)], ()),
        ([("window", 0, 2)], (0, 1)),
    ],
)
def test_slices_bring_their_layers_with_or_without_a_window(directory, slices, full):
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": name, "layer_range": [start, end]}]}
            for name, start, end in slices
        ],
    }
    merge_plan = planner.plan_recipe(json.dumps(recipe, indent=1), resolve=lambda n: directory / n)
    windows = merge_plan.config.windows
    assert [layer for layer, window in enumerate(windows) if window is None] == list(full)
    assert set(windows) <= {None, 9}


def test_slices_bring_their_layers_with_or_without_a_rope(directory):
    flags = {"family": "smollm3", "tie_embeddings": True}
    make(directory / "deep", 4, 21, **flags, no_rope_layers=(3,))
    make(directory / "flat", 2, 22, **flags, no_rope_layers=(0,))
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": name, "layer_range": list(layers)}]}
            for name, layers in (("deep", (2, 4)), ("flat", (0, 2)), ("deep", (0, 4)))
        ],
    }
    merge_plan = planner.plan_recipe(json.dumps(recipe, indent=1), resolve=lambda n: directory / n)
    assert merge_plan.config.no_rope_layers == (1, 2, 7)
    assert merge_plan.config.to_hf("float32")["no_rope_layers"] == [1, 0, 0, 1, 1, 1, 1, 0]


def test_factors_of_the_forward_pass_are_not_mixed(directory):
    flags = {"family": "granite", "attention_scale": 0.1, "residual_scale": 0.22}
    for name, divisor in (("eight", 8.0), ("sixteen", 16.0)):
        make(directory / name, 4, 23, **flags, logit_divisor=divisor)
    sources = [Directory(directory / name) for name in ("eight", "sixteen")]
    with pytest.raises(UserError, match=r"logit_divisor is 8\.0 and 16\.0"):
        plan.uniform(sources, None, method="average")


def test_other_families_are_still_refused(directory):
    sources = [Directory(directory / "plain"), Directory(directory / "open")]
    with pytest.raises(UserError, match="family is 'llama' and 'mistral'"):
        plan.uniform(sources, None, method="average")
