"""Named randomness, the mesh, trees, and what importing costs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ordermerge
from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.errors import UserError
from jax_ordermerge.rng import stream, stream_key_bits


def test_streams_do_not_meet():
    names = [
        (s, *n)
        for s in range(30)
        for n in [("a",), ("a", 0), ("a", "0"), ("b", "a"), ("ba",), (0,), ("a", 1), ("a", s)]
    ]
    streams = {tuple(stream_key_bits(*name).tolist()): name for name in names}
    assert len(streams) == len(set(names))


def test_stream_is_stable_and_typed():
    assert (
        jax.random.key_data(stream(7, "select", "model.norm.weight")).tolist()
        == stream_key_bits(7, "select", "model.norm.weight").tolist()
    )
    assert stream_key_bits(-1, "x").tolist() != stream_key_bits(1, "x").tolist()
    with pytest.raises(TypeError, match="named by strings and integers"):
        stream(0, 1.5)


@pytest.mark.parametrize(
    ("mesh", "sizes"),
    [
        (((2, -1, 2), {}), (2, 1, 2, 1, 2)),
        (((1, 3, 1), {}), (1, 1, 3, 1, 1)),
        (((), {"data": 2, "sequence": -1}), (1, 2, 1, 4, 1)),
    ],
)
def test_mesh_sizes(mesh, sizes):
    positional, named = mesh
    shape = meshes.make_mesh(*positional, **named).shape
    assert dict(shape) == dict(zip(meshes.AXES, sizes, strict=True))


def test_mesh_sizes_that_do_not_fit():
    for sizes in [(-1, -1, 1), (0, 1, 1), (16, 1, 1), (3, -1, 1)]:
        with pytest.raises(UserError, match="mesh order="):
            meshes.make_mesh(*sizes)


def test_partition_drops_what_does_not_divide_and_never_repeats_an_axis():
    mesh = meshes.make_mesh(2, 2, 2)
    assert meshes.partition(("member", "layer", "mlp", "embed"), (4, 3, 6, 8), mesh) == P(
        "order", None, "tensor", "fsdp"
    )
    assert meshes.partition(("mlp", "embed"), (5, 8), mesh) == P(None, "fsdp")
    assert meshes.partition(("batch", "embed"), (8, 8), mesh) == P("fsdp", None)


def test_constrain_is_nothing_without_a_mesh_and_shards_under_one():
    x = jnp.ones((4, 6))
    assert meshes.constrain(x, "batch", "mlp") is x
    mesh = meshes.make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda v: meshes.constrain(v * 1.0, "batch", "mlp"))(x)
    assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P("fsdp", "tensor")), 2)


@pytest.mark.parametrize(("platform", "pinned"), [("cpu", 0), ("tpu", 0), ("gpu", 2)])
def test_the_layout_of_states_is_pinned_on_gpu_and_changes_no_bit(monkeypatch, platform, pinned):
    def step(state, x, shared):
        return {name: value.T @ (value * x) for name, value in state.items()}, x + shared

    mesh = meshes.make_mesh(2, 2)
    monkeypatch.setattr(meshes, "platform", lambda mesh: platform)
    update = jax.jit(meshes.update_members(step, mesh))
    state = {name: jnp.arange(36.0).reshape(4, 3, 3) / 7 for name in "ab"}
    arguments = state, jnp.arange(4.0), jnp.float32(1)
    assert update.lower(*arguments).as_text().count("@LayoutConstraint") == pinned
    updated, outputs = update(*arguments)
    one_by_one = [jax.jit(step)({"a": state["a"][m]}, jnp.float32(m), 1.0)[0] for m in range(4)]
    for name in "ab":
        assert updated[name].tolist() == [one["a"].tolist() for one in one_by_one]
    assert outputs.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_trees():
    members = [{"a": {"w": np.full(2, m)}, "b": np.full((1, 2), m)} for m in range(3)]
    population = tree.stack(members)
    assert tree.size(population) == 3
    assert tree.flatten(tree.member(population, 1))["a/w"].tolist() == [1, 1]
    assert tree.flatten(tree.unflatten(tree.flatten(members[2]))).keys() == {"a/w", "b"}


def test_importing_is_light():
    code = (
        "import sys, jax_ordermerge.config, jax_ordermerge.arch, jax_ordermerge.cli\n"
        "sys.exit('jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    assert jax_ordermerge.__all__ == [
        "Config",
        "ModelConfig",
        "UserError",
        "__version__",
        "export",
        "forward",
        "init_params",
        "load_config",
        "load_params",
        "make_mesh",
        "order_indices",
        "run",
        "stream",
        "tensor_table",
    ]
    for name in jax_ordermerge.__all__:
        assert getattr(jax_ordermerge, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        jax_ordermerge.nothing  # noqa: B018
