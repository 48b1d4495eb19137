"""Several sources as one: ids, weights by counting, parts that are set aside."""

from collections import Counter

import numpy as np
import pytest

from jax_ordermerge.config.experiment import make_config, to_dict
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.mixture import set_aside
from jax_ordermerge.data.order import permutation
from jax_ordermerge.data.source import load_splits
from jax_ordermerge.errors import UserError
from tests.data.rows import ROWS, write


def data_of(**settings):
    return make_config({"data": settings}).data


def copies_of(examples):
    """How often each (source, row) is there."""
    pairs = zip(examples.source_numbers.tolist(), examples.row_numbers.tolist(), strict=True)
    return Counter(pairs)


def train_of(tokenizer, seed=0, **settings):
    return load_splits(data_of(**settings), tokenizer, seed=seed)["train"]


def test_two_halves_of_a_file_are_the_file(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer()
    complete = train_of(tokenizer, train=write(tmp_path / "a.jsonl"))
    halves = [write(tmp_path / "b.jsonl", ROWS[:5]), write(tmp_path / "c.csv", ROWS[5:])]
    both = train_of(tokenizer, train=halves)
    assert (both.digest, both.responses) == (complete.digest, complete.responses)
    assert both.counts == complete.counts
    assert [source.name for source in both.sources] == halves
    assert both.source_numbers.tolist() == [0] * 5 + [1] * 7
    assert both.row_numbers.tolist() == [*range(5), *range(7)]
    assert [source.first_id for source in both.sources] == [0, 5]


def test_a_source_has_its_format_template_columns_and_limit(tmp_path, byte_tokenizer):
    renamed = [{"problem": row["question"], "solution": row["answer"]} for row in ROWS]
    pairs = [{"prompt": "a", "completion": f"b{n}", "note": "x"} for n in range(3)]
    examples = train_of(
        byte_tokenizer(),
        train=[
            {"path": write(tmp_path / "a.jsonl"), "name": "gsm8k", "limit": 2},
            {
                "path": write(tmp_path / "b.jsonl", renamed),
                "columns": {"question": "problem", "answer": "solution"},
                "template": "plain",
            },
            {"path": write(tmp_path / "c.jsonl", pairs), "ignore_columns": ["note"]},
        ],
        limit=4,
    )
    decode = byte_tokenizer().decode
    assert [source.counts["used"] for source in examples.sources] == [2, 4, 3]
    assert decode(examples.tokens[0]).startswith("<s>Question: 0 + 0?\nAnswer: It is 0")
    assert decode(examples.tokens[2]) == "<s>0 + 0?It is 0, é\n#### 0</s>"
    assert decode(examples.tokens[6]) == "<s>ab0</s>"
    assert examples.sources[0].name == "gsm8k"
    assert [source.template for source in examples.sources] == ["gsm8k", "plain", "plain"]
    assert [source.format for source in examples.sources] == [
        "question_answer",
        "question_answer",
        "prompt_completion",
    ]
    assert examples.sources[2].ignored == ("note",)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1, {1: 12}),
        (0.5, {1: 6}),
        (0.3, {1: 4}),  # 3.6 rows, rounded
        (2, {2: 12}),
        (2.25, {2: 9, 3: 3}),
        (0.999999, {1: 12}),
    ],
)
def test_a_weight_is_how_often_an_epoch_has_each_row(tmp_path, byte_tokenizer, weight, expected):
    other = [{"question": "q", "answer": f"{n}"} for n in range(7)]
    sources = [write(tmp_path / "b.jsonl", other), write(tmp_path / "a.jsonl")]
    examples = train_of(
        byte_tokenizer(), train=[sources[0], {"path": sources[1], "weight": weight}]
    )
    copies = copies_of(examples)
    assert Counter(count for (source, _), count in copies.items() if source) == expected
    assert [copies[0, row] for row in range(7)] == [1] * 7
    assert len(set(examples.ids)) == len(examples)
    counts = examples.sources[1].counts
    assert counts.get("left_out_by_weight", 0) == 12 - sum(expected.values())
    assert counts.get("repeated_by_weight", 0) == sum(
        (count - 1) * rows for count, rows in expected.items()
    )
    assert examples.counts["used"] == 19
    # a copy has the tokens of its row
    plain = train_of(byte_tokenizer(), train=sources)
    rows = {
        pair: tokens.tolist() for pair, tokens in zip(copies_of(plain), plain.tokens, strict=True)
    }
    for pair, tokens, id_ in zip(
        zip(examples.source_numbers, examples.row_numbers, strict=True),
        examples.tokens,
        examples.ids,
        strict=True,
    ):
        assert tokens.tolist() == rows[pair]
        # the number of the copy and the id without weights
        assert id_ % 19 == pair[1] + 7 * pair[0]


def test_the_rows_of_a_fraction_are_chosen_by_the_seed_alone(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl", [{"text": f"{n}"} for n in range(40)])

    def rows(seed, weight=0.5, **settings):
        examples = train_of(
            byte_tokenizer(), seed, train={"path": path, "weight": weight}, **settings
        )
        return examples.row_numbers.tolist()

    assert rows(1) == rows(1) == sorted(rows(1))
    assert rows(1) != rows(2)
    # smaller weights choose among the rows of larger ones
    assert set(rows(1, 0.25)) < set(rows(1)) < set(rows(1, 0.75))


def test_a_weight_counts_conversations_and_not_their_answers(tmp_path, byte_tokenizer, chatml):
    # one example for each answer, since this template changes earlier turns
    template = chatml.replace(
        "{{ message['content'] }}",
        "{{ '<>' if message['role'] == 'assistant' and loop.last }}{{ message['content'] }}",
    )
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    rows = [{"messages": turns * (1 + n % 3)} for n in range(9)]
    path = write(tmp_path / "a.jsonl", rows)
    examples = train_of(
        byte_tokenizer(chat_template=template), train={"path": path, "weight": 1.34}
    )
    copies = copies_of(examples)
    assert len(copies) == 9
    quotients = [copies[0, row] / (1 + row % 3) for row in range(9)]
    assert sorted(quotients) == [1] * 6 + [2] * 3


def test_held_out_examples_are_taken_before_weights(tmp_path, byte_tokenizer):
    settings = {"validation_examples": 3, "test_examples": 2}
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", ROWS[:6])]
    plain = load_splits(data_of(train=paths, **settings), byte_tokenizer(), seed=3)
    weighted = load_splits(
        data_of(train=[{"path": path, "weight": 3} for path in paths], **settings),
        byte_tokenizer(),
        seed=3,
    )
    for split in ("validation", "test"):
        assert weighted[split].digest == plain[split].digest
        assert not set(copies_of(weighted[split])) & set(copies_of(weighted["train"]))
    assert set(copies_of(weighted["train"]).values()) == {3}
    assert len(plain["train"]) == 13
    parts = [copies_of(part) for part in plain.values()]
    assert sum(parts, Counter()) == Counter(
        [(0, n) for n in range(12)] + [(1, n) for n in range(6)]
    )


def test_preference_pairs_and_texts_of_several_sources(tmp_path, byte_tokenizer):
    pairs = [{"prompt": "p", "chosen": f"{n}", "rejected": f"-{n}"} for n in range(5)]
    paths = [write(tmp_path / "a.jsonl", pairs[:2]), write(tmp_path / "b.jsonl", pairs[2:])]
    complete = train_of(byte_tokenizer(), train=write(tmp_path / "c.jsonl", pairs))
    assert train_of(byte_tokenizer(), train=paths).digest == complete.digest
    twice = train_of(byte_tokenizer(), train=[paths[0], {"path": paths[1], "weight": 2}])
    assert twice.rejected.ids.tolist() == twice.ids.tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert twice.rejected.responses[-3:] == ["-2", "-3", "-4"]
    with pytest.raises(UserError, match=r"a.jsonl holds preference pairs and .*d.jsonl does not"):
        train_of(byte_tokenizer(), train=[paths[0], write(tmp_path / "d.jsonl")])
    texts = [{"text": "abcdef"}, {"text": "ghijkl"}, {"text": "mn"}]
    paths = [write(tmp_path / "e.jsonl", texts[:2]), write(tmp_path / "f.jsonl", texts[2:])]
    complete = train_of(byte_tokenizer(), train=write(tmp_path / "g.jsonl", texts), max_length=4)
    assert train_of(byte_tokenizer(), train=paths, max_length=4).digest == complete.digest
    mixed = train_of(byte_tokenizer(), train=[paths[1], write(tmp_path / "a.jsonl")])
    assert mixed.responses == ["", *(row["answer"] for row in ROWS)]


def test_a_weight_that_leaves_nothing(tmp_path, byte_tokenizer):
    path = write(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match=r"weight 0.04 leaves none of the 12 rows of few; raise"):
        train_of(byte_tokenizer(), train={"path": path, "name": "few", "weight": 0.04})
    with pytest.raises(UserError, match="copies of 12 rows are more than"):
        train_of(byte_tokenizer(), train={"path": path, "weight": 1e9})


def test_columns_that_no_source_has(tmp_path, byte_tokenizer):
    renamed = [{"answer": row["answer"], "problem": row["question"]} for row in ROWS]
    paths = [write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", renamed)]
    columns = {"question": "problem"}
    # a source may lack the column, where another has it
    both = train_of(byte_tokenizer(), train=paths, columns=columns)
    assert [source.columns for source in both.sources] == [{}, columns]
    with pytest.raises(
        UserError, match=r"a.jsonl: no row has the column of columns: question: pro"
    ):
        train_of(byte_tokenizer(), train={"path": paths[0], "columns": columns})
    with pytest.raises(UserError, match=r"data.columns: no row of any source has .* question: pro"):
        train_of(byte_tokenizer(), train=paths[0], columns=columns)
    test = load_splits(
        data_of(train=paths[0], test=paths[1], columns=columns), byte_tokenizer(), seed=0
    )["test"]
    assert test.responses == [row["answer"] for row in ROWS]


def test_places_of_examples(tmp_path, byte_tokenizer):
    (tmp_path / "d").mkdir()
    paths = [write(tmp_path / "d/a.jsonl", ROWS[:3]), write(tmp_path / "d/b.csv", ROWS[3:6])]
    other = write(tmp_path / "c.jsonl", ROWS[6:])
    train = train_of(byte_tokenizer(), train=[f"{tmp_path}/d", other])
    assert train.place(1) == f"{paths[0]} row 1"
    assert train.place(4) == f"{paths[1]} row 1"
    assert train.place(8) == f"{other} row 2"
    assert train_of(byte_tokenizer(), train=other).place(2) == "row 2"


def test_take_keeps_source_and_row(tmp_path, byte_tokenizer):
    paths = [write(tmp_path / "a.jsonl", ROWS[:3]), write(tmp_path / "b.jsonl", ROWS[3:6])]
    part = train_of(byte_tokenizer(), train=paths).take(np.array([4, 1]))
    assert part.source_numbers.tolist() == [1, 0]
    assert part.row_numbers.tolist() == [1, 1]


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([], "data.train is an empty list"),
        (["a", ""], r"data.train\[1\] = '': expected a path or name"),
        (None, "data.train = None: expected a path or name, a mapping with path, or a list"),
        (["a", {"path": "b", "wieght": 2}], r"data.train\[1\]: unknown key wieght .* 'weight'"),
        ({"name": "b"}, "data.train: path is missing"),
        ({"path": "b", "weight": 0}, "data.train: weight = 0: input should be greater than 0"),
        ({"path": "b", "weight": float("nan")}, "data.train: weight = nan: input should be"),
        (["a", "a"], "the source a twice; give weight: 2"),
        (["a", {"path": "b", "name": "a"}], "the source a twice"),
        (
            {"kind": "a", "weight": 2},
            "data.train is a path; give a mapping, e.g. {path: ..., weight",
        ),
        ({"path": "o/n@test", "split": "train"}, "o/n@test names a split, and so does split"),
    ],
)
def test_sources_that_are_refused(train, message):
    with pytest.raises(UserError, match=message) as caught:
        data_of(train=train)
    assert "\n" not in str(caught.value)


def test_weights_are_not_for_held_out_examples():
    with pytest.raises(UserError, match="weight 2 of b: each held-out example counts once"):
        data_of(test=["a", {"path": "b", "weight": 2}])


def test_conversations_are_set_aside_in_the_order_of_the_permutation():
    rows = np.array([0, 0, 2, 5, 5, 5, 6, 9, 9])
    source = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1], np.int32)
    tokens, answers = Ragged.of([[1, 2]] * 9, np.int32), Ragged.of([[0, 1]] * 9, np.bool_)
    examples = Examples(tokens, answers, np.arange(9), rows=rows, source=source)
    for seed in range(5):
        for count in range(1, 7):
            # one conversation after the other, each at its first answer, while they fit
            pairs = list(zip(source.tolist(), rows.tolist(), strict=True))
            chosen: list[int] = []
            for pair in dict.fromkeys(pairs[i] for i in permutation(9, seed, "test")):
                group = [i for i in range(9) if pairs[i] == pair]
                if chosen and len(chosen) + len(group) > count:
                    break
                chosen += group
            rest, selected = set_aside(examples, count, seed, "test")
            assert selected.ids.tolist() == sorted(chosen)
            assert sorted([*rest.ids, *selected.ids]) == list(range(9))


def test_a_resolved_config_says_what_was_set():
    train = ["a.jsonl", {"path": "b", "weight": 2, "columns": {"question": "problem"}}]
    config = make_config({"data": {"train": train}})
    assert to_dict(config)["data"]["train"] == train
    assert make_config(to_dict(config)) == config
