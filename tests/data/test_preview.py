"""Examples as text: what is marked is what is learned, and nothing of it is left out."""

import io

import numpy as np
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import preview
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.preview import BRACKETS, COLOURS, Segment
from jax_ordermerge.data.tokenizers import load_tokenizer
from tests.data.rows import load_train, write

TALK = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello é\U0001f600"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Well"},
    ]
}


def show(rows, tokenizer, tmp_path, row=0, marks=BRACKETS, **settings):
    examples = load_train(Data(train=write(tmp_path / "a.jsonl", rows), **settings), tokenizer)
    return preview.show_example(examples, row, tokenizer, marks)


def test_every_answer_of_a_conversation_is_marked(byte_tokenizer, chatml, tmp_path):
    tokenizer = byte_tokenizer(chat_template=chatml)
    assert show([TALK], tokenizer, tmp_path) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[[Hello é\U0001f600<|im_end|>]]\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n[[Well<|im_end|>]]"
    )
    assert show([TALK], tokenizer, tmp_path, learn="last").count("[[") == 1


def test_colours(byte_tokenizer, tmp_path):
    row = {"question": "2?", "answer": "3"}
    start, end = "\x1b[7m", "\x1b[27m"
    assert show([row], byte_tokenizer(), tmp_path, marks=COLOURS) == (
        f"{start}<s>{end}Question: 2?\nAnswer:\x1b[32m 3{start}</s>{end}\x1b[39m"
    )


def test_the_space_before_an_answer_is_shown(shared_data, tmp_path):
    """SentencePiece drops the space before the first token that it decodes."""
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    row = {"question": "2 + 3?", "answer": "5"}
    assert show([row], tokenizer, tmp_path) == "<s> Question: 2 + 3?\nAnswer:[[ 5</s>]]"


def test_the_first_token_of_a_text_is_not_learned(byte_tokenizer, tmp_path):
    assert show([{"text": "abc"}], byte_tokenizer(bos=False), tmp_path) == "a[[bc</s>]]"


def test_both_responses_of_a_pair(byte_tokenizer, tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert (
        show([row], byte_tokenizer(), tmp_path)
        == "chosen:\n<s>a[[b</s>]]\nrejected:\n<s>a[[c</s>]]"
    )


def test_a_character_across_a_border_is_shown_once(byte_tokenizer):
    tokenizer = byte_tokenizer()
    tokens = np.array(tokenizer("aé", add_special_tokens=False)["input_ids"])
    assert len(tokens) == 3
    parts = preview.segments(tokens, np.array([False, False, True]), tokenizer)
    assert parts[-1] == Segment("é", True, False)


def test_control_characters_are_not_obeyed(byte_tokenizer, tmp_path):
    row = {"prompt": "a\x1b[2J\r\x00b\tc\n", "completion": "\u202eabc\x9b é"}
    assert show([row], byte_tokenizer(), tmp_path) == (
        "<s>a\\x1b[2J\\r\\x00b\tc\n[[\\u202eabc\\x9b é</s>]]"
    )


def test_long_segments_are_shortened_and_borders_stay():
    parts = [Segment("x" * 5000, False, False), Segment("y" * 1300, True, False)]
    text = preview.show(parts, BRACKETS, shorten=True)
    assert text.startswith("x" * 400 + " ... (4,200 characters) ... x")
    assert text.endswith("x[[" + "y" * 400 + " ... (500 characters) ... " + "y" * 400 + "]]")
    assert preview.show(parts, BRACKETS) == "x" * 5000 + "[[" + "y" * 1300 + "]]"


@pytest.mark.parametrize(
    ("terminal", "environment", "marks"),
    [
        (True, {}, COLOURS),
        (True, {"NO_COLOR": "1"}, BRACKETS),
        (True, {"NO_COLOR": ""}, COLOURS),
        (True, {"TERM": "dumb"}, BRACKETS),
        (False, {}, BRACKETS),
    ],
)
def test_colours_are_for_terminals(terminal, environment, marks, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert preview.choose_marks(stream) == marks


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], list(range(1, 600)), [5, 10_000]])
def test_every_length_is_in_one_bin(lengths):
    bins = preview.length_bins(np.array(lengths))
    assert len(bins) <= 8
    for first, last, count in bins:
        assert count == sum(first <= length <= last for length in lengths)
    assert sum(part.examples for part in bins) == len(lengths)
    assert (bins[0].first, bins[-1].last) == (min(lengths), max(lengths))
    assert len(preview.show_bins(bins).splitlines()) == len(bins)


def test_learned_tokens_are_counted_as_they_are_trained():
    rows = Ragged.of([[1, 2, 3], [4, 5]], np.int32)
    masks = Ragged.of([[1, 1, 1], [0, 1]], np.bool_)
    assert preview.learned_tokens(Examples(rows, masks, np.arange(2))) == 3


def test_no_examples_have_no_bins():
    assert preview.show_bins(preview.length_bins(np.array([], int))) == ""
