"""A merge method registered from outside the package merges files, populations and recipes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge.checkpoint import convert
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan, population
from jax_ordermerge.merge.methods.table import METHODS, Method, check_parameters
from jax_ordermerge.merge.recipe import planner
from jax_ordermerge.merge.sources.storage import Directory

SCALE = 0.5
RECIPE = """
merge_method: sign_descent
base_model: base
models: [{model: member_0}, {model: member_1}, {model: member_2}]
parameters: {scale: 0.5}
"""


def prepare(tensor, *, scale: float = 1.0):
    """Move the base by the sign of the sum of the task vectors."""
    return {"scale": np.float32(scale)}


def apply(part, *, scale):
    return part.base_float() + scale * jnp.sign(sum(part.task_vectors()))


@pytest.fixture
def sign_descent():
    METHODS.register("sign_descent", Method(prepare, apply, "a toy"))
    yield "sign_descent"
    METHODS.unregister("sign_descent")


def read(directory):
    reader = Reader(directory)
    return {name: reader.read(name) for name in reader.names}


def test_a_registered_method_merges_everything(sign_descent, models, tiny, tmp_path):
    members, base = models
    for i in range(3):
        convert.export(members, tiny, tmp_path / f"member_{i}", dtype="float32", member=i)
    convert.export(base, tiny, tmp_path / "base", dtype="float32")
    sources = [Directory(tmp_path / f"member_{i}") for i in range(3)]
    settings = {"method": sign_descent, "parameters": {"scale": SCALE}, "seed": 0}

    files = plan.uniform(sources, Directory(tmp_path / "base"), **settings)
    engine.merge_plan(files, tmp_path / "files")
    recipe = planner.plan_recipe(RECIPE, resolve=lambda name: tmp_path / name)
    engine.merge_plan(recipe, tmp_path / "recipe")
    first_three = jax.tree.map(lambda leaf: leaf[:3], members)
    merged = population.merge(first_three, base, tiny, dtype="float32", **settings)
    convert.export(merged, tiny, tmp_path / "memory", dtype="float32")

    start, models_read = read(tmp_path / "base"), [read(source.directory) for source in sources]
    for directory in ("files", "recipe", "memory"):
        for name, tensor in read(tmp_path / directory).items():
            step = np.sign(sum(model[name] - start[name] for model in models_read))
            np.testing.assert_allclose(tensor, start[name] + SCALE * step, rtol=1e-6)


def test_the_signature_is_the_schema(sign_descent):
    assert check_parameters(sign_descent) == {"scale": 1.0}
    with pytest.raises(UserError, match=r"has no parameter 'scal' \(did you mean 'scale'\?\)"):
        check_parameters(sign_descent, {"scal": 1.0})


def test_a_name_is_registered_once(sign_descent):
    with pytest.raises(ValueError, match="merge method 'sign_descent' is registered already"):
        METHODS.register(sign_descent, Method(prepare, apply, "a toy"))
