"""Files of each kind into examples: what is dropped and counted, validation, one-line errors."""

import csv
import gzip
import json

import numpy as np
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import source
from jax_ordermerge.data.source import load, load_examples, load_splits, load_tokenizer, tokenize
from jax_ordermerge.errors import UserError

ROWS = [{"question": f"{n} + {n}?", "answer": f"It is {2 * n}, é\n#### {2 * n}"} for n in range(12)]


def write(path, rows=ROWS):
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        text = (
            "\n".join(map(json.dumps, rows)) + "\n"
            if "jsonl" in name
            else json.dumps({"data": rows} if "wrapped" in name else rows)
        )
        data = text.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def load_train(data, tokenizer, seed=0):
    return load_examples(data, tokenizer, "train", seed=seed)


@pytest.mark.parametrize(
    "name", ["a.json", "wrapped.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.csv"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert load(write(tmp_path / name)) == ROWS
    assert load(write(tmp_path / name), limit=5) == ROWS[:5]


def test_text_files(tmp_path):
    (tmp_path / "one.txt").write_text("To be,\n\nor not.\n")
    (tmp_path / "two.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert load(str(tmp_path / "one.txt")) == [{"text": "To be,\n\nor not."}]
    assert load(str(tmp_path / "two.txt")) == [{"text": "One."}, {"text": "Two."}]


def test_generated():
    train, test = load("generated:quickstart"), load("generated:quickstart", "test")
    assert load("generated:quickstart@test") == test != train
    assert load("generated:quickstart", limit=3) == train[:3]
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load("generated:quikstart")


def test_hub_names_reach_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("openai/gsm8k:main@train[:50%]", limit=2) == ROWS[:2]
    assert load("tatsu-lab/alpaca", "test") == ROWS
    assert asked == [("openai/gsm8k", "main", "train[:50%]"), ("tatsu-lab/alpaca", None, "test")]


def test_hub_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def load_dataset(name, subset, *, split):
        raise ConnectionError(
            "Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nand more"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load("owner/name")
    assert "hub dataset owner/name (split train) cannot be loaded: Couldn't reach" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "data file .*a.json not found"),
        ("a", None, "data .*a not found; expected a file"),
        ("a.xlsx", b"x", "has an unknown suffix; expected .json .jsonl"),
        ("a.json", b"{", "a.json cannot be read: Expecting property name"),
        ("a.json", b'{"rows": []}', r'expected a list of objects, or \{"data"'),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1]", "row 0 is int, expected an object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "line 3 is not JSON"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.parquet", b"plain", "a.parquet cannot be read"),
        ("a.csv", b"text\na,b\n", "row 0 is more fields than the header"),
        ("a.txt", b"\xff\xfe\xff", "a.txt cannot be read: 'utf-8' codec"),
        ("a.txt", b" \n", "holds no rows"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_directory_is_not_data(tmp_path):
    with pytest.raises(UserError, match="is a directory"):
        load(str(tmp_path))


# --- examples ---


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
    assert examples.sources["format"] == "question_answer"
    assert examples.sources["template"] == "gsm8k"
    assert len(examples.sources["sha256"]) == 64


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
    path = write(tmp_path / "a.jsonl", [{"prompt": "", "completion": "rr"}])
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


# --- the same rows from every kind of file ---

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


# --- bad rows ---


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


def test_a_pair_with_one_bad_side_is_dropped(tmp_path, byte_tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "half \ud83d"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    data = Data(train=write(tmp_path / "a.jsonl", rows), bad_rows="drop")
    pairs = load_train(data, byte_tokenizer())
    assert (pairs.ids.tolist(), pairs.rejected.responses) == ([1], ["c"])


def test_half_of_a_character(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": "Once"}, {"text": "Hi \ud83d there"}])
    with pytest.raises(UserError, match=r"row 1: '\\ud83d' is half of a character"):
        load_train(Data(train=path), byte_tokenizer())


def test_null_is_not_a_missing_column(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"prompt": None, "completion": "b"}])
    with pytest.raises(UserError, match="row 0: column 'prompt' is null"):
        load_train(Data(train=path), byte_tokenizer())


def test_long_cells_and_lines_under_the_name_of_json(tmp_path):
    rows = [{"text": "x" * 200_000}, {"text": "y"}]
    assert load(write(tmp_path / "a.csv", rows)) == rows
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert load(str(tmp_path / "lines.json")) == ROWS
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(UserError, match=r"lines.json: line 2 is not JSON"):
        load(str(tmp_path / "lines.json"))


def test_a_tokenizer_that_needs_sentencepiece(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"has only tokenizer\.model, which needs sentencepiece"):
        load_tokenizer(tmp_path)


# --- tokenizers ---


def test_tokenizers(tmp_path, byte_tokenizer):
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    assert load_tokenizer(tmp_path / "whole")("a").input_ids == byte_tokenizer()("a").input_ids
    with pytest.raises(UserError, match=r"tokenizer directory .*absent not found"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read") as caught:
        load_tokenizer(tmp_path / "bare")
    assert "\n" not in str(caught.value)


# --- real data ---


def test_real_tokenizer_agrees_with_its_golden_cases(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    cases = json.loads(
        (shared_data / "golden" / "stories260K" / "tokenizer_cases.json").read_text()
    )
    for case in cases:
        assert tokenizer(case["text"]).input_ids == case["ids"]


def test_real_files(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    alpaca = tokenize(
        str(shared_data / "alpaca" / "random_9k.json"),
        Data(format="alpaca", too_long="truncate"),
        tokenizer,
        limit=200,
    )
    assert alpaca.counts["used"] + alpaca.counts["dropped_no_response_tokens"] == 200
    gsm8k = tokenize(str(shared_data / "gsm8k" / "test.jsonl"), Data(), tokenizer, limit=100)
    assert gsm8k.counts["used"] + gsm8k.counts["dropped_too_long"] == 100
    assert gsm8k.longest <= 512
    with pytest.raises(
        UserError, match=r"row 1461 has no response .* 3 more rows too: 3587, 6234, 8990"
    ):
        tokenize(str(shared_data / "alpaca" / "random_9k.json"), Data(), tokenizer)


# ------------------------------------------------------------------ preference pairs


def pairs_of(tmp_path, rows, tokenizer, **data):
    return tokenize(
        write(tmp_path / "pairs.jsonl", rows), Data(**{"template": "plain", **data}), tokenizer
    )


def learned_of(part, row, tokenizer):
    return tokenizer.decode(part.tokens[row][part.answers[row]])


def test_a_pair_is_one_example_whose_sequences_share_their_prompt(tmp_path, piece_tokenizer):
    rows = [
        {"prompt": "x is", "chosen": " 42", "rejected": " y y"},
        {"chosen": "y is 4", "rejected": "y is 42"},
    ]
    pairs = pairs_of(tmp_path, rows, piece_tokenizer)
    assert (len(pairs), pairs.ids.tolist(), pairs.rejected.ids.tolist()) == (2, [0, 1], [0, 1])
    for row in range(2):
        prompt = pairs.prompt(row).tolist()
        assert (
            prompt
            == pairs.rejected.prompt(row).tolist()
            == pairs.tokens[row][: len(prompt)].tolist()
        )
        assert not pairs.answers[row][: len(prompt)].any()
        assert pairs.answers[row][len(prompt) :].all()
    responses = [
        (learned_of(pairs, row, piece_tokenizer), learned_of(pairs.rejected, row, piece_tokenizer))
        for row in range(2)
    ]
    assert responses == [("▁42 </s>", "▁y ▁y </s>"), ("▁4 </s>", "▁42 </s>")]
    assert pairs.lengths.tolist() == [
        max(len(part.tokens[row]) for part in pairs.parts) for row in range(2)
    ]
    assert pairs.responses == [" 42", " 4"]
    assert pairs.rejected.responses == [" y y", " 42"]
    assert pairs.counts == {
        "read": 2,
        "dropped_too_long": 0,
        "truncated": 0,
        "dropped_no_response_tokens": 0,
        "dropped_same_tokens": 0,
        "used": 2,
    }


def test_turns_of_the_prompt_are_not_learned(tmp_path, byte_tokenizer, chatml):
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
        {"role": "user", "content": "Bye"},
    ]
    chosen, rejected = (
        [*talk, {"role": "assistant", "content": text}] for text in ("See you", "Go")
    )
    tokenizer = byte_tokenizer(chat_template=chatml)
    pairs = pairs_of(
        tmp_path, [{"chosen": chosen, "rejected": rejected}], tokenizer, template="auto"
    )
    assert (pairs.sources["format"], pairs.sources["template"]) == ("preference", "chat")
    assert learned_of(pairs, 0, tokenizer) == "See you<|im_end|>"
    assert learned_of(pairs.rejected, 0, tokenizer) == "Go<|im_end|>"


@pytest.mark.parametrize(
    ("too_long", "used", "counts"),
    [
        ("drop", [0], {"dropped_too_long": 3}),
        (
            "truncate",
            [0, 1],
            {"truncated": 1, "dropped_no_response_tokens": 1, "dropped_same_tokens": 2},
        ),
    ],
)
def test_a_pair_is_dropped_whole(tmp_path, byte_tokenizer, too_long, used, counts):
    rows = [
        {"prompt": "ab", "chosen": "cd", "rejected": "e"},
        {"prompt": "ab", "chosen": "c", "rejected": "defghij"},  # cut
        {"prompt": "abcdefgh", "chosen": "i", "rejected": "j"},  # no response is left
        {
            "prompt": "ab",
            "chosen": "cdefghi",
            "rejected": "cdefghj",
        },  # different only behind the cut
        {"prompt": "ab", "chosen": "c", "rejected": "c"},
    ]
    pairs = pairs_of(tmp_path, rows, byte_tokenizer(), max_length=8, too_long=too_long)
    assert pairs.ids.tolist() == pairs.rejected.ids.tolist() == used
    assert {
        name: count
        for name, count in pairs.counts.items()
        if count and name not in ("read", "used")
    } == (counts | ({"dropped_same_tokens": 1} if too_long == "drop" else {}))
    assert pairs.rejected.longest <= 8


def test_pairs_are_set_aside_whole(tmp_path, byte_tokenizer):
    rows = [{"prompt": f"{n}?", "chosen": "yes", "rejected": "no " * n} for n in range(1, 7)]
    data = Data(
        train=write(tmp_path / "pairs.jsonl", rows), template="plain", validation_examples=2
    )
    train, validation = load_splits(data, byte_tokenizer(), seed=0).values()
    assert sorted([*train.ids, *validation.ids]) == list(range(6))
    for part in (train, validation):
        assert part.rejected.prompts == part.prompts == [f"{n + 1}?" for n in part.ids]
        assert [text.count("no") for text in part.rejected.responses] == [n + 1 for n in part.ids]
