"""Fields beside the messages: each is used, or named as ignored, or refused by name."""

import copy
import json

import pytest

from jax_ordermerge.data import chat
from jax_ordermerge.data.formats import normalize
from jax_ordermerge.data.mixture import set_aside
from jax_ordermerge.errors import UserError
from tests.data.conftest import FULL

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARE = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
WEATHER = {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
ALPACA = {"instruction": "Hi", "input": "", "output": "Hello"}


def render(*turns):
    """The text of ChatML for (role, content) pairs, without the last line feed."""
    return "\n".join(f"<|im_start|>{role}\n{content}<|im_end|>" for role, content in turns)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (ALPACA | {"input": "there"}, [("user", "Hi\nthere"), ("assistant", "Hello")]),
        (
            ALPACA | {"system": "Be kind.", "history": [["A?", "B"]]},
            [
                ("system", "Be kind."),
                ("user", "A?"),
                ("assistant", "B"),
                ("user", "Hi"),
                ("assistant", "Hello"),
            ],
        ),
        (
            {"conversations": SHARE, "system": "Be kind."},
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {"prompt": TALK[:1], "completion": TALK[1:], "system": "Be kind."},
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {"prompt": "Hi", "chosen": "Hello", "rejected": "No", "system": "Be kind."},
            [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {"chosen": TALK, "rejected": [TALK[0], TALK[1] | {"content": "No"}], "system": "Be."},
            [("system", "Be."), ("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {
                "conversations": SHARE[:1],
                "chosen": SHARE[1],
                "rejected": {"from": "gpt", "value": "No"},
            },
            [("user", "Hi"), ("assistant", "Hello")],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]},
            [("user", "Hi"), ("assistant", "Hello")],
        ),
    ],
)
def test_fields_stand_where_they_belong(load, row, turns):
    ((text, learned),), examples = load([row])
    assert text == render(*turns)
    assert learned == [f"{content}<|im_end|>" for role, content in turns if role == "assistant"]
    if examples.rejected is not None:
        # one token per byte, so only the response is another one
        assert len(examples.rejected.tokens[0]) == len(examples.tokens[0]) - len("Hello") + len(
            "No"
        )


def test_input_reaches_every_template(load):
    for template, prompt in {"plain": "Hi\nthere", "gsm8k": "Question: Hi\nthere\nAnswer:"}.items():
        ((text, _),), _ = load([ALPACA | {"input": "there"}], template)
        assert text.startswith(prompt)
    ((text, _),), _ = load([ALPACA | {"input": "there"}], "alpaca")
    assert "### Instruction:\nHi\n\n### Input:\nthere\n\n### Response:" in text


@pytest.mark.parametrize(
    "tools", [[WEATHER], json.dumps([WEATHER]), [{"type": "function", "function": WEATHER}]]
)
def test_tools_are_in_training_and_in_the_prompt_of_generation(load, byte_tokenizer, tools):
    row = {"messages": TALK, "tools": tools}
    ((text, learned),), examples = load([row])
    shown = json.dumps({"type": "function", "function": WEATHER})
    assert text == f"<|im_start|>tools\n{shown}<|im_end|>\n" + render(
        ("user", "Hi"), ("assistant", "Hello")
    )
    assert learned == ["Hello<|im_end|>"]
    tokenizer = byte_tokenizer(chat_template=FULL, bos=False, eos="<|im_end|>")
    (record,) = normalize([row], "messages", "x")
    prompt = chat.prompt_tokens(record, "chat", tokenizer)
    assert prompt.tolist() == examples.prompt(0).tolist()


def test_calls_of_sharegpt(load):
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "rain"},
        {"from": "gpt", "value": "It rains."},
    ]
    ((text, learned),), _ = load([{"conversations": turns, "tools": json.dumps([WEATHER])}])
    assert learned == [f"{json.dumps(call)}<|im_end|>", "It rains.<|im_end|>"]
    assert "<|im_start|>tool\nrain<|im_end|>" in text
    turns[1]["value"] = "weather(Oslo)"
    with pytest.raises(UserError, match=r"row 0: column 'conversations': not JSON .*weather.Oslo"):
        load([{"conversations": turns}])


def test_weights_of_messages(load):
    talk = [TALK[0], TALK[1] | {"weight": 0}, TALK[0], {**TALK[1], "content": "5", "weight": 1}]
    ((text, learned),), _ = load([{"messages": talk}])
    assert learned == ["5<|im_end|>"]
    assert text == render(*[(turn["role"], turn["content"]) for turn in talk])
    for weight, message in ((0.5, "weight 0.5 of a message, expected 0 or 1"), (0, "weight 1")):
        with pytest.raises(UserError, match=message):
            load([{"messages": [TALK[0], TALK[1] | {"weight": weight}]}])


def test_a_greeting_is_context(load):
    ((text, learned),), _ = load([{"conversations": [SHARE[1], *SHARE]}])
    assert learned == ["Hello<|im_end|>"]
    assert text == render(("assistant", "Hello"), ("user", "Hi"), ("assistant", "Hello"))


def test_variables_of_the_template(load):
    answer = [TALK[0], {"role": "assistant", "content": "Briefly: Hello"}]
    kwargs = {"chat_template_kwargs": {"brief": True}}
    ((_, learned),), _ = load([{"messages": answer} | kwargs])
    assert learned == ["Hello<|im_end|>"]
    with pytest.raises(UserError, match=r"nothing reads chat_template_kwargs\.breif"):
        load([{"messages": answer, "chat_template_kwargs": {"breif": True}}])


def test_what_nothing_reads_is_refused_once_and_by_name(load):
    rows = [
        {"messages": [TALK[0] | {"mood": "glad"}, TALK[1]], "id": 3, "hint": "x", "empty": None},
        {"messages": TALK, "rating": 5, "source": "web"},
    ]
    with pytest.raises(UserError, match=r"nothing reads hint, messages\.mood, rating \(format"):
        load(rows)
    _, examples = load(rows, ignore_columns=["hint", "messages.mood", "rating"])
    assert ", ".join(examples.sources[0].ignored) == "hint, id, messages.mood, rating, source"
    with pytest.raises(UserError, match="nothing reads tools"):
        load(
            [{"messages": TALK, "tools": [WEATHER]}], chat_template=FULL.replace("if tools", "if 0")
        )
    for template in ("plain", "gsm8k"):
        with pytest.raises(UserError, match=r"nothing reads messages\.mood"):
            load(rows[:1], template, ignore_columns=["hint"])


def leaves(value, path=()):
    """Paths of all strings and numbers in a nested value."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [leaf for key, part in items for leaf in leaves(part, (*path, key))]
    return [path]


def test_no_key_can_change_without_changing_the_tokens(load):
    """Unless the list of ignored columns names it."""
    row = {
        "messages": [
            TALK[0] | {"id": "a"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "c",
                        "function": {"name": "weather", "arguments": {"city": {"name": "Oslo"}}},
                    }
                ],
            },
            {"role": "tool", "content": "rain", "tool_call_id": "c"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [{"type": "function", "function": WEATHER}],
        "system": "Be kind.",
        "url": "x.org",
    }
    _, examples = load([row])
    ignored = examples.sources[0].ignored
    assert ignored == ("messages.id", "messages.tool_call_id", "messages.tool_calls.id", "url")
    for *path, last in leaves(row):
        changed = copy.deepcopy(row)
        target = changed
        for key in path:
            target = target[key]
        name = ".".join(str(key) for key in (*path, last) if not isinstance(key, int))
        if last == "role":
            continue  # other roles have other rules
        target[last] += "s"
        assert (load([changed])[1].digest == examples.digest) == (name in ignored), name


# ------------------------------------------------------------------ what a template leaves out


def without(name):
    """FULL with one part of messages left out."""
    return {
        "reasoning": FULL.replace("m.content }}", "m.content.split('</think>')[-1] }}"),
        "calls": FULL.replace("m.tool_calls or ()", "()"),
        "developer": FULL.replace(
            "{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}"
        ),
    }[name]


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        (
            "reasoning",
            [TALK[0], {"role": "assistant", "content": "<think>Why?</think>Hello"}],
            r"row 1: the chat template leaves '<think>Why\?</think>Hello' out of .* message 1",
        ),
        (
            "calls",
            [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"function": WEATHER}]}],
            "row 1: the chat template leaves 'weather' out of the response in message 1",
        ),
        (
            "developer",
            [{"role": "developer", "content": "Be kind."}, *TALK],
            r"row 1: the chat template leaves out message 0 \(developer\): 'Be kind.'",
        ),
    ],
)
def test_what_is_left_out_is_an_error(load, name, messages, message):
    rows = [{"messages": TALK}, {"messages": messages}]
    ignore = ["parameters"]
    with pytest.raises(UserError, match=message):
        load(rows, chat_template=without(name), ignore_columns=ignore)
    assert len(load(rows, ignore_columns=ignore)[0]) == 2


def test_reasoning_in_another_layout_is_not_left_out(load):
    template = FULL.replace("m.content }}", "m.content.replace('<think>', '<think>\\n') }}")
    talk = [TALK[0], {"role": "assistant", "content": " <think>Why?</think>Hello\n"}]
    assert load([{"messages": talk}], chat_template=template)[0][0][1] == [
        " <think>\nWhy?</think>Hello\n<|im_end|>"
    ]


def test_numbers_and_texts_of_calls_may_stand_as_json(load):
    arguments = {"at": {"x": 1.5, "on": True, "none": [None]}, "text": 'a "b"\né'}
    call = {"function": {"name": "f", "arguments": arguments}}
    talk = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [call]}]
    ((_, (learned,)),), _ = load([{"messages": talk}])
    assert json.loads(learned.removesuffix("<|im_end|>")) == call["function"]


# ------------------------------------------------------------------ published templates

CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
CONVERSATIONS = {
    "one answer": {"messages": TALK},
    "two answers": {"messages": [*TALK, *TALK]},
    "system": {"messages": [{"role": "system", "content": "Be kind."}, *TALK, *TALK]},
    "white space": {"messages": [TALK[0], {"role": "assistant", "content": "\n\nHello\n"}]},
    "tools": {
        "messages": [
            TALK[0],
            {"role": "assistant", "content": "", "tool_calls": [{"function": CALL}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
            *TALK,
        ],
        "tools": [WEATHER],
    },
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_marked_templates_learn_what_unmarked_ones_do(load, shared_data, family, name):
    """The marks of the training templates take in white space around a turn, or its head."""
    folder = shared_data / "templates"
    if not folder.is_dir():
        pytest.skip("published templates are absent")
    marked = (folder / f"{family}_training.jinja").read_text()
    unmarked = marked.replace("{%- generation %}", "").replace("{%- endgeneration %}", "")
    row = CONVERSATIONS[name]
    results = [load([row], chat_template=text)[0] for text in (marked, unmarked)]
    assert results[0] == results[1]
    if family == "qwen2_5":
        stock = load([row], chat_template=(folder / "qwen2_5.jinja").read_text())[0]
        assert results[0] == stock
    ((_, learned),) = results[0]
    assert len(learned) == sum(turn["role"] == "assistant" for turn in row["messages"])
    assert all(run.count("<|im_end|>") == 1 and run.endswith("<|im_end|>") for run in learned)
    assert not any("<|im_start|>" in run for run in learned)


# ------------------------------------------------------------------ templates that change a prefix

# As Qwen3's: only the last answer has reasoning, be it empty.
CHANGING = FULL.replace(
    "m.content }}",
    "('<think></think>' if m.role == 'assistant' and loop.last else '') + m.content }}",
)
TWO = {"messages": [*TALK, {"role": "user", "content": "2 + 3?"}, TALK[1] | {"content": "5"}]}


def test_each_answer_has_the_prefix_that_generation_sees(load):
    parts, examples = load([TWO, {"messages": TALK}], chat_template=CHANGING)
    first = [("user", "Hi"), ("assistant", "<think></think>Hello")]
    second = [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "2 + 3?"),
        ("assistant", "<think></think>5"),
    ]
    assert parts == [
        (render(*first), ["<think></think>Hello<|im_end|>"]),
        (render(*second), ["<think></think>5<|im_end|>"]),
        (render(*first), ["<think></think>Hello<|im_end|>"]),
    ]
    assert examples.ids.tolist() == [0, 1, 2]
    assert examples.rows.tolist() == [0, 0, 1]
    assert examples.responses == ["Hello", "5", "Hello"]
    assert (examples.counts["read"], examples.counts["used"]) == (2, 3)


def test_only_the_last_answer(load):
    for template in (FULL, CHANGING):
        ((text, learned),), examples = load([TWO], chat_template=template, learn="last")
        thought = "<think></think>" if template == CHANGING else ""
        assert learned == [f"{thought}5<|im_end|>"]
        assert text.count("<|im_start|>") == 4
        assert (examples.ids.tolist(), examples.rows) == ([0], None)


def test_answers_of_one_conversation_are_set_aside_together(load):
    rows = [
        {"messages": [turn | {"content": turn["content"] + str(n)} for turn in TWO["messages"]]}
        for n in range(6)
    ]
    _, examples = load(rows, chat_template=CHANGING)
    for seed in range(4):
        train, validation = set_aside(examples, 4, seed, "validation")
        assert len(validation) == 4
        assert not set(train.rows) & set(validation.rows)
        assert sorted([*train.ids, *validation.ids]) == list(range(12))
    sizes = {1: 2, 2: 2, 3: 2, 5: 4, 11: 10}  # never a half, and never none
    for count, size in sizes.items():
        assert len(set_aside(examples, count, 0, "validation")[1]) == size


def test_stock_template_of_qwen3(load, shared_data):
    folder = shared_data / "templates"
    if not folder.is_dir():
        pytest.skip("published templates are absent")
    text = (folder / "qwen3.jinja").read_text()
    parts, _ = load([CONVERSATIONS["two answers"]], chat_template=text)
    empty = "<think>\n\n</think>\n\n"
    assert parts == [
        (render(("user", "Hi"), ("assistant", f"{empty}Hello")), [f"{empty}Hello<|im_end|>"]),
        (
            render(
                ("user", "Hi"),
                ("assistant", "Hello"),
                ("user", "Hi"),
                ("assistant", f"{empty}Hello"),
            ),
            [f"{empty}Hello<|im_end|>"],
        ),
    ]
