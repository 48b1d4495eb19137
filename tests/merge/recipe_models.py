"""Small models for recipes: of one architecture, and some that differ from it in one thing."""

import numpy as np

from jax_ordermerge import arch, tree
from jax_ordermerge.checkpoint import convert

LAYERS = {"a": 4, "b": 4, "c": 4, "base": 4, "short": 2, "long": 6}
CONFIG = {"vocab_size": 6, "hidden_size": 4, "intermediate_size": 4, "num_heads": 2}


def make(directory, layers, seed, *, dtype="float32", **change):
    config = arch.ModelConfig(**{**CONFIG, "num_layers": layers, **change})
    generator = np.random.default_rng(seed)
    flat = {
        spec.path: generator.normal(size=spec.shape).astype(np.float32)
        for spec in arch.tensor_table(config)
    }
    convert.export(tree.unflatten(flat), config, directory, dtype=dtype)
    return directory


def make_all(path):
    """Models in directories of these names."""
    for seed, (name, layers) in enumerate(LAYERS.items()):
        make(path / name, layers, seed)
    make(path / "half", 4, 10, dtype="bfloat16")
    make(path / "tied", 4, 11, tie_embeddings=True)
    make(path / "padded", 4, 12, vocab_size=7)
    make(path / "wide", 4, 13, hidden_size=8)
    return path
