"""The model against transformers (live and golden), a loop, meshes, a pretrained checkpoint."""

import json
import pathlib
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import mesh, rng, tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.model import llama, loss

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import families

GOLDEN = pathlib.Path(families.__file__).parent / "model"

SMALL = families.FAMILIES["llama_gqa_bias"]


# one compilation a family and shape for the complete file
FORWARD = jax.jit(llama.forward, static_argnums=0, static_argnames=("dtype", "last_only"))


def logits_of(config, params, tokens, positions=None, segments=None, **kwargs):
    B, T = tokens.shape
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1)) if positions is None else positions
    segments = np.ones((B, T), np.int32) if segments is None else segments
    return np.asarray(
        FORWARD(config, params, tokens, positions, segments, **{"dtype": "float32", **kwargs})[0]
    )


@pytest.mark.parametrize("name", families.FAMILIES)
def test_goldens(name):
    config = families.FAMILIES[name]
    ours = logits_of(config, families.weights(config), families.tokens(config))
    np.testing.assert_allclose(
        ours[1, ::3], np.load(GOLDEN / f"{name}.npz")["logits"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", families.FAMILIES)
def test_transformers(name):
    pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    config = families.FAMILIES[name]
    generator = np.random.default_rng(3)  # weights other than those of the goldens
    flat = {
        s.path: (generator.normal(0, 0.2, s.shape) + (s.init == "ones")).astype(np.float32)
        for s in tensor_table(config)
    }
    tokens = generator.integers(0, config.vocab_size, (2, families.LENGTH)).astype(np.int32)
    params = tree.unflatten(flat)
    theirs = make_model_goldens.logits(config, params, tokens)
    assert theirs.std() > 0.3
    np.testing.assert_allclose(logits_of(config, params, tokens), theirs, atol=1e-4, rtol=0)


def test_what_tells_families_apart_is_seen_by_the_goldens():
    # a golden that stays equal without its own feature would prove nothing
    import dataclasses

    def rope(name, **change):
        return {"rope": dataclasses.replace(families.FAMILIES[name].rope, **change)}

    for name, change in [
        ("llama31", rope("llama31", kind="default")),
        ("llama_linear_rope", rope("llama_linear_rope", kind="default")),
        ("mistral_window", {"sliding_window": None}),
        ("qwen2_window", {"full_attention_layers": ()}),
        ("qwen3_window", {"full_attention_layers": (0, 1)}),
        ("qwen2_yarn", rope("qwen2_yarn", kind="default")),
        ("mistral_yarn", rope("mistral_yarn", attention_factor=None)),
        ("llama_yarn", rope("llama_yarn", truncate=True)),
        ("llama_yarn", rope("llama_yarn", beta_fast=32.0)),
        ("llama_yarn", rope("llama_yarn", beta_slow=1.0)),
        ("llama_yarn", rope("llama_yarn", mscale=None)),
        ("llama_yarn", rope("llama_yarn", original_max_position_embeddings=32)),
    ]:
        config = families.FAMILIES[name]
        changed = logits_of(
            dataclasses.replace(config, **change), families.weights(config), families.tokens(config)
        )
        assert abs(changed[1, ::3] - np.load(GOLDEN / f"{name}.npz")["logits"]).max() > 1e-2, name


@pytest.mark.parametrize("name", families.FAMILIES)
def test_the_module_declares_the_tensor_table(name):
    config = families.FAMILIES[name]
    tokens = jnp.zeros((1, 3), jnp.int32)
    shared = llama.LayerInputs(
        *(llama.Tokens(tokens, tokens),) * 2,
        tuple(
            llama.rotation(rope, config.head_dim, tokens * 1.0)
            for rope in dict.fromkeys(config.layer_ropes)
        ),
        jnp.int32(0),
    )
    variables = jax.eval_shape(
        llama.Llama(config, jnp.float32).init, jax.random.key(0), tokens, shared
    )
    declared = {path: leaf.shape for path, leaf in tree.flatten(variables["params"]).items()}
    # the head is a plain product beside the module: training never takes all of its logits at once
    assert declared == {
        spec.path: spec.shape for spec in tensor_table(config) if not spec.path.startswith("head/")
    }


def test_init_is_named_and_the_same_on_every_mesh():
    config = families.FAMILIES["qwen3_bias"]
    unsharded = jax.device_get(tree.flatten(llama.init_params(config, 5)))
    for spec in tensor_table(config):
        if spec.init == "normal":
            assert abs(unsharded[spec.path].std() / config.initializer_range - 1) < 0.1, spec.path
        else:
            assert (unsharded[spec.path] == (spec.init == "ones")).all(), spec.path
    q = unsharded["layers/attention/q/weight"]
    key = rng.stream(5, "init", "model.layers.1.self_attn.q_proj.weight")
    np.testing.assert_allclose(
        q[1], jax.random.normal(key, q[1].shape) * config.initializer_range, rtol=1e-6
    )
    grid = mesh.make_mesh(2, 2, 2)
    sharded = tree.flatten(llama.init_params(config, 5, grid))
    for spec in tensor_table(config):
        assert sharded[spec.path].sharding == mesh.sharding(spec.axes, spec.shape, grid)
        np.testing.assert_array_equal(sharded[spec.path], unsharded[spec.path], err_msg=spec.path)


@pytest.mark.parametrize("name", ["mistral_window", "qwen3_window"])
def test_packed_documents_do_not_see_each_other(name):
    config = families.FAMILIES[name]
    params = families.weights(config)
    lengths, T = (30, 70, 41), 150  # more than one block of queries, and padding behind
    documents = [families.tokens(config, 100)[i % 2, i : i + n] for i, n in enumerate(lengths)]
    tokens, positions, segments = (np.zeros((1, T), np.int32) for _ in range(3))
    tokens[0, : sum(lengths)] = np.concatenate(documents)
    positions[0, : sum(lengths)] = np.concatenate([np.arange(n) for n in lengths])
    segments[0, : sum(lengths)] = np.repeat([1, 2, 3], lengths)
    packed = logits_of(config, params, tokens, positions, segments)[0]
    assert np.isfinite(packed).all()
    for document, end in zip(documents, np.cumsum(lengths), strict=True):
        unsharded = logits_of(config, params, document[None])[0]
        np.testing.assert_allclose(packed[end - len(document) : end], unsharded, atol=2e-5, rtol=0)
    # no bit of document 3 depends on document 2
    changed = np.where(segments == 2, (tokens + 1) % config.vocab_size, tokens)
    np.testing.assert_array_equal(
        logits_of(config, params, changed, positions, segments)[0][100:141], packed[100:141]
    )


def loss_and_grads(config, params, tokens, remat="none", dtype="float32"):
    positions = np.tile(np.arange(tokens.shape[1], dtype=np.int32), (len(tokens), 1))

    def mean(p):
        x, _ = llama.hidden(
            config, p, tokens, positions, np.ones_like(tokens), dtype=dtype, remat=remat
        )
        weights = np.ones(tokens[:, 1:].shape, np.float32)
        return (
            loss.linear_losses(
                x[:, :-1],
                llama.head(config, p),
                tokens[:, 1:],
                weights,
                softcap=config.logit_softcap,
            )[0]
            / weights.sum()
        )

    value, grads = jax.jit(jax.value_and_grad(mean))(params)
    return float(value), jax.device_get(grads)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3_bias",
        "qwen3_window",
        "gemma2",
        pytest.param("gemma3", marks=pytest.mark.slow),
        "phi4_mini",
    ],
)
def test_gradients_equal_those_of_torch(name):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens

    config = families.FAMILIES[name]
    params, tokens = families.weights(config), families.tokens(config, 70)
    model = make_model_goldens.torch_model(config, params)
    ids = torch.tensor(tokens, dtype=torch.long)
    value = model(ids, labels=ids).loss
    value.backward()
    ours, grads = loss_and_grads(config, params, tokens)
    assert ours == pytest.approx(value.item(), abs=1e-5)
    flat = tree.flatten(grads)
    names = dict(model.named_parameters())
    for spec in tensor_table(config):
        for layer, name in enumerate(spec.hf_names()):
            ours_one = flat[spec.path][layer] if spec.stacked else flat[spec.path]
            np.testing.assert_allclose(
                ours_one, names[name].grad.numpy(), atol=2e-6, rtol=1e-4, err_msg=name
            )


@pytest.mark.parametrize("name", ["llama2", pytest.param("qwen2_window", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(name):
    config = families.FAMILIES[name]
    params, tokens = families.weights(config), families.tokens(config)
    value, grads = loss_and_grads(config, params, tokens)
    for remat in ("full", "dots", "offload"):
        recomputed, recomputed_grads = loss_and_grads(config, params, tokens, remat)
        assert recomputed == pytest.approx(value, abs=1e-6)
        chex.assert_trees_all_close(recomputed_grads, grads, atol=1e-6)


@pytest.mark.parametrize("name", ["llama_gqa_bias", "qwen3_window"])
def test_meshes_change_no_logit(name):
    config = families.FAMILIES[name]
    params, tokens = families.weights(config), families.tokens(config)
    unsharded = logits_of(config, params, tokens)
    for grid in (
        mesh.make_mesh(1, 2, 4),
        mesh.make_mesh(1, 8, 1),
        mesh.make_mesh(1, 2, 1, sequence=4),
    ):
        placed = tree.unflatten(
            {
                s.path: jax.device_put(x, mesh.sharding(s.axes, s.shape, grid))
                for s, x in zip(tensor_table(config), tree.flatten(params).values(), strict=True)
            }
        )
        with jax.set_mesh(grid):
            np.testing.assert_allclose(
                logits_of(config, placed, tokens), unsharded, atol=1e-5, rtol=0
            )


def test_bfloat16_is_near_and_logits_stay_float32():
    params, tokens = families.weights(SMALL), families.tokens(SMALL)
    exact, rounded = (
        logits_of(SMALL, params, tokens),
        logits_of(SMALL, params, tokens, dtype="bfloat16"),
    )
    assert rounded.dtype == np.float32
    assert 0 < abs(rounded - exact).max() < 0.15


@pytest.mark.parametrize("name", ["llama31", "mistral_window", "qwen3_window"])
def test_cache_in_pieces_equals_the_whole(name):
    config = families.FAMILIES[name]
    params, tokens = families.weights(config), families.tokens(config)
    complete = logits_of(config, params, tokens)
    cache, begin = llama.init_cache(config, 2, families.LENGTH + 3, "float32"), 0
    for length in (22, 1, 1):
        part = slice(begin, begin + length)
        positions = np.tile(np.arange(families.LENGTH, dtype=np.int32)[part], (2, 1))
        out, cache = FORWARD(
            config,
            params,
            tokens[:, part],
            positions,
            np.ones_like(positions),
            cache,
            dtype="float32",
        )
        np.testing.assert_allclose(out, complete[:, part], atol=1e-5, rtol=0)
        begin += length
    assert int(cache.length) == families.LENGTH
    last, _ = FORWARD(
        config,
        params,
        tokens,
        np.tile(np.arange(families.LENGTH), (2, 1)),
        np.ones_like(tokens),
        dtype="float32",
        last_only=True,
    )
    np.testing.assert_allclose(last, complete[:, -1:], atol=1e-6)


def test_a_cache_too_small_is_refused():
    tokens = np.zeros((1, 4), np.int32)
    with pytest.raises(ValueError, match="the cache is too short: given 4 tokens, it has 3 slots"):
        llama.forward(
            SMALL,
            families.weights(SMALL),
            tokens,
            tokens,
            tokens,
            llama.init_cache(SMALL, 1, 3, "float32"),
            dtype="float32",
        )


def test_one_compilation_a_shape():
    params = families.weights(SMALL)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(params, tokens):
        return llama.forward(SMALL, params, tokens, tokens, jnp.ones_like(tokens), dtype="float32")[
            0
        ]

    for shift in range(3):
        run(params, families.tokens(SMALL) + shift)


@pytest.fixture(scope="module")
def stories(shared_data):
    from safetensors.numpy import load_file

    directory = shared_data / "models" / "stories260K"
    config = ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
    tensors = load_file(directory / "model.safetensors")
    stacked = {
        s.path: np.stack([tensors[n] for n in s.hf_names()]) if s.stacked else tensors[s.hf_name]
        for s in tensor_table(config)
    }
    golden = shared_data / "golden" / "stories260K"
    return (
        config,
        tree.unflatten(stacked),
        json.loads((golden / "golden.json").read_text()),
        golden,
        directory,
    )


def test_stories260k_logits(stories):
    config, params, golden, directory, _ = stories
    reference = np.load(directory / "greedy200_logits_f32.npz")
    ours = logits_of(config, params, reference["ids"][None].astype(np.int32))[0]
    np.testing.assert_allclose(ours, reference["logits"], atol=1e-4, rtol=0)
    # each token of the golden text is the argmax after the one before
    assert ours.argmax(-1)[:-1].tolist() == golden["bos_prompt_greedy_200_ids"][1:]


def test_stories260k_document_losses(stories, shared_data):
    """The mean loss of documents against transformers. Ours are packed into one row."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import make_model_goldens
    from transformers import AutoTokenizer

    config, params, _, _, directory = stories
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = (shared_data / "text" / "tinystories_sample_2MB.txt").read_text()
    documents = [
        tokenizer(part.strip())["input_ids"][:250] for part in text.split("<|endoftext|>", 6)[:6]
    ]
    model = make_model_goldens.torch_model(config, params)
    with torch.no_grad():
        theirs = [
            model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() for ids in documents
        ]

    tokens, positions, segments = (np.zeros((3, 500), np.int32) for _ in range(3))
    places = []
    for number, ids in enumerate(documents):
        row, begin = number // 2, 250 * (number % 2)
        place = slice(begin, begin + len(ids))
        tokens[row, place], positions[row, place], segments[row, place] = (
            ids,
            np.arange(len(ids)),
            number + 1,
        )
        places.append((row, slice(begin, begin + len(ids) - 1)))
    x = llama.hidden(config, params, tokens, positions, segments, dtype="float32")[0][:, :-1]
    ours = []
    for row, part in places:
        weights = np.zeros(tokens[:, 1:].shape, np.float32)
        weights[row, part] = 1
        ours.append(
            float(
                loss.linear_losses(x, llama.head(config, params), tokens[:, 1:], weights)[0]
                / weights.sum()
            )
        )
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    assert 1 < np.mean(ours) < 1.6
