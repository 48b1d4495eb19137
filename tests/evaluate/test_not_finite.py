"""Models whose weights hold NaN: every kind of scoring names model and first item."""

import json

import jax
import numpy as np
import pytest
import yaml

from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import decode, generation, scoring
from jax_ordermerge.evaluate.eval_model import NotFiniteError
from jax_ordermerge.experiment import losses
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.model import llama
from tests.commands.test_cli import call
from tests.experiment import tiny

MODEL = ModelConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2
)


def broken_params(value=np.nan, token=None):
    """A model with one bad weight: in a norm, or in the embedding of one token."""
    params = llama.init_params(MODEL, 0)
    if token is None:
        norm = params["norm"]["weight"]
        return params | {"norm": {"weight": norm.at[3].set(value)}}
    table = params["embed"]["weight"].at[token, 0].set(value)
    return params | {"embed": {"weight": table}}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_of_a_broken_model_are_an_error(value):
    pairs = [([1], [2, 3]), ([4, 5], [6])]
    with pytest.raises(NotFiniteError, match=r"input 0: log-probability .*of 2 of 2 texts"):
        scoring.score(
            MODEL, broken_params(value), pairs, batch=2, dtype="float32", mesh=make_mesh()
        )


def test_the_first_text_that_meets_the_broken_token_is_named():
    pairs = [([1], [2, 3]), ([4, 5], [6]), ([9, 4], [6])]
    with pytest.raises(NotFiniteError, match=r"input 2: .*of 1 of 3 texts") as raised:
        scoring.score(
            MODEL, broken_params(token=9), pairs, batch=2, dtype="float32", mesh=make_mesh()
        )
    assert raised.value.number == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_of_a_broken_model_is_an_error(temperature):
    options = {"max_new_tokens": 4, "eos_ids": (0,), "dtype": "float32"}
    options["sampling"] = decode.Sampling(temperature)
    with pytest.raises(NotFiniteError, match=r"input 0: a logit is NaN or infinite.* 1 of 2"):
        decode.generate(MODEL, broken_params(token=9), [[9], [4]], **options)
    # The same rows, bit for bit, as of the model without the token.
    intact = llama.init_params(MODEL, 0)
    assert decode.generate(MODEL, broken_params(token=9), [[4]], **options) == decode.generate(
        MODEL, intact, [[4]], **options
    )


def test_one_broken_member_does_not_stop_the_others():
    population = tree.stack([llama.init_params(MODEL, 0), broken_params()])

    class Tokenizer:
        eos_token_id = 0

        def decode(self, row, **_):
            return str(row)

    first, second = generation.make_generators(
        MODEL, population, Tokenizer(), batch=2, dtype="float32"
    )
    assert len(first([[1], [2, 3]], 4)) == 2
    with pytest.raises(NotFiniteError, match="2 of 2 prompts"):
        second([[1], [2, 3]], 4)


def test_what_comes_after_the_end_of_a_text_is_not_looked_at():
    # A row that has ended is computed on beside the others; what it meets there is no answer.
    params = llama.init_params(MODEL, 0)
    end = decode.generate(MODEL, params, [[1]], max_new_tokens=1, eos_ids=(), dtype="float32")
    broken = params | {"embed": {"weight": params["embed"]["weight"].at[end[0][0], 0].set(np.nan)}}
    options = {"max_new_tokens": 6, "eos_ids": end[0], "dtype": "float32"}
    assert decode.generate(MODEL, broken, [[1]], **options)[0] == []


def test_losses_that_are_not_finite_name_model_and_example():
    examples = Examples(
        Ragged.of([[1, 2]] * 3, np.int32), Ragged.of([[False, True]] * 3, np.bool_), np.arange(5, 8)
    )
    measured = losses.Losses(np.array([1.0, np.nan, np.inf]), np.ones(3))
    with pytest.raises(UserError, match=r"ties: the losses of 2 of 3 examples .* example 6"):
        losses.require_finite(measured, examples, "ties")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A model on disk in which the embedding of `h` is NaN."""
    folder = tmp_path_factory.mktemp("broken")
    tiny.make_base(folder / "base")
    config, params = convert.load_params(folder / "base")
    number = tiny.WORDS.index("h")
    params = jax.tree.map(np.asarray, params)
    table = params["embed"]["weight"].copy()
    table[number] = np.nan
    convert.export(
        params | {"embed": {"weight": table}},
        config,
        folder / "broken",
        dtype="float32",
        source=folder / "base",
    )
    return folder / "broken"


ROWS = [{"q": "a plus b is ?", "c": ["a .", "b a ."], "right": 1, "instruction": "a plus b is ?"}]
ROWS.append({"q": "h plus b is ?", "c": ["h .", "b h ."], "right": 1, "instruction": "h is ?"})
KINDS = {
    "multiple_choice": {"prompt": "{{q}}", "choices": "{{c}}", "answer": "{{right}}"},
    "perplexity": {"text": "{{q}}"},
    "alpaca_outputs": {"max_new_tokens": 4},
    "exact": {"prompt": "{{q}}", "response": " {{c[1]}}", "max_new_tokens": 4},
}


# The head is the embedding, so a NaN in it reaches every logit; the first item is named.
@pytest.mark.parametrize(
    ("kind", "out"),
    # Answers for a judge need --out.
    [*((kind, True) for kind in KINDS), *((kind, False) for kind in KINDS if "alpaca" not in kind)],
)
def test_a_task_names_model_task_and_item(broken, kind, out, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {"name": "asked", "kind": kind, "data": str(tmp_path / "rows.jsonl"), **KINDS[kind]}
    settings = {"evaluation": {"tasks": [task]}, "model": {"compute_dtype": "float32"}}
    settings["data"] = {"template": "plain"}
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(settings))
    options = ["--out", tmp_path / "out"] if out else []
    assert call("evaluate", broken, "--config", tmp_path / "tasks.yaml", *options) == 2
    printed = capsys.readouterr()
    assert f"{broken}: evaluation task asked: item 0: " in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not printed.out
    assert not (tmp_path / "out").exists()


def test_generate_names_model_and_prompt(broken, capsys):
    assert call("generate", broken, "--prompt", "a plus", "--max-new-tokens", 3) == 2
    error = capsys.readouterr().err
    assert f"{broken}: input 0: a logit is NaN or infinite" in error
