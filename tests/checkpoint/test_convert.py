"""Hugging Face -> parameters -> Hugging Face, also by Orbax, gives the same bytes on every mesh."""

import dataclasses
import importlib.resources
import json

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub import errors

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh

MESHES = {"none": None, "2x2x2": (2, 2, 2), "1x8x1": (1, 8, 1)}


def mesh_of(name: str):
    return None if MESHES[name] is None else make_mesh(*MESHES[name])


def assert_same_bytes(directory, arrays) -> None:
    reader = Reader(directory)
    assert set(reader.names) == set(arrays)
    for name, array in arrays.items():
        assert reader.read(name).dtype == array.dtype
        assert reader.read(name).tobytes() == array.tobytes(), name


def flushed(array: np.ndarray) -> np.ndarray:
    """Return the array as a multiplication by XLA on CPU leaves it: denormals become zero."""
    return np.where(np.abs(array) < np.finfo(np.float32).tiny, array * np.float32(0), array)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("kind", "dtype", "shards"),
    [
        ("untied", "float32", 1),
        ("untied", "bfloat16", 3),
        ("tied", "float32", 3),
        ("tied", "bfloat16", 1),
        ("qwen2", "bfloat16", 2),
    ],
)
def test_hf_to_params_to_orbax_to_hf(make_directory, tmp_path, mesh, kind, dtype, shards):
    directory, config, arrays = make_directory(kind, dtype, shards)
    loaded, params = convert.load_params(directory, mesh_of(mesh))
    assert loaded == config
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
    convert.export(
        params, config, tmp_path / "direct", dtype=dtype, shard_bytes=10**9 if shards == 1 else 3000
    )
    assert_same_bytes(tmp_path / "direct", arrays)

    orbax.save(tmp_path / "orbax", 3, {"params": params})
    # onto another mesh: a checkpoint does not depend on the mesh that wrote it
    other_mesh = mesh_of("1x8x1" if mesh == "2x2x2" else "2x2x2")
    restored = orbax.restore(
        tmp_path / "orbax", 3, {"params": convert.abstract_params(config, other_mesh)}
    )
    convert.export(restored["params"], config, tmp_path / "over_orbax", dtype=dtype)
    assert_same_bytes(tmp_path / "over_orbax", arrays)


@pytest.mark.parametrize("mesh", MESHES)
def test_loading_in_bfloat16_rounds_once(make_directory, mesh):
    directory, _, arrays = make_directory("untied", "float32")
    config, params = convert.load_params(directory, mesh_of(mesh), dtype=jnp.bfloat16)
    flat = tree.flatten(params)
    for name, spec, layer in arch.hf_tensors(config):
        array = flat[spec.path] if layer is None else flat[spec.path][layer]
        assert np.asarray(array).tobytes() == arrays[name].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("mesh", MESHES)
def test_population_round_trip(make_directory, tmp_path, mesh):
    directory, config, arrays = make_directory("tied", "float32")
    _, population = convert.load_params(directory, mesh_of(mesh), members=4)
    chex.assert_trees_all_equal_shapes_and_dtypes(
        population, convert.abstract_params(config, members=4)
    )
    scale = jnp.array([1.0, -2.0, 4.0, -8.0])  # powers of two: exact
    population = jax.tree.map(lambda x: x * scale.reshape(4, *(1,) * (x.ndim - 1)), population)
    for member in (0, 3):
        convert.export(population, config, tmp_path / str(member), dtype="float32", member=member)
        assert_same_bytes(
            tmp_path / str(member),
            {n: np.float32([1, -2, 4, -8][member]) * flushed(a) for n, a in arrays.items()},
        )


def test_arrays_are_placed_by_the_tensor_table(make_directory):
    directory, config, _ = make_directory()
    mesh = make_mesh(2, 2, 2)
    _, params = convert.load_params(directory, mesh, members=2)
    abstract = convert.abstract_params(config, mesh, members=2)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: a.sharding == b.sharding and a.shape == b.shape, params, abstract)
    )
    assert tuple(params["layers"]["attention"]["q"]["weight"].sharding.spec) == (
        "order",
        None,
        "tensor",
        "fsdp",
    )
    # donation of buffers that several devices got from one host array
    before = jax.tree.map(np.array, params)
    step = jax.jit(lambda p: jax.tree.map(lambda x: x * 2, p), donate_argnums=0)
    after = step(step(params))
    assert (
        np.asarray(after["norm"]["weight"]).tobytes()
        == (flushed(before["norm"]["weight"]) * 4).tobytes()
    )


def test_only_the_slices_of_a_device_are_read(make_directory, monkeypatch):
    directory, _, _ = make_directory()
    read: list[tuple[str, int]] = []
    original = Reader.read_slice

    def counting(self, name, index):
        part = original(self, name, index)
        read.append((name, part.nbytes))
        return part

    monkeypatch.setattr(Reader, "read_slice", counting)
    convert.load_params(directory, make_mesh(2, 2, 2))
    total = {name: Reader(directory).read(name).nbytes for name in Reader(directory).names}
    # order replicates: each part is read once, not once per device, and all parts make one tensor
    assert {name: sum(size for n, size in read if n == name) for name in total} == total
    assert (
        max(size for name, size in read if "q_proj" in name) * 4
        == total["model.layers.0.self_attn.q_proj.weight"]
    )


def test_only_the_config_decides_the_tensors(make_directory, tmp_path):
    directory, config, _ = make_directory("tied")
    _, params = convert.load_params(directory)
    convert.export(params, config, tmp_path / "out", dtype="bfloat16")
    assert "lm_head.weight" not in Reader(tmp_path / "out").names
    assert arch.ModelConfig.from_hf(Reader(tmp_path / "out").config) == config


# ---------------------------------------------------------------- bad models


def rewrite(directory, change) -> None:
    file = directory / "model.safetensors"
    content = {name: array.copy() for name, array in safetensors.numpy.load_file(file).items()}
    change(content)
    safetensors.numpy.save_file(content, file)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
        (
            lambda t: t.update(extra=np.ones(2, np.float32)),
            "has the tensor extra, which this architecture does not have",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(8, np.float32)}),
            r"has shape \(8,\), config\.json asks for \(16,\)",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones(16, np.int32)}),
            "has dtype int32; supported are",
        ),
        (lambda t: t.pop("lm_head.weight"), r"lacks the tensor lm_head\.weight"),
    ],
)
def test_wrong_tensors_are_refused_by_name(make_directory, change, text):
    directory, *_ = make_directory("untied")
    rewrite(directory, change)
    with pytest.raises(UserError, match=text) as caught:
        convert.load_params(directory)
    assert "\n" not in str(caught.value)


def test_rotary_buffers_and_tied_copies_are_ignored(make_directory):
    directory, config, arrays = make_directory("tied")
    _, clean = convert.load_params(directory)

    def add(content):
        content["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
        content["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()

    rewrite(directory, add)
    loaded, params = convert.load_params(directory)
    assert loaded == config
    chex.assert_trees_all_equal(params, clean)


def test_tied_head_that_differs_is_refused(make_directory):
    directory, _, arrays = make_directory("tied")
    rewrite(
        directory,
        lambda content: content.update(
            {"lm_head.weight": arrays["model.embed_tokens.weight"][::-1].copy()}
        ),
    )
    with pytest.raises(
        UserError,
        match=r"ties the embeddings, but lm_head\.weight differs from model\.embed_tokens\.weight",
    ):
        convert.load_params(directory)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("{", "config.json is not valid JSON"),
        ('{"model_type": "gpt2"}', "model_type = 'gpt2' is not supported"),
        (
            json.dumps(
                {
                    **arch.ModelConfig(
                        vocab_size=4, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=1
                    ).to_hf("float32"),
                    "num_attention_heads": "4",
                }
            ),
            "num_attention_heads = '4'; expected a positive integer",
        ),
    ],
)
def test_bad_configs(make_directory, content, text):
    directory, *_ = make_directory()
    (directory / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        convert.load_params(directory)
    assert text in str(caught.value)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        convert.load_config(directory)


def test_ends_of_sequence_come_from_both_configs(make_directory, tmp_path):
    directory, config, _ = make_directory("tied")
    (directory / "generation_config.json").write_text(
        '{"eos_token_id": [1, 2], "temperature": 0.6}'
    )
    loaded, params = convert.load_params(directory)
    assert loaded == dataclasses.replace(config, eos_token_ids=(1, 2))
    convert.export(params, loaded, tmp_path / "out", dtype="float32")
    written = [
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]
    assert [content["eos_token_id"] for content in written] == [[1, 2], [1, 2]]


# ---------------------------------------------------------------- bad exports


def test_export_refuses_what_does_not_fit(make_directory, tmp_path):
    directory, config, _ = make_directory()
    _, params = convert.load_params(directory)
    _, population = convert.load_params(directory, members=2)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"has shape \(2, 24, 16\), expected \(24, 16\)"):
        convert.export(population, config, out, dtype="float32")
    with pytest.raises(
        UserError, match="member 2 does not exist; the population has members 0 to 1"
    ):
        convert.export(population, config, out, dtype="float32", member=2)
    with pytest.raises(ValueError, match="head/weight is not part of it"):
        convert.export(
            params, dataclasses.replace(config, tie_embeddings=True), out, dtype="float32"
        )
    with pytest.raises(UserError, match="is not empty"):
        convert.export(params, config, directory, dtype="float32")
    with pytest.raises(UserError, match="to copy the tokenizer from, does not exist"):
        convert.export(params, config, out, dtype="float32", source=tmp_path / "nowhere")
    assert not out.exists()


# ---------------------------------------------------------------- names of bases


def test_existing_directories_resolve_to_themselves(tmp_path):
    assert convert.resolve(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("base", ["./nowhere", "/nowhere/at/all", "a/b/c"])
def test_paths_that_do_not_exist(base):
    with pytest.raises(UserError, match=f"model directory {base} not found"):
        convert.resolve(base)


def test_embedded_names(monkeypatch, tmp_path):
    (tmp_path / "assets" / "small").mkdir(parents=True)
    monkeypatch.setattr(importlib.resources, "files", lambda package: tmp_path)
    assert convert.resolve("embedded:small") == tmp_path / "assets" / "small"
    with pytest.raises(
        UserError, match=r"embedded:other is not shipped with this package \(shipped: small\)"
    ):
        convert.resolve("embedded:other")


def test_hub_names_are_downloaded_without_foreign_weights(monkeypatch, tmp_path):
    asked = {}

    def download(name, **options):
        asked.update(name=name, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert convert.resolve("some/model") == tmp_path
    assert asked["name"] == "some/model"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pth")) for pattern in asked["allow_patterns"])


def test_offline_hub_is_one_line():
    with pytest.raises(UserError) as caught:
        convert.resolve("nobody/such-a-model")
    assert str(caught.value).startswith(
        "model nobody/such-a-model is no directory and could not be downloaded: "
    )
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="neither an existing directory nor a valid hub name"):
        convert.resolve("no such name!")


@pytest.mark.parametrize(
    ("kind", "text"),
    [(errors.GatedRepoError, "is gated"), (errors.RepositoryNotFoundError, "is not on the hub")],
)
def test_hub_refusals(monkeypatch, kind, text):
    def refuse(name, **options):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=text):
        convert.resolve("some/model")
