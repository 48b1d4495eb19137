"""Checkpoints of architectures that are not in the tensor table: names, layers, dtypes, files."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from jax_ordermerge.arch import unlisted
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner
from tests.commands.test_cli import call

BF16 = ml_dtypes.bfloat16
EMBEDDING = "model.embed_tokens.weight"
CONFIG = {
    "model_type": "two_towers",
    "torch_dtype": "float32",
    "text_config": {
        "vocab_size": 6,
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "c"],
        "first_k_dense_replace": 1,
    },
    "vision_config": {"depth": 2},
}


def two_towers(seed, layers=3):
    """A text stack and a vision stack, with experts, a convolution, a scalar and buffers."""
    generator = np.random.default_rng(seed)
    shapes = {
        EMBEDDING: (6, 4),
        "visual.conv1.weight": (2, 3, 2, 2),
        "logit_scale": (),
        "nothing.weight": (0, 4),
        "classifier.0.weight": (4, 4),
    }
    for layer in range(layers):
        shapes[f"model.layers.{layer}.attn.q.weight"] = (4, 4)
        shapes[f"model.layers.{layer}.experts.0.up.weight"] = (2, 4)
        shapes[f"model.layers.{layer}.scale"] = (4,)
    for layer in range(2):
        shapes[f"visual.blocks.{layer}.norm.weight"] = (4,)
    tensors = {
        name: np.asarray(generator.normal(size=shape), np.float32) for name, shape in shapes.items()
    }
    return {**tensors, "position_ids": np.arange(5)}


def save(directory, tensors, *, config=CONFIG, stem="model", files=()):
    directory.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    for name, text in dict(files).items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    safetensors.numpy.save_file(tensors, directory / f"{stem}.safetensors")
    return directory


@pytest.fixture
def pair(tmp_path):
    return [save(tmp_path / name, two_towers(seed)) for seed, name in enumerate("ab")]


def linear(*models, **keys):
    return {
        "merge_method": "linear",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"weight": 1},
        **keys,
    }


def merge(recipe, out, stem="model"):
    plan = planner.plan_recipe(recipe)
    engine.merge_plan(plan, out)
    return safetensors.numpy.load_file(out / f"{stem}.safetensors"), plan


def refused(recipe, *parts):
    with pytest.raises(UserError) as error:
        planner.plan_recipe(recipe)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


# ---------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("names", "stacks"),
    [
        (["conv1.weight", "bn1.weight", "fc.bias"], {}),
        (["layer1.0.conv1.weight", "layer1.1.conv1.weight", "layer2.0.conv1.weight"],
         {"layer1": 2}),
        (["block.0.layer.0.k.w", "block.11.layer.0.k.w"], {}),  # a gap: layers are missing
        (["encoder.block.0.layer.0.k.w", "encoder.block.1.layer.0.k.w", "decoder.block.0.layer.0.w"],
         {"encoder.block": 2}),
        (["h.0.experts.0.up.w", "h.0.experts.1.up.w", "h.1.experts.0.up.w"], {"h": 2}),
        # a wrapper of one module, and a list of parameters
        (["0.model.layers.0.mlp.w", "0.model.layers.1.mlp.w"], {"0.model.layers": 2}),
        (["mid.attentions.0.blocks.0.q.w", "mid.attentions.0.blocks.1.q.w"],
         {"mid.attentions.0.blocks": 2}),
        (["norms.0.weight", "norms.1.weight"], {}),
        (["layers.1.a.w", "layers.2.a.w"], {}),
        (["layers.0.a.w", "layers.00.a.w"], {}),
    ],
)  # fmt: skip
def test_stacks_of_layers(names, stacks):
    assert unlisted.find_stacks(names) == stacks


def test_every_tensor_is_merged_or_copied(pair, tmp_path):
    merged, plan = merge(linear(*pair), tmp_path / "out")
    first, second = map(two_towers, (0, 1))
    assert merged.keys() == first.keys()
    for name, values in merged.items():
        expected = first[name]
        if name != "position_ids":
            expected = (first[name].astype(np.float64) + second[name]) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-7)
        assert values.shape == expected.shape
    assert json.loads((tmp_path / "out/config.json").read_text()) == CONFIG
    text = " ".join(plan.notes)
    assert "model.layers (3), visual.blocks (2)" in text
    assert "copied, since they are no real numbers: position_ids" in text


def test_the_order_of_files_and_tensors_does_not_matter(pair, tmp_path):
    expected, _ = merge(linear(*pair), tmp_path / "one")
    tensors = two_towers(1)
    names = sorted(tensors, reverse=True)
    shards = {"model-2.safetensors": names[::2], "model-1.safetensors": names[1::2]}
    (pair[1] / "model.safetensors").unlink()
    for file, part in shards.items():
        safetensors.numpy.save_file({name: tensors[name] for name in part}, pair[1] / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (pair[1] / "model.safetensors.index.json").write_text(json.dumps(index))
    merged, _ = merge(linear(*pair), tmp_path / "two")
    assert {name: x.tobytes() for name, x in merged.items()} == {
        name: x.tobytes() for name, x in expected.items()
    }
    (pair[1] / "model-1.safetensors").unlink()
    refused(linear(*pair), "names the shard model-1.safetensors, which is absent")


def change(name, values):
    return lambda tensors: {**tensors, name: values}


def without(name):
    return lambda tensors: {key: x for key, x in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (without("logit_scale"), ["/a has logit_scale, ", "/b has not"]),
        (change("extra.weight", np.ones(2, np.float32)), ["/b has extra.weight", "/a has not"]),
        (without(EMBEDDING), ["may tie it to another tensor"]),
        (change("model.layers.1.scale", np.ones(5, np.float32)),
         ["model.layers.1.scale is [4] in", "and [5] in"]),
        (change("position_ids", np.arange(1, 6)), ["differ in position_ids, which holds int64"]),
        (change("position_ids", np.ones(5, np.float32)), ["position_ids is int64 in", "float32 in"]),
        (change("position_ids", np.arange(5, dtype=np.int32)), ["int64 in", "and int32 in"]),
        (change("logit_scale", np.ones((), np.float16)),
         ["logit_scale is stored in float32", "and float16", "with dtype"]),
        (change("logit_scale", np.ones((), np.float64)), ["float64", "with dtype"]),
        (change("q.weight", np.ones((2, 2), ml_dtypes.float8_e4m3fn)),
         ["q.weight is quantized (stored in float8_e4m3fn)", "dequantize"]),
        (change("q.weight", np.ones((2, 2), np.int8)), ["q.weight is quantized (stored in int8)"]),
        (change("q.qweight", np.ones((2, 2), np.int32)), ["q.qweight is quantized"]),
        (change("q.weight_scale_inv", np.ones(2, np.float32)), ["q.weight_scale_inv is quantized"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_by_name(pair, edit, parts):
    save(pair[1], edit(two_towers(1)))
    refused(linear(*pair), *parts)


def test_a_quantized_config_is_refused(pair):
    save(pair[1], two_towers(1), config={**CONFIG, "quantization_config": {"quant_method": "awq"}})
    refused(linear(*pair), "is quantized (config.json: quantization_config, awq)", "dequantize")


def test_other_architectures_are_refused(pair, tmp_path):
    save(pair[1], two_towers(1), config={**CONFIG, "model_type": "other"})
    refused(linear(*pair), "are of different architectures: two_towers and other")
    listed = save(tmp_path / "listed", two_towers(2), config={"model_type": "llama"})
    refused(linear(pair[0], listed), "config.json")


def test_a_class_of_a_listed_family_with_another_head(tmp_path):
    config = {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}
    models = [
        save(tmp_path / name, {"score.weight": np.full((2, 2), seed, np.float32)}, config=config)
        for seed, name in enumerate("ab")
    ]
    merged, _ = merge(linear(*models), tmp_path / "out")
    assert (merged["score.weight"] == 0.5).all()


# --------------------------------------------------------------------------------------- dtypes


def mixed(seed):
    tensors = {name: np.asarray(x, BF16) for name, x in two_towers(seed).items()}
    tensors["position_ids"] = np.arange(5)
    return {**tensors, "router.weight": two_towers(seed)["classifier.0.weight"]}


def test_each_tensor_keeps_its_dtype(tmp_path):
    config = {**CONFIG, "torch_dtype": "bfloat16"}
    models = [save(tmp_path / name, mixed(seed), config=config) for seed, name in enumerate("ab")]
    merged, plan = merge(linear(*models), tmp_path / "out")
    assert {name: x.dtype for name, x in merged.items()} == {
        name: x.dtype for name, x in mixed(0).items()
    }
    expected = (mixed(0)["router.weight"] + mixed(1)["router.weight"].astype(np.float64)) / 2
    np.testing.assert_allclose(merged["router.weight"], expected, rtol=1e-6)
    assert any("keep the dtypes in which they are stored" in note for note in plan.notes)
    assert "dtype" not in plan.recipe  # the recipe beside the result gives the same again
    # with a dtype all are rounded to it, also what the config says
    merged, plan = merge(linear(*models, dtype="float32"), tmp_path / "wide")
    assert {x.dtype.name for x in merged.values()} == {"float32", "int64"}
    assert json.loads((tmp_path / "wide/config.json").read_text())["torch_dtype"] == "float32"
    merged, plan = merge(linear(*models, dtype="bfloat16"), tmp_path / "narrow")
    assert merged["router.weight"].dtype == BF16
    assert any("stored in float32 and rounded to bfloat16: router.weight" in x for x in plan.notes)
    refused(linear(*models, rounding="stochastic"), "router.weight: rounding: stochastic")


# --------------------------------------------------------------------------------------- layers


def test_gradients_and_filters_follow_each_stack(pair):
    weight = [{"filter": "experts", "value": 7}, {"value": [1, 3]}]
    models = [{"model": str(pair[0]), "parameters": {"weight": weight}}, {"model": str(pair[1])}]
    plan = planner.plan_recipe(linear(models=models))
    weights = {output.name: float(output.weights[0]) for output in plan.outputs}
    assert [weights[f"model.layers.{layer}.attn.q.weight"] for layer in range(3)] == [1, 2, 3]
    assert [weights[f"visual.blocks.{layer}.norm.weight"] for layer in range(2)] == [1, 3]
    assert weights["model.layers.2.experts.0.up.weight"] == 7
    assert weights["classifier.0.weight"] == weights["logit_scale"] == 1


def slices(*ranges, **keys):
    parts = [
        {"sources": [{"model": str(model), "layer_range": list(layers)}]}
        for model, layers in ranges
    ]
    return {"merge_method": "passthrough", "slices": parts, **keys}


def test_slices_are_of_one_stack(pair, tmp_path):
    recipe = slices((pair[0], (0, 2)), (pair[1], (1, 3)), layers="model.layers")
    merged, plan = merge(recipe, tmp_path / "out")
    assert any("first_k_dense_replace are left as they were" in note for note in plan.notes)
    first, second = map(two_towers, (0, 1))
    for layer, (tensors, number) in enumerate([(first, 0), (first, 1), (second, 1), (second, 2)]):
        for rest in ("attn.q.weight", "experts.0.up.weight", "scale"):
            expected = tensors[f"model.layers.{number}.{rest}"]
            np.testing.assert_array_equal(merged[f"model.layers.{layer}.{rest}"], expected)
    # the embedding as in the first slice, what is outside of the layers as in the last
    np.testing.assert_array_equal(merged[EMBEDDING], first[EMBEDDING])
    np.testing.assert_array_equal(merged["classifier.0.weight"], second["classifier.0.weight"])
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["num_hidden_layers"] == 4
    assert text["layer_types"] == ["a", "b", "b", "c"]
    recipe = slices((pair[0], (0, 1)), layers="visual.blocks")
    merge(recipe, tmp_path / "vision")
    config = json.loads((tmp_path / "vision/config.json").read_text())
    assert config["vision_config"] == {"depth": 1}
    assert config["text_config"] == CONFIG["text_config"]


def test_slices_that_are_not_clear_are_refused(pair):
    ranges = [(pair[0], (0, 2))]
    refused(
        slices(*ranges), "2 stacks of layers: model.layers (3 layers), visual.blocks (2 layers)"
    )
    refused(slices(*ranges, layers="model.layer"), "has no stack model.layer", "model.layers")
    refused(slices((pair[0], (1, 4)), layers="model.layers"), "which has 3 layers")
    refused(linear(*pair, layers="model.layers"), "layers names the stack that slices are of")
    tensors = two_towers(1)
    save(pair[1], {**tensors, "model.layers.1.gate.weight": np.ones(2, np.float32)})
    recipe = linear(parameters={"weight": 1}, layers="model.layers")
    del recipe["models"]
    recipe["slices"] = [
        {"sources": [{"model": str(model), "layer_range": [1, 2]} for model in pair]}
    ]
    refused(recipe, "layer 1 of", "have other tensors: gate.weight is in one of them")
    save(pair[0], two_towers(0), config={"model_type": "two_towers"})
    refused(
        slices(*ranges, layers="model.layers"), "config.json has no one key with their number, 3"
    )


# ---------------------------------------------------------------------------------- vocabularies


def tokenizer(tokens):
    return json.dumps({"model": {"vocab": {token: i for i, token in enumerate(tokens)}}})


def test_vocabularies_are_aligned_where_the_embedding_is_known_or_named(pair, tmp_path):
    files = {"tokenizer.json": tokenizer("abcdef"), "spiece.model": "of a", "processor.json": "{}"}
    save(pair[0], two_towers(0), files=files)
    tensors = two_towers(1)
    tensors[EMBEDDING] = np.arange(28, dtype=np.float32).reshape(7, 4)
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": 7}}
    save(pair[1], tensors, config=config, files={"tokenizer.json": tokenizer("gabcdef")})
    merged, plan = merge(linear(*pair), tmp_path / "out")
    rows = two_towers(0)[EMBEDDING]
    expected = (rows + tensors[EMBEDDING][1:].astype(np.float64)) / 2
    np.testing.assert_allclose(merged[EMBEDDING], expected, rtol=1e-6)
    assert any("which the merged vocabulary has not" in note for note in plan.notes)
    merged, _ = merge(linear(*pair, tokenizer_source=str(pair[1])), tmp_path / "wide")
    assert len(merged[EMBEDDING]) == 7
    text = json.loads((tmp_path / "wide/config.json").read_text())["text_config"]
    assert text["vocab_size"] == 7
    assert (tmp_path / "wide/tokenizer.json").read_text() == tokenizer("gabcdef")
    assert (tmp_path / "wide/processor.json").is_file()
    assert not (tmp_path / "wide/spiece.model").exists()  # it is of the other tokenizer
    # under a name that nobody knows
    for model in pair:
        stored = safetensors.numpy.load_file(model / "model.safetensors")
        stored["lookup.table"] = stored.pop(EMBEDDING)
        save(model, stored, config={**CONFIG, "model_type": "x"})
    refused(linear(*pair), "lookup.table is [6, 4] in", "embedding: NAME")
    named, _ = merge(linear(*pair, embedding="lookup.table"), tmp_path / "named")
    np.testing.assert_allclose(named["lookup.table"], expected, rtol=1e-6)
    refused(linear(*pair, embedding="lookup"), "has no tensor lookup")
    refused(linear(*pair, embedding=[]), "embedding")


def test_keys_of_unlisted_models_are_refused_for_listed_ones():
    models = [{"model": "embedded:quickstart"}]
    refused(linear(models=models, embedding="a"), "embedding and layers are for architectures")


# ----------------------------------------------------------------------------------------- files


def test_files_of_the_base_come_along(pair, tmp_path):
    files = {
        "preprocessor_config.json": "{}",
        "generation_config.json": '{"max_length": 3}',
        "spiece.model": "x",
        "modeling_own.py": "raise SystemExit('it was run')",
        "1_Pooling/config.json": "{}",
        "README.md": "the card of the base",
    }
    base = save(tmp_path / "base", two_towers(2), files=files)
    save(base / "2_Dense", {"w": np.ones(2, np.float32)})
    save(base, two_towers(2), stem="consolidated")
    recipe = linear(*pair, merge_method="task_arithmetic", base_model=str(base))
    _, plan = merge(recipe, tmp_path / "out")
    for name, text in files.items():
        if name != "README.md":
            assert (tmp_path / "out" / name).read_text() == text
    card = (tmp_path / "out/README.md").read_text()
    assert "pipeline_tag" not in card
    assert "2 models of one architecture" in card
    assert not (tmp_path / "out/2_Dense").exists()
    text = " ".join(plan.notes)
    assert "/a and " in text
    assert "have not the same 1_Pooling/config.json, generation_config.json" in text
    assert "modeling_own.py: code of the model is copied, and was not run" in text
    assert "2_Dense: has weights of its own" in text
    assert "base: not read beside model.safetensors: consolidated.safetensors" in text


def test_single_files_are_merged(pair, tmp_path):
    files = [model / "model.safetensors" for model in pair]
    out = tmp_path / "out"
    assert call("merge", *files, "--out", out) == 0
    expected = (two_towers(0)["logit_scale"] + two_towers(1)["logit_scale"]) / 2
    merged = safetensors.numpy.load_file(out / "model.safetensors")
    np.testing.assert_allclose(merged["logit_scale"], expected, rtol=1e-6)
    assert not (out / "config.json").exists()


def test_configs_that_differ_are_named(pair):
    save(pair[1], two_towers(1), config={**CONFIG, "vision_config": {"depth": 2, "heads": 4}})
    plan = planner.plan_recipe(linear(*pair))
    assert any("differ: vision_config.heads 4 and None" in note for note in plan.notes)


def test_diffusers_names_its_files_otherwise(tmp_path):
    tensors = {"conv_in.weight": np.ones((2, 2, 3, 3), np.float32)}
    config = {"_class_name": "UNet2DConditionModel"}
    for name in "ab":
        save(tmp_path / name / "unet", tensors, config=config, stem="diffusion_pytorch_model")
        (tmp_path / name / "model_index.json").write_text("{}")
    models = [tmp_path / name / "unet" for name in "ab"]
    merged, _ = merge(linear(*models), tmp_path / "out", "diffusion_pytorch_model")
    assert merged.keys() == tensors.keys()
    assert "library_name: diffusers" in (tmp_path / "out/README.md").read_text()
    refused(linear(tmp_path / "a", tmp_path / "b"), "is a pipeline of several models", "/a/unet")


# -------------------------------------------------------------------------------------- adapters


def adapter(directory, seed, **settings):
    generator = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{prefix}.lora_A.weight": generator.normal(size=(2, 4)).astype(np.float32),
        f"{prefix}.lora_B.weight": generator.normal(size=(4, 2)).astype(np.float32),
    }
    save(directory, tensors, config=None, stem="adapter_model")
    content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**content, **settings}))
    return directory


def test_adapters_are_merged_as_adapters(tmp_path):
    first = adapter(tmp_path / "a", 0, base_model_name_or_path="one")
    other = {"target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.1, "use_dora": False}
    second = adapter(tmp_path / "b", 1, **other)
    merged, plan = merge(linear(first, second), tmp_path / "out", "adapter_model")
    parts = [safetensors.numpy.load_file(x / "adapter_model.safetensors") for x in (first, second)]
    for name, values in merged.items():
        expected = (parts[0][name].astype(np.float64) + parts[1][name]) / 2
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert not (tmp_path / "out/config.json").exists()
    assert (tmp_path / "out/adapter_config.json").is_file()
    text = " ".join(plan.notes)
    assert "is not the average of the products B A" in text
    assert "/b is of the base None" in text


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"r": 4}, "differ in r: 2 and 4"),
        ({"lora_alpha": 8}, "differ in lora_alpha: 4 and 8"),
        ({"target_modules": ["q_proj"]}, "differ in target_modules"),
        ({"use_rslora": True}, "differ in use_rslora: None and True"),
        ({"rank_pattern": {"q": 1}}, "differ in rank_pattern.q"),
        ({"init_lora_weights": "pissa"}, "differ in init_lora_weights"),
        ({"peft_type": "LOHA"}, "different architectures: LORA and LOHA"),
    ],
)
def test_adapters_of_other_forms_are_refused(tmp_path, settings, part):
    first, second = adapter(tmp_path / "a", 0), adapter(tmp_path / "b", 1, **settings)
    refused(linear(first, second), part)


def test_an_adapter_beside_a_model_is_refused(pair, tmp_path):
    lone = adapter(tmp_path / "lora", 0)
    refused(linear(pair[0], lone), "lora is an adapter; give the model that it belongs to")
    refused(linear(f"{pair[0]}+{lone}"), "config.json", "two_towers")


# --------------------------------------------------------------------------------- command line


def test_the_command_line(pair, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert call("merge", *pair, "--out", out, "--method", "average") == 0
    assert "two_towers is not in the table of architectures" in capsys.readouterr().err
    merged = safetensors.numpy.load_file(out / "model.safetensors")
    expected = (two_towers(0)["logit_scale"] + two_towers(1)["logit_scale"]) / 2
    np.testing.assert_allclose(merged["logit_scale"], expected, rtol=1e-6)
    assert call("inspect", out) == 0
    text = capsys.readouterr().out
    assert "layers: model.layers.0 to model.layers.2" in text
    assert "visual.blocks.0 to visual.blocks.1" in text
    assert call("merge", *pair, "--out", tmp_path / "orbax", "--to", "orbax") == 2
    assert "--to orbax is for architectures in the table" in capsys.readouterr().err
    assert not (tmp_path / "orbax").exists()
    # the recipe beside the result gives it again
    monkeypatch.chdir(tmp_path)
    pathlib.Path("recipe.yml").write_text(json.dumps(linear("a", "b", embedding=EMBEDDING)))
    assert call("merge", "recipe.yml", "first") == 0
    assert call("merge", "first/merge_config.yaml", "second") == 0
    stored = [pathlib.Path(name, "model.safetensors").read_bytes() for name in ("first", "second")]
    assert stored[0] == stored[1]
    assert call("inspect", adapter(tmp_path / "lora", 0)) == 0
    assert "lora_A.weight" in capsys.readouterr().out
