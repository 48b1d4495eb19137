"""The tokens that end learned responses, as the examples record them."""

import json

import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import chat
from jax_ordermerge.data.formats import Record
from tests.data.rows import load_train, write

# An assistant turn with a call ends by another token than one with an answer, as in Llama 3.1.
TWO_ENDS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "{{ '</s>' if 'call' in message['content'] else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Turns end in a line feed, as in Vicuna's first template, or at once.
WORDS = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def talks(tmp_path, *answers, name="a.jsonl"):
    rows = [
        {
            "messages": [
                {"role": ("user", "assistant")[number % 2], "content": content}
                for number, content in enumerate(contents)
            ]
        }
        for contents in answers
    ]
    return write(tmp_path / name, rows)


def names(tokenizer, examples):
    return tokenizer.convert_ids_to_tokens(list(examples.ends))


def test_a_template_may_end_turns_by_another_token_than_eos(tmp_path, byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    path = talks(tmp_path, ("Hi", "Ho", "He", "Ha"), ("Who?", "Jo"))
    examples = load_train(Data(train=path), tokenizer)
    assert names(tokenizer, examples) == ["<|im_end|>"]
    assert examples.take([1]).ends == examples.ends


@pytest.mark.parametrize("template", ["plain", "alpaca", "gsm8k"])
def test_other_templates_end_by_eos(tmp_path, byte_tokenizer, template):
    path = write(tmp_path / "a.jsonl", [{"question": "Who?", "answer": "Jo<|im_end|>"}])
    tokenizer = byte_tokenizer()
    examples = load_train(Data(train=path, template=template), tokenizer)
    assert names(tokenizer, examples) == ["</s>"]


def test_a_template_may_have_several_ends(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer(chat_template=TWO_ENDS)
    path = talks(tmp_path, ("Hi", "call()", "3", "Ho"), ("Who?", "Jo"))
    examples = load_train(Data(train=path), tokenizer)
    assert names(tokenizer, examples) == ["</s>", "<|im_end|>"]
    # what is context is no end: only the call is learned here
    rows = [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Ho", "weight": 0},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "call()"},
            ]
        }
    ]
    examples = load_train(Data(train=write(tmp_path / "b.jsonl", rows)), tokenizer)
    assert names(tokenizer, examples) == ["</s>"]


def test_an_ordinary_word_that_ends_a_turn_is_no_end(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer(chat_template=WORDS)
    examples = load_train(Data(train=talks(tmp_path, ("Hi", "Ho", "He", "Ha"))), tokenizer)
    assert tokenizer.decode(examples.tokens[0]).endswith("Ha </s>")
    assert names(tokenizer, examples) == ["</s>"]


def test_a_response_that_is_cut_has_no_end(tmp_path, byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=chatml)
    # a special token inside of the response, at every place of the cut
    path = talks(tmp_path, ("Hi", "a</s>b"))
    (encoded,) = chat.encode([Record.single_turn("Hi", "a</s>b")], "chat", tokenizer)
    length = len(encoded.tokens)
    for cut in range(length - 3, length + 2):
        data = Data(train=path, max_length=cut, too_long="truncate")
        expected = ["<|im_end|>"] if cut >= length else []
        assert names(tokenizer, load_train(data, tokenizer)) == expected, cut


def test_texts_end_where_the_last_window_does(tmp_path, byte_tokenizer):
    tokenizer = byte_tokenizer()
    path = write(tmp_path / "a.jsonl", [{"text": "a<|im_start|>b<|im_end|>c"}])
    for length in range(2, 9):
        examples = load_train(Data(train=path, max_length=length), tokenizer)
        assert names(tokenizer, examples) == ["</s>"], length


def test_pairs_have_the_ends_of_the_chosen_responses(tmp_path, byte_tokenizer, chatml):
    tokenizer = byte_tokenizer(chat_template=TWO_ENDS)
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Ho"}],
        "rejected": [{"role": "assistant", "content": "call()"}],
    }
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n")
    examples = load_train(Data(train=str(path)), tokenizer)
    assert names(tokenizer, examples) == ["<|im_end|>"]


def test_the_token_of_unknown_text_ends_nothing(piece_tokenizer):
    piece_tokenizer.chat_template = WORDS.replace(": ", ":").replace("}} {%", "}}{%")
    (encoded,) = chat.encode([Record.single_turn("x", "y!")], "chat", piece_tokenizer)
    assert piece_tokenizer.convert_ids_to_tokens(encoded.tokens)[-2:] == ["<unk>", "</s>"]
