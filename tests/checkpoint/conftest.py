"""Tiny models as other programs write them: by the safetensors library, in one file or shards."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from jax_ordermerge import arch

SHAPE = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_layers": 2,
    "num_heads": 4,
}
CONFIGS = {
    "untied": arch.ModelConfig(**SHAPE, bos_token_id=1, eos_token_ids=(2, 5)),
    "tied": arch.ModelConfig(**SHAPE, num_kv_heads=2, tie_embeddings=True, eos_token_ids=(2,)),
    "qwen2": arch.ModelConfig(**SHAPE, family="qwen2", qkv_bias=True, num_kv_heads=2),
}


def tensors(config: arch.ModelConfig, dtype: str) -> dict[str, np.ndarray]:
    """Return random values over many magnitudes, with denormals and negative zeros."""
    generator = np.random.default_rng(7)
    out = {}
    for name, spec, _ in arch.hf_tensors(config):
        values = generator.normal(size=spec.hf_shape) * 10.0 ** generator.integers(
            -42, 30, size=spec.hf_shape
        )
        values.flat[0] = -0.0
        out[name] = values.astype(np.float32).astype(np.dtype(dtype))
    return out


def write_directory(
    directory: pathlib.Path, config: arch.ModelConfig, dtype: str, shards: int
) -> dict[str, np.ndarray]:
    """Write a model directory without code of this package except for the config."""
    directory.mkdir()
    arrays = tensors(config, dtype)
    names = list(arrays)
    (directory / "config.json").write_text(json.dumps(config.to_hf(dtype)))
    if shards == 1:
        safetensors.numpy.save_file(arrays, directory / "model.safetensors", {"format": "pt"})
        return arrays
    weight_map = {
        name: f"model-{1 + i % shards:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(names)
    }
    for file in set(weight_map.values()):
        part = {name: arrays[name] for name in names if weight_map[name] == file}
        safetensors.numpy.save_file(part, directory / file, {"format": "pt"})
    index = {
        "metadata": {"total_size": sum(a.nbytes for a in arrays.values())},
        "weight_map": weight_map,
    }
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return arrays


@pytest.fixture
def make_directory(tmp_path):
    """Return `make(kind, dtype, shards) -> (directory, config, tensors)`."""

    def make(kind: str = "untied", dtype: str = "float32", shards: int = 1):
        directory = tmp_path / f"{kind}-{dtype}-{shards}"
        return directory, CONFIGS[kind], write_directory(directory, CONFIGS[kind], dtype, shards)

    return make
