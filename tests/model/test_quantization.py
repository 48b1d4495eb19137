"""Quantized weights against naive references, and products with them against dense ones."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from scipy import stats

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama, lora, quantization
from jax_ordermerge.train import frozen, objective
from jax_ordermerge.train.frozen import Storage

FORMATS = tuple(quantization.FORMATS)
MODEL = ModelConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    qkv_bias=True,
)
SETTINGS = Lora(rank=2, alpha=4, targets=("q", "o", "down"))


LARGEST = {"int8": 127, "int4": 7, "nf4": 1}  # what the largest of a block becomes


def naive_scale(weight, name, block):
    scale = np.abs(weight).reshape(len(weight), -1, block).max(-1) / np.float32(LARGEST[name])
    return np.where(scale > 0, scale, np.float32(1))


def naive(weight, scale, name):
    """Codes and values [O, I] of a weight, one element after the other."""
    codes, values = np.zeros(weight.shape, int), np.zeros_like(weight)
    block = weight.shape[1] // scale.shape[1]
    for row, column in np.ndindex(*weight.shape):
        unit = scale[row, column // block]
        x = weight[row, column] / unit
        if name == "nf4":
            code = int(np.argmin([abs(np.float32(value) - x) for value in quantization.NF4]))
            value = np.float32(quantization.NF4[code])
        else:
            code = int(np.clip(np.rint(x), -LARGEST[name], LARGEST[name]))
            value = np.float32(code)
        codes[row, column], values[row, column] = code, value * unit
    return codes, values


def weights(shape=(6, 32)):
    """Blocks of all kinds: normal, of zeros, of one value, with the largest on either side."""
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    weight[0], weight[1], weight[2, 0], weight[3, 1] = 0, 0.25, 9, -9
    weight[4] *= 1e-3
    weight[5] = 1e4 * weight[5].astype(jnp.bfloat16).astype(np.float32)
    return weight


@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_of_a_naive_reference_and_of_the_library(name, block):
    weight = weights()
    codes, scale = jax.jit(quantization.quantize, static_argnums=(1, 2))(weight, name, block)
    form = quantization.FORMATS[name]
    assert (codes.shape, codes.dtype.name) == ((6, 32 // form.per_byte), form.dtype)
    # XLA multiplies by the reciprocal of a constant, which is off by a digit
    expected_scale = naive_scale(weight, name, block)
    np.testing.assert_allclose(scale, expected_scale, rtol=3e-7)
    expected_codes, expected = naive(weight, np.asarray(scale), name)
    values = quantization.dequantize(codes, scale, name, "float32")
    assert values.tobytes() == expected.tobytes()
    theirs = qwix.QArray(
        jnp.asarray(expected_codes, "uint4" if name == "nf4" else name), scale, None, name
    )
    assert values.tobytes() == qwix.dequantize(theirs).tobytes()
    # what is largest stays as it is
    largest = np.abs(weight).reshape(-1, block).max(1)
    np.testing.assert_allclose(np.abs(values).reshape(-1, block).max(1), largest, rtol=1e-6)
    # half a step at most, of the widest gap of the table for nf4
    step = {"int8": 1, "int4": 1, "nf4": 0.304}[name] * np.repeat(np.asarray(scale), block, 1)
    assert (np.abs(values - weight) <= 0.501 * step).all()


def test_the_code_book_is_of_normal_quantiles():
    """The construction of QLoRA: quantiles of both halves, whose ends are ±1, and 0 once."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    positive = stats.norm.ppf(np.linspace(end, 0.5, 9)[:-1])
    negative = -stats.norm.ppf(np.linspace(end, 0.5, 8)[:-1])
    expected = np.sort(np.concatenate([positive, negative, [0]])) / positive.max()
    np.testing.assert_allclose(quantization.NF4, expected, atol=2e-7)


@pytest.fixture(scope="module")
def batch():
    random = np.random.default_rng(0)
    rows = {key: random.integers(0, 32, (2, 12)).astype(np.int32) for key in ("tokens", "targets")}
    return rows | {
        "positions": np.tile(np.arange(12, dtype=np.int32), (2, 1)),
        "segments": np.ones((2, 12), np.int32),
        "weights": np.ones((2, 12), np.float32),
    }


@pytest.fixture(scope="module")
def adapters():
    """Two members, [2, ...], in which nothing is zero."""
    random = np.random.default_rng(1)
    return tree.unflatten(
        {
            spec.path: 0.3 * random.normal(size=(2, *spec.shape)).astype(np.float32)
            for spec in lora.table(MODEL, SETTINGS)
        }
    )


def quantized(name):
    params = jax.tree.map(
        lambda x: x + 0.1 * np.random.default_rng(2).normal(size=x.shape).astype(np.float32),
        llama.init_params(MODEL, 0),
    )
    return frozen.place(params, tensor_table(MODEL), Storage("float32", name, 8), make_mesh())


def losses(form="flat", remat="none"):
    dense = objective.sft(MODEL, dtype="float32", form=form, remat=remat)
    return objective.adapted(dense, lora.scale(SETTINGS))


@pytest.mark.parametrize(
    ("name", "form"), [("int8", "flat"), ("int4", "flat"), ("nf4", "flat"), ("nf4", "by_head")]
)
def test_loss_and_gradients_are_those_of_the_dequantized_base(name, form, batch, adapters):
    base, adapter = quantized(name), tree.member(adapters, 0)
    step = jax.jit(jax.value_and_grad(losses(form), has_aux=True))
    (loss, _), grads = step(adapter, batch, base)
    (expected, _), expected_grads = step(adapter, batch, quantization.dense(base))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for ours, theirs in zip(*map(jax.tree.leaves, (grads, expected_grads)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(grads))


def shapes(jaxpr):
    """Shapes of all floating arrays of a program, also of its loops and calls."""
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if jnp.issubdtype(getattr(variable.aval, "dtype", int), jnp.floating):
                yield variable.aval.shape
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes(inner)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_one_layer_is_dense_at_a_time_for_all_members(remat, batch, adapters):
    """No array holds the dense matrices of all layers, or those of a member of its own."""
    gradient = jax.grad(losses(remat=remat), has_aux=True)
    members = jax.vmap(gradient, (0, None, None))
    base = quantized("nf4")
    program = set(shapes(jax.make_jaxpr(members)(adapters, batch, base).jaxpr))
    assert (40, 16) in program  # of gate and up, whose shape nothing else has
    layers, member = (3, 40, 16), (2, 40, 16)
    assert not {layers, member, (2, *layers), (3, *member)} & program
    stacked = jax.make_jaxpr(quantization.dense)(base)
    assert layers in set(shapes(stacked.jaxpr))  # where they are, they are found


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as caught:
        quantization.check_installed("lora.base_dtype = nf4")
    assert str(caught.value) == (
        "lora.base_dtype = nf4 needs the package qwix, which is not installed:"
        " pip install 'jax_ordermerge[quant]'"
    )
