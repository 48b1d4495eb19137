"""Both forms of the program, flat and by head, have the same losses and gradients."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Lora
from jax_ordermerge.model import kernels, layers, llama, lora, loss, rope
from jax_ordermerge.plan.collectives import read_collectives
from jax_ordermerge.train import objective

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
    output_bias=True,
)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    rows = {
        name: random.integers(0, CONFIG.vocab_size, (4, 12)).astype(np.int32)
        for name in ("tokens", "targets")
    }
    return rows | {
        "positions": np.tile(np.arange(12, dtype=np.int32), (4, 1)),
        "segments": np.ones((4, 12), np.int32),
        "weights": random.random((4, 12)).astype(np.float32),
    }


@pytest.fixture(scope="module")
def params():
    """Biases and the second factor of adapters start at 0; here nothing does."""
    settings = Lora(rank=2, targets=("q", "o", "down"))
    dense, adapter = llama.init_params(CONFIG, 0), lora.init_params(CONFIG, settings, 0)
    leaves, structure = jax.tree.flatten(lora.join(dense, adapter, 1.0))
    random = np.random.default_rng(1)
    return structure.unflatten(
        [x + 0.1 * random.normal(size=x.shape).astype(np.float32) for x in leaves]
    )


def gradients(params, batch, form, mesh=None):
    """Loss, sums per example and gradients, of the second of two equal members on a mesh."""
    one = jax.value_and_grad(objective.sft(CONFIG, dtype="float32", form=form), has_aux=True)
    if mesh is None:
        return jax.jit(one)(params, batch)
    both = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    return jax.tree.map(lambda x: x[1], jax.jit(meshes.map_members(one, mesh))(both, batch))


def assert_same(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5 * max(1, float(abs(y).max())))


def test_by_head_is_flat_with_biases_and_adapters(params, batch):
    expected = gradients(params, batch, "flat")
    assert_same(gradients(params, batch, "by_head"), expected)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(expected[1]))


def test_gradients_by_head_are_stacked_in_the_compute_dtype(params, batch):
    """One per layer of every matrix: in float32 they would take twice the memory."""
    step = jax.grad(objective.sft(CONFIG, dtype="bfloat16", form="by_head"), has_aux=True)
    program = jax.make_jaxpr(step)(params, batch)
    scans = [
        equation
        for equation in program.jaxpr.eqns
        if equation.primitive.name == "scan" and equation.params["length"] == CONFIG.num_layers
    ]
    sizes = {(16, 16), (8, 16), (24, 16), (16, 24)}
    matrices = [
        var.aval.dtype.name
        for equation in scans
        for var in (*equation.invars, *equation.outvars)
        if var.aval.shape[:1] == (2,) and var.aval.shape[1:] in sizes
    ]
    # seven matrices forward and backward, and the gradients of seven
    assert (len(scans), matrices.count("bfloat16"), matrices.count("float32")) == (2, 21, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"data": 2, "fsdp": 2},
        {"fsdp": 2, "tensor": 2},
        {"fsdp": 2, "sequence": 2},
        {"tensor": 4},  # which does not divide the two kv heads
    ],
)
def test_by_head_on_a_mesh(params, batch, sizes):
    mesh = meshes.make_mesh(2, **sizes)
    assert_same(gradients(params, batch, "by_head", mesh), gradients(params, batch, "flat"))


@pytest.mark.parametrize("B", [8, 3])  # a batch that the mesh does not divide takes the flat way
def test_the_loss_on_a_mesh(B, monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", 4)
    random = np.random.default_rng(0)
    x, head = (random.normal(size=size).astype(np.float32) for size in ((B, 6, 8), (32, 8)))
    targets = random.integers(0, 32, (B, 6)).astype(np.int32)
    weights = random.random((B, 6)).astype(np.float32)
    segments = np.repeat(np.array([[1, 1, 1, 2, 2, 0]], np.int32), B, 0)

    def of(form):
        def total(x, head):
            sums = loss.linear_losses(
                x, head, targets, weights, segments_BT=segments, count=2, form=form
            )
            return 3 * sums[0], sums[1]

        return jax.value_and_grad(total, (0, 1), has_aux=True)

    mesh = meshes.make_mesh(1, 2, data=2)
    placed = [
        jax.device_put(array, meshes.sharding(axes, array.shape, mesh))
        for array, axes in ((x, ("batch", None, None)), (head, ("vocab", "embed")))
    ]
    with jax.set_mesh(mesh):
        program = jax.jit(of("by_head")).lower(*placed).compile()
        actual = program(*placed)
    assert_same(actual, of("flat")(x, head))
    if B == 8:
        # three chunks; the head is gathered once: 3/4 would be 1/2 of it per chunk
        received = read_collectives(program.as_text(), mesh)
        assert received["all-gather", ("fsdp",)] == (1.0, 32 * 8 * 4 / 2)


def test_the_gradient_of_an_embedding_adds_up_in_float32():
    # bfloat16 has 8 bits: a sum of ones in it stays at 256
    table = layers.Embedding(4, 2, "bfloat16", "by_head")
    tokens = jnp.full((1, 4096), 3)
    params = {"params": {"weight": jnp.ones((4, 2))}}
    gradient = jax.grad(lambda x: table.apply(x, tokens).astype("float32").sum())(params)
    expected = np.array([[0, 0], [0, 0], [0, 0], [4096, 4096]])
    np.testing.assert_array_equal(gradient["params"]["weight"], expected)


def test_the_gradient_of_the_head_adds_up_in_float32(monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", 8)
    # 512 chunks of 8 rows; softmax - target is 1/2 for token 1, so that each chunk adds 4
    x, targets = jnp.ones((8, 512, 2), "bfloat16"), jnp.zeros((8, 512), int)

    def total(head):
        return loss.linear_losses(x, head, targets, jnp.ones((8, 512)), form="by_head")[0]

    gradient = jax.jit(jax.grad(total))(jnp.zeros((2, 2)))
    np.testing.assert_array_equal(gradient, [[-2048, -2048], [2048, 2048]])


def test_the_gradient_of_a_weight_contracts_the_input_first():
    """XLA on TPU writes the first array again: x once, and not each gradient of what reads x."""
    layer = layers.Linear((5,), ("mlp", "embed"), False, "float32", "by_head")

    def loss(weight, x):
        return jnp.sin(layer.apply({"params": {"weight": weight}}, x)).sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.ones((5, 4)), jnp.ones((2, 3, 4))).as_text()
    assert "(tensor<2x3x4xf32>, tensor<2x3x5xf32>) -> tensor<4x5xf32>" in text


def test_rotations_of_bfloat16_are_those_of_float32_rounded():
    random = np.random.default_rng(0)
    x, ct = (jnp.asarray(random.normal(size=(2, 5, 3, 8)), "bfloat16") for _ in range(2))
    angles = random.random((2, 5, 4)).astype(np.float32)
    cos, sin = np.cos(angles), np.sin(angles)

    def rotated(x):
        first, second = np.split(np.asarray(x, np.float32), 2, axis=-1)
        c, s = cos[:, :, None], sin[:, :, None]
        return np.concatenate([first * c - second * s, second * c + first * s], -1)

    out, vjp = jax.vjp(lambda x: rope.rotate(x, cos, sin), x)
    np.testing.assert_array_equal(out, jnp.asarray(rotated(x), "bfloat16"))
    # the transpose of a rotation is the rotation back
    sin = -sin
    np.testing.assert_array_equal(vjp(ct)[0], jnp.asarray(rotated(ct), "bfloat16"))


def test_the_form_is_that_of_the_devices():
    for platform, form in (("cpu", "flat"), ("tpu", "by_head"), ("cuda", "by_head")):
        device = types.SimpleNamespace(platform=platform)
        assert layers.choose_form(types.SimpleNamespace(devices=np.array([device]))) == form


@pytest.mark.parametrize(
    ("size", "head_bytes", "block"), [(2048, 256, 1024), (2048, 512, 512), (1536, 256, 512)]
)
def test_blocks_of_splash_fit_rows_and_memory(size, head_bytes, block):
    assert kernels.splash_block(size, head_bytes) == block
