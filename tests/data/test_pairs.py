"""Preference pairs into examples."""

import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data.source import load_splits, tokenize
from tests.data.rows import load_train, write


def test_a_pair_with_one_bad_side_is_dropped(tmp_path, byte_tokenizer):
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "half \ud83d"},
        {"prompt": "a", "chosen": "b", "rejected": "c"},
    ]
    data = Data(train=write(tmp_path / "a.jsonl", rows), bad_rows="drop")
    pairs = load_train(data, byte_tokenizer())
    assert (pairs.ids.tolist(), pairs.rejected.responses) == ([1], ["c"])


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
    assert (pairs.sources[0].format, pairs.sources[0].template) == ("preference", "chat")
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
