"""Greedy generation against a reference without cache, against itself under other batches and paddings, and transformers."""

import dataclasses
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from jax_ordermerge import mesh, tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode
from jax_ordermerge.model import llama

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "golden"))
import families

CONFIG = families.FAMILIES["mistral_window"]
PARAMS = families.weights(CONFIG)
PROMPTS = [families.tokens(CONFIG, 30)[i % 2, i : i + n].tolist() for i, n in enumerate((3, 20, 1, 11, 7))]
NEW = 12


@jax.jit
def next_token(params, tokens, length):
    positions = np.arange(tokens.shape[1], dtype=np.int32)[None]
    segments = (positions < length).astype(np.int32)
    logits, _ = llama.forward(CONFIG, params, tokens, positions, segments, dtype="float32")
    return logits[0, length - 1].argmax()


def without_cache(prompt, new=NEW, ends=()):
    row = np.zeros((1, 40), np.int32)
    row[0, : len(prompt)] = prompt
    for at in range(len(prompt), len(prompt) + new):
        row[0, at] = next_token(PARAMS, row, at)
        if row[0, at] in ends:
            return row[0, len(prompt) : at].tolist()
    return row[0, len(prompt) : len(prompt) + new].tolist()


def generate(prompts, **kwargs):
    return decode.generate(CONFIG, PARAMS, prompts, **{"max_new_tokens": NEW, "eos_ids": (), "dtype": "float32", **kwargs})


@pytest.fixture(scope="module")
def reference():
    return [without_cache(prompt) for prompt in PROMPTS]


def test_equals_a_reference_without_cache(reference):
    assert len({tuple(ids) for ids in reference}) == len(PROMPTS)
    assert generate(PROMPTS) == reference


@pytest.mark.parametrize("batch", [1, 2])
def test_other_batches_give_the_same(reference, batch):
    assert generate(PROMPTS, batch=batch) == reference


def test_other_padding_gives_the_same(reference):
    # beside a longer prompt the others are padded to 32 instead of 16 or 24
    longer = families.tokens(CONFIG, 30)[0].tolist()
    assert generate([*PROMPTS, longer])[:-1] == reference


def test_stops_at_end_tokens(reference):
    ends = {reference[0][4], reference[1][0], reference[3][7]}
    expected = [without_cache(prompt, ends=ends) for prompt in PROMPTS]
    assert any(len(ids) < NEW for ids in expected)
    assert [] in expected
    assert generate(PROMPTS, eos_ids=sorted(ends)) == expected
    with_ends = dataclasses.replace(CONFIG, eos_token_ids=tuple(sorted(ends)))
    assert decode.generate(with_ends, PARAMS, PROMPTS, max_new_tokens=NEW, dtype="float32") == expected


def test_stops_early_when_all_rows_are_done(monkeypatch, reference):
    steps = []
    real = llama.forward

    def counted(config, params, tokens, *args, **kwargs):
        jax.debug.callback(lambda: steps.append(tokens.shape[1]))
        return real(config, params, tokens, *args, **kwargs)

    monkeypatch.setattr(llama, "forward", counted)
    ends = [ids[2] for ids in reference[:2]]
    assert max(ids.index(end) for ids, end in zip(reference[:2], ends, strict=True)) == 2
    generate(PROMPTS[:2], eos_ids=ends, max_new_tokens=11)  # 11: a program of its own, traced with the counter
    jax.effects_barrier()
    assert sorted(steps) == [1, 1, 24]


def test_one_compilation_a_bucket():
    decode._decode.clear_cache()
    for length in (17, 20, 24):
        generate([list(range(length)), [5]])
    assert decode._decode._cache_size() == 1
    generate([list(range(25)), [5]])
    assert decode._decode._cache_size() == 2


def test_buckets_waste_at_most_half():
    for size in range(1, 2000):
        assert size <= decode.bucket(size) <= max(2 * size - 1, 1)
        assert decode.bucket(decode.bucket(size)) == decode.bucket(size)
    assert len({decode.bucket(size) for size in range(1, 2049)}) <= 21


def test_a_sharded_model_gives_the_same(reference):
    grid = mesh.make_mesh(1, 2, 2)
    flat = tree.flatten(PARAMS)
    placed = tree.unflatten(
        {s.path: jax.device_put(flat[s.path], mesh.sharding(s.axes, s.shape, grid)) for s in tensor_table(CONFIG)}
    )
    with jax.set_mesh(grid):
        assert decode.generate(CONFIG, placed, PROMPTS, max_new_tokens=NEW, eos_ids=(), dtype="float32") == reference


@pytest.mark.parametrize("name", ["mistral_window", "qwen3"])
def test_equals_transformers(name):
    torch = pytest.importorskip("torch")
    import make_model_goldens

    config = families.FAMILIES[name]
    params = families.weights(config)
    model = make_model_goldens.torch_model(config, params)
    found = decode.generate(config, params, PROMPTS, max_new_tokens=NEW, eos_ids=(), dtype="float32")
    for prompt, ids in zip(PROMPTS, found, strict=True):
        given = torch.tensor([prompt])
        with torch.no_grad():
            theirs = model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )  # fmt: skip
        assert ids == theirs[0, len(prompt) :].tolist()


def test_stories260k_golden_tokens(shared_data):
    from safetensors.numpy import load_file

    directory = shared_data / "models" / "stories260K"
    config = ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
    tensors = load_file(directory / "model.safetensors")
    params = tree.unflatten(
        {s.path: np.stack([tensors[n] for n in s.hf_names()]) if s.stacked else tensors[s.hf_name] for s in tensor_table(config)}
    )
    golden = json.loads((shared_data / "golden" / "stories260K" / "golden.json").read_text())["bos_prompt_greedy_200_ids"]
    assert len(golden) == 201
    found = decode.generate(config, params, [golden[:1], golden[:40]], max_new_tokens=200, eos_ids=(), dtype="float32")
    assert found[0] == golden[1:]
    assert found[1][:161] == golden[40:]


def test_bfloat16_runs_and_no_prompts_give_nothing():
    assert [len(ids) for ids in generate(PROMPTS[:2], dtype="bfloat16")] == [NEW] * 2
    assert generate([]) == []


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has no tokens"),
        ([[1, 96]], {}, "prompt 0 holds an id outside the vocabulary of 96"),
        ([[1] * 2040], {}, "prompt 0 of 2040 tokens and 12 new ones exceed the context of 2048"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_bad_input_is_named(prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(prompts, **options)
