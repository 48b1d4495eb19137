"""Each format a user brings, and each way in which a row of it can be wrong."""

import pytest

from jax_ordermerge.data.formats import FORMATS, detect, normalize
from jax_ordermerge.errors import UserError

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ROWS = {
    "messages": {"messages": TALK},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    },
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
}


@pytest.mark.parametrize("form", ROWS)
def test_every_format_becomes_the_same_messages(form):
    assert detect([ROWS[form]], "x") == form
    (record,) = normalize([ROWS[form]], form, "x")
    assert list(record.messages) == TALK
    assert (record.prompt, record.response) == ("Hi", "Hello")
    assert record.input == ""


def test_text():
    assert detect([{"text": "Once"}], "x") == "text"
    (record,) = normalize([{"text": "Once"}], "text", "x")
    assert (record.text, record.response, list(record.messages)) == ("Once", "Once", [])


def test_alpaca_input_is_below_the_instruction_for_every_template():
    (record,) = normalize([{"instruction": "Add.", "input": "2, 3", "output": "5"}], "alpaca", "x")
    assert (record.prompt, record.input) == ("Add.\n2, 3", "2, 3")


def test_prompts_that_are_messages_are_given():
    (record,) = normalize(
        [{"prompt": [*TALK, TALK[0]], "completion": [TALK[1]]}], "prompt_completion", "x"
    )
    assert (record.context, len(record.messages)) == (3, 4)


def test_what_follows_the_last_response_is_left_out():
    (record,) = normalize([{"messages": [*TALK, TALK[0]]}], "messages", "x")
    assert list(record.messages) == TALK


def test_sharegpt_speakers():
    row = {
        "conversations": [
            {"from": "system", "value": "s"},
            {"from": "user", "value": "a"},
            {"from": "assistant", "value": "b"},
        ]
    }
    assert [message["role"] for message in normalize([row], "sharegpt", "x")[0].messages] == [
        "system",
        "user",
        "assistant",
    ]


def test_a_number_is_a_response_also_when_it_is_nought():
    assert (
        normalize([{"question": "1 - 1?", "answer": 0}], "question_answer", "x")[0].response == "0"
    )


@pytest.mark.parametrize("form", [*ROWS, "text"])
def test_missing_column(form):
    column = FORMATS[form].columns[-1]
    complete = ROWS.get(form, {"text": "Once"})
    row = {name: value for name, value in complete.items() if name != column} | {"id": 7}
    present = ", ".join(f"'{name}'" for name in row)
    with pytest.raises(UserError) as caught:
        normalize([complete, row], form, "train.json")
    assert (
        str(caught.value)
        == f"train.json: row 1 has no column '{column}' (format {form}); it has {present}"
    )


@pytest.mark.parametrize(
    ("form", "row", "reason"),
    [
        ("messages", {"messages": TALK[:1]}, "column 'messages' has no assistant message"),
        ("messages", {"messages": []}, "column 'messages' has no assistant message"),
        (
            "messages",
            {"messages": [TALK[0], {"role": "assistant", "content": " "}]},
            "column 'messages' has an empty response in message 1",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "Hi"}]},
            "column 'conversations' has no assistant message",
        ),
        ("prompt_completion", {"prompt": "Hi", "completion": None}, "column 'completion' is null"),
        (
            "prompt_completion",
            {"prompt": TALK, "completion": []},
            "column 'completion' has no assistant message",
        ),
        ("prompt_completion", {"prompt": TALK, "completion": None}, "column 'completion' is null"),
        ("alpaca", {"instruction": "Hi", "output": "\n"}, "column 'output' is empty"),
        ("question_answer", {"question": "Hi", "answer": ""}, "column 'answer' is empty"),
        ("text", {"text": "  "}, "column 'text' is empty"),
    ],
)
def test_no_response(form, row, reason):
    with pytest.raises(UserError) as caught:
        normalize([row], form, "x.json")
    assert (
        str(caught.value)
        == f"x.json: row 0 has no response ({reason}); remove rows without a response"
    )


def test_all_rows_without_a_response_are_named():
    good, bad = ROWS["alpaca"], ROWS["alpaca"] | {"output": ""}
    with pytest.raises(UserError, match=r"row 1 has no response .* 2 more rows too: 2, 4;"):
        normalize([good, bad, bad, good, bad], "alpaca", "x.json")


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        (
            "messages",
            {"messages": "Hi"},
            "row 0: column 'messages' holds str, expected a list of messages",
        ),
        (
            "messages",
            {"messages": [{"content": "Hi"}]},
            "row 0: column 'messages': a message without 'role'",
        ),
        (
            "messages",
            {"messages": [{"role": "user"}]},
            "row 0: column 'messages': a message without the string 'content'",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "humann", "value": ""}]},
            "row 0: .* unknown speaker 'humann' .did you mean 'human'",
        ),
        (
            "question_answer",
            {"question": ["Hi"], "answer": "a"},
            "row 0: column 'question' holds list, expected a string",
        ),
    ],
)
def test_wrong_types(form, row, message):
    with pytest.raises(UserError, match=message):
        normalize([row], form, "x.json")


def test_unknown_formats():
    with pytest.raises(
        UserError,
        match="the columns 'input', 'label' match no format; expected those of messages",
    ):
        detect([{"input": "a", "label": 1}], "x.json")
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        normalize([], "alpacca", "x.json")


# ------------------------------------------------------------------ preference pairs

USER, YES, NO = TALK[0], TALK[1], {"role": "assistant", "content": "Go away"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
    ],
    ids=["prompt of messages", "implicit prompt", "prompt in words beside messages", "strings"],
)
def test_pairs_of_every_kind_are_the_same_messages(row):
    assert detect([row], "x") == "preference"
    (record,) = normalize([row], "preference", "x")
    assert (list(record.messages), list(record.rejected.messages)) == ([USER, YES], [USER, NO])
    assert (
        record.context == record.rejected.context == (1 if isinstance(row["chosen"], list) else 0)
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: Why? A: So.", "Q: Why? A: No.", "Q: Why? A:"),  # the space goes to the responses
        ("2 + 3 = 5", "2 + 3 = 6", "2 + 3 ="),
        ("so", "so much", "s"),  # one begins the other: a response is never empty
        ("same", "same", "sam"),
        ("yes", "no", ""),
    ],
)
def test_an_implicit_prompt_is_what_both_texts_begin_with(chosen, rejected, prompt):
    (record,) = normalize([{"chosen": chosen, "rejected": rejected}], "preference", "x")
    assert (record.prompt, record.rejected.prompt) == (prompt, prompt)
    assert (record.prompt + record.response, record.prompt + record.rejected.response) == (
        chosen,
        rejected,
    )


def test_an_implicit_prompt_of_several_turns():
    chosen, rejected = [*TALK, USER, YES], [*TALK, USER, NO]
    (record,) = normalize([{"chosen": chosen, "rejected": rejected}], "preference", "x")
    assert (record.context, list(record.messages), list(record.rejected.messages)) == (
        3,
        chosen,
        rejected,
    )


def test_messages_with_a_pair_beside_them_are_still_messages():
    assert detect([{"messages": TALK, "chosen": TALK, "rejected": [USER, NO]}], "x") == "messages"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "Hi", "chosen": "a"},
            "row 0 has no column 'rejected' (format preference); it has 'prompt', 'chosen'",
        ),
        (
            {"prompt": "Hi", "chosen": "a", "rejected": ""},
            "row 0 has no response (column 'rejected' is empty)",
        ),
        (
            {"prompt": [USER], "chosen": "a", "rejected": "b"},
            "row 0: column 'prompt' holds messages and column 'chosen' a string; give both",
        ),
        (
            {"chosen": [YES], "rejected": [NO]},
            "row 0: columns 'chosen' and 'rejected' begin with different messages; give a column",
        ),
        (
            {"chosen": [USER, YES], "rejected": [USER]},
            "row 0: columns 'chosen' and 'rejected' begin with different messages; give",
        ),
        (
            {"prompt": [USER], "chosen": [YES], "rejected": [USER]},
            "row 0 has no response (column 'rejected' has no assistant message)",
        ),
    ],
)
def test_pairs_that_are_wrong(row, message):
    with pytest.raises(UserError) as caught:
        normalize([row], "preference", "x.json")
    assert message in str(caught.value)
