"""Recipes of mergekit 0.1.5 for architectures outside the tensor table give its numbers."""

import importlib.util
import json
import pathlib

import numpy as np
import pytest

from jax_ordermerge.merge.recipe import planner
from tests.merge.test_mergekit import execute

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GOLDENS = np.load(GOLDEN / "merge" / "unlisted.npz")
METHODS = sorted(name.removesuffix("/yaml") for name in GOLDENS.files if name.endswith("/yaml"))
KINDS = sorted(name.removesuffix("/config") for name in GOLDENS.files if name.endswith("/config"))

# each architecture compiles programs for its own shapes, for three seconds or more
DEFAULT = ("t5",)


@pytest.fixture(scope="module")
def unlisted_inputs():
    path = GOLDEN / "unlisted_inputs.py"
    spec = importlib.util.spec_from_file_location("unlisted_inputs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_ten_architectures():
    assert len(KINDS) == 10
    assert len(METHODS) == 5
    assert json.loads(str(GOLDENS["versions"]))["mergekit"] == "0.1.5"


@pytest.mark.parametrize(
    "kind",
    [kind if kind in DEFAULT else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS],
)
def test_the_numbers_are_those_of_mergekit(kind, unlisted_inputs, tmp_path):
    shapes = json.loads(str(GOLDENS[f"{kind}/shapes"]))
    stem = "diffusion_pytorch_model" if kind == "unet" else "model"
    config = json.loads(str(GOLDENS[f"{kind}/config"]))
    unlisted_inputs.write(tmp_path, unlisted_inputs.tensors(shapes), config, stem)
    for method in METHODS:
        recipe = str(GOLDENS[f"{method}/yaml"])
        merged = execute(planner.plan_recipe(recipe, resolve=lambda name: tmp_path / name))
        assert merged.keys() == shapes.keys()
        values = [merged[name] for name in sorted(merged)]
        samples = [*map(unlisted_inputs.sample, values)]
        expected = GOLDENS[f"{kind}/{method}"]
        ends = np.cumsum([part.size for part in samples])
        for name, x, part in zip(sorted(merged), samples, np.split(expected, ends), strict=False):
            np.testing.assert_allclose(x, part, rtol=0, atol=1e-6, err_msg=f"{method} {name}")
        # the sample is small: the sum is of all elements, each within a rounding
        sums = [x.sum(dtype=np.float64) for x in values]
        sizes = np.array([x.size for x in values])
        errors = np.abs(sums - GOLDENS[f"{kind}/{method}/sum"]) / sizes
        assert errors.max() < 1e-6, (method, sorted(merged)[int(errors.argmax())])
