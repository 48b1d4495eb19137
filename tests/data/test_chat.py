"""Templates: the text, what is learned, and that prompts have the tokens of training."""

import json

import numpy as np
import pytest

from jax_ordermerge.data import chat
from jax_ordermerge.data.formats import Record, normalize
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.errors import UserError


def talk(*contents, system=None, context=0):
    head = [{"role": "system", "content": system}] if system else []
    turns = [
        {"role": ("user", "assistant")[n % 2], "content": content}
        for n, content in enumerate(contents)
    ]
    return Record(messages=(*head, *turns), context=context)


def learned(tokenizer, encoded):
    """Texts of the runs that are learned."""
    mask = np.array([False, *encoded.answers, False])
    edges = np.flatnonzero(mask[1:] != mask[:-1])
    return [
        tokenizer.decode(encoded.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def asked_by(encoded):
    """Tokens before the last response."""
    context = [index for index, answer in enumerate(encoded.answers) if not answer]
    return encoded.tokens[: context[-1] + 1]


# --- encoded prompt, encoded response ---


def test_alpaca_is_the_published_wording():
    assert chat.render(Record.single_turn("Add.", "5", "2 and 3"), "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that "
        "appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:",
        "5",
    )
    assert chat.render(Record.single_turn("Add {2}.", "5"), "alpaca") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n"
        "### Instruction:\nAdd {2}.\n\n### Response:",
        "5",
    )


def test_plain_and_gsm8k():
    assert chat.render(Record.single_turn("a ", "b"), "plain") == ("a ", "b")
    assert chat.render(Record.single_turn("a", "b", "c"), "plain") == ("a\nc", "b")
    assert chat.render(Record.single_turn("2 + 3?", "5"), "gsm8k") == (
        "Question: 2 + 3?\nAnswer:",
        " 5",
    )


@pytest.mark.parametrize("template", ["plain", "alpaca", "gsm8k"])
@pytest.mark.parametrize("bos", [True, False])
def test_response_and_eos_are_learned(byte_tokenizer, template, bos):
    tokenizer = byte_tokenizer(bos=bos)
    record = Record.single_turn("Who?", "Jo")
    (encoded,) = chat.encode([record], template, tokenizer)
    prompt, response = chat.render(record, template)
    assert tokenizer.decode(encoded.tokens) == ("<s>" if bos else "") + prompt + response + "</s>"
    assert learned(tokenizer, encoded) == [response + "</s>"]
    assert chat.prompt_tokens(record, template, tokenizer).tolist() == asked_by(encoded)
    assert chat.prompt_tokens(Record.single_turn("Who?"), template, tokenizer).tolist() == asked_by(
        encoded
    )


def test_bos_and_eos_are_never_doubled(byte_tokenizer):
    tokenizer = byte_tokenizer()
    (encoded,) = chat.encode([Record.single_turn("<s>a", "b</s>")], "plain", tokenizer)
    assert tokenizer.decode(encoded.tokens) == "<s>ab</s>"
    assert encoded.answers == [False, False, True, True]
    (text,) = chat.encode([Record(text="<s>ab</s>")], "plain", tokenizer)
    assert text == chat.Encoded(encoded.tokens, [False, True, True, True])


def test_a_text_is_learned_but_for_bos(byte_tokenizer):
    (with_bos,) = chat.encode([Record(text="ab")], "plain", byte_tokenizer())
    (without,) = chat.encode([Record(text="ab")], "plain", byte_tokenizer(bos=False))
    assert with_bos.answers == [False, True, True, True]
    assert without.answers == [True, True, True]


def test_a_border_between_tokens_keeps_the_natural_tokens(piece_tokenizer):
    (encoded,) = chat.encode([Record.single_turn("x:", " 42")], "plain", piece_tokenizer)
    assert piece_tokenizer.convert_ids_to_tokens(encoded.tokens) == [
        "<s>",
        "▁x",
        ":",
        "▁42",
        "</s>",
    ]
    assert encoded.answers == [False, False, False, True, True]


def test_a_border_inside_a_token_keeps_the_prompt(piece_tokenizer):
    # "x: 42" has the token "▁42" across the border. The tokens of the prompt alone are used, so
    # that generation has the same prompt as training.
    record = Record.single_turn("x: ", "42")
    (encoded,) = chat.encode([record], "plain", piece_tokenizer)
    assert piece_tokenizer.convert_ids_to_tokens(encoded.tokens) == [
        "<s>",
        "▁x",
        ":",
        "▁",
        "▁42",
        "</s>",
    ]
    assert chat.prompt_tokens(record, "plain", piece_tokenizer).tolist() == asked_by(encoded)


def test_several_turns_need_chat(byte_tokenizer):
    with pytest.raises(
        UserError,
        match=r"template alpaca takes one user .* message, an example has user, assistant, user",
    ):
        chat.encode([talk("a", "b", "c", "d")], "alpaca", byte_tokenizer())


def test_a_tokenizer_without_eos(byte_tokenizer):
    with pytest.raises(UserError, match="no eos_token"):
        chat.encode([Record.single_turn("a", "b")], "plain", byte_tokenizer(eos=None))


# --- chat ---


@pytest.fixture(params=["marked", "unmarked"])
def chat_tokenizer(request, byte_tokenizer, chatml, chatml_marked):
    return byte_tokenizer(
        chat_template=chatml_marked if request.param == "marked" else chatml, bos=False
    )


def test_every_response_of_a_conversation_is_learned(chat_tokenizer):
    record = talk("Hi", "Hello", "2 + 3?", "5", system="Be brief.")
    (encoded,) = chat.encode([record], "chat", chat_tokenizer)
    # the turn's end is learned, the line feed after it is not
    assert learned(chat_tokenizer, encoded) == ["Hello<|im_end|>", "5<|im_end|>"]
    assert chat_tokenizer.decode(encoded.tokens) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\n2 + 3?<|im_end|>\n<|im_start|>assistant\n5<|im_end|>"
    )
    assert chat.prompt_tokens(record, "chat", chat_tokenizer).tolist() == asked_by(encoded)


def test_marked_and_unmarked_templates_agree(byte_tokenizer, chatml, chatml_marked):
    records = [talk("Hi", "Hello", "2 + 3?", "5"), talk("a", "b", system="s")]
    encoded = [
        chat.encode(records, "chat", byte_tokenizer(chat_template=template))
        for template in (chatml, chatml_marked)
    ]
    assert encoded[0] == encoded[1]


def test_given_turns_are_not_learned(chat_tokenizer):
    (encoded,) = chat.encode(
        [talk("Hi", "Hello", "2 + 3?", "5", context=3)], "chat", chat_tokenizer
    )
    assert learned(chat_tokenizer, encoded) == ["5<|im_end|>"]


def test_bos_of_the_template_is_not_doubled(byte_tokenizer, chatml):
    (encoded,) = chat.encode(
        [talk("a", "b")], "chat", byte_tokenizer(chat_template="{{ bos_token }}" + chatml)
    )
    tokenizer = byte_tokenizer()
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert encoded.tokens[0] == tokenizer.bos_token_id


def test_eos_is_appended_where_the_template_ends_a_turn_with_nothing(byte_tokenizer):
    tokenizer = byte_tokenizer(
        chat_template=(
            "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        )
    )
    (encoded,) = chat.encode([talk("a", "b", "c", "d")], "chat", tokenizer)
    assert learned(tokenizer, encoded) == ["b\n", "d\n</s>"]


def test_a_response_is_what_follows_the_generation_prompt_wherever_it_is_marked(
    byte_tokenizer, chatml
):
    # the marks take in the head of the turn, which the generation prompt writes
    marked = chatml.replace(
        "{{ '<|im_start|>'",
        "{% if message['role'] == 'assistant' %}{% generation %}{{ '<|im_start|>'",
        1,
    ).replace(
        "{{ '<|im_end|>'",
        "{% endgeneration %}{% else %}"
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
        "{% endif %}{{ '<|im_end|>'",
    )
    tokenizer = byte_tokenizer(chat_template=marked)
    (encoded,) = chat.encode([talk("a", "b")], "chat", tokenizer)
    assert learned(tokenizer, encoded) == ["b<|im_end|>"]


def test_turns_that_cannot_be_separated(byte_tokenizer, chatml):
    # Templates that drop the reasoning of earlier turns render the last turn differently.
    dropping = chatml.replace(
        "{{ message['content'] }}", "{% if loop.last %}<think>{% endif %}{{ message['content'] }}"
    )
    with pytest.raises(
        UserError, match=r"response in message 1 once it is answered.*data\.template"
    ):
        chat.encode([talk("a", "b", "c", "d")], "chat", byte_tokenizer(chat_template=dropping))


def test_a_generation_prompt_that_training_does_not_have(byte_tokenizer, chatml_marked):
    template = chatml_marked.replace(
        "{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>model\n' }}"
    )
    with pytest.raises(UserError, match="does not precede the response in message 1"):
        chat.encode([talk("a", "b")], "chat", byte_tokenizer(chat_template=template))


def test_a_template_that_refuses_roles(byte_tokenizer):
    tokenizer = byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        UserError, match="the chat template refuses the roles user, assistant: roles must alternate"
    ):
        chat.encode([talk("a", "b")], "chat", tokenizer)


# --- which template ---


@pytest.mark.parametrize(
    ("form", "has_chat", "expected"),
    [
        ("alpaca", True, "alpaca"),
        ("question_answer", True, "gsm8k"),
        ("prompt_completion", True, "plain"),
        ("text", False, "plain"),
        ("messages", True, "chat"),
        ("sharegpt", True, "chat"),
    ],
)
def test_auto(byte_tokenizer, chatml, form, has_chat, expected):
    tokenizer = byte_tokenizer(chat_template=chatml if has_chat else None)
    assert (
        chat.resolve_template("auto", form, [Record.single_turn("a", "b")], tokenizer) == expected
    )


def test_auto_of_prompts_that_are_messages(byte_tokenizer, chatml):
    row = {
        "prompt": [{"role": "user", "content": "a"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    records = normalize([row], "prompt_completion", "x")
    assert (
        chat.resolve_template(
            "auto", "prompt_completion", records, byte_tokenizer(chat_template=chatml)
        )
        == "chat"
    )


def test_no_silent_choice(byte_tokenizer):
    for template in ("auto", "chat"):
        with pytest.raises(UserError, match=r"no chat template; set data\.template"):
            chat.resolve_template(template, "messages", [], byte_tokenizer())
    with pytest.raises(UserError, match="did you mean 'alpaca'"):
        chat.resolve_template("alpacas", "alpaca", [], byte_tokenizer())


# --- a real tokenizer ---


def test_stories_tokenizer(shared_data):
    tokenizer = load_tokenizer(shared_data / "models" / "stories260K")
    with (shared_data / "gsm8k" / "test.jsonl").open() as file:
        records = normalize([json.loads(next(file)) for _ in range(20)], "question_answer", "gsm8k")
    for record, encoded in zip(records, chat.encode(records, "gsm8k", tokenizer), strict=True):
        assert encoded.tokens[0] == 1
        assert encoded.tokens[-1] == 2
        assert {1, 2} & set(encoded.tokens[1:-1]) == set()
        assert chat.prompt_tokens(record, "gsm8k", tokenizer).tolist() == asked_by(encoded)
        # the mask's tokens are the answer, to the byte
        assert learned(tokenizer, encoded) == [f"{record.response}</s>"]
        assert (
            tokenizer.decode(encoded.tokens)
            == f"<s> Question: {record.prompt}\nAnswer: {record.response}</s>"
        )
