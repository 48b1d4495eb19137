"""Slices and vocabularies of models whose files have their tensors in the order of their names."""

import json

import numpy as np
import pytest

from jax_ordermerge.merge.recipe import planner
from tests.merge.test_unlisted import (
    CONFIG,
    EMBEDDING,
    linear,
    merge,
    refused,
    save,
    slices,
    tokenizer,
    two_towers,
)

HEAD = "lm_head.weight"  # stands before the embedding in a file that safetensors wrote


@pytest.fixture
def untied(tmp_path):
    """Two models with a head and positions, the second with four layers of text."""
    models = []
    for seed, layers in enumerate((3, 4)):
        tensors = two_towers(seed, layers)
        tensors[HEAD] = np.full((6, 4), seed, np.float32)
        tensors["model.wpe.weight"] = np.full((5, 4), seed, np.float32)
        text = {**CONFIG["text_config"], "num_hidden_layers": layers}
        text["layer_types"] = list(("abc", "defg")[seed])
        models.append(save(tmp_path / "mn"[seed], tensors, config={**CONFIG, "text_config": text}))
    return models


def test_what_is_before_the_layers_is_of_the_first_slice_and_the_head_of_the_last(untied, tmp_path):
    recipe = slices((untied[0], (0, 2)), (untied[1], (2, 4)), layers="model.layers")
    merged, _ = merge(recipe, tmp_path / "out")
    np.testing.assert_array_equal(merged[EMBEDDING], two_towers(0)[EMBEDDING])
    assert not merged["model.wpe.weight"].any()
    assert (merged[HEAD] == 1).all()
    # the entry of a layer is that of its own model, which may have more layers
    text = json.loads((tmp_path / "out/config.json").read_text())["text_config"]
    assert text["layer_types"] == ["a", "b", "f", "g"]


def test_a_list_per_layer_that_a_model_lacks_is_named(untied):
    text = {"num_hidden_layers": 4}
    save(untied[1], two_towers(1, 4), config={**CONFIG, "text_config": text})
    recipe = slices((untied[0], (0, 1)), (untied[1], (2, 4)), layers="model.layers")
    save(untied[0], two_towers(0))
    refused(recipe, "has no text_config.layer_types with an entry for each of its 4 layers")


def test_stacks_with_equally_many_layers_do_not_take_the_key_of_each_other(tmp_path):
    """As of Flux, where `num_layers` is of the first stack alone."""
    names = [f"{stack}.{i}.w.b" for stack in ("blocks", "single_blocks") for i in range(2)]
    tensors = {name: np.ones(2, np.float32) for name in names}
    config = {"_class_name": "Flux", "num_layers": 2, "num_single_layers": 2}
    model = save(tmp_path / "m", tensors, config=config)
    for stack, numbers in {"single_blocks": (2, 1), "blocks": (1, 2)}.items():
        content = planner.plan_recipe(slices((model, (0, 1)), layers=stack)).config.content
        assert (content["num_layers"], content["num_single_layers"]) == numbers


@pytest.mark.parametrize(
    ("layers", "keys", "stack", "expected", "noted"),
    [
        # as of Whisper and BART: in transformers `num_hidden_layers` is that of the encoder
        ((3, 2), ("encoder_layers", "decoder_layers"), "encoder", (1, 2, 1), False),
        ((3, 2), ("encoder_layers", "decoder_layers"), "decoder", (3, 1, 3), False),
        ((2, 2), ("encoder_layers", "decoder_layers"), "encoder", (1, 2, 2), True),
        # as of Mamba and Falcon: two names of one number
        ((3, 0), ("n_layer",), "encoder", (1, 1), False),
    ],
)
def test_every_key_with_the_number_of_layers_is_written(
    tmp_path, layers, keys, stack, expected, noted
):
    tensors = {
        f"{part}.layers.{i}.w.b": np.ones(2, np.float32)
        for part, count in zip(("encoder", "decoder"), layers, strict=True)
        for i in range(count)
    }
    config = dict(zip(keys, layers, strict=False)) | {"num_hidden_layers": layers[0]}
    model = save(tmp_path / "m", tensors, config={"model_type": "x", **config})
    plan = planner.plan_recipe(slices((model, (0, 1)), layers=f"{stack}.layers"))
    assert tuple(plan.config.content[key] for key in config) == expected
    note = "of config.json, num_hidden_layers are left as they were before slicing"
    assert (note in plan.notes) == noted


def test_integers_of_sliced_layers_are_compared(untied):
    for model, layers in zip(untied, (3, 4), strict=True):
        tensors = two_towers(0, layers)
        for layer in range(layers):
            tensors[f"model.layers.{layer}.attn.mask"] = np.array([1, 2, 3 + (layer == 3)])
        save(model, tensors, config=json.loads((model / "config.json").read_text()))

    def recipe(first, second):
        sources = [
            {"model": str(model), "layer_range": [layer, layer + 1]}
            for model, layer in zip(untied, (first, second), strict=True)
        ]
        parts = {"slices": [{"sources": sources}], "layers": "model.layers"}
        return {"merge_method": "linear", "parameters": {"weight": 1}, **parts}

    planner.plan_recipe(recipe(1, 2))
    names = "model.layers.1.attn.mask and model.layers.3.attn.mask"
    refused(recipe(1, 3), f"differ in {names}, which holds int64")


def test_a_named_embedding_is_of_the_first_slice(untied, tmp_path):
    for seed, model in enumerate(untied):
        tensors = {**two_towers(seed), "table": np.full((6, 4), seed, np.float32)}
        save(model, tensors, config={**CONFIG, "model_type": "x"})
    keys = {"layers": "model.layers", "embedding": "table"}
    merged, _ = merge(slices((untied[0], (0, 2)), (untied[1], (2, 3)), **keys), tmp_path / "out")
    assert not merged["table"].any()


def test_vocabularies_are_aligned_whatever_the_order_in_the_files(tmp_path):
    models = []
    for seed, (tokens, dtype) in enumerate([("abcdef", np.float32), ("bacdef", np.float64)]):
        tensors = {**two_towers(seed), HEAD: two_towers(seed + 2)[EMBEDDING]}
        # a file has its wider tensors first: the embedding stands before the head in one of two
        tensors[EMBEDDING] = tensors[EMBEDDING].astype(dtype)
        files = {"tokenizer.json": tokenizer(tokens)}
        models.append(save(tmp_path / "mn"[seed], tensors, files=files))
    merged, _ = merge(linear(*models, dtype="float32"), tmp_path / "out")
    first, second = (two_towers(seed)[EMBEDDING] for seed in (0, 1))
    expected = (first + second[[1, 0, 2, 3, 4, 5]]) / 2
    np.testing.assert_allclose(merged[EMBEDDING], expected, rtol=1e-5)


def test_a_number_of_rows_that_no_key_of_the_config_has_is_noted(tmp_path):
    models = []
    for seed, tokens in enumerate(("abcdef", "gabcdef")):
        tensors = {**two_towers(seed), EMBEDDING: np.ones((len(tokens), 4), np.float32)}
        files = {"tokenizer.json": tokenizer(tokens)}
        text = {"num_hidden_layers": 3}  # transformers leaves out what is the default
        config = {**CONFIG, "text_config": text}
        models.append(save(tmp_path / "mn"[seed], tensors, config=config, files=files))
    keys = {"embedding": EMBEDDING, "tokenizer_source": str(models[1])}
    _, plan = merge(linear(*models, **keys), tmp_path / "out")
    text = " ".join(plan.notes)
    assert "has 7 rows in place of 6, and config.json has no vocab_size of 6 to change" in text
