"""Published chat templates: marked as unmarked, and the mask of transformers."""

import json

import numpy as np
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import source
from tests.data.rows import write
from tests.data.test_fields import CALL, TALK, WEATHER

USER, ANSWER = TALK
SYSTEM = {"role": "system", "content": "Be kind."}
CALLING = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]}
SAYING = {"role": "assistant", "content": "I look.", "tool_calls": [{"function": CALL}]}
TWICE = {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}] * 2}
RAIN = {"role": "tool", "content": '{"rain": 2}'}
TALKS = {
    "one answer": TALK,
    "two answers": [*TALK, {"role": "user", "content": "2 + 3?"}, {**ANSWER, "content": "5"}],
    "system": [SYSTEM, *TALK, *TALK],
    "white space": [USER, {**ANSWER, "content": "Hello\n"}, USER, {**ANSWER, "content": " Yo "}],
    "call": [USER, CALLING, RAIN, ANSWER],
    "call and text": [SYSTEM, USER, SAYING, RAIN, ANSWER, *TALK],
    "two calls": [USER, TWICE, RAIN, RAIN, ANSWER],
    "ends in a call": [*TALK, USER, CALLING],
    "weight": [USER, {**ANSWER, "content": "No", "weight": 0}, *TALK],
    "no user": [SYSTEM, ANSWER],
    "greeting": [{**ANSWER, "content": "Welcome"}, *TALK],
    "similar": [USER, {**ANSWER, "content": "assistant\nHi"}, USER, {**ANSWER, "content": "Hi"}],
}
REASONED = [
    USER,
    {**ANSWER, "content": "<think>\nWhy?\n</think>\n\nHello"},
    USER,
    {**ANSWER, "reasoning_content": "So."},
]
PAIRS = ("qwen2_5", "qwen3")


@pytest.fixture(scope="module")
def templates(shared_data):
    folder = shared_data / "templates"
    if not folder.is_dir():
        pytest.skip("published templates are absent")
    return {path.stem: path.read_text() for path in folder.glob("*.jinja")}


def learned_texts(load, talk, template, tools=None):
    row = {"messages": talk} | ({"tools": tools} if tools else {})
    parts, _ = load([row], chat_template=template)
    return [run for _, runs in parts for run in runs]


def masked_texts(tokenizer, talk, tools):
    """The texts that transformers marks."""
    encoded = tokenizer.apply_chat_template(
        [{key: value for key, value in turn.items() if key != "weight"} for turn in talk],
        tools=tools,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    edges = np.flatnonzero(np.diff([0, *encoded["assistant_masks"], 0]))
    return [
        tokenizer.decode(encoded["input_ids"][start:end])
        for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


@pytest.mark.parametrize("tools", [None, [WEATHER]], ids=["", "tools"])
@pytest.mark.parametrize("name", TALKS)
@pytest.mark.parametrize("family", PAIRS)
def test_marked_and_unmarked_templates_learn_the_same_text(load, templates, family, name, tools):
    if (family, name) == ("qwen3", "no user"):
        pytest.skip("without a question Qwen3's own template has no reasoning, the other always")
    marked, stock = (
        learned_texts(load, TALKS[name], templates[part], tools)
        for part in (f"{family}_training", family)
    )
    assert marked == stock
    assert all(run.count("<|im_end|>") == 1 and run.endswith("<|im_end|>") for run in marked)


def test_reasoning_is_learned_by_both_templates(load, templates):
    marked, stock = (
        learned_texts(load, REASONED, templates[part]) for part in ("qwen3_training", "qwen3")
    )
    assert (
        marked
        == stock
        == [
            "<think>\nWhy?\n</think>\n\nHello<|im_end|>",
            "<think>\nSo.\n</think>\n\nHello<|im_end|>",
        ]
    )


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": WEATHER}]])
@pytest.mark.parametrize("name", [name for name in TALKS if name not in ("weight", "greeting")])
@pytest.mark.parametrize("family", PAIRS)
def test_the_mask_of_transformers(load, byte_tokenizer, templates, family, name, tools):
    """It marks the line feed behind the end token, and with Qwen2.5 the one of the prompt."""
    template = templates[f"{family}_training"]
    tokenizer = byte_tokenizer(chat_template=template, bos=False, eos="<|im_end|>")
    theirs = masked_texts(tokenizer, TALKS[name], tools)
    expected = [
        run.removeprefix("\n" if family == "qwen2_5" else "").removesuffix("\n") for run in theirs
    ]
    assert learned_texts(load, TALKS[name], template, tools) == expected


@pytest.mark.parametrize(
    "name", [name for name in TALKS if name not in ("no user", "two calls", "call and text")]
)
@pytest.mark.parametrize("family", ["llama3", "llama3_2"])
def test_templates_without_marks(load, byte_tokenizer, templates, family, name):
    """Llama's: the text is that of transformers, and each answer is learned to its end."""
    if family == "llama3" and "call" in name:
        pytest.skip("the template of Llama 3 takes no calls")
    talk = TALKS[name]
    tools = [{"type": "function", "function": WEATHER}] if "call" in name else None
    tokenizer = byte_tokenizer(chat_template=templates[family], bos=True)
    bare = [{key: value for key, value in turn.items() if key != "weight"} for turn in talk]
    text = tokenizer.apply_chat_template(bare, tools=tools, tokenize=False)
    row = {"messages": talk} | ({"tools": tools} if tools else {})
    ((ours, learned),), _ = load([row], chat_template=templates[family])
    # the end token of the fixture is no special token of Llama's template
    assert ours.removesuffix("<|im_end|>").startswith(text.rstrip("\n").split("<|eot_id|>")[0])
    answers = [
        turn
        for number, turn in enumerate(talk)
        if turn["role"] == "assistant" and turn.get("weight", 1) and number
    ]
    assert len(learned) == len(answers)
    for run, turn in zip(learned, answers, strict=True):
        assert turn["content"].strip() in run
        for call in turn.get("tool_calls", ()):
            assert json.dumps(call["function"]["arguments"]) in run


# ------------------------------------------------------------------ loss under Qwen3


def test_the_loss_of_the_second_answer_is_that_of_transformers(tmp_path, byte_tokenizer, templates):
    """Qwen3's stock template: one sequence for each answer, which sees the prefix of generation."""
    torch = pytest.importorskip("torch", reason="needs the extra parity")
    import jax
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from jax_ordermerge.checkpoint import convert
    from jax_ordermerge.evaluate import scoring
    from jax_ordermerge.mesh import make_mesh

    torch.manual_seed(0)
    tokenizer = byte_tokenizer(chat_template=templates["qwen3"], bos=False, eos="<|im_end|>")
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,  # losses that depend on the prefix
    )
    twin = Qwen3ForCausalLM(config).float().eval()
    twin.save_pretrained(tmp_path / "base")
    talk = TALKS["two answers"]
    examples = source.tokenize(
        write(tmp_path / "a.jsonl", [{"messages": talk}]), Data(max_length=512), tokenizer
    )
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = convert.load_params(tmp_path / "base", mesh)
    sums, counts = scoring.losses(
        model, params, examples, batch=2, lengths=[256], dtype="float32", mesh=mesh
    )
    for row, end in enumerate((2, 4)):
        prompt = tokenizer.apply_chat_template(
            talk[: end - 1], add_generation_prompt=True, return_dict=False
        )
        tokens = tokenizer.apply_chat_template(talk[:end], return_dict=False)
        tokens = tokens[: len(tokens) - 1]  # the line feed behind the end token
        assert tokens[: len(prompt)] == prompt
        assert examples.tokens[row].tolist() == tokens
        with torch.no_grad():
            logits = twin(torch.tensor([tokens])).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(tokens[1:]), reduction="none"
        )[len(prompt) - 1 :]
        assert counts[row] == len(losses)
        assert float(sums[0, row]) == pytest.approx(float(losses.sum()), rel=1e-5)
