"""`convert --to peft` of merged models: PEFT computes what the dense model does."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from jax_ordermerge import arch
from jax_ordermerge.layout import RunLayout, write_json
from jax_ordermerge.merge import low_rank
from jax_ordermerge.merge.sources.references import open_model
from jax_ordermerge.merge.sources.storage import read
from jax_ordermerge.merge.sources.unlisted import Unlisted
from tests.commands.test_cli import call

torch = pytest.importorskip("torch", reason="needs the extra parity")
peft = pytest.importorskip("peft", reason="needs the extra parity")
LoraConfig, PeftModel, get_peft_model = peft.LoraConfig, peft.PeftModel, peft.get_peft_model

TOKENS = torch.arange(36)[None]
DOWN = "model.layers.1.mlp.down_proj.weight"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, a merged model with other linear layers, and one with another norm as well."""
    path = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    base.save_pretrained(path / "base")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "_proj" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    base.save_pretrained(path / "merged")
    with torch.no_grad():
        base.model.norm.weight[3] += 0.5
    base.save_pretrained(path / "normed")
    return path


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits.numpy()


def with_adapter(folder, adapter):
    return PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter)


def to_peft(folder, model, out, rank, *options):
    source = folder / model
    return call(
        *("convert", source, out, "--to", "peft", "--base", folder / "base", "--rank", rank),
        *options,
    )


@pytest.mark.filterwarnings("ignore")
def test_at_full_rank_peft_computes_the_merged_model(folder, tmp_path, capsys):
    assert to_peft(folder, "merged", tmp_path / "out", 16) == 0
    printed = capsys.readouterr().out
    assert "vLLM" not in printed
    assert "cannot hold" not in printed
    expected = logits(LlamaForCausalLM.from_pretrained(folder / "merged"))
    np.testing.assert_allclose(logits(with_adapter(folder, tmp_path / "out")), expected, atol=1e-5)
    # key and value have 8 rows: zeros beyond, so that every matrix has the rank of the setting
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {x.shape["A" not in name] for name, x in tensors.items()} == {16}
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["use_rslora"]) == (16, 16, False)


def test_the_change_of_a_large_tensor_is_not_held(tmp_path):
    values = np.random.default_rng(0).normal(size=(3 << 20) + 5).astype(np.float32)
    models = []
    for name, array in (("base", values), ("tuned", values + np.float32(0.5))):
        save_file({"w": array}, tmp_path / f"{name}.safetensors")
        models.append(Unlisted(tmp_path / f"{name}.safetensors", name))
    tracemalloc.start()
    change = low_rank._change(models[1], models[0], "w")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    wide = values.astype(np.float64)
    moved = (values + np.float32(0.5)).astype(np.float64) - wide
    assert change.norm == pytest.approx(np.linalg.norm(moved), rel=1e-12)
    assert change.base_norm == pytest.approx(np.linalg.norm(wide), rel=1e-12)
    # blocks of 8 MiB in float64, whatever the size
    assert peak < 45e6 < 2 * wide.nbytes


@pytest.mark.filterwarnings("ignore")
def test_a_smaller_rank_leaves_out_the_smallest_singular_values(folder, tmp_path, capsys):
    assert to_peft(folder, "normed", tmp_path / "out", 3) == 0
    lines = capsys.readouterr().out.splitlines()
    tensors, start = (load_file(folder / name / "model.safetensors") for name in ("normed", "base"))
    changes = {name: tensors[name].astype(np.float64) - start[name] for name in tensors}
    left_out = {
        name: np.linalg.norm(np.linalg.svd(change, compute_uv=False)[3:])
        for name, change in changes.items()
        if "_proj" in name
    } | {NORM: 0.5}
    total = np.linalg.norm([*left_out.values()])
    error = total / np.linalg.norm([np.linalg.norm(x) for x in changes.values()])
    assert any(line.startswith(f"rank 3: relative error {error:.4g} in all") for line in lines)
    size = 0.5 / np.linalg.norm(start[NORM])
    assert f"stay as in the base: {NORM} (by 0.5, {size:.2g} of its length)" in "\n".join(lines)
    assert "note: rank 3 is not a --max-lora-rank of vLLM; start it with --max-lora-rank 8" in lines
    card = (tmp_path / "out" / "README.md").read_text()
    norm = np.linalg.norm(changes[DOWN])
    assert f"| `{DOWN}` | {norm:.4g} | {left_out[DOWN] / norm:.4g} |" in card
    assert f"| `{NORM}` | 0.5 | 1 |" in card
    # the nearest matrix of rank 3, as PEFT adds it
    u, s, vt = np.linalg.svd(changes[DOWN])
    merged = with_adapter(folder, tmp_path / "out").merge_and_unload().state_dict()[DOWN].numpy()
    expected = start[DOWN] + (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(merged, expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_a_recipe_of_adapters_is_one_adapter_without_loss(folder, tmp_path, capsys):
    """Of other ranks, scales and modules: what the merge of the dense models is."""
    kinds = {
        "a": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
        "b": {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj"], "use_rslora": True},
    }
    for name, settings in kinds.items():
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        wrapped = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for key, parameter in wrapped.named_parameters():
                if "lora_" in key:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        wrapped.save_pretrained(tmp_path / name)
    models = [{"model": f"{folder}/base+{tmp_path}/{name}"} for name in kinds]
    models[0]["parameters"], models[1]["parameters"] = {"weight": 1}, {"weight": 3}
    recipe = tmp_path / "recipe.yaml"
    ties = {"merge_method": "ties", "models": models, "base_model": f"{folder}/base"}
    recipe.write_text(json.dumps(ties))
    assert call("convert", recipe, tmp_path / "joined", "--to", "peft") == 2
    assert "ties is no weighted sum of the adapters" in capsys.readouterr().err
    linear = {"merge_method": "linear", "models": models, "dtype": "float32"}
    plain = [{"model": model["model"]} for model in models]
    knots = {
        "merge_method": "knots",
        "models": plain,
        "parameters": {"density": 0.4, "scale": 0.9},
        "base_model": f"{folder}/base",
    }
    for name, content in (("linear", linear), ("knots", knots)):
        recipe.write_text(json.dumps(content))
        assert call("convert", recipe, tmp_path / name, "--to", "peft") == 0
        assert call("merge", recipe, tmp_path / f"{name}-dense") == 0
        joined = open_model(f"{folder}/base+{tmp_path}/{name}")
        dense = open_model(str(tmp_path / f"{name}-dense"))
        for tensor, _, _ in arch.hf_tensors(dense.config):
            np.testing.assert_allclose(read(joined, tensor), read(dense, tensor), atol=1e-6)
    expected = logits(LlamaForCausalLM.from_pretrained(tmp_path / "linear-dense"))
    adapted = with_adapter(folder, tmp_path / "linear")
    np.testing.assert_allclose(logits(adapted), expected, atol=1e-5)
    assert adapted.peft_config["default"].r == 7


def test_an_average_of_checkpoints_is_not_the_merge_of_the_last_adapters(tmp_path, capsys):
    layout = RunLayout(tmp_path / "run")
    layout.root.mkdir()
    layout.config.write_text("{}")
    row = {"name": "average-last2", "method": "average", "weights": None, "parameters": {}}
    row["checkpoints"] = {"steps": [8, 10], "weights": [0.5, 0.5]}
    write_json(layout.merges, {"merges": [row]})
    source = layout.root / "average-last2"
    assert call("convert", source, tmp_path / "out", "--to", "peft") == 2
    assert "average-last2 averages checkpoints" in capsys.readouterr().err


def test_task_vectors_from_another_base_are_refused(folder, tmp_path, capsys):
    assert to_peft(folder, "merged", tmp_path / "a", 4) == 0
    recipe = tmp_path / "recipe.yaml"
    content = {
        "merge_method": "task_arithmetic",
        "models": [{"model": f"{folder}/base+{tmp_path}/a", "parameters": {"weight": 0.5}}],
        "base_model": f"{folder}/normed",
        "parameters": {"normalize": False},
    }
    recipe.write_text(json.dumps(content))
    assert call("convert", recipe, tmp_path / "out", "--to", "peft") == 2
    message = f"base_model is {folder}/normed, and the adapters are of {folder}/base;"
    assert message in capsys.readouterr().err
    content["base_model"] = f"{folder}/base"
    recipe.write_text(json.dumps(content))
    assert call("convert", recipe, tmp_path / "out", "--to", "peft") == 0


def test_keys_that_are_ignored_of_the_model_are_ignored_of_its_base(folder, tmp_path):
    for name in ("base", "merged"):
        shutil.copytree(folder / name, tmp_path / name)
        config = tmp_path / name / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "custom_scale": 3.0}))
    keys = ["--ignore-config-keys", "custom_scale"]
    assert to_peft(tmp_path, "merged", tmp_path / "out", 4, *keys) == 0


@pytest.mark.parametrize(
    ("model", "base", "rank", "message"),
    [
        ("base", "base", 4, "have the same linear layers"),
        ("merged", "base", 17, "--rank 17: no matrix of"),
        ("merged", "base", 0, "--rank 0 must be positive"),
        ("merged", "base+merged", 4, "PEFT loads the base by this name"),
    ],
)
def test_what_is_refused(folder, tmp_path, capsys, model, base, rank, message):
    line = ["--to", "peft", "--base", f"{folder}/{base}", "--rank", rank]
    assert call("convert", folder / model, tmp_path / "out", *line) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
