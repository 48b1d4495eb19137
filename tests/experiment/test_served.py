"""Exported models give the same answers in transformers and in another serving engine."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ordermerge import tree
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data import tokenizers
from jax_ordermerge.evaluate import decode
from jax_ordermerge.merge import population
from jax_ordermerge.model import llama
from jax_ordermerge.rng import stream

PROMPTS = [
    "Ann has 3 apples",
    "Question: Tom has 12 books. Tom buys 5 more and then loses 2. How many books does Tom have?\nAnswer: ",
    "Sums: 3",
]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """An exported selection in bfloat16, and its parameters in float32."""
    directory, base_directory = (
        tmp_path_factory.mktemp("served") / "merged",
        convert.resolve("embedded:quickstart"),
    )
    config, base = convert.load_params(base_directory)

    def disturbed(seed):
        flat = tree.flatten(base)
        noise = {
            name: jax.random.normal(stream(seed, "test", name), x.shape) for name, x in flat.items()
        }
        return tree.unflatten({name: x + 0.02 * noise[name] for name, x in flat.items()})

    members = tree.stack([disturbed(seed) for seed in range(3)])
    merged = population.merge(
        members,
        base,
        config,
        method="selection",
        seed=0,
        parameters={"resample": "exhaustive"},
        dtype="bfloat16",
    )
    convert.export(merged, config, directory, dtype="bfloat16", source=base_directory)
    return directory, config, jax.tree.map(lambda x: x.astype(jnp.float32), merged)


def ours(served, tokenizer, prompt, new=12):
    """Return prompt ids, greedy ids and log-probabilities of the prompt by our forward pass."""
    _, config, params = served
    ids = tokenizer(prompt)["input_ids"]
    tokens = jnp.array([ids])
    logits, _ = llama.forward(
        config,
        params,
        tokens,
        jnp.arange(len(ids))[None],
        jnp.ones((1, len(ids)), jnp.int32),
        dtype="float32",
    )
    return (
        ids,
        decode.generate(config, params, [ids], max_new_tokens=new, dtype="float32")[0],
        np.asarray(logits[0]),
    )


def test_transformers_reads_the_same_model(served):
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    transformers = pytest.importorskip("transformers")
    directory = served[0]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = tokenizers.load_tokenizer(directory)
    for prompt in PROMPTS:
        ids, out, logits = ours(served, tokenizer, prompt)
        with torch.no_grad():
            theirs = model(torch.tensor([ids])).logits[0].numpy()
            new = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids)),
                max_new_tokens=12,
                do_sample=False,
            )
        np.testing.assert_allclose(logits, theirs, atol=1e-4, rtol=0)
        assert [t for t in new[0, len(ids) :].tolist() if t not in served[1].eos_token_ids] == out


ENGINE = """
import json, sys, mistralrs
given = json.load(open(sys.argv[1]))
runner = mistralrs.Runner(which=mistralrs.Which.Plain(model_id=given["model"], dtype=mistralrs.ModelDType.F32), no_paged_attn=True)
answers = []
for prompt in given["prompts"]:
    request = mistralrs.CompletionRequest(model="default", prompt=prompt, max_tokens=12, temperature=0.0)
    answers.append(runner.send_completion_request(request).choices[0].text)
json.dump(answers, open(sys.argv[2], "w"))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("mistralrs") is None,
    reason="mistralrs (an independent engine) is not installed",
)
def test_an_independent_engine_says_the_same(served, tmp_path):
    directory = served[0]
    (tmp_path / "in.json").write_text(json.dumps({"model": str(directory), "prompts": PROMPTS}))
    # a process of its own: the engine keeps threads and locks that outlive it
    subprocess.run(
        [sys.executable, "-c", ENGINE, tmp_path / "in.json", tmp_path / "out.json"],
        check=True,
        timeout=300,
        env={**os.environ, "MISTRALRS_CPU_KV_F32": "1"},
    )
    tokenizer = tokenizers.load_tokenizer(directory)
    expected = [
        tokenizer.decode(ours(served, tokenizer, prompt)[1], skip_special_tokens=True)
        for prompt in PROMPTS
    ]
    assert any(expected)
    assert [text.strip() for text in json.loads((tmp_path / "out.json").read_text())] == [
        text.strip() for text in expected
    ]
