"""Every kind of source reads like a Hugging Face directory of the same model."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.commands.convert import convert_checkpoint
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources import peft_files, storage
from jax_ordermerge.merge.sources.references import open_model

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
LORA = np.load(GOLDEN / "merge" / "lora.npz")


def read_tensor(source, name):
    info = source.info(name)
    out = np.empty(info.shape, info.dtype)
    source.read_into(name, 0, out)
    return out


def assert_reads_in_any_run(source, name, generator):
    """Any run of elements is that part of the whole, bit for bit."""
    expected = read_tensor(source, name).reshape(-1)
    for _ in range(8):
        start, end = sorted(generator.choice(expected.size + 1, 2, replace=False))
        out = np.empty(end - start, expected.dtype)
        source.read_into(name, int(start), out)
        assert out.tobytes() == expected[start:end].tobytes()


@pytest.fixture(scope="module")
def run(tiny, models, tmp_path_factory):
    """A run directory of four members, 7 of 7 steps done."""
    root = tmp_path_factory.mktemp("runs")
    members, base = models
    convert.export(base, tiny, root / "base", dtype="float32")
    directory = root / "run"
    orbax.save(
        directory / "checkpoints",
        7,
        {"params": tree.unflatten({k: jnp.asarray(v) for k, v in tree.flatten(members).items()})},
        {"steps": 7, "members": [0, 1, 3, 2]},
    )
    (directory / "config.yaml").write_text(yaml.safe_dump({"model": {"base": str(root / "base")}}))
    return directory


# ---------------------------------------------------------------------------------- runs and Orbax


def test_a_member_of_a_run_with_averages_is_its_average(run, tiny, models, tmp_path):
    params = jax.tree.map(jnp.asarray, models[0])
    stored = {"params": jax.tree.map(jnp.zeros_like, params), "optimizer": {"ema": params}}
    orbax.save(
        tmp_path / "checkpoints",
        7,
        stored,
        {"steps": 7, "members": [0, 1, 3, 2], "weights": "optimizer/ema"},
    )
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    averages, members = open_model(f"{tmp_path}/member_2"), open_model(f"{run}/member_2")
    for name, _, _ in arch.hf_tensors(tiny):
        assert read_tensor(averages, name).tobytes() == read_tensor(members, name).tobytes()


def test_a_member_of_a_run_is_found_by_its_number(run, tiny, models, tmp_path):
    source = open_model(f"{run}/member_2")
    convert.export(
        models[0], tiny, tmp_path / "m", dtype="float32", member=3
    )  # the last of the order in the checkpoint
    exported = storage.Directory(tmp_path / "m")
    for name, _, _ in arch.hf_tensors(tiny):
        assert read_tensor(source, name).tobytes() == read_tensor(exported, name).tobytes()
        assert_reads_in_any_run(source, name, np.random.default_rng(1))
    assert source.directory == run.parent / "base"
    assert source.label == f"{run}/member_2"


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        (
            "member_9",
            {"steps": 7, "members": [0, 1]},
            "member_9 does not exist; the run has the members 0, 1",
        ),
        (
            "member_0",
            {"steps": 8, "members": [0, 1]},
            r"the training in \S+ stands at step 7 of 8; run it again",
        ),
        ("member_0", {}, "is not that of a training"),
        ("member_0", None, "run the training first"),
        ("", {"steps": 7, "members": [0]}, "is a run; name one of its members"),
    ],
)
def test_a_member_that_is_not_there_is_refused(run, tmp_path, name, metadata, message):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    (tmp_path / "checkpoints").mkdir()
    if metadata is not None:
        orbax.save(tmp_path / "checkpoints", 7, {"params": jnp.zeros(2)}, metadata)
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_orbax_directory_is_the_directory_it_was_made_from(tiny, models, tmp_path, dtype):
    convert.export(models[1], tiny, tmp_path / "hf", dtype=dtype)
    convert_checkpoint(str(tmp_path / "hf"), tmp_path / "orbax", to="orbax")
    source, directory = open_model(str(tmp_path / "orbax")), open_model(str(tmp_path / "hf"))
    assert isinstance(source, storage.Checkpoint)
    for name, _, _ in arch.hf_tensors(tiny):
        assert source.info(name) == directory.info(name)
        assert read_tensor(source, name).tobytes() == read_tensor(directory, name).tobytes()
        assert_reads_in_any_run(source, name, np.random.default_rng(2))


def test_a_strange_orbax_directory_is_refused(tmp_path):
    orbax.save(tmp_path / "o", 0, {"params": jnp.zeros(2)}, {})
    with pytest.raises(UserError, match="is not an Orbax directory made by"):
        open_model(str(tmp_path / "o"))


def test_names_that_stand_for_nothing(tmp_path, tiny, models):
    with pytest.raises(UserError, match=r"a revision \(@\) is not offered"):
        open_model("someone/model@main")
    with pytest.raises(UserError, match="with one adapter"):
        open_model("a+b+c")
    with pytest.raises(UserError, match="not found"):
        open_model("./nothing")
    # a name that exists is taken as it is
    convert.export(models[1], tiny, tmp_path / "a+b@c", dtype="float32")
    assert open_model(str(tmp_path / "a+b@c")).config == tiny


# -------------------------------------------------------------------------------------------- LoRA


@pytest.fixture
def checkpoints(golden_checkpoints, tmp_path):
    """The base of the goldens as a directory, with its arrays."""
    base = golden_checkpoints.models()["base"]
    golden_checkpoints.write(tmp_path, {"base": base})
    return tmp_path / "base", base


def write_adapter(directory, case, **change):
    """An adapter of the goldens, with other settings if given."""
    directory.mkdir()
    settings = json.loads(str(LORA[f"{case}/config"])) | change
    (directory / peft_files.CONFIG).write_text(json.dumps(settings))
    start = f"{case}/adapter/"
    save_file(
        {name.removeprefix(start): LORA[name] for name in LORA.files if name.startswith(start)},
        directory / peft_files.WEIGHTS,
    )
    return directory


@pytest.mark.parametrize("case", ["plain", "rslora", "patterns", "embedding"])
def test_an_adapter_is_merged_as_peft_does(checkpoints, tmp_path, case):
    directory, base = checkpoints
    source = open_model(f"{directory}+{write_adapter(tmp_path / 'adapter', case)}")
    for name, values in base.items():
        expected = (
            LORA[f"{case}/merged/{name}"] if f"{case}/merged/{name}" in LORA.files else values
        )
        np.testing.assert_allclose(
            read_tensor(source, name),
            expected,
            rtol=0,
            atol=2e-7 * np.abs(expected).max(),
            err_msg=name,
        )
        assert_reads_in_any_run(source, name, np.random.default_rng(3))
    assert source.directory == directory


def test_a_recipe_names_an_adapter_in_two_ways(checkpoints, tmp_path):
    directory, _ = checkpoints
    adapter = write_adapter(tmp_path / "adapter", "plain")
    text = (
        "merge_method: linear\nmodels: [{{model: {}}}, {{model: {}}}]\nparameters: {{weight: 1}}\n"
    )
    short = planner.plan_recipe(text.format(f"{directory}+{adapter}", directory))
    long = planner.plan_recipe(
        text.format(f"{{model: {{path: {directory}}}, lora: {{path: {adapter}}}}}", directory)
    )
    name = "model.layers.1.self_attn.q_proj.weight"
    assert (
        read_tensor(short.sources[0], name).tobytes()
        == read_tensor(long.sources[0], name).tobytes()
        != read_tensor(short.sources[1], name).tobytes()
    )
    assert short.recipe["models"][0] == {"model": "base+adapter"}


def test_an_adapter_is_base_plus_scaled_product_rounded_once(tiny, tmp_path):
    """Against float64 by hand, on a bfloat16 base of more rows than a block."""
    config = arch.ModelConfig(
        vocab_size=300,
        hidden_size=8,
        intermediate_size=300,
        num_layers=1,
        num_heads=2,
        tie_embeddings=True,
    )
    generator = np.random.default_rng(0)
    params = tree.unflatten(
        {
            spec.path: generator.normal(size=spec.shape).astype(np.float32)
            for spec in arch.tensor_table(config)
        }
    )
    convert.export(params, config, tmp_path / "base", dtype="bfloat16")
    name = "model.layers.0.mlp.up_proj.weight"
    a, b = (generator.normal(size=shape).astype(np.float32) for shape in ((4, 8), (300, 4)))
    (tmp_path / "adapter").mkdir()
    start = "base_model.model.model.layers.0.mlp.up_proj"
    save_file(
        {f"{start}.lora_A.weight": a, f"{start}.lora_B.weight": b},
        tmp_path / "adapter" / peft_files.WEIGHTS,
    )
    (tmp_path / "adapter" / peft_files.CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 6})
    )
    source = open_model(f"{tmp_path}/base+{tmp_path}/adapter")
    base = read_tensor(open_model(f"{tmp_path}/base"), name)
    expected = (base.astype(np.float64) + 1.5 * b.astype(np.float64) @ a.astype(np.float64)).astype(
        np.float32
    )
    merged = read_tensor(source, name)
    assert merged.dtype == base.dtype
    assert (merged != expected.astype(merged.dtype)).mean() < 0.001  # a tie in a million
    assert_reads_in_any_run(source, name, generator)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        (
            "plain",
            {"use_qalora": True},
            r"use_qalora = True is not supported \(supported: absent\)",
        ),
        ("plain", {"bias": "some"}, "bias = 'some' is not supported"),
        (
            "plain",
            {"peft_type": "LOHA"},
            r"peft_type = 'LOHA' is not supported \(supported: 'LORA'\)",
        ),
        ("plain", {"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ("plain", {"layer_replication": [[0, 2]]}, "layer_replication"),
        ("plain", {"brand_new": 3}, "brand_new = 3 is not supported"),
        (
            "plain",
            {"r": 4},
            "(q|down)_proj has rank 3, adapter_config.json says 4",
        ),
        ("plain", {"lora_alpha": None}, "lora_alpha = None, expected a positive number"),
    ],
)
def test_other_adapters_are_refused(checkpoints, tmp_path, case, change, message):
    adapter = write_adapter(tmp_path / "adapter", case, **change)
    with pytest.raises(UserError, match=message):
        open_model(f"{checkpoints[0]}+{adapter}")


def test_adapters_that_are_not_whole_are_refused(checkpoints, tmp_path):
    directory, _ = checkpoints
    adapter = write_adapter(tmp_path / "adapter", "plain")
    with pytest.raises(
        UserError, match=r"is an adapter; give the model that it belongs to as well"
    ):
        open_model(str(adapter))
    tensors = {
        name.removeprefix("plain/adapter/"): LORA[name]
        for name in LORA.files
        if name.startswith("plain/adapter/")
    }
    first = next(iter(tensors))
    save_file(
        {name: values for name, values in tensors.items() if name != first},
        adapter / peft_files.WEIGHTS,
    )
    with pytest.raises(UserError, match="only one of the two matrices"):
        open_model(f"{directory}+{adapter}")
    save_file(tensors | {first: tensors[first][:, 1:].copy()}, adapter / peft_files.WEIGHTS)
    with pytest.raises(UserError, match="do not fit"):
        open_model(f"{directory}+{adapter}")
    save_file(
        tensors
        | {"base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector": np.ones(16)},
        adapter / peft_files.WEIGHTS,
    )
    with pytest.raises(UserError, match="has a lora_magnitude_vector"):
        open_model(f"{directory}+{adapter}")
    (adapter / peft_files.WEIGHTS).rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin is a pickle of PyTorch.*--allow-bin"):
        open_model(f"{directory}+{adapter}")


def test_a_tokenizer_travels_inside_an_orbax_directory(tiny, models, tmp_path, capsys):
    source = tmp_path / "hf"
    convert.export(models[1], tiny, source, dtype="float32")
    convert_checkpoint(str(source), tmp_path / "bare", to="orbax")
    assert "has no tokenizer files, so" in capsys.readouterr().out
    texts = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "x",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    convert_checkpoint(str(source), tmp_path / "orbax", to="orbax")
    # moved, and what it was made from removed
    (tmp_path / "orbax").rename(tmp_path / "moved")
    source.rename(tmp_path / "gone")
    convert_checkpoint(str(tmp_path / "moved"), tmp_path / "back", to="hf")
    assert {name: (tmp_path / "back" / name).read_text() for name in texts} == texts | {
        "tokenizer_config.json": '{\n  "a": 1,\n  "chat_template": "x"\n}\n'
    }
    merged = open_model(str(tmp_path / "moved"))
    assert (merged.directory / "tokenizer.json").read_text() == "{}"
