"""A training step and a conversion of Granite, SmolLM3 and OLMo against transformers."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Lora
from jax_ordermerge.model import layers, llama, lora
from jax_ordermerge.model.attention import attend
from jax_ordermerge.train import objective
from tests.model.test_attention import inputs, packed

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import families

NAMES = ["granite", "smollm3", "olmo2", "olmo3"]


def gradients(config, params, tokens, form, mesh=None):
    """Loss, sums per example and gradients of the summed losses of all tokens but the first."""
    batch = {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(tokens.shape[1] - 1, dtype=np.int32), (len(tokens), 1)),
        "segments": np.ones_like(tokens[:, 1:]),
        "weights": np.ones(tokens[:, 1:].shape, np.float32),
    }
    step = jax.value_and_grad(
        objective.sft(config, dtype="float32", remat="dots", form=form), has_aux=True
    )
    if mesh is None:
        return jax.jit(step)(params, batch)
    with jax.set_mesh(mesh):
        return jax.jit(step)(params, batch)


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_of_a_training_step_equal_those_of_torch(name):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    config = families.FAMILIES[name]
    params, tokens = families.weights(config), families.tokens(config)
    model = make_model_goldens.torch_model(config, params)
    ids = torch.tensor(tokens, dtype=torch.long)
    total = model(ids, labels=ids).loss * tokens[:, 1:].size
    total.backward()
    (ours, _), grads = gradients(config, params, tokens, "by_head")
    assert float(ours) == pytest.approx(total.item(), rel=1e-5)
    flat, named = tree.flatten(grads), dict(model.named_parameters())
    for spec in tensor_table(config):
        for layer, hf_name in enumerate(spec.hf_names()):
            gradient = flat[spec.path][layer] if spec.stacked else flat[spec.path]
            expected = named[hf_name].grad.numpy()
            np.testing.assert_allclose(
                gradient, expected, rtol=1e-4, atol=1e-5 * abs(expected).max(), err_msg=hf_name
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("olmo2", {"tensor": 4}),  # the norm over all heads needs those of other devices
        ("smollm3", {"fsdp": 2, "sequence": 2}),
    ],
)
def test_forms_and_meshes_change_no_gradient(name, sizes):
    """With adapters on every matrix."""
    config = families.FAMILIES[name]
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init_params(config, Lora(rank=2), 0))
    params = lora.join(families.weights(config), adapter, 0.5)
    inputs = config, params, np.tile(families.tokens(config), (2, 1))
    actual = gradients(*inputs, "by_head", meshes.make_mesh(1, **sizes))
    expected = gradients(*inputs, "flat")
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * max(1, float(abs(y).max())))


@pytest.mark.parametrize("name", NAMES)
def test_files_of_transformers_keep_their_bytes_over_orbax(name, tmp_path):
    torch, transformers = (
        pytest.importorskip(name, reason="needs the extra parity")
        for name in ("torch", "transformers")
    )
    import make_model_goldens

    config = families.FAMILIES[name]
    model = make_model_goldens.torch_model(config, families.weights(config))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    read, params = convert.load_params(tmp_path / "hf")
    assert read == config
    orbax.save(tmp_path / "orbax", 1, {"params": params})
    template = {"params": convert.abstract_params(config, None)}
    restored = orbax.restore(tmp_path / "orbax", 1, template)["params"]
    convert.export(restored, config, tmp_path / "again", dtype="bfloat16")
    before, after = Reader(tmp_path / "hf"), Reader(tmp_path / "again")
    assert set(before.names) == set(after.names)
    for tensor in before.names:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    # what transformers takes from our file is what it wrote into its own
    first, second = (
        transformers.AutoConfig.from_pretrained(tmp_path / directory).to_dict()
        for directory in ("hf", "again")
    )
    for key in first.keys() - {"transformers_version", "_name_or_path"}:
        assert first[key] == second[key], key


@pytest.mark.parametrize("factor", [0.22, 12.0, 0.7])
def test_factors_are_rounded_as_in_torch(factor):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    ours = layers.scaled(jnp.asarray(values, "bfloat16"), factor)
    theirs = torch.tensor(values).to(torch.bfloat16) * factor
    np.testing.assert_array_equal(np.asarray(ours, np.float32), theirs.float().numpy())


def test_a_divisor_of_the_logits_costs_no_digit():
    """Logits of bfloat16 states are as exact with the divisor as without."""
    config = families.FAMILIES["granite"]
    params, tokens = families.weights(config), families.tokens(config)
    inputs = np.tile(np.arange(24, dtype=np.int32), (2, 1)), np.ones_like(tokens)
    forward = jax.jit(llama.forward, static_argnums=0, static_argnames="dtype")
    exact, rounded = (
        np.asarray(forward(config, params, tokens, *inputs, dtype=dtype)[0])
        for dtype in ("float32", "bfloat16")
    )
    assert abs(rounded - exact).max() < 0.03 * abs(exact).max()


@pytest.mark.parametrize("kernel", ["xla", "splash_interpreted"])
def test_scores_take_the_factor_of_the_model(kernel):
    q, k, v = inputs(130, 130, H=8)
    tokens = packed(130, (50, 70))
    real = np.asarray(tokens.segments > 0)
    actual = attend(q, k, v, tokens, tokens, scale=0.1, kernel=kernel)
    # the same scores by queries of another length
    expected = attend(0.1 * np.sqrt(8) * q, k, v, tokens, tokens)
    np.testing.assert_allclose(np.asarray(actual)[real], np.asarray(expected)[real], atol=1e-5)
    assert abs(np.asarray(attend(q, k, v, tokens, tokens))[real] - actual[real]).max() > 0.1
