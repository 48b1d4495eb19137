"""Files beside the weights of unlisted architectures, and notes on what a merge leaves out."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_ordermerge.checkpoint.shards import ShardFiles
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner
from tests.merge.test_unlisted import adapter, linear, merge, save, two_towers


@pytest.fixture
def pair(tmp_path):
    return [save(tmp_path / name, two_towers(seed)) for seed, name in enumerate("mn")]


def test_weights_in_other_forms_are_named_and_not_copied(pair, tmp_path):
    stale = ["tf_model.h5", "rust_model.ot", "flax_model.msgpack", "model.onnx"]
    records = ["mergekit_config.yml", "eval_results.json", "runs/events.out.tfevents.1"]
    save(pair[0], two_towers(0), files=dict.fromkeys([*stale, *records, "vocab.txt"], "x"))
    _, plan = merge(linear(*pair), tmp_path / "out")
    note = "not read beside model.safetensors: flax_model.msgpack, model.onnx, rust_model.ot and 1"
    assert any(note in text for text in plan.notes)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "vocab.txt" in names
    assert not names & {*stale, "mergekit_config.yml", "eval_results.json", "runs"}


def test_tensors_of_several_dtypes_are_aligned(tmp_path):
    shapes = {"a": (3,), "b": (2,), "c": (1,), "d": (5,)}
    dtypes = {"b": np.dtype("float32"), "c": np.dtype("int64")}
    ShardFiles(tmp_path, shapes, "bfloat16", dtypes=dtypes).create()
    data = (tmp_path / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header.pop("__metadata__")
    starts = {name: row["data_offsets"][0] for name, row in header.items()}
    assert starts == {"c": 0, "b": 8, "a": 16, "d": 22}


def test_tensors_that_a_spectral_method_only_averages_are_named(pair):
    recipe = linear(*pair, merge_method="iso_c", base_model=str(pair[0]))
    plan = planner.plan_recipe(recipe)
    assert "averaged, since they are no matrices: visual.conv1.weight" in plan.notes
    assert not any("no matrices" in note for note in planner.plan_recipe(linear(*pair)).notes)


def test_an_adapter_that_pytorch_wrote_is_merged_where_pickles_are_allowed(tmp_path):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    models = [adapter(tmp_path / name, seed) for seed, name in enumerate("mn")]
    stored = [load_file(model / "adapter_model.safetensors") for model in models]
    for model, tensors in zip(models, stored, strict=True):
        (model / "adapter_model.safetensors").unlink()
        pickled = {name: torch.tensor(values) for name, values in tensors.items()}
        torch.save(pickled, model / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model\.bin is a pickle of PyTorch"):
        planner.plan_recipe(linear(*models))
    plan = planner.plan_recipe(linear(*models), allow_bin=True)
    engine.merge_plan(plan, tmp_path / "out")
    merged = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, values in merged.items():
        np.testing.assert_allclose(values, (stored[0][name] + stored[1][name]) / 2, rtol=1e-6)


def test_lists_of_adapters_may_hold_anything(tmp_path):
    entries = [{"pattern": "q"}, {"pattern": "k"}, 3]
    first = adapter(tmp_path / "a", 0, target_parameters=entries)
    second = adapter(tmp_path / "b", 1, target_parameters=entries[::-1])
    assert planner.plan_recipe(linear(first, second)).outputs


def test_keys_to_ignore_are_refused_where_no_key_is_checked(pair):
    message = (
        r"ignored keys my_note: .*/m is of an architecture whose config\.json is taken as it is"
    )
    with pytest.raises(UserError, match=message):
        planner.plan_recipe(linear(*pair), ignore=["my_note"])
