"""Tokenizers in GGUF: the tokens of a text are those of the tokenizer that was written."""

import dataclasses
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from jax_ordermerge.data.tokenizers import load_tokenizer
from jax_ordermerge.errors import UserError

STORIES = Path(__file__).parents[2].parent / "shared/data/models/stories260K"
TEXTS = [
    "Tom has 12 apples, 345 pears and 6.5 plums. He can't eat them!",
    "  def f(x):\n\treturn x**2  # über café\r\n\n",
    "你好 мир ½ 🙂 I'LL DON'T e\u0301",
    "<|start|>user\nhello<|end|> <think>hm</think>",
]
WORDS = [*TEXTS, "the cat sat on the mat and the dog ran after the cat", "1 2 3 12 123 1234"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
# as published by the makers of the models
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def split(regex):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Digits(individual_digits=True)
FORMS = {
    "gpt-2": (GPT2, {}),
    "smollm": (pre_tokenizers.Sequence([DIGITS, GPT2]), {}),
    "qwen2": (split(QWEN2), {}),
    "llama-bpe": (split(LLAMA3), {"ignore_merges": True}),
    "dbrx": (split(LLAMA3), {}),
}


def byte_level(name):
    pre_tokenizer, options = FORMS[name]
    fast = tokenizers.Tokenizer(models.BPE(**options))
    fast.pre_tokenizer, fast.decoder = pre_tokenizer, decoders.ByteLevel()
    if name == "qwen2":
        fast.normalizer = normalizers.NFC()
    special = ["<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(WORDS, trainer)
    fast.add_tokens(["<think>", "</think>"])
    return fast


def sentencepiece(prefix):
    fast = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    blanks = [normalizers.Replace(" ", "▁")]
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁")] * prefix + blanks)
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    special = ["<unk>", "<|start|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    fast.train_from_iterator(WORDS[:2] + WORDS[4:], trainer)
    raw = json.loads(fast.to_str())
    raw["added_tokens"] = raw["added_tokens"][:3]  # bytes are found by falling back only
    return tokenizers.Tokenizer.from_str(json.dumps(raw))


def save(directory, fast, **settings):
    directory.mkdir()
    fast.save(str(directory / "tokenizer.json"))
    tokens = {"bos_token": "<|start|>", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **settings})
    (directory / "tokenizer_config.json").write_text(text)
    return directory


def config_of(fast, **change):
    size = {"hidden_size": 8, "intermediate_size": 8, "num_layers": 1, "num_heads": 1}
    ids = {
        "bos_token_id": fast.token_to_id("<|start|>"),
        "eos_token_ids": (fast.token_to_id("<|end|>"),),
    }
    rows = fast.get_vocab_size() + 3  # rows of the embedding without a token
    return ModelConfig(vocab_size=rows, **size, **(ids | change))


def write_and_read(directory, config):
    keys, notes = tokenizer_metadata(directory, config)
    back = directory.with_name("back")
    back.mkdir()
    read_tokenizer(keys, back, 64, "model.gguf")
    return keys, notes, load_tokenizer(back)


@pytest.mark.parametrize("name", FORMS)
def test_a_byte_level_tokenizer_has_the_name_of_its_splits(tmp_path, name):
    fast = byte_level(name)
    directory = save(tmp_path / "hf", fast)
    keys, notes, back = write_and_read(directory, config_of(fast))
    assert keys["tokenizer.ggml.pre"] == name
    assert keys["tokenizer.ggml.tokens"][-3:] == [f"[PAD{len(back) + i}]" for i in range(3)]
    original = load_tokenizer(directory)
    assert len(back) == len(original)
    for text in TEXTS:
        assert back.encode(text) == original.encode(text), text
        assert back.decode(back.encode(text)) == original.decode(original.encode(text))
    chat = [{"role": "user", "content": "hello"}]
    assert back.apply_chat_template(chat, tokenize=False) == "hello"
    assert (back.bos_token, back.eos_token) == ("<|start|>", "<|end|>")
    assert "<|start|>" in back.all_special_tokens
    assert "<think>" not in back.all_special_tokens
    assert notes == []


@pytest.mark.parametrize("prefix", [True, False])
def test_a_sentencepiece_tokenizer_has_scores_for_its_merges(tmp_path, prefix):
    fast = sentencepiece(prefix)
    directory = save(tmp_path / "hf", fast, unk_token="<unk>")
    keys, _, back = write_and_read(directory, config_of(fast))
    assert keys["tokenizer.ggml.model"] == "llama"
    assert keys["tokenizer.ggml.add_space_prefix"] is prefix
    original = load_tokenizer(directory)
    for text in TEXTS:
        assert back.encode(text) == original.encode(text), text


@pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/models/stories260K")
def test_a_published_sentencepiece_tokenizer(tmp_path):
    original = load_tokenizer(STORIES)
    config = ModelConfig.from_hf(json.loads((STORIES / "config.json").read_text()))
    directory = tmp_path / "hf"
    original.save_pretrained(directory)
    _, _, back = write_and_read(directory, config)
    golden = STORIES.parents[1] / "golden/stories260K"
    for text in [
        *TEXTS,
        STORIES.parents[1].joinpath("text/tinyshakespeare.txt").read_text()[:9000],
    ]:
        assert back.encode(text) == original.encode(text), (golden, text[:80])


@pytest.mark.parametrize("flags", [(True, False), (False, True), (False, False), (True, True)])
def test_tokens_that_are_added_to_a_text_are_those_of_the_post_processor(tmp_path, flags):
    fast, (bos, eos) = byte_level("llama-bpe"), flags
    template = " ".join(["<|start|>"] * bos + ["$A"] + ["<|end|>"] * eos)
    special = [(token, fast.token_to_id(token)) for token in ("<|start|>", "<|end|>")]
    fast.post_processor = processors.TemplateProcessing(template, special_tokens=special)
    keys, _, back = write_and_read(save(tmp_path / "hf", fast), config_of(fast))
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == flags
    assert back.encode("hello") == fast.encode("hello").ids


def test_ends_have_keys_of_their_own_and_what_is_lost_is_named(tmp_path):
    fast = byte_level("qwen2")
    fast.add_special_tokens([tokenizers.AddedToken("<|tool|>", lstrip=True)])
    config = config_of(fast, eos_token_ids=(1, 4, 5, 6))
    keys, notes = tokenizer_metadata(save(tmp_path / "hf", fast), config)
    ends = [keys[f"tokenizer.ggml.{end}_token_id"] for end in ("eos", "eot", "eom")]
    assert ends == [1, 4, 5]
    assert any("(6,)" in note for note in notes)
    assert any("<|tool|> takes spaces around it" in note for note in notes)


def test_what_is_put_around_a_text_and_has_no_key_is_named(tmp_path):
    fast = byte_level("llama-bpe")
    special = [(token, fast.token_to_id(token)) for token in ("<|start|>", "<|end|>")]
    fast.post_processor = processors.TemplateProcessing("<|end|> $A", special_tokens=special)
    # null is what a setting has that nobody gave
    directory = save(tmp_path / "hf", fast, add_bos_token=None, add_eos_token=None)
    _, notes = tokenizer_metadata(directory, config_of(fast))
    assert notes == [
        "GGUF cannot say that tokenizer.json makes ['<|end|>', 'a'] of 'a'; the file makes"
        " ['a', '<|end|>']"
    ]


def test_added_tokens_that_are_found_in_other_places_are_named(tmp_path):
    fast = byte_level("gpt-2")
    fast.add_tokens([tokenizers.AddedToken("cat", single_word=True)])
    _, notes = tokenizer_metadata(save(tmp_path / "hf", fast), config_of(fast))
    assert notes == ["around added tokens the file splits text otherwise than tokenizer.json"]


def test_chat_templates_keep_their_names(tmp_path):
    fast = byte_level("qwen2")
    templates = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    directory = save(tmp_path / "hf", fast, chat_template=templates)
    keys, _, back = write_and_read(directory, config_of(fast))
    assert keys["tokenizer.chat_template.tool_use"] == "b"
    assert back.chat_template == {"default": "a", "tool_use": "b"}


def other_split():
    fast = byte_level("gpt-2")
    fast.pre_tokenizer = split(r"\w+|\W+")
    return fast


def whole_words():
    return tokenizers.Tokenizer(models.WordLevel({"<|start|>": 0, "<|end|>": 1}, "<|end|>"))


@pytest.mark.parametrize(
    ("make", "message"),
    [(other_split, "splits text as no tokenizer does"), (whole_words, "of type WordLevel")],
)
def test_a_tokenizer_that_llama_cpp_lacks_is_refused(tmp_path, make, message):
    fast = make()
    with pytest.raises(UserError, match=message):
        tokenizer_metadata(save(tmp_path / "hf", fast), config_of(fast))


def test_more_tokens_than_rows_are_refused(tmp_path):
    fast = byte_level("gpt-2")
    with pytest.raises(UserError, match="the model only 300 rows"):
        tokenizer_metadata(
            save(tmp_path / "hf", fast), dataclasses.replace(config_of(fast), vocab_size=300)
        )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ggml.pre", "chatglm-bpe", r"tokenizer.ggml.pre = 'chatglm-bpe' is not supported"),
        ("ggml.model", "rwkv", r"tokenizer.ggml.model = 'rwkv' is not supported"),
        ("ggml.remove_extra_whitespaces", True, "remove_extra_whitespaces = True"),
        ("ggml.tokens", lambda tokens: [*tokens[:-1], tokens[0]], "tokens 0 and 387 are both"),
        ("ggml.bos_token_id", 2**32 - 1, "bos_token_id = 4294967295, but there are"),
        ("ggml.token_type", [1, 1], "token_type has 2 values, one per token expected"),
        ("ggml.merges", ["a zzz"], "model.gguf has a damaged tokenizer: "),
    ],
)
def test_what_changes_tokens_and_is_not_understood_is_refused(tmp_path, key, value, message):
    fast = byte_level("gpt-2")
    keys, _ = tokenizer_metadata(save(tmp_path / "hf", fast), config_of(fast))
    value = value(keys[f"tokenizer.{key}"]) if callable(value) else value
    with pytest.raises(UserError, match=message):
        read_tokenizer(keys | {f"tokenizer.{key}": value}, tmp_path, 64, "model.gguf")
