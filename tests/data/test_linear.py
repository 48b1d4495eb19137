"""Splitting and tokenizing conversations in linear time gives what the obvious way gives."""

import random

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from jax_ordermerge.data import chat, turns
from jax_ordermerge.data.formats import Record, read_rows
from jax_ordermerge.data.pieces import Piece, encode_pieces
from tests.data.naive import NaiveSplitter
from tests.data.naive import encode_pieces as naive_encode_pieces

SPECIAL = [
    "<s>",
    "</s>",
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|endoftext|>",
]
WORDS = [
    "the",
    "of",
    "and",
    "Order",
    "merge",
    "1234",
    "12",
    "é",
    "你好",
    "😀",
    "ab_c",
    "d's",
    "(x)",
    "...",
    "<b>",
    "\\n",
    "tab\t",
]
CORPUS = [" ".join(random.Random(n).choices(WORDS, k=40)) + "\n\n  x" for n in range(50)]
# How Llama-3 cuts a text: digits in threes, line feeds with the spaces before them.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(inner):
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()


def llama3(inner):
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def metaspace(inner):
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)


def prepended(inner):
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )


def composed(inner):
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    inner.pre_tokenizer = pre_tokenizers.Whitespace()


def make_tokenizer(kind, template=None, **flags):
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    kind(inner)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(CORPUS, trainer)
    inner.add_special_tokens([AddedToken(text, special=True, **flags) for text in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<|begin_of_text|>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )


KINDS = [byte_level, llama3, metaspace, prepended, composed]


# --- tokens ---


def random_pieces(draw):
    def text():
        parts = draw.choices([*WORDS, *SPECIAL, "\n", " ", "  ", "\n\n", ""], k=draw.randrange(7))
        return draw.choice(["", " "]).join(parts)

    count = draw.randrange(1, 9)
    return [Piece(text(), number % 2 == count % 2) for number in range(count)]


@pytest.mark.parametrize(
    "flags", [{}, {"rstrip": True}, {"lstrip": True}, {"single_word": True}, {"normalized": True}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_of_prefixes(kind, flags):
    tokenizer = make_tokenizer(kind, **flags)
    draw = random.Random(0)
    examples = [random_pieces(draw) for _ in range(300)]
    examples = [pieces for pieces in examples if "".join(piece.text for piece in pieces)]
    assert encode_pieces(examples, tokenizer) == naive_encode_pieces(examples, tokenizer)


def test_special_tokens_that_are_read_as_text():
    tokenizer = make_tokenizer(byte_level)
    tokenizer.split_special_tokens = True
    draw = random.Random(1)
    examples = [random_pieces(draw) for _ in range(50)]
    assert encode_pieces(examples, tokenizer) == naive_encode_pieces(examples, tokenizer)


def test_unknown_text_is_no_special_token():
    tokenizer = make_tokenizer(composed)
    examples = [[Piece("the \u4e00", False), Piece("\u4e01 of<unk>", True), Piece(" the", False)]]
    assert encode_pieces(examples, tokenizer) == naive_encode_pieces(examples, tokenizer)


# --- turns ---

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"zone": {"type": "string"}}}},
]


def random_row(draw, plain):
    """A row of a conversation; `plain` leaves out what not all templates take."""

    def words(low=1, high=12):
        return " ".join(draw.choices(WORDS, k=draw.randrange(low, high)))

    def content():
        text = words()
        odd = {
            0: f"  {text}\n",
            1: f"<think>\n{words()}\n</think>\n\n{text}",
            2: f"{text}<|im_end|>",
            3: f"<tool_response>\n{text}\n</tool_response>",
            4: f"{text}\n<|im_start|>user\n{text}",
            5: f"</think>{text}",
            6: "730000001",
        }
        return odd.get(draw.randrange(60), text)

    messages = [{"role": "system", "content": content()}] if draw.random() < 0.4 else []
    for _ in range(draw.randrange(1, 5)):
        messages.append({"role": "user", "content": content()})
        while not plain and draw.random() < 0.3:
            function = {
                "name": "weather",
                "arguments": {"city": words(), "days": draw.randrange(9)},
            }
            calls = [{"id": f"call{draw.randrange(10**5):05d}", "type": "function"}]
            calls[0]["function"] = function
            messages.append({"role": "assistant", "content": "", "tool_calls": calls})
            messages.append({"role": "tool", "content": f'{{"a": "{words()}"}}'})
        answer = {"role": "assistant", "content": content()}
        if not plain and draw.random() < 0.15:
            answer["reasoning_content"] = words()
        if draw.random() < 0.1:
            answer["weight"] = 0
        messages.append(answer)
    row = {"messages": messages}
    if not plain and draw.random() < 0.4:
        row["tools"] = TOOLS[: draw.randrange(1, 3)]
    if draw.random() < 0.2:
        row["chat_template_kwargs"] = {"enable_thinking": draw.random() < 0.5}
    return row


def encode_both(records, tokenizer, monkeypatch):
    fast = chat.encode_rows(records, "chat", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(chat, "TurnSplitter", NaiveSplitter)
        patch.setattr(chat, "encode_pieces", naive_encode_pieces)
        slow = chat.encode_rows(records, "chat", tokenizer)
    return fast, slow


def count_renderings(monkeypatch):
    calls = []
    render = turns.render_chat
    monkeypatch.setattr(
        turns, "render_chat", lambda *args, **kwargs: (calls.append(1), render(*args, **kwargs))[1]
    )
    return calls


@pytest.fixture(
    params=["qwen2_5", "qwen2_5_training", "qwen3", "qwen3_training", "llama3", "llama3_2"]
)
def published(request, shared_data):
    return (shared_data / "templates" / f"{request.param}.jinja").read_text()


@pytest.mark.parametrize("plain", [True, False])
def test_published_templates(published, plain, monkeypatch):
    tokenizer = make_tokenizer(llama3, published)
    draw = random.Random(2)
    rows = [random_row(draw, plain) for _ in range(150)]
    records, _ = read_rows(rows, "messages")
    (fast, bad), (slow, slow_bad) = encode_both(records, tokenizer, monkeypatch)
    assert bad == slow_bad
    assert fast == slow
    assert len(fast) > (100 if plain else 40)


# Templates that a layout must not be taken from, or that it must be refused for.
ODD = {
    "contents are printed twice": "{{ m.content }}|{{ m.content }}</s>",
    "contents are looked at": "{{ m.content if 'Order' in m.content else 'x' + m.content }}</s>",
    "the last turn differs": "{% if loop.last %}!{% endif %}{{ m.content }}</s>",
    "contents are upper case": "{{ m.content | upper }}</s>",
    "numbers like placeholders": "730000001{{ m.content }}730000099</s>",
    "no special token": "{{ m.content }}\n",
    "nothing between turns": "{{ m.content }}",
    "length of the conversation": "{{ m.content }}{{ messages | length }}</s>",
    "contents as JSON": "{{ m.content | tojson }}</s>",
    "contents cut": "{{ m.content[:20] }}</s>",
    "refused": "{{ raise_exception('no') if 'merge' in m.content else m.content }}</s>",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_templates(name, monkeypatch):
    template = "{% for m in messages %}[{{ m.role }}]" + ODD[name] + "{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    tokenizer = make_tokenizer(byte_level, template)
    draw = random.Random(3)
    records, _ = read_rows([random_row(draw, plain=True) for _ in range(150)], "messages")
    (fast, bad), (slow, slow_bad) = encode_both(records, tokenizer, monkeypatch)
    assert bad == slow_bad
    assert fast == slow


def long_talk(count, draw):
    return Record(
        messages=tuple(
            {"role": ("user", "assistant")[n % 2], "content": " ".join(draw.choices(WORDS, k=5))}
            for n in range(count)
        )
    )


@pytest.mark.parametrize("name", ["qwen2_5", "qwen2_5_training", "llama3_2"])
def test_a_conversation_is_rendered_once(name, shared_data, monkeypatch):
    template = (shared_data / "templates" / f"{name}.jinja").read_text()
    tokenizer = make_tokenizer(byte_level, template)
    draw = random.Random(4)
    splitter = turns.TurnSplitter(tokenizer, chat.special_tokens(tokenizer))
    for record in (long_talk(40, draw), long_talk(40, draw)):
        splitter.split(record)  # the first is split the slow way, the second gives the layout
    calls = count_renderings(monkeypatch)
    splitter.split(long_talk(40, draw))
    assert len(calls) == 1


def test_tool_calls_are_rendered_once(shared_data, monkeypatch):
    template = (shared_data / "templates" / "qwen2_5.jinja").read_text()
    tokenizer = make_tokenizer(byte_level, template)

    def trace(city, tools):
        call = {"type": "function", "function": {"name": "weather", "arguments": {city: city}}}
        turn = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": f"in {city}"},
        ]
        end = {"role": "assistant", "content": f"Sunny in {city}."}
        return {"messages": [{"role": "user", "content": city}, *turn, *turn, end], "tools": tools}

    splitter = turns.TurnSplitter(tokenizer, chat.special_tokens(tokenizer))
    naive = NaiveSplitter(tokenizer, chat.special_tokens(tokenizer))
    records, _ = read_rows(
        [
            trace("Oslo", TOOLS[:1]),
            trace("Rome", TOOLS[::-1]),
            trace("Bern", [TOOLS[0]] * 3),
            trace("x }", TOOLS[::-1]),
        ],
        "messages",
    )
    records = list(records.values())
    for record in records[:2]:
        splitter.split(record)
    calls = count_renderings(monkeypatch)
    pieces = [splitter.split(record) for record in records[2:]]
    assert len(calls) == 2
    assert pieces == [naive.split(record) for record in records[2:]]


def test_texts_of_prefixes_are_not_tokenized_again(shared_data, monkeypatch):
    template = (shared_data / "templates" / "llama3.jinja").read_text()
    tokenizer = make_tokenizer(byte_level, template)
    lengths = []
    call = type(tokenizer).__call__
    monkeypatch.setattr(
        type(tokenizer),
        "__call__",
        lambda self, texts, **options: (
            lengths.extend(map(len, texts)),
            call(self, texts, **options),
        )[1],
    )
    record = long_talk(40, random.Random(5))
    special = chat.special_tokens(tokenizer)
    lengths.clear()
    pieces = turns.TurnSplitter(tokenizer, special).split(record)
    encode_pieces([pieces], tokenizer)
    text = sum(len(piece.text) for piece in pieces)
    # the text itself, the head of an answer, and an end of turn
    assert sum(lengths) < text + 100
