"""Mixing against naive loops of numpy, on meshes, and through the loop."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import rng, tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Wash, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import members, mixing
from jax_ordermerge.train import step as steps

MODEL = ModelConfig(
    vocab_size=24, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2
)
M = 4
MIXINGS = {
    "wash": {"kind": "wash", "fraction": 0.3, "every": 2},
    "papa": {"kind": "papa", "rate": 0.25, "every": 2},
}


# ---------------------------------------------------------------------- naive, number by number


def lowbias(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def word(key, index, number):
    a = lowbias((key[0] + 0x9E3779B9 * number) & 0xFFFFFFFF)
    return lowbias(lowbias(index ^ a) ^ lowbias(key[1] ^ a))


def naive_wash(x, key, done, fraction, tile_shape):
    """Tile by tile; x is [M, rows, columns]."""
    out, (height, width) = x.copy(), tile_shape
    R, C = x.shape[1] // height, x.shape[2] // width
    swapped = 0
    for number, (r, c) in enumerate(itertools.product(range(R), range(C))):
        place, chance, *deal = (
            word(key, number, (done * (len(x) + 2) + i) & 0xFFFFFFFF) for i in range(len(x) + 2)
        )
        if np.float32((chance >> 8) * 2.0**-24) >= np.float32(fraction) * np.float32(
            height * width
        ):
            continue
        down, right = divmod(place % (height * width), width)
        at = r * height + down, c * width + right
        for member, source in enumerate(np.argsort(deal, kind="stable")):
            out[(member, *at)] = x[(source, *at)]
        swapped += 1
    return out, swapped


@pytest.mark.parametrize(
    ("shape", "fraction"),
    [((6, 8), 0.2), ((5, 7), 0.4), ((1, 12), 0.5), ((64, 64), 0.01), ((4, 4), 1.0)],
)
def test_wash_is_the_naive_loop(shape, fraction):
    x = np.random.default_rng(0).standard_normal((M, *shape)).astype(np.float32)
    key, tile_shape = rng.stream_key_bits(3, "wash", "w"), mixing.tile(shape, fraction)
    ours = jax.jit(mixing.wash, static_argnames="tile_shape")(
        x, key, jnp.uint32(5), jnp.float32(fraction), tile_shape=tile_shape
    )
    expected, swapped = naive_wash(x, key.tolist(), 5, fraction, tile_shape)
    np.testing.assert_array_equal(ours, expected)
    assert 0 < swapped <= -(-x[0].size // (tile_shape[0] * tile_shape[1]))


def test_wash_takes_its_fraction_and_permutes_uniformly():
    x = jnp.broadcast_to(jnp.arange(3.0)[:, None, None], (3, 600, 1000))
    tile_shape = mixing.tile((600, 1000), 0.01)
    out = np.asarray(
        mixing.wash(
            x,
            jnp.asarray(rng.stream_key_bits(0, "wash", "w")),
            jnp.uint32(1),
            jnp.float32(0.01),
            tile_shape=tile_shape,
        )
    )
    np.testing.assert_array_equal(np.sort(out, axis=0), x)  # nothing is lost or doubled
    moved = (out != np.asarray(x)).any(0)
    assert moved.mean() == pytest.approx(
        0.01 * 5 / 6, abs=4 * (0.01 / 600_000) ** 0.5
    )  # one of 6 permutations moves nothing
    dealt = out[:, moved]
    counts = [
        int((dealt == np.array(order)[:, None]).all(0).sum())
        for order in list(itertools.permutations(range(3)))[1:]
    ]
    assert np.abs(np.array(counts) - moved.sum() / 5).max() < 4 * (moved.sum() / 5) ** 0.5
    assert moved.any(0).mean() > 0.9
    assert moved.any(1).mean() > 0.9


def test_wash_keeps_bits():
    odd = np.array([0x7FC00001, 0x80000000, 0x00000001, 0xFF800000], np.uint32).view(np.float32)
    x = np.broadcast_to(odd[:, None, None], (4, 8, 8))
    out = mixing.wash(
        x, jnp.array([1, 2], jnp.uint32), jnp.uint32(1), jnp.float32(1), tile_shape=(1, 1)
    )
    np.testing.assert_array_equal(
        np.sort(np.asarray(out).view(np.uint32), 0),
        np.sort(np.ascontiguousarray(x).view(np.uint32), 0),
    )


@pytest.mark.parametrize("rate", [0.01, 0.25, 1.0])
def test_papa_is_the_naive_sum(rate):
    x = np.random.default_rng(0).standard_normal((M, 5, 7)).astype(np.float32)
    total = x[0]
    for member in x[1:]:
        total = total + member
    expected = np.float32(1 - rate) * x + np.float32(rate) * (total / np.float32(M))
    np.testing.assert_array_equal(jax.jit(lambda x: mixing.papa(tuple(x), rate))(x), expected)
    if rate == 1:
        assert (expected == expected[0]).all()


# ---------------------------------------------------------------------- on meshes


def mixed(settings, mesh, *dones):
    table = tensor_table(MODEL)
    abstract = convert.abstract_params(MODEL, mesh, members=M)
    random = np.random.default_rng(1)
    params = tree.unflatten(
        {s.path: random.standard_normal((M, *s.shape)).astype(np.float32) for s in table}
    )
    mix = mixing.compile_mixing(settings, table, 0, mesh, abstract)
    return params, *(
        jax.device_get(
            mix(
                steps.TrainState(jax.device_put(params, steps.shardings(abstract)), None, None),
                done,
            ).params
        )
        for done in dones
    )


@pytest.mark.parametrize("kind", MIXINGS)
def test_every_mesh_gives_the_same_bits(kind, same_bits):
    settings = make_config({"training": {"mixing": MIXINGS[kind]}}).training.mixing
    params, plain, none, later = mixed(settings, make_mesh(), 2, 3, 4)
    for mesh in (make_mesh(2), make_mesh(4), make_mesh(2, 2, 2)):
        assert same_bits(mixed(settings, mesh, 2)[1], plain), mesh
    assert not same_bits(params, plain)
    assert same_bits(params, none)  # every second step
    assert same_bits(later, plain) == (kind == "papa")  # WASH takes other elements each time


def test_the_fraction_falls_with_depth():
    params, out = (tree.flatten(x) for x in mixed(Wash(fraction=0.3), make_mesh(), 1))
    share = {path: (out[path] != params[path]).any(0) for path in params}
    up = share["layers/mlp/up/weight"].mean((1, 2))
    assert 0.2 < share["embed/weight"].mean() < 0.35
    assert up[0] > up[1] + 0.04
    assert not share["head/weight"].any()
    assert not share["norm/weight"].any()


# ---------------------------------------------------------------------- through the loop


def weights(run, model):
    return members.restore_members(run.spec, model, make_mesh(), run.layout)


@pytest.mark.parametrize("kind", [pytest.param("wash", marks=pytest.mark.slow), "papa"])
def test_killed_and_resumed_is_uninterrupted(tmp_path, tiny_train, tiny_model, same_bits, kind):
    changes = {
        "training": {"mixing": MIXINGS[kind], "checkpoint_every": 2, "microbatch": 8},
        "data": {"buckets": []},
    }
    trained = tiny_train(tmp_path / "whole", make_mesh(), **changes)
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path / "killed", make_mesh(), stop_at=5, **changes)
    resumed = tiny_train(tmp_path / "killed", make_mesh(), **changes)
    assert same_bits(weights(resumed, tiny_model), weights(trained, tiny_model))
    assert resumed.lines()[-1]["loss"] == trained.lines()[-1]["loss"]
    unmixed = tiny_train(
        tmp_path / "apart",
        make_mesh(),
        **changes | {"training": changes["training"] | {"mixing": None}},
    )
    assert not same_bits(weights(unmixed, tiny_model), weights(trained, tiny_model))


# ---------------------------------------------------------------------- refusals


def test_a_member_cannot_be_mixed_alone(tmp_path, tiny_train):
    with pytest.raises(UserError, match="member 1 cannot be trained without the other 1"):
        tiny_train(tmp_path, make_mesh(), members=(1,), training={"mixing": {"kind": "papa"}})


@pytest.mark.parametrize(
    ("population", "mixing", "message"),
    [
        (
            {"members": 4, "wave": 2},
            {"kind": "wash"},
            "all trained at once; population has members = 4, wave = 2",
        ),
        ({"members": 1}, {"kind": "wash"}, "needs two or more members"),
        (
            {},
            {"kind": "wash", "rate": 0.5},
            r"unknown key training.mixing.rate \(kind wash has: every, fraction, depth\)",
        ),
        (
            {},
            {"kind": "papa", "fraction": 0.5},
            r"unknown key training.mixing.fraction \(kind papa has: every, rate\)",
        ),
        (
            {},
            {"kind": "wush"},
            "training.mixing.kind = 'wush': unknown mixing .did you mean 'wash'",
        ),
        ({}, {"kind": "wash", "fraction": 0}, "training.mixing.fraction"),
        ({}, {"kind": "papa", "rte": 0.5}, r"training.mixing.rte \(kind papa has: every, rate\)"),
    ],
)
def test_what_is_refused(population, mixing, message):
    with pytest.raises(UserError, match=message) as error:
        make_config({"population": population, "training": {"mixing": mixing}})
    assert "\n" not in str(error.value)
