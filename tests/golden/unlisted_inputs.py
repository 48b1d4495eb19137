"""Inputs of the goldens of architectures outside the tensor table: a base and two members.

They are the same to the last bit wherever they are made, from the names and shapes of a model.
"""

import json
import pathlib
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import save_file

MODELS = ("base", "a", "b")
SAMPLE = 8  # elements of a tensor in the goldens, at most
SEED = 20261130


def tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, np.ndarray]]:
    """Model of `MODELS` -> name -> float32 array; of a member half of the elements changed."""
    generator = np.random.Generator(np.random.PCG64(SEED))
    models: dict[str, dict[str, np.ndarray]] = {name: {} for name in MODELS}
    # by name: files of one model may have its tensors in another order
    for name, shape in sorted(shapes.items()):
        base = generator.random(shape) - 0.5
        shared = generator.random(shape) - 0.5
        models["base"][name] = base.astype(np.float32)
        for member in MODELS[1:]:
            change = 0.3 * (shared + generator.random(shape) - 0.5)
            change *= generator.random(shape) < 0.5
            models[member][name] = (base + change).astype(np.float32)
    return models


def sample(values: np.ndarray) -> np.ndarray:
    """Elements at equal distances, at most `SAMPLE`, of which the last is the last."""
    flat = values.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(SAMPLE, flat.size)).round().astype(int)]


def write(
    directory: pathlib.Path,
    models: Mapping[str, Mapping[str, np.ndarray]],
    config: Mapping[str, object],
    stem: str,
) -> None:
    """Write a directory per model."""
    for model, arrays in models.items():
        (directory / model).mkdir(parents=True)
        (directory / model / "config.json").write_text(json.dumps(config))
        save_file(dict(arrays), directory / model / f"{stem}.safetensors", {"format": "pt"})
