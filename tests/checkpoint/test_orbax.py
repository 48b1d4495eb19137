"""Orbax checkpoints are restored on any mesh; partial and mismatching ones are refused."""

import errno
import shutil
import time
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge.checkpoint import orbax
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh


def abstract(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def population(mesh, members: int = 4) -> dict[str, dict[str, jax.Array]]:
    values = {
        "a": np.arange(members * 8 * 4, dtype=np.float32).reshape(members, 8, 4),
        "b": np.arange(members * 2.0, dtype=np.float32).reshape(members, 2),
    }
    specs = {"a": P("order", "fsdp", "tensor"), "b": P("order")}
    return {
        "layer": {
            name: jax.device_put(value, NamedSharding(mesh, specs[name]))
            for name, value in values.items()
        }
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with steps 2 and 4 of parameters, optimizer state and metadata."""
    directory = tmp_path_factory.mktemp("orbax")
    params = population(make_mesh(2, 2, 2))
    state = optax.adamw(optax.linear_schedule(0.0, 1.0, 5)).init(params)
    with orbax.Checkpoints(directory) as checkpoints:
        for step in (2, 4):
            tree = {"params": jax.tree.map(lambda x, s=step: x + s, params), "optimizer": state}
            checkpoints.save(
                step, tree, {"members": 4, "orders": ["x", "y"], "rope": {"theta": 1e4}}
            )
    return directory, tree


def test_a_tree_is_restored_with_its_types(saved):
    directory, tree = saved
    restored = orbax.restore(directory, 4, abstract(tree))
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    chex.assert_trees_all_equal(restored, tree)
    assert orbax.latest(directory) == 4
    assert orbax.metadata(directory, 2) == {
        "members": 4,
        "orders": ["x", "y"],
        "rope": {"theta": 1e4},
    }


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (4, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_part_is_restored_onto_another_mesh_and_dtype(saved, sizes, dtype):
    directory, tree = saved
    mesh = make_mesh(*sizes)
    sharding = {
        "layer": {
            "a": NamedSharding(mesh, P("order", "fsdp")),
            "b": NamedSharding(mesh, P(None, "tensor")),
        }
    }
    asked = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, dtype, sharding=s), tree["params"], sharding
    )
    restored = orbax.restore(directory, 4, {"params": asked})
    assert restored.keys() == {"params"}
    assert jax.tree.map(lambda x: x.sharding, restored["params"]) == sharding
    chex.assert_trees_all_equal(
        jax.device_get(restored["params"]),
        jax.device_get(jax.tree.map(lambda x: x.astype(dtype), tree["params"])),
    )


@pytest.mark.parametrize("mesh", [None, (1, 8, 1), (2, 2, 2)])
def test_one_member_is_restored(saved, mesh):
    directory, tree = saved
    sharding = None if mesh is None else NamedSharding(make_mesh(*mesh), P("fsdp"))
    asked = {
        "params": {"layer": {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)}}
    }
    for member in (0, 3):
        restored = orbax.restore_member(directory, 4, member, asked)["params"]["layer"]["a"]
        assert restored.tolist() == tree["params"]["layer"]["a"][member].tolist()
        assert sharding is None or restored.sharding == sharding


def test_one_member_does_not_need_the_bytes_of_the_others(tmp_path):
    # incompressible, and larger than what Orbax writes inline, so that members share no bytes
    noise = np.random.default_rng(0).normal(size=(4, 512, 256)).astype(np.float32)
    sharding = NamedSharding(make_mesh(4, 1, 1), P("order"))
    orbax.save(tmp_path, 1, {"w": jax.device_put(noise, sharding)})
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert size > 0.8 * noise.nbytes
    restored = orbax.restore_member(
        tmp_path, 1, 2, {"w": jax.ShapeDtypeStruct((512, 256), jnp.float32)}
    )
    np.testing.assert_array_equal(restored["w"], noise[2])


def test_arrays_may_change_as_soon_as_save_returns(tmp_path):
    mesh = make_mesh(1, 8, 1)
    x = jax.device_put(jnp.ones((512, 512)), NamedSharding(mesh, P("fsdp")))
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    with orbax.Checkpoints(tmp_path) as checkpoints:
        for number in range(1, 4):
            checkpoints.save(number, {"x": x})
            x = step(step(x))
        checkpoints.wait()
        for number in range(1, 4):
            restored = checkpoints.restore(
                number, {"x": jax.ShapeDtypeStruct((512, 512), jnp.float32)}
            )
            assert np.unique(restored["x"]).tolist() == [2 * number - 1]


def test_every_save_is_written_and_only_the_last_ones_stay(tmp_path):
    with orbax.Checkpoints(tmp_path / "new" / "directory", keep=2) as checkpoints:
        assert checkpoints.latest() is None
        # without `force` Orbax would skip saves during another one
        for step in (1, 2, 3, 10):
            checkpoints.save(step, {"x": jnp.full(3, step)}, {"step": step})
        checkpoints.save(10, {"x": jnp.full(3, 11)}, {"step": 11})
    with orbax.Checkpoints(tmp_path / "new" / "directory", keep=2) as checkpoints:
        assert sorted(path.name for path in checkpoints.directory.iterdir()) == ["10", "3"]
        assert checkpoints.latest() == 10
        assert checkpoints.metadata(10) == {"step": 11}
        assert checkpoints.restore(10, {"x": jax.ShapeDtypeStruct((3,), jnp.int32)})[
            "x"
        ].tolist() == [11, 11, 11]


def test_partial_checkpoints_are_not_listed(saved, tmp_path):
    directory, tree = saved
    here = tmp_path / "checkpoints"
    shutil.copytree(directory, here)
    shutil.copytree(here / "4", here / "9")
    (here / "9" / "_CHECKPOINT_METADATA").unlink()  # as after a deletion that was cut off
    shutil.copytree(here / "4", here / "8.orbax-checkpoint-tmp")  # as after a save that was cut off
    (here / "notes").mkdir()
    assert orbax.latest(here) == 4
    with pytest.raises(UserError, match=r"no checkpoint of step 9 .*\(present: 2, 4\)"):
        orbax.restore(here, 9, abstract(tree))
    with orbax.Checkpoints(here) as checkpoints:
        assert sorted(path.name for path in here.iterdir()) == ["2", "4", "notes"]
        for step in (8, 9):
            checkpoints.save(step, tree)
    assert orbax.latest(here) == 9


def test_absent_checkpoints(tmp_path):
    assert orbax.latest(tmp_path / "nowhere") is None
    assert orbax.latest(tmp_path) is None
    for call in (
        lambda: orbax.metadata(tmp_path, 1),
        lambda: orbax.restore(tmp_path, 1, {}),
        lambda: orbax.restore_member(tmp_path, 1, 0, {}),
    ):
        with pytest.raises(UserError, match=r"no checkpoint of step 1 in .*\(present: none\)"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_do_not_fit_are_named(saved):
    directory, _ = saved
    leaf = jax.ShapeDtypeStruct
    with pytest.raises(
        UserError, match=r"params/layer/a has shape \(4, 8, 4\), expected \(2, 8, 4\)"
    ):
        orbax.restore(directory, 4, {"params": {"layer": {"a": leaf((2, 8, 4), jnp.float32)}}})
    with pytest.raises(UserError, match="has no array params/layer/c"):
        orbax.restore(directory, 4, {"params": {"layer": {"c": leaf((4, 2), jnp.float32)}}})
    with pytest.raises(
        UserError, match=r"params/layer/a has shape \(4, 8, 4\), expected \(4, 8, 5\)"
    ):
        orbax.restore_member(
            directory, 4, 0, {"params": {"layer": {"a": leaf((8, 5), jnp.float32)}}}
        )
    with pytest.raises(UserError, match="has members 0 to 3, not 4"):
        orbax.restore_member(
            directory, 4, 4, {"params": {"layer": {"a": leaf((8, 4), jnp.float32)}}}
        )


@pytest.mark.parametrize("damage", ["_METADATA", "_CHECKPOINT_METADATA", "data"])
def test_damage_is_one_line(saved, tmp_path, damage):
    directory, _ = saved
    shutil.copytree(directory, tmp_path / "c")
    for path in (tmp_path / "c" / "4").rglob("*"):
        if path.is_file() and (
            path.name == damage or (damage == "data" and path.parent.name == "d")
        ):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    population, member = (
        {"params": {"layer": {"a": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
        for shape in ((4, 8, 4), (8, 4))
    )
    calls = [lambda: orbax.restore_member(tmp_path / "c", 4, 0, member)]
    if damage != "data":  # otherwise Orbax leaves futures that raise in later tests
        calls.append(lambda: orbax.restore(tmp_path / "c", 4, population))
    for call in calls:
        with pytest.raises(
            UserError, match=r"c/4 is damaged \(.+\); (remove it|restore)"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_nothing_is_printed(saved, capfd):
    directory, tree = saved
    orbax.restore(directory, 4, abstract(tree))
    assert capfd.readouterr() == ("", "")


# those of the first line are parts of URLs and patterns to Orbax, which would write `a#b` to `a`
@pytest.mark.parametrize(
    "name",
    [
        *("a#b", "a?b", "a%20b", "a[b]", "a*b", "a|b", "a\\b"),
        *("a b", "a+b", "a{b}", "é", "a:b", "a&b=c", "a'b", "$HOME", "~", "a\nb", "a\tb", "a."),
    ],
)
def test_awkward_paths_work(tmp_path, name):
    orbax.save(tmp_path / name, 0, {"params": {"w": jnp.arange(2.0)}}, {"x": 1})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    wanted = {"params": {"w": jax.ShapeDtypeStruct((2,), "float32")}}
    assert orbax.restore(tmp_path / name, 0, wanted)["params"]["w"].tolist() == [0, 1]
    array = orbax.open_member(tmp_path / name, 0, None, {"params/w": (2,)})["params/w"]
    assert array.read(slice(0, 2)).tolist() == [0, 1]
    one = {"params": {"w": jax.ShapeDtypeStruct((), "float32")}}
    assert orbax.restore_member(tmp_path / name, 0, 1, one)["params"]["w"] == 1
    # saved again beside the first, of which the oldest goes
    with orbax.Checkpoints(tmp_path / name, keep=1) as checkpoints:
        checkpoints.save(1, {"params": {"w": jnp.arange(2.0) + 5}})
        checkpoints.wait()
        assert checkpoints.restore(1, wanted)["params"]["w"].tolist() == [5, 6]
    assert [path.name for path in (tmp_path / name).iterdir()] == ["1"]


def test_a_path_may_go_up(tmp_path):
    (tmp_path / "below").mkdir()
    directory = tmp_path / "below" / ".." / "checkpoints"
    orbax.save(directory, 0, {"w": jnp.arange(2.0)})
    member = {"w": jax.ShapeDtypeStruct((), "float32")}
    assert orbax.restore_member(directory, 0, 1, member)["w"] == 1


def test_what_cannot_be_read_is_not_called_damaged(saved, tmp_path):
    directory, _ = saved
    shutil.copytree(directory, tmp_path / "c")
    member = {"params": {"layer": {"a": jax.ShapeDtypeStruct((8, 4), jnp.float32)}}}
    refused = "PERMISSION_DENIED: Error opening [OS error 13: EACCES Permission denied]"
    for error in (OSError(errno.EIO, "I/O error"), ValueError(refused)):
        with (
            mock.patch.object(orbax, "_open_store", side_effect=error),
            pytest.raises(UserError, match=r"cannot be read .* not damaged"),
        ):
            orbax.restore_member(tmp_path / "c", 4, 0, member)
    orbax.restore_member(tmp_path / "c", 4, 0, member)


def test_a_save_is_given_the_time_that_its_bytes_take(tmp_path):
    # Llama-2-7B, four members, on a file share of 2 TiB at 88 MiB/s per TiB: 29 minutes, of which
    # Orbax allows 20
    seconds = 324e9 / (2 * 88 * 2**20)
    timeout = orbax.save_timeout(324 * 10**9, 2 * 88 * 2**20)
    assert 1200 < seconds < timeout
    with orbax.Checkpoints(tmp_path, timeout=timeout) as checkpoints:
        # what Orbax waits by
        manager = checkpoints._checkpointer._manager._checkpointer._async_manager
        assert manager._timeout_secs == timeout
    # small ones keep its own time
    assert orbax.save_timeout(10**9, 200e6) == 1200


def test_a_save_says_how_long_it_waited_for_the_one_before(tmp_path):
    tree = {"w": jnp.zeros(2)}
    with orbax.Checkpoints(tmp_path, on_saved=lambda: time.sleep(0.5)) as checkpoints:
        checkpoints.save(1, tree)
        assert checkpoints.save(2, tree) > 0.1
