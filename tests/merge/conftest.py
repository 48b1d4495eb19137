"""Tiny models for the tests of merging."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from jax_ordermerge import arch, tree


@pytest.fixture(scope="session")
def tiny() -> arch.ModelConfig:
    """Grouped heads, biases and norms, untied; sizes that the meshes (2, 4) and (4, 2) divide."""
    return arch.ModelConfig(
        family="qwen2",
        vocab_size=24,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        qkv_bias=True,
    )


@pytest.fixture(scope="session")
def models(tiny):
    """Four members, sparsely changed as by bfloat16 training, and their base, float32 in numpy."""
    generator = np.random.default_rng(0)
    members, base = {}, {}
    for spec in arch.tensor_table(tiny):
        base[spec.path] = generator.normal(size=spec.shape).astype(np.float32)
        task_vectors = generator.normal(size=(4, *spec.shape)) * (
            generator.random((4, *spec.shape)) < 0.5
        )
        members[spec.path] = base[spec.path][None] + (0.3 * task_vectors).astype(np.float32)
    return tree.unflatten(members), tree.unflatten(base)


@pytest.fixture(scope="session")
def bits():
    """The bit patterns of every leaf, as numpy, by path."""

    def read(params):
        return {
            path: np.asarray(jax.device_get(leaf)).view(f"u{leaf.dtype.itemsize}")
            for path, leaf in tree.flatten(params).items()
        }

    return read


@pytest.fixture(scope="session")
def golden_checkpoints():
    """The module that makes the models which other libraries merged."""
    spec = importlib.util.spec_from_file_location(
        "checkpoints", pathlib.Path(__file__).parents[1] / "golden" / "checkpoints.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
