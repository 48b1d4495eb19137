"""What Gemma and Phi have beside the others: soft caps, two ropes, LongRoPE, fused matrices."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import tensor_table
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Lora
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode
from jax_ordermerge.model import kernels, layers, llama, lora, loss
from jax_ordermerge.model.attention import attend
from jax_ordermerge.train import objective
from tests.model.test_attention import inputs, packed

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import families

PHI = families.FAMILIES["phi4_mini"]
FORWARD = jax.jit(llama.forward, static_argnums=0, static_argnames=("dtype",))


def logits_of(config, params, tokens, positions=None, segments=None):
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None] if positions is None else positions
    segments = np.ones_like(tokens) if segments is None else segments
    positions = np.broadcast_to(positions, tokens.shape)
    return np.asarray(FORWARD(config, params, tokens, positions, segments, dtype="float32")[0])


def test_each_document_has_the_factors_of_its_own_length():
    """Two short documents and a long one in a row, against each alone, which is transformers'."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    params, lengths = families.weights(PHI), (12, 25, 20)
    documents = [families.tokens(PHI, 30)[i % 2, i : i + n] for i, n in enumerate(lengths)]
    row = np.concatenate(documents)[None]
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])[None]
    segments = np.repeat(np.array([1, 2, 3], np.int32), lengths)[None]
    together = logits_of(PHI, params, row, positions, segments)[0]
    model = make_model_goldens.torch_model(PHI, params)
    for document, end in zip(documents, np.cumsum(lengths), strict=True):
        with torch.no_grad():
            alone = model(torch.tensor(document[None], dtype=torch.long)).logits[0].numpy()
        np.testing.assert_allclose(together[end - len(document) : end], alone, atol=1e-4)


def test_short_and_long_prompts_in_a_batch_equal_transformers():
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    from tests.evaluate.test_decode import transformers_greedy

    params, text = families.weights(PHI), families.tokens(PHI, 40)[0].tolist()
    prompts = [text[:3], text[5:26], text[7:16], text[9:39]]  # 3, 21, 9 and 30 tokens
    options = {"eos_ids": (), "dtype": "float32"}
    rows = decode.generate(PHI, params, prompts, max_new_tokens=12, **options)
    model = make_model_goldens.torch_model(PHI, params)
    assert rows == transformers_greedy(model, prompts, 12, torch)
    # 21 tokens are long: transformers would read the text again with other factors
    with pytest.raises(
        UserError,
        match=r"prompt 0 of 9 tokens and 13 new ones cross the length of"
        r" 20, .* lower max_new_tokens to 12",
    ):
        decode.generate(PHI, params, [text[:9]], max_new_tokens=13, **options)


def test_losses_under_a_soft_cap(monkeypatch):
    monkeypatch.setattr(loss, "_ROWS", 3)  # several chunks, the last of them padded
    random = np.random.default_rng(0)
    x, head = (random.normal(size=shape).astype(np.float32) for shape in ((3, 5, 4), (17, 4)))
    targets, weights = random.integers(0, 17, (3, 5)), random.random((3, 5)).astype(np.float32)
    # by hand, in float64
    capped = 2.5 * np.tanh(np.einsum("BTD,VD->BTV", x, head, dtype=np.float64) / 2.5)
    chosen = np.take_along_axis(capped, targets[..., None], -1)[..., 0]
    sums = ((np.log(np.exp(capped).sum(-1)) - chosen) * weights).sum(-1)
    missed = ((capped.max(-1) > chosen) * weights).sum(-1)
    scores = loss.linear_scores(x, head, targets, weights, softcap=2.5)
    np.testing.assert_allclose(scores[0], sums, rtol=1e-5)
    np.testing.assert_allclose(scores[1], missed, rtol=1e-6)

    def plain(x, head):
        logits = 2.5 * jnp.tanh(jnp.einsum("BTD,VD->BTV", x, head) / 2.5)
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0]
        return -(picked * weights).sum()

    (total, same), ours = jax.value_and_grad(
        lambda x, head: loss.linear_losses(x, head, targets, weights, softcap=2.5),
        (0, 1),
        has_aux=True,
    )(x, head)
    np.testing.assert_allclose((total, *same), (sums.sum(), *sums), rtol=1e-5)
    for actual, expected in zip(ours, jax.grad(plain, (0, 1))(x, head), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_splash_caps_scores_as_xla_does():
    q, k, v = inputs(130, 130, H=8)
    q = 20 * q
    tokens = packed(130, (50, 70))
    real = np.asarray(tokens.segments > 0)

    def mixed(kernel, softcap):
        out = attend(q, k, v, tokens, tokens, window=40, softcap=softcap, kernel=kernel)
        return np.asarray(out)[real]

    xla = mixed("xla", 3.0)
    np.testing.assert_allclose(mixed("splash_interpreted", 3.0), xla, atol=1e-4)
    assert abs(mixed("xla", None) - xla).max() > 0.1


@pytest.mark.slow
def test_gradients_of_splash_under_a_cap_are_those_of_xla():
    q, k, v = inputs(130, 130, H=8)
    tokens = packed(130, (50, 70))
    weights = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)
    weights *= np.asarray(tokens.segments > 0)[:, :, None, None]

    def gradients(kernel, softcap):
        def total(q, k, v):
            settings = {"window": 40, "scale": 0.3, "softcap": softcap, "kernel": kernel}
            return (attend(q, k, v, tokens, tokens, **settings) * weights).sum()

        return jax.grad(total, (0, 1, 2))(20 * q, k, v)

    xla = gradients("xla", 3.0)
    for actual, expected in zip(gradients("splash_interpreted", 3.0), xla, strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5 * float(abs(expected).max()))
    assert abs(gradients("xla", None)[0] - xla[0]).max() > 1


def test_cudnn_has_no_soft_cap():
    class Gpu:
        platform = "gpu"

    class Grid:
        devices, shape = np.array([Gpu()]), {}

    config = dataclasses.replace(families.FAMILIES["gemma2"], head_dim=16)
    assert kernels.choose("auto", config, Grid, dtype="bfloat16") == "xla"
    with pytest.raises(UserError, match="cudnn has no soft cap of the scores"):
        kernels.choose("cudnn", config, Grid, dtype="bfloat16")


def gradients(config, params, form, mesh=None):
    """Loss and gradients of one microbatch."""
    random = np.random.default_rng(0)
    batch = {
        name: random.integers(0, config.vocab_size, (4, 24)).astype(np.int32)
        for name in ("tokens", "targets")
    } | {
        "positions": np.tile(np.arange(24, dtype=np.int32), (4, 1)),
        "segments": np.ones((4, 24), np.int32),
        "weights": random.random((4, 24)).astype(np.float32),
    }
    step = jax.value_and_grad(
        objective.sft(config, dtype="float32", remat="none", form=form), has_aux=True
    )
    if mesh is None:
        return jax.jit(step)(params, batch)
    with jax.set_mesh(mesh):
        return jax.jit(step)(params, batch)


def assert_near(actual, expected):
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5 * max(1, float(abs(y).max())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("phi4_mini", {"tensor": 4}),  # cuts across the heads of the fused matrix
        ("gemma2", {"fsdp": 2, "tensor": 2}),
        ("gemma3", {"fsdp": 2, "sequence": 2}),
    ],
)
def test_forms_and_meshes_change_no_gradient(name, sizes):
    """With adapters on every matrix."""
    config = families.FAMILIES[name]
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init_params(config, Lora(rank=2), 0))
    params = lora.join(families.weights(config), adapter, 0.5)
    expected = gradients(config, params, "flat")
    assert_near(gradients(config, params, "by_head", meshes.make_mesh(1, **sizes)), expected)


def test_an_adapter_of_fused_matrices_is_its_product():
    settings = Lora(rank=2, targets=("qkv_proj", "gate_up"))
    adapter = jax.tree.map(lambda x: x + 0.1, lora.init_params(PHI, settings, 0))
    base, tokens = families.weights(PHI), families.tokens(PHI, 15)
    joined = logits_of(PHI, lora.join(base, adapter, 0.5), tokens)
    np.testing.assert_allclose(
        joined, logits_of(PHI, lora.dense(base, adapter, 0.5), tokens), atol=1e-4
    )
    assert abs(joined - logits_of(PHI, base, tokens)).max() > 0.1
    names = [spec.hf_names()[0] for spec in lora.table(PHI, settings)]
    assert names[0] == "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight"
    with pytest.raises(
        UserError, match=r"q is not a matrix of this model.* it has qkv, o, gate_up"
    ):
        lora.targets(PHI, Lora(targets=("q",)))


def test_norms_of_gemma_start_at_zero_and_multiply_by_one():
    config = families.FAMILIES["gemma3"]
    norms = [spec.init for spec in tensor_table(config) if spec.kind == "norm"]
    assert norms == ["zeros"] * 7
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    norm = layers.Norm(1e-6, "float32", offset=1.0)
    np.testing.assert_allclose(
        norm.apply({"params": {"weight": jnp.zeros(8)}}, x),
        x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6),
        rtol=1e-5,
    )


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_embeddings_in_bfloat16_are_those_of_transformers(name):
    """The root of the width is rounded before the product: 5.6568 is 5.65625 in bfloat16."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    config = families.FAMILIES[name]
    params = families.weights(config)
    model = make_model_goldens.torch_model(config, params).to(torch.bfloat16)
    ids = torch.tensor(families.tokens(config), dtype=torch.long)
    with torch.no_grad():
        states = model.model(ids, output_hidden_states=True, use_cache=False).hidden_states[0]
    table = jnp.asarray(params["embed"]["weight"], "bfloat16")
    scale = llama._embedding_scale(config, "bfloat16")
    ours = layers.scaled(table[families.tokens(config)], scale)
    np.testing.assert_array_equal(np.asarray(ours, np.float32), states.float().numpy())


@pytest.mark.parametrize(
    "name", [pytest.param("gemma2", marks=pytest.mark.slow), "gemma3", "phi4_mini"]
)
def test_a_directory_of_transformers_comes_back_byte_for_byte(name, tmp_path):
    """Read onto a mesh, written by Orbax, read without a mesh and exported."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens
    import transformers

    config = families.FAMILIES[name]
    model = make_model_goldens.torch_model(config, families.weights(config))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    read, params = convert.load_params(tmp_path / "hf", meshes.make_mesh(2, 2, 2))
    assert read == config
    orbax.save(tmp_path / "orbax", 1, {"params": params})
    restored = orbax.restore(tmp_path / "orbax", 1, {"params": convert.abstract_params(config)})
    convert.export(restored["params"], config, tmp_path / "export", dtype="bfloat16")
    before, after = (Reader(tmp_path / directory) for directory in ("hf", "export"))
    assert set(before.names) == set(after.names)
    for tensor in before.names:
        assert before.read(tensor).tobytes() == after.read(tensor).tobytes(), tensor
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "export", output_loading_info=True
    )
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys"))
    assert again.config.rope_parameters == model.config.rope_parameters
