"""Tiny tokenizers: bytes as tokens, and pieces that merge across spaces as in SentencePiece."""

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from jax_ordermerge.config import Data
from jax_ordermerge.data import source
from tests.data.rows import write

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "OPEN{{ message['content'] }}CLOSE"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# ChatML with all that a template may use.
FULL = (
    "{% if tools %}{{ '<|im_start|>tools\n' }}{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for call in m.tool_calls or () %}{{ call.function | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if brief %}{{ 'Briefly: ' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="session")
def chatml():
    """ChatML without `{% generation %}`."""
    return CHATML.replace("OPEN", "").replace("CLOSE", "")


@pytest.fixture(scope="session")
def chatml_marked():
    """The same with `{% generation %}` around the content of assistant turns, without the end."""
    role = (
        "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}"
        "{% endgeneration %}{% else %}"
    )
    return CHATML.replace(
        "OPEN{{ message['content'] }}CLOSE", role + "{{ message['content'] }}{% endif %}"
    )


@pytest.fixture
def byte_tokenizer():
    """make(bos=True, chat_template=None): one token per byte, then special tokens."""

    def make(*, bos=True, chat_template=None, eos="</s>"):
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        inner = Tokenizer(
            models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[])
        )
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
        if bos:
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token=eos, chat_template=chat_template
        )

    return make


@pytest.fixture
def piece_tokenizer():
    """A space is glued to the piece after it, and one is put before every text, as in Llama-2."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        "▁",
        *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:\n.,?",
        "▁4",
        "▁42",
        "▁y",
        "▁x",
    ]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=[("▁", "4"), ("▁4", "2"), ("▁", "y"), ("▁", "x")],
            unk_token="<unk>",
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def load(tmp_path, byte_tokenizer):
    """load(rows, template="chat", **settings) -> (text, learned runs) per row, and the examples.

    `file` is the name of the file that is written, whose suffix says its kind.
    """

    def run(rows, template="chat", chat_template=FULL, file="rows.jsonl", **settings):
        tokenizer = byte_tokenizer(chat_template=chat_template, bos=False, eos="<|im_end|>")
        path = write(tmp_path / file, rows)
        data = Data(template=template, max_length=8000, **settings)
        examples = source.tokenize(path, data, tokenizer)
        parts = []
        for tokens, answers in zip(examples.tokens, examples.answers, strict=True):
            edges = np.flatnonzero(np.diff([False, *answers, False]))
            runs = zip(edges[::2], edges[1::2], strict=True)
            learned = [tokenizer.decode(tokens[start:end]) for start, end in runs]
            parts.append((tokenizer.decode(tokens), learned))
        return parts, examples

    return run
