"""Adapters as PEFT computes them: tied bases, DoRA, trained tokens, biases, one rounding."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from jax_ordermerge import arch
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources import peft_files
from jax_ordermerge.merge.sources.references import open_model
from tests.commands.test_cli import call
from tests.merge.test_sources import assert_reads_in_any_run, read_tensor

torch = pytest.importorskip("torch", reason="needs the extra parity")
peft = pytest.importorskip("peft", reason="needs the extra parity")
LoraConfig, get_peft_model = peft.LoraConfig, peft.get_peft_model

VOCABULARY = 40
TOKENS = torch.arange(VOCABULARY - 4)[None]


def make_base(directory, *, tied, family="llama"):
    torch.manual_seed(0)
    config, model = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[family]
    base = model(
        config(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=tied,
        )
    )
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    base.save_pretrained(directory)
    return base


def make_adapter(base, directory, *, rows=None, **settings):
    """Save an adapter with random values; return the logits of PEFT's forward."""
    generator = torch.Generator().manual_seed(1)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    wrapped = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **{"r": 3, **settings}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator))
            elif any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                parameter.add_(0.3 * (torch.rand(parameter.shape, generator=generator) - 0.5))
    save = {} if rows is None else {"save_embedding_layers": True}
    wrapped.save_pretrained(directory, **save)
    return wrapped.eval()(TOKENS).logits.detach().float().numpy()


def logits_of(source):
    """Logits that transformers computes with the tensors of a source."""
    config = source.config.to_hf("float32")
    model_class = Qwen2ForCausalLM if config["model_type"] == "qwen2" else LlamaForCausalLM
    model = model_class(model_class.config_class(**config))
    tensors = {
        name: torch.from_numpy(read_tensor(source, name))
        for name, _, _ in arch.hf_tensors(source.config)
    }
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if source.config.tie_embeddings else [])
    return model.eval()(TOKENS).logits.detach().numpy()


LINEAR = ["q_proj", "down_proj"]
# name -> settings of the adapter, whether the result of a tied base is tied
CASES = {
    "plain": ({"target_modules": LINEAR}, True),
    "rslora": ({"target_modules": LINEAR, "use_rslora": True}, True),
    "dora": ({"target_modules": "all-linear", "use_dora": True}, True),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
    "embedding-dora": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "embedding-tied": (
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        True,
    ),
    "head": ({"target_modules": ["lm_head", "v_proj"]}, False),
    "head-dora": ({"target_modules": ["lm_head"], "use_dora": True, "use_rslora": True}, False),
    "embedding-head": ({"target_modules": ["lm_head", "embed_tokens"]}, False),
    "saved": ({"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}, False),
    "saved-head": ({"target_modules": LINEAR, "modules_to_save": ["lm_head"]}, False),
    "saved-both": (
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens", "lm_head"]},
        False,
    ),
    "saved-tied": (
        {
            "target_modules": LINEAR,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
        True,
    ),
    "saved-head-lora-embedding": (
        {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
        False,
    ),
    "tokens": ({"target_modules": LINEAR, "trainable_token_indices": [7, 3, 30]}, True),
    "tokens-by-name": (
        {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [5]}},
        True,
    ),
    "grown": ({"target_modules": LINEAR, "rows": VOCABULARY + 3}, True),
    "grown-embedding": ({"target_modules": ["embed_tokens"], "rows": VOCABULARY + 3}, False),
    "grown-saved": (
        {
            "target_modules": LINEAR,
            "modules_to_save": ["embed_tokens"],
            "rows": VOCABULARY + 3,
        },
        False,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(tmp_path, case, tied):
    if case == "grown-embedding" and not tied:
        pytest.skip("PEFT does not save the grown rows of a head that it does not adapt")
    settings, stays_tied = CASES[case]
    base = make_base(tmp_path / "base", tied=tied)
    expected = make_adapter(base, tmp_path / "adapter", **settings)
    source = open_model(f"{tmp_path}/base+{tmp_path}/adapter")
    assert source.config.tie_embeddings == (tied and stays_tied)
    logits = logits_of(source)
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for name, _, _ in arch.hf_tensors(source.config):
        assert_reads_in_any_run(source, name, np.random.default_rng(3))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}])
def test_biases_of_a_base_that_has_them(tmp_path, settings):
    base = make_base(tmp_path / "base", tied=False, family="qwen2")
    expected = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], **settings)
    logits = logits_of(open_model(f"{tmp_path}/base+{tmp_path}/adapter"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("modules", "flags"),
    [
        (["q_proj"], (True, False)),
        (["down_proj"], (False, True)),
        (["o_proj", "gate_proj"], (True, True)),
    ],
)
def test_biases_of_a_llama_without_any(tmp_path, modules, flags, tied):
    """Those that the adapter does not train are zero, and config.json says that they are there."""
    base = make_base(tmp_path / "base", tied=tied)
    expected = make_adapter(base, tmp_path / "adapter", target_modules=modules, lora_bias=True)
    name = f"{tmp_path}/base+{tmp_path}/adapter"
    np.testing.assert_allclose(logits_of(open_model(name)), expected, rtol=0, atol=1e-4)
    assert call("convert", name, tmp_path / "out") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.config.attention_bias, model.config.mlp_bias) == flags
    np.testing.assert_allclose(model(TOKENS).logits.detach().numpy(), expected, atol=1e-4)
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")(TOKENS).logits.detach().numpy()
    assert np.abs(plain - expected).max() > 0.01  # the biases change what is computed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("module", ["lm_head", "o_proj", "down_proj"])
def test_a_bias_that_the_family_has_not(tmp_path, module):
    base = make_base(tmp_path / "base", tied=False, family="qwen2")
    make_adapter(base, tmp_path / "adapter", target_modules=[module], lora_bias=True)
    with pytest.raises(UserError, match=rf"adds \S*{module}\.bias \(lora_bias\).* cannot have"):
        open_model(f"{tmp_path}/base+{tmp_path}/adapter")


def change_config(directory, **change):
    path = directory / peft_files.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("dora", {"use_dora": False}, "use_dora of adapter_config.json is False"),
        ("plain", {"use_dora": True}, "has no lora_magnitude_vector"),
        ("tokens", {"trainable_token_indices": [7, 3]}, "names 2 rows of 16"),
        ("tokens", {"trainable_token_indices": [7, 3, 40]}, "names row 40"),
        ("tokens", {"trainable_token_indices": [7, 3, 3]}, "may be named once"),
        ("tokens", {"trainable_token_indices": None}, "names 0 rows"),
        ("saved-head", {"modules_to_save": None}, "which modules_to_save of adapter_config.json"),
    ],
)
def test_settings_that_contradict_the_tensors(tmp_path, case, change, message):
    base = make_base(tmp_path / "base", tied=True)
    make_adapter(base, tmp_path / "adapter", **CASES[case][0])
    change_config(tmp_path / "adapter", **change)
    with pytest.raises(UserError, match=message):
        open_model(f"{tmp_path}/base+{tmp_path}/adapter")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_rounded_once_to_the_dtype_of_the_recipe(tmp_path, dtype):
    """A small change of a bfloat16 base: rounded to it first, an eighth of the change was lost."""
    base = make_base(tmp_path / "base", tied=False).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    for seed in (1, 2):
        directory = tmp_path / f"adapter{seed}"
        make_adapter(base, directory, target_modules=["q_proj"])
        base = make_base(tmp_path / "again", tied=False).to(torch.bfloat16)
        path = directory / peft_files.WEIGHTS
        generator = np.random.default_rng(seed)
        save_file(
            {
                name: (
                    generator.normal(size=values.shape) * (0.02 if "lora_B" in name else 0.5)
                ).astype(np.float32)
                for name, values in load_file(path).items()
            },
            path,
        )
    models = ", ".join(
        f"{{model: '{tmp_path}/base+{tmp_path}/adapter{seed}', parameters: {{weight: 1}}}}"
        for seed in (1, 2)
    )
    plan = planner.plan_recipe(
        f"merge_method: task_arithmetic\nbase_model: {tmp_path}/base\nmodels: [{models}]\n"
        f"dtype: {dtype}\nout_dtype: float32\n"
    )
    engine.merge_plan(plan, tmp_path / "out")
    name = "model.layers.0.self_attn.q_proj"
    start = load_file(tmp_path / "base" / "model.safetensors")[f"{name}.weight"].astype(np.float64)
    changes = []
    for seed in (1, 2):
        tensors = load_file(tmp_path / f"adapter{seed}" / peft_files.WEIGHTS)
        b, a = (
            tensors[f"base_model.model.{name}.lora_{part}.weight"].astype(np.float64)
            for part in "BA"
        )
        member = start + 8 / 3 * b @ a  # lora_alpha is 8, the rank 3
        target = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        changes.append(member.astype(np.float32).astype(target).astype(np.float64) - start)
    merged = load_file(tmp_path / "out" / "model.safetensors")[f"{name}.weight"].astype(np.float64)
    error = np.linalg.norm(merged - start - sum(changes)) / np.linalg.norm(sum(changes))
    assert error < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_inspect_and_diff_take_every_name_that_merge_takes(tmp_path, capsys):
    base = make_base(tmp_path / "base", tied=False)
    make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    name = f"{tmp_path}/base+{tmp_path}/adapter"
    call("convert", tmp_path / "base", tmp_path / "orbax", "--to", "orbax")
    capsys.readouterr()
    assert call("diff", tmp_path / "base", tmp_path / "orbax", "--json") == 0
    assert call("diff", tmp_path / "base", name, "--json") == 1
    difference = json.loads(capsys.readouterr().out.split("\n}\n")[1] + "\n}")
    changed = [pair["name"] for pair in difference["pairs"] if not pair["equal"]]
    assert changed == [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)]
    assert call("inspect", name, "--json") == 0
    listed = json.loads(capsys.readouterr().out)["tensors"]
    assert [row["name"] for row in listed] == [
        row[0] for row in arch.hf_tensors(open_model(name).config)
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "dora", "saved", "grown"])
def test_an_adapter_becomes_a_model_in_one_line(tmp_path, case):
    """Of a tied base: the directory is what transformers loads, with the logits of PEFT."""
    settings, tied = CASES[case]
    base = make_base(tmp_path / "base", tied=True)
    expected = make_adapter(base, tmp_path / "adapter", **settings)
    name = f"{tmp_path}/base+{tmp_path}/adapter"
    assert call("convert", name, tmp_path / "out") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings == tied
    np.testing.assert_allclose(model(TOKENS).logits.detach().numpy(), expected, atol=1e-4)
    # by way of Orbax it has the same bits
    assert call("convert", name, tmp_path / "orbax", "--to", "orbax") == 0
    assert call("convert", tmp_path / "orbax", tmp_path / "back") == 0
    assert call("diff", tmp_path / "out", tmp_path / "back") == 0
    # rounded once, and not to the dtype of the base first
    assert call("convert", name, tmp_path / "half", "--dtype", "bfloat16") == 0
    exact, half = (load_file(tmp_path / out / "model.safetensors") for out in ("out", "half"))
    for tensor, values in exact.items():
        assert half[tensor].tobytes() == values.astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["plain", "saved"])
def test_an_adapter_in_a_file_of_pytorch(tmp_path, case, capsys):
    settings, _ = CASES[case]
    base = make_base(tmp_path / "base", tied=False)
    expected = make_adapter(base, tmp_path / "adapter", **settings)
    path = tmp_path / "adapter" / peft_files.WEIGHTS
    tensors = {name: torch.from_numpy(values) for name, values in load_file(path).items()}
    torch.save(tensors, path.with_suffix(".bin"))
    path.unlink()
    name = f"{tmp_path}/base+{tmp_path}/adapter"
    assert call("convert", name, tmp_path / "out") == 2
    assert "--allow-bin" in capsys.readouterr().err
    assert call("convert", name, tmp_path / "out", "--allow-bin") == 0
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(model(TOKENS).logits.detach().numpy(), expected, atol=1e-4)
