"""Rows as the users of OpenAI, axolotl, LLaMA-Factory and TRL bring them: read, or refused."""

import json

import pytest

from jax_ordermerge.errors import UserError
from tests.data.conftest import FULL
from tests.data.test_fields import SHARE, TALK, WEATHER, render

USER, ANSWER = TALK
NO = {"role": "assistant", "content": "No"}
TALKED = render(("user", "Hi"), ("assistant", "Hello"))
CALL = {"name": "f", "arguments": {"city": "Oslo"}}
CALLED = json.dumps(CALL)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": SHARE},
        {"conversations": TALK},
        {"conversations": [{"from": "Human", "value": "Hi"}, {"from": "GPT", "value": "Hello"}]},
        {"messages": [USER, ANSWER | {"role": "Assistant"}]},
        {"messages": [USER, ANSWER | {"role": "model"}]},
        {"conversations": [{"role": "user", "value": "Hi"}, {"role": "bot", "value": "Hello"}]},
        {"messages": [USER, {"role": "assistant", "content": ["Hel", "lo"]}]},
        {"messages": json.dumps(TALK)},
        {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "chosen": TALK, "rejected": [USER, NO]},
        {"prompt": " Hi", "chosen": TALK, "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": [ANSWER], "rejected": [NO]},
        {"conversations": [USER], "chosen": ANSWER, "rejected": NO},
        {"conversations": [USER], "chosen": [ANSWER], "rejected": [NO]},
        {"instruction": "Hi", "input": "", "chosen": "Hello", "rejected": "No"},
    ],
)
def test_spellings_of_one_conversation(load, row):
    ((text, learned),), examples = load([row])
    assert (text, learned) == (TALKED, ["Hello<|im_end|>"])
    if "chosen" in row:
        assert examples.rejected.responses == ["No"]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"function": CALL}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {
            "role": "assistant",
            "content": None,
            "function_call": CALL | {"arguments": '{"city":"Oslo"}'},
        },
        {"role": "function_call", "content": CALLED},
        {"from": "function_call", "value": json.dumps([CALL])},
    ],
)
@pytest.mark.parametrize("answer", ["tool", "function", "observation", "function_response"])
def test_spellings_of_one_call(load, message, answer):
    row = {"messages": [USER, message, {"role": answer, "content": "rain"}, ANSWER]}
    ((text, learned),), _ = load([row])
    assert learned == [f"{CALLED}<|im_end|>", "Hello<|im_end|>"]
    assert "<|im_start|>tool\nrain<|im_end|>" in text


def test_a_call_without_arguments_has_an_object_of_none(load):
    """Arrow makes null of an object without keys, and OpenAI has an empty string."""
    for arguments in ({}, None, "", "{}"):
        call = {"function": {"name": "f", "arguments": arguments}}
        row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        assert load([row])[0][0][1] == ['{"name": "f", "arguments": {}}<|im_end|>']


def test_train_of_axolotl_is_a_weight(load):
    row = {"messages": [USER, ANSWER | {"train": False}, USER | {"train": False}, NO]}
    assert load([row])[0][0][1] == ["No<|im_end|>"]
    talk = [USER | {"train": True}, ANSWER]
    with pytest.raises(UserError, match="train True of a message of user: only what assistants"):
        load([{"messages": talk}])
    row = {"prompt": [USER, ANSWER | {"weight": 1}, USER], "completion": [ANSWER]}
    with pytest.raises(UserError, match="weight 1 of a message in a prompt: only what assistants"):
        load([row])
    row["prompt"][1] = ANSWER | {"weight": 0}
    assert load([row])[0][0][1] == ["Hello<|im_end|>"]
    greeting = ANSWER | {"weight": 1}
    talk = [{"role": "system", "content": "Be kind."}, greeting, *TALK]
    assert len(load([{"messages": talk}])[0][0][1]) == 2
    with pytest.raises(UserError, match="the first message has weight 1 and nothing to answer"):
        load([{"messages": [greeting, *TALK]}])
    with pytest.raises(UserError, match="train 1 of a message, expected true or false"):
        load([{"messages": [USER, ANSWER | {"train": 1}]}])
    with pytest.raises(UserError, match="weight '0' of a message, expected 0 or 1"):
        load([{"messages": [USER, ANSWER | {"weight": "0"}]}])


def test_pairs_of_instructions_have_the_template_of_instructions(load):
    row = {"instruction": "Add.", "input": "2, 3", "chosen": "5", "rejected": "6"}
    ((text, _),), examples = load([row], template="auto")
    assert examples.sources[0].template == "alpaca"
    assert text.endswith("### Instruction:\nAdd.\n\n### Input:\n2, 3\n\n### Response:5<|im_end|>")
    ((text, _),), _ = load([row])
    assert text == render(("user", "Add.\n2, 3"), ("assistant", "5"))


def test_columns_of_other_sets(load):
    dolly = {"instruction": "Who?", "context": "Ada.", "response": "Ada", "category": "open_qa"}
    with pytest.raises(UserError, match=r"\{output: response, input: context\}, for format alpaca"):
        load([dolly])
    ((text, _),), _ = load([dolly], columns={"output": "response", "input": "context"})
    assert text == render(("user", "Who?\nAda."), ("assistant", "Ada"))
    orca = {"id": 1, "system_prompt": "Be kind.", "question": "Hi", "response": "Hello"}
    with pytest.raises(UserError, match=r"\{answer: response, system: system_prompt\}, for"):
        load([orca])
    columns = {"answer": "response", "system": "system_prompt"}
    ((text, _),), _ = load([orca], columns=columns)
    assert text == render(("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input": "a", "output": "b"}, "{prompt: input, completion: output}, for format prompt"),
        ({"conversation": SHARE}, "set data.columns to {messages: conversation}, for format mess"),
        ({"messages": TALK, "system_prompt": "S"}, r"data.columns: \{system: system_prompt\}"),
        ({"messages": TALK, "functions": [WEATHER]}, r"data.columns: \{tools: functions\}"),
        ({"prompt": "a", "completion": "b", "label": True}, "label .*unpaired preferences are not"),
        ({"conversations": SHARE, "kto_tag": False}, "kto_tag .*unpaired preferences are not"),
        ({"messages": TALK, "images": ["a.png"]}, "nothing reads images .*only text is trained"),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "files of tokens are not read"),
        ({"segments": [{"label": True, "text": "a"}]}, "segments are not read"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "OpenAI's pairs are"),
        ({"question": "a", "answer": "b", "context": "c"}, "nothing reads context"),
        ({"question": "a", "answer": "b", "choices": ["b"]}, "nothing reads choices"),
        ({"question": "a", "answers": {"text": ["b"]}, "context": "c"}, "match no format"),
        ({"system": "S", "question": "a", "chosen": "b", "rejected": "c"}, "{prompt: question}"),
        ({"text": "a", "title": "b"}, "nothing reads title"),
    ],
)
def test_other_columns_are_refused_with_advice(load, row, message):
    with pytest.raises(UserError, match=message):
        load([row], template="auto")


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "refusal": "No."}, "without the string 'content'"),
        ({"content": "a", "refusal": "No."}, r"nothing reads messages\.refusal"),
        ({"content": "a", "audio": {"id": "x"}}, r"nothing reads messages\.audio"),
        ({"content": "a", "train_detail": [{"train": True}]}, "learned as a whole or not at all"),
        ({"content": "a", "loss_mask": 0}, "weight: 0 on a message keeps it from being learned"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "no text: {'type': 'image_url'"),
        ({"content": [{"type": "image", "text": "a"}]}, "only text is trained"),
        (
            {"content": [{"type": "text", "text": "a", "cache": {"x": 1}}]},
            r"nothing reads messages\.content\.cache",
        ),
        ({"content": "a", "role": "asistant"}, "unknown role 'asistant' .did you mean 'assistant'"),
        ({"content": "a", "role": 1}, "without 'role' or 'from'"),
        ({"content": 5}, "without the string 'content'"),
        ({"content": {"a": 1}}, "without the string 'content'"),
        ({"content": "", "tool_calls": 5}, "a tool call that is no object: 5"),
        ({"content": "", "tool_calls": "f()"}, r"not JSON .* f\(\)"),
        ({"content": "", "tool_calls": [{"function": "f"}]}, "a tool call without a name"),
        ({"content": " "}, "has an empty response in message 1"),
        ({"content": "a", "n": float("inf")}, "the number inf is not finite"),
    ],
)
def test_other_messages_are_refused_by_name(load, message, expected):
    with pytest.raises(UserError, match=expected):
        load([{"messages": [USER, {"role": "assistant"} | message, USER, ANSWER]}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": str(TALK)}, "'messages' holds str, expected a list of messages or its JSON"),
        ({"messages": {"role": ["user"], "content": ["a"]}}, "holds dict, expected a list of mess"),
        ({"messages": ["a"]}, "without 'role' or 'from': a"),
        ({"messages": TALK, "system": ["a"]}, "column 'system' holds list, expected a string"),
        ({"messages": TALK, "tools": {"name": "f"}}, "column 'tools' holds dict, expected list"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "kwargs' holds list, expected dict"),
        ({"prompt": [USER], "completion": "a"}, "'completion' holds str, expected a list"),
        ({"prompt": "a", "completion": [ANSWER]}, "'prompt' holds str, expected a list"),
        ({"prompt": "", "completion": "a"}, "'prompt' is empty; a text without a prompt has"),
        ({"question": "a", "answer": float("inf")}, "holds the number inf, which is not finite"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "'input' holds list, expected a st"),
        ({"instruction": "", "input": "", "output": "c"}, "column 'instruction' is empty"),
        (
            {"instruction": "a", "output": "b", "history": [["c", None]]},
            "'history': expected pairs of a question and an answer",
        ),
        (
            {"prompt": "Bye", "chosen": TALK, "rejected": [USER, NO]},
            "'prompt' is none of the messages that 'chosen' and 'rejected' begin with: 'Bye'",
        ),
        (
            {"prompt": "a", "instruction": "b", "chosen": "c", "rejected": "d"},
            "columns 'prompt' and 'instruction' both hold a prompt",
        ),
        ({"prompt": "a", "input": "b", "chosen": "c", "rejected": "d"}, "'input' stands without"),
        ({"prompt": "a", "chosen": [ANSWER], "rejected": "d"}, "'rejected' holds str"),
        ({"conversations": [USER], "chosen": "c", "rejected": "d"}, "'chosen' a string; give both"),
    ],
)
def test_wrong_types_are_refused_by_name(load, row, message):
    with pytest.raises(UserError, match=message) as caught:
        load([row])
    assert "row 0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_input_of_nought_is_an_input(load):
    ((text, _),), _ = load([{"instruction": "Add 1.", "input": 0, "output": 1}])
    assert text == render(("user", "Add 1.\n0"), ("assistant", "1"))
    row = {"instruction": "", "input": "x", "output": "y"}
    assert load([row])[0][0][0] == render(("user", "x"), ("assistant", "y"))
    assert "### Instruction:\nx\n\n### Response:" in load([row], "alpaca")[0][0][0]
    with pytest.raises(UserError, match="row 1 has no column 'instruction'"):
        load([row, {"input": "x", "output": "y"}])


def test_roles_of_templates_stay_and_are_not_learned(load):
    talk = [USER, {"role": "ipython", "content": "x"}, ANSWER]
    ((text, learned),), _ = load([{"messages": talk}])
    assert learned == ["Hello<|im_end|>"]
    assert "<|im_start|>ipython\nx<|im_end|>" in text


def test_nesting_that_nobody_writes(load):
    deep = "x"
    for _ in range(100):
        deep = {"a": deep}
    call = {"function": {"name": "f", "arguments": deep}}
    row = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    with pytest.raises(UserError, match="row 0: more than 64 lists and objects"):
        load([row])
    assert load([{"messages": TALK, "hint": deep}], ignore_columns=["hint"])[0][0][0] == TALKED


def test_forms_of_one_file_that_differ(load):
    for rows in ([{"messages": TALK}, {"text": "a"}], [{"text": "a"}, {"messages": TALK}]):
        with pytest.raises(UserError, match=r"row \d has no column 'messages' .* it has 'text'"):
            load(rows)
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ANSWER]}]
    with pytest.raises(UserError, match=r"auto is ambiguous \(plain, chat\); set data.template"):
        load(rows, template="auto")
    assert [text for text, _ in load(rows)[0]] == [
        render(("user", "a"), ("assistant", "b")),
        TALKED,
    ]


# ------------------------------------------------------------------ what is passed over


def test_ignored_columns_are_not_used(load):
    row = {"messages": TALK, "system": "Be kind.", "tools": [WEATHER], "hint": "x"}
    ((text, _),), examples = load([row], ignore_columns=["system", "tools", "hint"])
    assert text == TALKED
    assert examples.sources[0].ignored == ("hint", "system", "tools")
    template = FULL.replace("m.content }}", "m.content + (m.mood or '') }}")
    talk = [USER | {"mood": "x"}, ANSWER]
    assert "Hix<" in load([{"messages": talk}], chat_template=template)[0][0][0]
    ((text, _),), examples = load(
        [{"messages": talk}], chat_template=template, ignore_columns=["messages.mood"]
    )
    assert (text, examples.sources[0].ignored) == (TALKED, ("messages.mood",))
    with pytest.raises(UserError, match=r"messages\.content is what is trained"):
        load([{"messages": TALK}], ignore_columns=["messages.content"])


def test_a_column_in_whose_place_another_one_stands_is_named(load):
    row = {"question": "Hi", "answer": "short", "solution": "Hello"}
    ((text, _),), examples = load([row], columns={"answer": "solution"})
    assert (text, examples.sources[0].ignored) == (TALKED, ("answer",))


def test_a_key_that_one_role_alone_has_printed(load):
    template = FULL.replace(
        "m.content }}", "m.content + (m.why or '' if m.role == 'assistant' else '') }}"
    )
    talk = [USER | {"why": "x"}, ANSWER | {"why": "y"}]
    with pytest.raises(UserError, match=r"nothing reads messages\.why \(user\) \("):
        load([{"messages": talk}], chat_template=template)
    _, examples = load(
        [{"messages": [USER | {"why": ""}, ANSWER | {"why": "y"}]}], chat_template=template
    )
    assert examples.sources[0].ignored == ()


def test_keys_of_tools_that_a_template_leaves_out(load):
    tool = WEATHER | {"description": "of a city", "strict": True}
    names = FULL.replace("tool | tojson", "tool.function.name")
    message = (
        r"nothing reads tools\.function\.description, tools\.function\.parameters,"
        r" tools\.function\.strict \("
    )
    with pytest.raises(UserError, match=message):
        load([{"messages": TALK, "tools": [tool]}], chat_template=names)
    assert load([{"messages": TALK, "tools": [tool]}])[1].sources[0].ignored == ()


def test_a_variable_with_its_default_counts_as_used(load):
    """Qwen3 reads `enable_thinking` only where it is false."""
    row = {"messages": TALK, "chat_template_kwargs": {"brief": False}}
    assert load([row])[1].sources[0].ignored == ()


def test_calls_that_a_template_without_tools_leaves_out(load):
    template = FULL.replace("m.tool_calls or ()", "()")
    call = {"tool_calls": [{"function": CALL}]}
    rows = {
        r"row 0: the chat template leaves out message 1 \(assistant\): 'f'": [
            USER,
            ANSWER | call | {"weight": 0},
            *TALK,
        ],
        r"nothing reads messages\.tool_calls": [USER | call, ANSWER],
    }
    for message, talk in rows.items():
        with pytest.raises(UserError, match=message):
            load([{"messages": talk}], chat_template=template)
    with pytest.raises(UserError, match=r"nothing reads messages\.tool_calls"):
        load([{"messages": [USER, ANSWER | call]}], "plain")


def test_surprises_are_counted(load):
    """A special token that a user writes is one, as in transformers; what follows is left out."""
    rows = [
        {"messages": [USER | {"content": "a<|im_end|>b"}, ANSWER]},
        {"messages": [USER, ANSWER | {"content": "</s>"}, USER, USER]},
        {"messages": TALK},
    ]
    parts, examples = load(rows)
    assert examples.counts["rows_with_special_tokens"] == 2
    assert examples.counts["messages_after_last_response"] == 2
    assert parts[0][0] == TALKED.replace("Hi", "a<|im_end|>b")
    assert len(examples.tokens[0]) == len(examples.tokens[2]) + len("ab") + 1 - len("Hi")
    assert not {"rows_with_special_tokens", "messages_after_last_response"} & set(
        load(rows[2:])[1].counts
    )
    pairs = [{"prompt": "</s>", "completion": "a"}]  # a text that the user has rendered
    assert "rows_with_special_tokens" not in load(pairs, "plain")[1].counts
