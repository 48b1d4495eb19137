"""NaN and infinities in models: refused with model, tensor and count, or counted where allowed."""

import json
import warnings

import ml_dtypes
import numpy as np
import pytest

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import safetensors
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.sources.storage import Directory
from tests.commands.test_cli import call
from tests.merge.recipe_models import make

UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
SPOILED = {UP: {(0, 1): np.nan, (2, 3): -np.inf, (1, 0): np.inf}, NORM: {(2,): np.nan}}
# two models, or members and a base, for every method that needs no data
METHODS = sorted(name for name, method in table.METHODS.items() if method.needs is None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models a, b and base, and `bad`, which is b with values that are not finite."""
    root = tmp_path_factory.mktemp("models")
    for dtype in ("float32", "bfloat16"):
        for seed, name in enumerate(("base", "a", "b")):
            make(root / dtype / name, 2, seed, dtype=dtype)
        reader = Reader(root / dtype / "b")
        tensors = {name: reader.read(name).copy() for name in reader.names}
        for name, places in SPOILED.items():
            for place, value in places.items():
                tensors[name][place] = value
        config = Directory(root / dtype / "b").config
        safetensors.write(root / dtype / "bad", tensors.items(), config=config, dtype=dtype)
    return root


def plan_of(folder, method, bad="bad"):
    parameters = {"t": 0.5} if method in ("slerp", "nearswap") else {}
    count = 2
    sources = [Directory(folder / name, name) for name in ("a", bad)][:count]
    return plan.uniform(
        sources, Directory(folder / "base", "base"), method=method, parameters=parameters
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_tensor_is_named_with_its_count(folder, tmp_path, method, dtype):
    try:
        merge_plan = plan_of(folder / dtype, method)
    except UserError:  # of one model, or with parameters of its own
        pytest.skip("not a method of two models with defaults")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError) as refused:
            engine.merge_plan(merge_plan, tmp_path / "out", workers=1)
    assert str(refused.value) == (
        f"bad: {UP} has 3 of 16 elements that are NaN or infinite;"
        " mend the model, or allow them (--allow-nan)"
    )
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_is_not_loaded_is_checked_by_the_first_pass(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "LOADED_BYTES", 0)
    with pytest.raises(UserError, match=f"bad: {UP} has 3 of 16 elements"):
        engine.merge_plan(plan_of(folder / "bfloat16", "karcher"), tmp_path / "out", workers=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_allowed_elements_are_counted_and_the_report_is_json(folder, tmp_path, method):
    try:
        merge_plan = plan_of(folder / "float32", method)
    except UserError:
        pytest.skip("not a method of two models with defaults")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.merge_plan(merge_plan, tmp_path / "out", allow_nan=True)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "out" / "merge.json").read_text()
    report = json.loads(text, parse_constant=refuse)
    assert report["notes"][-1] == (
        f"bad has 4 elements that are NaN or infinite, in 2 tensors ({UP}, {NORM})"
    )
    assert report["notes"][-1] in (tmp_path / "out" / "README.md").read_text()


def test_an_average_has_them_where_the_member_has(folder, tmp_path):
    engine.merge_plan(plan_of(folder / "float32", "average"), tmp_path / "out", allow_nan=True)
    merged = Reader(tmp_path / "out")
    for name, _, _ in arch.hf_tensors(Directory(folder / "float32" / "a").config):
        bad = Reader(folder / "float32" / "bad").read(name)
        np.testing.assert_array_equal(np.isfinite(merged.read(name)), np.isfinite(bad), name)


def test_on_the_command_line(folder, tmp_path, capsys):
    models = [folder / "float32" / name for name in ("a", "bad")]
    line = ["merge", *models, "--method", "average", "--out", tmp_path / "out"]
    assert call(*line) == 2
    assert f"{UP} has 3 of 16 elements that are NaN" in capsys.readouterr().err
    assert call(*line, "--allow-nan") == 0
    assert "has 4 elements that are NaN or infinite" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_is_finite_is_that_of_numpy(dtype):
    limits = [0.0, -0.0, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).min)]
    assert safetensors.is_finite(np.array(limits, dtype))
    assert safetensors.is_finite(np.array([], dtype))
    for value in (np.nan, -np.nan, np.inf, -np.inf):
        assert not safetensors.is_finite(np.array([*limits, value, 1.0], dtype))
    width = np.dtype(dtype).itemsize * 8
    bits = np.random.default_rng(0).integers(0, 2**width, 4096, dtype=f"uint{width}").view(dtype)
    for value in bits:
        assert safetensors.is_finite(value.reshape(1)) == bool(np.isfinite(np.float32(value)))
