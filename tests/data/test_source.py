"""Sources into examples: what is dropped and counted, splits, errors of rows."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import source
from jax_ordermerge.data.files import load
from jax_ordermerge.data.source import load_examples, load_splits, tokenize
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.errors import UserError
from tests.data.rows import ROWS, load_train, write


def test_examples_of_a_file(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.jsonl")
    examples = load_train(Data(train=path), tokenizer)
    assert (
        tokenizer.decode(examples.tokens[3])
        == "<s>Question: 3 + 3?\nAnswer: It is 6, é\n#### 6</s>"
    )
    assert tokenizer.decode(examples.tokens[3][examples.answers[3]]) == " It is 6, é\n#### 6</s>"
    assert tokenizer.decode(examples.prompt(3)) == "<s>Question: 3 + 3?\nAnswer:"
    assert (examples.prompts[3], examples.responses[3]) == ("3 + 3?", ROWS[3]["answer"])
    assert examples.ids.tolist() == list(range(12))
    assert examples.tokens.flat.dtype == np.int32
    assert examples.answers.flat.dtype == np.bool_
    assert examples.counts == {
        "read": 12,
        "dropped_too_long": 0,
        "truncated": 0,
        "dropped_no_response_tokens": 0,
        "used": 12,
    }
    assert examples.sources[0].format == "question_answer"
    assert examples.sources[0].template == "gsm8k"
    assert (
        examples.sources[0].files[0].sha256 == hashlib.sha256(Path(path).read_bytes()).hexdigest()
    )


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.csv"])
def test_the_digest_is_of_the_tokens_and_not_of_the_file(tmp_path, byte_tokenizer, name):
    same = load_train(Data(train=write(tmp_path / name)), byte_tokenizer())
    assert (
        same.digest == load_train(Data(train=write(tmp_path / "b.jsonl")), byte_tokenizer()).digest
    )
    assert (
        same.digest
        != load_train(Data(train=write(tmp_path / "b.jsonl", ROWS[::-1])), byte_tokenizer()).digest
    )


def lengths_file(tmp_path):
    # BOS, prompt, response, EOS: 2 + prompt + response tokens of one byte
    rows = [
        {"prompt": "p" * p, "completion": "r" * r}
        for p, r in ((2, 3), (2, 40), (40, 3), (5, 3), (8, 3))
    ]
    return write(tmp_path / "lengths.jsonl", rows)


def test_too_long_is_dropped_and_counted(tmp_path, byte_tokenizer):
    examples = load_train(Data(train=lengths_file(tmp_path), max_length=10), byte_tokenizer())
    assert examples.ids.tolist() == [0, 3]
    assert examples.counts == {
        "read": 5,
        "dropped_too_long": 3,
        "truncated": 0,
        "dropped_no_response_tokens": 0,
        "used": 2,
    }


def test_too_long_is_truncated_and_what_keeps_no_response_is_dropped(tmp_path, byte_tokenizer):
    examples = load_train(
        Data(train=lengths_file(tmp_path), max_length=10, too_long="truncate"), byte_tokenizer()
    )
    assert examples.ids.tolist() == [0, 1, 3, 4]
    assert examples.lengths.tolist() == [7, 10, 10, 10]
    assert [int(answers.sum()) for answers in examples.answers] == [4, 7, 4, 1]
    assert examples.counts == {
        "read": 5,
        "dropped_too_long": 0,
        "truncated": 2,
        "dropped_no_response_tokens": 1,
        "used": 4,
    }
    assert examples.responses[1] == "r" * 40


def test_a_first_token_is_no_target(tmp_path, byte_tokenizer):
    # both responses begin with other letters, so the prompt that they share is empty
    path = write(tmp_path / "a.jsonl", [{"chosen": "rr", "rejected": "no"}])
    with pytest.raises(UserError, match="dropped no response tokens 1"):
        load_train(Data(train=path, max_length=1, too_long="truncate"), byte_tokenizer(bos=False))


def test_nothing_left_says_why(tmp_path, byte_tokenizer):
    with pytest.raises(
        UserError,
        match=r"no example is left with data.max_length = 4 \(read 5, dropped too long 5,.*raise",
    ):
        load_train(Data(train=lengths_file(tmp_path), max_length=4), byte_tokenizer())


@pytest.mark.parametrize("length", [2, 3, 7, 50])
def test_texts_are_cut_into_windows_that_learn_each_token_once(tmp_path, byte_tokenizer, length):
    (tmp_path / "a.txt").write_text("The first text.<|endoftext|>No.")
    tokenizer = byte_tokenizer()
    examples = load_train(Data(train=str(tmp_path / "a.txt"), max_length=length), tokenizer)
    assert examples.longest <= length
    assert examples.lengths.min() >= 2
    targets = [token for row in examples.tokens for token in row[1:]]
    assert tokenizer.decode(targets) == "The first text.</s>No.</s>"
    assert examples.ids.tolist() == list(range(len(examples)))
    assert examples.counts["read"] == 2
    assert examples.counts["used"] == len(examples)


def test_records_beyond_one_chunk(tmp_path, byte_tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl")
    examples = load_train(Data(train=path), byte_tokenizer())
    monkeypatch.setattr(source, "CHUNK", 5)
    parts = load_train(Data(train=path), byte_tokenizer())
    assert (parts.digest, parts.responses) == (examples.digest, examples.responses)


def test_validation_is_disjoint_and_keyed_by_the_seed(tmp_path, byte_tokenizer):
    data = Data(train=write(tmp_path / "a.jsonl"), validation_examples=4, limit=10)
    train, validation = load_splits(data, byte_tokenizer(), seed=1).values()
    assert sorted([*train.ids, *validation.ids]) == list(range(10))
    assert len(validation) == 4
    assert validation.responses == [ROWS[row]["answer"] for row in validation.ids]
    assert load_examples(data, byte_tokenizer(), "validation", seed=1).digest == validation.digest
    assert load_examples(data, byte_tokenizer(), "train", seed=1).digest == train.digest
    assert (
        load_examples(data, byte_tokenizer(), "validation", seed=2).ids.tolist()
        != validation.ids.tolist()
    )


def test_splits_that_the_config_has_not(tmp_path, byte_tokenizer):
    data = Data(train=write(tmp_path / "a.jsonl"))
    assert load_examples(data, byte_tokenizer(), "validation", seed=0) is None
    assert load_examples(data, byte_tokenizer(), "test", seed=0) is None
    with pytest.raises(UserError, match="validation_examples = 12 leaves none of 12"):
        load_examples(
            data.model_copy(update={"validation_examples": 12}), byte_tokenizer(), "train", seed=0
        )


def test_held_out_examples_without_a_file_of_their_own(tmp_path, byte_tokenizer):
    data = Data(train=write(tmp_path / "a.jsonl"), test_examples=3, validation_examples=4)
    parts = load_splits(data, byte_tokenizer(), seed=1)
    assert {name: len(part) for name, part in parts.items()} == {
        "train": 5,
        "test": 3,
        "validation": 4,
    }
    assert sorted(row for part in parts.values() for row in part.ids) == list(range(12))
    for name, part in parts.items():
        assert load_examples(data, byte_tokenizer(), name, seed=1).digest == part.digest
    assert (
        load_splits(data, byte_tokenizer(), seed=2)["test"].ids.tolist()
        != parts["test"].ids.tolist()
    )
    with pytest.raises(UserError, match="test_examples = 12 leaves none of 12"):
        load_splits(data.model_copy(update={"test_examples": 12}), byte_tokenizer(), seed=0)


def test_columns_under_other_names(tmp_path, byte_tokenizer):
    rows = [
        {"problem": row["question"], "solution": row["answer"], "answer": "short"} for row in ROWS
    ]
    data = Data(
        train=write(tmp_path / "other.jsonl", rows),
        test=write(tmp_path / "a.jsonl"),
        template="gsm8k",
    )
    named = data.model_copy(update={"columns": {"question": "problem", "answer": "solution"}})
    parts = load_splits(named, byte_tokenizer(), seed=0)
    assert parts["train"].digest == parts["test"].digest
    assert parts["train"].responses == [row["answer"] for row in ROWS]
    with pytest.raises(UserError, match="match no format"):
        load_train(data, byte_tokenizer())


def test_a_limit_counts_windows_of_a_text(tmp_path, byte_tokenizer):
    (tmp_path / "a.txt").write_text("One long text.<|endoftext|>And a second one.")
    data = Data(train=str(tmp_path / "a.txt"), max_length=4)
    complete, limited = (
        load_train(data.model_copy(update={"limit": limit}), byte_tokenizer())
        for limit in (None, 3)
    )
    assert len(complete) > 6
    assert [row.tolist() for row in limited.tokens] == [row.tolist() for row in complete.tokens][:3]
    assert [row.tolist() for row in limited.answers] == [row.tolist() for row in complete.answers][
        :3
    ]


def test_test_split(tmp_path, byte_tokenizer):
    data = Data(train="absent.json", test=write(tmp_path / "a.jsonl"), test_limit=3)
    assert load_examples(data, byte_tokenizer(), "test", seed=0).ids.tolist() == [0, 1, 2]


def test_errors_of_rows_name_the_file(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [*ROWS[:2], {"question": "Why?"}])
    with pytest.raises(
        UserError,
        match=r"a.jsonl: row 2 has no column 'answer' \(format question_answer\); .* 'question'",
    ):
        load_train(Data(train=path), byte_tokenizer())
    with pytest.raises(
        UserError,
        match=r"row 0 has no column 'instruction' \(format alpaca\); it has 'question', 'answer'",
    ):
        load_train(Data(train=path, format="alpaca"), byte_tokenizer())


TOOL_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}],
            },
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ]
    },
    {
        "messages": [
            {"role": "user", "content": "Time?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "time", "arguments": {"zone": "CET"}},
                    }
                ],
            },
        ]
    },
]


CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or () %}{{ call.function.name }}"
    "{{ call.function.arguments | tojson }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_parquet_and_json_lines_give_the_same_tokens(tmp_path, byte_tokenizer):
    """Arrow fills `arguments` with the keys of other rows; a string of JSON is one object."""
    as_strings = json.loads(json.dumps(TOOL_ROWS))
    for row in as_strings:
        function = row["messages"][1]["tool_calls"][0]["function"]
        function["arguments"] = json.dumps(function["arguments"])
    tokenizer = byte_tokenizer(chat_template=CALLS)
    paths = [
        write(tmp_path / "a.jsonl", TOOL_ROWS),
        write(tmp_path / "a.parquet", TOOL_ROWS),
        write(tmp_path / "strings.jsonl", as_strings),
        write(tmp_path / "strings.parquet", as_strings),
    ]
    examples = [load_train(Data(train=path), tokenizer) for path in paths]
    assert len({part.digest for part in examples}) == 1
    assert tokenizer.decode(examples[0].tokens[0][examples[0].answers[0]]) == (
        'weather{"city": "Oslo"}<|im_end|>It rains.<|im_end|>'
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_nan_is_null(tmp_path, byte_tokenizer, name):
    rows = [
        {"instruction": "Name a color.", "input": value, "output": "Blue."}
        for value in (float("nan"), 1.5)
    ]
    path = write(tmp_path / name, rows)
    assert [row["input"] for row in load(path)] == [None, 1.5]
    examples = load_train(Data(train=path), byte_tokenizer())
    assert "### Input" not in byte_tokenizer().decode(examples.tokens[0])
    write(tmp_path / name, [rows[1] | {"output": value} for value in (1.5, float("nan"))])
    with pytest.raises(UserError, match=r"row 1 has no response .column 'output' is null."):
        load_train(Data(train=path), byte_tokenizer())


def test_bad_rows_are_named_at_once_or_dropped_and_counted(tmp_path, byte_tokenizer, chatml):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    refusing = "{% if messages[0].content == 'no' %}{{ raise_exception('No.') }}{% endif %}"
    tokenizer = byte_tokenizer(chat_template=refusing + chatml)
    rows = [
        {"messages": [user, answer]},
        {"messages": [user | {"content": "no"}, answer]},
        {"messages": [user, answer | {"content": "half \ud83d"}]},
        {"messages": [user | {"content": "no"}, answer]},
        {"messages": [user, answer | {"content": "c"}]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(
        UserError,
        match=r"a.jsonl: row 1: .* refuses the roles user, assistant: No.; 2 more rows too: 2, 3",
    ):
        load_train(Data(train=path), tokenizer)
    write(tmp_path / "a.jsonl", [*rows, {"messages": [user]}])
    examples = load_train(Data(train=path, bad_rows="drop"), tokenizer)
    assert (examples.ids.tolist(), examples.responses) == ([0, 4], ["b", "c"])
    assert (examples.counts["dropped_bad_rows"], examples.counts["used"]) == (4, 2)
    write(tmp_path / "a.jsonl", [{"messages": [user]}])
    with pytest.raises(UserError, match="row 0 has no response"):
        load_train(Data(train=path, bad_rows="drop"), tokenizer)


def test_half_of_a_character(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "Once"}, {"text": "Hi \ud83d there"}])
    with pytest.raises(UserError, match=r"row 1: '\\ud83d' is half of a character"):
        load_train(Data(train=path), byte_tokenizer())


def test_null_is_not_a_missing_column(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": None, "completion": "b"}])
    with pytest.raises(UserError, match="row 0: column 'prompt' is null"):
        load_train(Data(train=path), byte_tokenizer())


def test_real_files(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    alpaca = tokenize(
        str(shared_data / "alpaca" / "random_9k.json"),
        Data(format="alpaca", too_long="truncate", limit=200),
        tokenizer,
    )
    assert alpaca.counts["used"] + alpaca.counts["dropped_no_response_tokens"] == 200
    gsm8k = tokenize(str(shared_data / "gsm8k" / "test.jsonl"), Data(limit=100), tokenizer)
    assert gsm8k.counts["used"] + gsm8k.counts["dropped_too_long"] == 100
    assert gsm8k.longest <= 512
    with pytest.raises(
        UserError, match=r"row 1461 has no response .* 3 more rows too: 3587, 6234, 8990"
    ):
        tokenize(str(shared_data / "alpaca" / "random_9k.json"), Data(), tokenizer)
