"""Tokenizers in GGUF files, from and to `tokenizer.json`.

GGUF has vocabulary, merges and special tokens. In place of a normalizer and pre-tokenizer it has a
name, `tokenizer.ggml.pre`, for which llama.cpp has a regular expression. A name that is not known
here is refused, since another split gives other tokens and a model that seems merely worse.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import json_files, sidecar_files
from jax_ordermerge.errors import UserError, first_line
from jax_ordermerge.json_types import Json, JsonRow

_GGML: Final = "tokenizer.ggml."
_TEMPLATE: Final = "tokenizer.chat_template"
# Types of tokens.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


class _Split(NamedTuple):
    """How text is split before merging, by a name of `tokenizer.ggml.pre`.

    Attributes:
        regex: of the pieces; None is that of GPT-2.
        digits: whether digits are split off one by one first.
        nfc: whether transformers normalizes the text, which llama.cpp does not.
        ignore_merges: whether a piece that is a token needs no merges.
        add_bos: whether llama.cpp begins a text with BOS where the file does not say.
    """

    regex: str | None = None
    digits: bool = False
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


def _words(digits: str) -> str:
    """Return the regular expression of GPT-4, with its expression for digits."""
    return (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _Split(_words(r"\p{N}{1,3}"), ignore_merges=True, add_bos=True)
_QWEN2 = _Split(_words(r"\p{N}"), nfc=True)
# The first of equal ones is written.
_SPLITS: Final = {
    "gpt-2": _Split(),
    "olmo": _Split(),
    "phi-2": _Split(),
    "smollm": _Split(digits=True),
    "starcoder": _Split(digits=True),
    "refact": _Split(digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "dbrx": _Split(_words(r"\p{N}{1,3}")),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _Split(_TEKKEN, ignore_merges=True, add_bos=True),
}
# Keys that are read, and those that change no token of a text.
_READ: Final = (
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
    "bos_token_id",
    "eos_token_id",
    "eot_token_id",
    "eom_token_id",
    "unknown_token_id",
    "padding_token_id",
)
_NEUTRAL: Final = ("seperator", "mask", "cls", "prefix", "suffix", "middle", "fim_", "token_type_c")
_NEUTRAL_VALUES: Final = {"remove_extra_whitespaces": False, "add_sep_token": False}
# Settings of transformers, and keys of GGUF, on what is put around a text.
_ADDED: Final = ("add_bos_token", "add_eos_token")
# Text on which tokenizers are compared: words, digits, spaces, lines, scripts, punctuation.
_PROBES: Final = (
    "Hello, I'm 12345 years old! It'S 3.14 or 1,000,000?",
    "  two  spaces\tand\ttabs \n\n lines\r\n  x = {'a': [1, 2]}; y += foo_bar(x)//2 ...\n",
    "café naïve ÀÉ CamelCase Straße 你好，世界 привет 🙂🚀 ½ Ⅻ ١٢٣ \u200b$€",
    " leading and trailing ",
    "a",
    "",
)


# ---------------------------------------------------------------------------------------- reading


def read_tokenizer(metadata: Mapping[str, Any], directory: Path, positions: int, path: str) -> None:
    """Write the tokenizer of a GGUF file into a directory, as a fast tokenizer of Hugging Face.

    Args:
        metadata: values by key.
        directory: an existing directory.
        positions: length of the context.
        path: of the file, for messages.

    Raises:
        UserError: its kind, the name of its splits, or a key is not supported.
    """
    # first, since it checks all that is read here
    raw, tokens = tokenizer_json(metadata, path), metadata[f"{_GGML}tokens"]
    roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {role: metadata.get(f"{_GGML}{name}_token_id") for role, name in roles.items()}
    settings: Json = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": positions,
        **{f"{role}_token": tokens[i] for role, i in ids.items() if i is not None},
    }
    templates = {"default": metadata[_TEMPLATE]} if _TEMPLATE in metadata else {}
    # others have a name behind a dot
    for key in metadata:
        if key.startswith(f"{_TEMPLATE}."):
            templates[key.removeprefix(f"{_TEMPLATE}.")] = metadata[key]
    if list(templates) == ["default"]:
        settings["chat_template"] = templates["default"]
    elif templates:
        settings["chat_template"] = [{"name": n, "template": t} for n, t in templates.items()]
    import tokenizers

    try:
        tokenizers.Tokenizer.from_str(json.dumps(raw))
    # of merges of absent tokens, and others: the library has no class for what it refuses
    except Exception as error:
        raise UserError(f"{path} has a damaged tokenizer: {first_line(error)}") from error
    json_files.write_json(directory / sidecar_files.TOKENIZER, raw)
    json_files.write_json(directory / sidecar_files.TOKENIZER_CONFIG, settings)


def tokenizer_json(metadata: Mapping[str, Any], path: str) -> Json:
    """Return the `tokenizer.json` of a GGUF file; see `read_tokenizer`."""
    values = {key.removeprefix(_GGML): value for key, value in metadata.items() if _GGML in key}
    for key, value in values.items():
        if key not in _READ and not key.startswith(_NEUTRAL):
            if key in _NEUTRAL_VALUES and value == _NEUTRAL_VALUES[key]:
                continue
            raise UserError(f"{path}: the key {_GGML}{key} = {str(value)[:60]} is not supported")
    tokens = values["tokens"]
    for key, value in values.items():
        if key.endswith("_token_id") and not (type(value) is int and 0 <= value < len(tokens)):
            raise UserError(f"{path}: {_GGML}{key} = {value!r}, but there are {len(tokens)} tokens")
        if key in ("token_type", "scores") and len(value) != len(tokens):
            raise UserError(f"{path}: {_GGML}{key} has {len(value)} values, one per token expected")
    # the vocabulary of `tokenizer.json` is a mapping: of two equal tokens it would lose one
    places = {token: number for number, token in enumerate(tokens)}
    for number, token in enumerate(tokens):
        if places[token] != number:
            raise UserError(f"{path}: the tokens {number} and {places[token]} are both {token!r}")
    kind, name = values.get("model"), values.get("pre")
    if kind == "gpt2":
        if name not in _SPLITS:
            raise UserError(
                f"{path}: {_GGML}pre = {name!r} is not supported (supported: {', '.join(_SPLITS)})"
            )
        split = _SPLITS[name]
        return _byte_level(values, split) | _ends(values, split.add_bos)
    if kind == "llama":
        if "scores" not in values:
            raise UserError(f"{path} has no {_GGML}scores, by which its tokens are merged")
        return _sentencepiece(values) | _ends(values, True)
    raise UserError(f"{path}: {_GGML}model = {kind!r} is not supported (supported: gpt2, llama)")


def _byte_level(values: Mapping[str, Any], split: _Split) -> Json:
    """Return a byte-level BPE, as that of GPT-2."""
    steps: list[Json] = []
    if split.digits:
        steps.append({"type": "Digits", "individual_digits": True})
    if split.regex is not None:
        pattern = {"Regex": split.regex}
        steps.append({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False})
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    steps.append(level | {"use_regex": split.regex is None})
    # the library leaves out a list that is empty
    merges = [merge.split(" ") for merge in values.get("merges", [])]
    return _assemble(
        values,
        merges,
        normalizer={"type": "NFC"} if split.nfc else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=level | {"use_regex": True},
        model={"ignore_merges": split.ignore_merges},
    )


def _sentencepiece(values: Mapping[str, Any]) -> Json:
    """Return a BPE of SentencePiece, whose merges follow from the scores of its tokens."""
    tokens, scores = values["tokens"], values["scores"]
    place = {token: number for number, token in enumerate(tokens)}
    pairs = []
    for number, token in enumerate(tokens):
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        halves = [cut for cut in cuts if cut[0] in place and cut[1] in place]
        # between cuts of one token the order is free: it is applied where its halves meet
        pairs += [(-scores[number], place[a], place[b], a, b) for a, b in halves]
    has_prefix = values.get("add_space_prefix", True)
    blanks: list[Json] = [{"type": "Prepend", "prepend": "▁"}] if has_prefix else []
    blanks.append({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if has_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = values.get("unknown_token_id")
    return _assemble(
        values,
        [[a, b] for *_, a, b in sorted(pairs)],
        normalizer={"type": "Sequence", "normalizers": blanks},
        pre_tokenizer=None,
        decoder={"type": "Sequence", "decoders": decoders},
        model={
            "byte_fallback": True,
            "fuse_unk": True,
            "unk_token": None if unknown is None else tokens[unknown],
        },
    )


def _assemble(values: Mapping[str, Any], merges: list[Any], *, model: Json, **parts: Any) -> Json:
    tokens = values["tokens"]
    # files of one kind of token have no list
    kinds = values.get("token_type") or [_NORMAL] * len(tokens)
    entries = list(zip(range(len(tokens)), tokens, kinds, strict=True))
    # GGUF has no such flags; `tokenizer_metadata` has a note where writing loses them
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": kind != _USER_DEFINED}
        for i, token, kind in entries
        if kind in (_CONTROL, _USER_DEFINED, _UNKNOWN)
    ]
    # rows of the embedding that no token has
    vocabulary = {token: i for i, token, kind in entries if (kind, token) != (_UNUSED, f"[PAD{i}]")}
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    affixes = {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    bpe |= affixes | {"byte_fallback": False, "ignore_merges": False} | model
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "model": bpe | {"vocab": vocabulary, "merges": merges},
    }


def _ends(values: Mapping[str, Any], add_bos: bool) -> Json:
    """Return the post-processor that adds BOS and EOS, where the file asks for them."""
    tokens, single, special = values["tokens"], [], {}
    for name, default in (("bos", add_bos), ("", True), ("eos", False)):
        # the empty name stands for the text between them
        number = values.get(f"{name}_token_id")
        if not name:
            single.append({"Sequence": {"id": "A", "type_id": 0}})
        elif number is not None and values.get(f"add_{name}_token", default):
            token = tokens[number]
            single.append({"SpecialToken": {"id": token, "type_id": 0}})
            special[token] = {"id": token, "ids": [number], "tokens": [token]}
    second = [{"Sequence": {"id": "B", "type_id": 1}}]
    template = {"type": "TemplateProcessing", "single": single, "pair": single + second}
    return {"post_processor": template | {"special_tokens": special} if special else None}


# ---------------------------------------------------------------------------------------- writing


def tokenizer_metadata(directory: Path, config: ModelConfig) -> tuple[Json, list[str]]:
    """Return the tokenizer of a directory as keys of GGUF, and notes on what these cannot hold.

    Args:
        directory: with `tokenizer.json`.
        config: of the model: its vocabulary and special tokens.

    Raises:
        UserError: the tokenizer is of a kind that llama.cpp does not have, splits text in another
            way, or has more tokens than the model.
    """
    path = directory / sidecar_files.TOKENIZER
    if not path.is_file():
        raise UserError(f"{directory} has no {path.name}; GGUF takes the tokenizer from there")
    raw, settings_path = json_files.read_json(path), directory / sidecar_files.TOKENIZER_CONFIG
    settings = json_files.read_json(settings_path) if settings_path.is_file() else {}
    model, added = raw["model"], raw.get("added_tokens") or []
    # the vocabulary of others would be read as that of a BPE, by its wrong merges
    if model.get("type") != "BPE":
        raise UserError(
            f"{path} is a tokenizer of type {model.get('type')}, which cannot be written as GGUF"
            " (supported: BPE)"
        )
    ids = {**model["vocab"], **{entry["content"]: entry["id"] for entry in added}}
    if max(ids.values()) >= config.vocab_size:
        raise UserError(
            f"{path} has tokens up to {max(ids.values())}, the model only {config.vocab_size} rows"
        )
    # every row needs a token: llama.cpp counts rows by tokens
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    kinds = [_UNUSED] * config.vocab_size
    for token, i in ids.items():
        tokens[i], kinds[i] = token, _NORMAL
    for entry in added:
        kinds[entry["id"]] = _CONTROL if entry.get("special") else _USER_DEFINED
    values: Json = {"tokens": tokens, "token_type": kinds}
    values |= _special_ids(settings, config, ids)
    # old files have a text of both halves
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
    if model.get("byte_fallback"):
        values |= _as_sentencepiece(values, merges, model.get("unk_token"))
    else:
        values |= {"model": "gpt2", "merges": [" ".join(merge) for merge in merges]}
    values = {key: value for key, value in values.items() if value is not None}
    values |= _find_form(raw, values, settings, path)
    keys: Json = {f"{_GGML}{key}": value for key, value in values.items()}
    for name, text in sidecar_files.read_chat_templates(directory).items():
        keys[_TEMPLATE if name == "default" else f"{_TEMPLATE}.{name}"] = text
    stripped = [e["content"] for e in added if any(e.get(k) for k in ("lstrip", "rstrip"))]
    notes = []
    if stripped:
        notes.append(f"GGUF does not say that {', '.join(stripped[:5])} takes spaces around it")
    if absent := [i for i in _config_ids(config) if i not in range(config.vocab_size)]:
        notes.append(f"the config names tokens that the model does not have; left out: {absent}")
    notes += _differences(raw, keys, settings, path)
    if len(config.eos_token_ids) > 3:
        notes.append(f"GGUF has three ends of three kinds; left out: {config.eos_token_ids[3:]}")
    return keys, notes


def no_tokenizer(config: ModelConfig) -> Json:
    """Return the keys of a model without a tokenizer: the special tokens of its config.

    Example:
        >>> no_tokenizer(ModelConfig.from_hf({"model_type": "llama"}))[
        ...     "tokenizer.ggml.eos_token_id"
        ... ]
        2
    """
    values = {"model": "none"} | _special_ids({}, config, {})
    return {f"{_GGML}{key}": value for key, value in values.items() if value is not None}


def _special_ids(settings: JsonRow, config: ModelConfig, ids: Mapping[str, int]) -> Json:
    def number(role: str) -> int | None:
        token = settings.get(f"{role}_token")
        # the second form is that of transformers 4
        content = token.get("content") if isinstance(token, dict) else token
        return ids.get(content) if isinstance(content, str) else None

    # padded: a model has any number of ends, GGUF three keys for them
    ends = (*config.eos_token_ids, None, None, None)
    bos, pad = number("bos"), number("pad")
    numbers = {
        "bos_token_id": config.bos_token_id if bos is None else bos,
        "eos_token_id": number("eos") if ends[0] is None else ends[0],
        "eot_token_id": ends[1],
        "eom_token_id": ends[2],
        "unknown_token_id": number("unk"),
        "padding_token_id": config.pad_token_id if pad is None else pad,
    }
    # configs have -1, or a row that was never added, where a model has none
    return {
        key: i if i is not None and i in range(config.vocab_size) else None
        for key, i in numbers.items()
    }


def _config_ids(config: ModelConfig) -> list[int]:
    ids = (config.bos_token_id, *config.eos_token_ids, config.pad_token_id)
    return [i for i in ids if i is not None]


def _differences(raw: Json, keys: Json, settings: JsonRow, path: Path) -> Iterator[str]:
    """Yield notes on what surrounds text: it differs where GGUF has no key for it."""
    import tokenizers

    # outside of `_PROBES`, which are plain text without marks around it
    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    stored = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(keys, str(path))))
    expected, tokens = (tokenizer.encode("a").tokens for tokenizer in (original, stored))
    # transformers applies its settings over the file
    if expected != tokens and all(settings.get(key) is None for key in _ADDED):
        yield f"GGUF cannot say that {path.name} makes {expected} of 'a'; the file makes {tokens}"
    added = [e for e in raw.get("added_tokens") or [] if not (e.get("lstrip") or e.get("rstrip"))]
    text = "".join(f"{entry['content']}a" for entry in added[:100])
    a, b = (x.encode(text, add_special_tokens=False).ids for x in (original, stored))
    if a != b:
        yield f"around added tokens the file splits text otherwise than {path.name}"


def _as_sentencepiece(values: Json, merges: Sequence[Sequence[str]], unknown: str | None) -> Json:
    """Return the keys of a BPE with bytes as a fallback, which llama.cpp merges by score."""
    scores = [0.0] * len(values["tokens"])
    place = {token: i for i, token in enumerate(values["tokens"])}
    for rank, (a, b) in reversed(list(enumerate(merges))):
        # the first merge that makes a token decides: reversed, so that it is written last
        scores[place[a + b]] = -float(rank + 1)
    kinds = list(values["token_type"])
    for i, token in enumerate(values["tokens"]):
        if len(token) == 6 and token.startswith("<0x") and kinds[i] == _NORMAL:
            kinds[i] = _BYTE
    if unknown is not None:
        kinds[place[unknown]] = _UNKNOWN
        values = values | {"unknown_token_id": place[unknown]}
    return values | {"model": "llama", "scores": scores, "token_type": kinds, "pre": "default"}


def _find_form(raw: Json, values: Json, settings: JsonRow, path: Path) -> Json:
    """Return the keys with which the tokens of `_PROBES` are those of the original tokenizer."""
    import tokenizers

    original = tokenizers.Tokenizer.from_str(json.dumps(raw))
    bos, eos = values.get("bos_token_id"), values.get("eos_token_id")
    ends = original.encode("").ids
    flags = {
        "add_bos_token": bos is not None and ends[:1] == [bos],
        "add_eos_token": eos is not None and ends[-1:] == [eos],
    }
    flags |= {key: settings[key] for key in _ADDED if settings.get(key) is not None}
    # transformers applies its settings over the file; with BOS equal to EOS one of both is enough
    if len(ends) == 1 and all(flags.values()):
        flags["add_eos_token"] = False
    # by trial: names of pre-tokenizers say less than what they do to text
    for form in _forms(values["model"]):
        metadata = {f"{_GGML}{key}": x for key, x in (values | form).items()}
        candidate = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json(metadata, str(path))))
        if _split(original) == _split(candidate) and _tokens(original) == _tokens(candidate):
            return form | flags
    raise UserError(
        f"{path} splits text as no tokenizer does that GGUF has a name for (known here:"
        f" {', '.join(_SPLITS)}, SentencePiece); write the model with --to hf"
    )


def _forms(kind: str) -> Iterator[Json]:
    if kind == "llama":
        yield from ({"add_space_prefix": has_prefix} for has_prefix in (True, False))
        return
    yield from ({"pre": name} for name in _SPLITS)


def _split(tokenizer: Any) -> list[Any]:
    # beside the tokens: those of a small vocabulary are bytes, however a text is split
    if tokenizer.pre_tokenizer is None or "Metaspace" in repr(tokenizer.pre_tokenizer):
        return []
    ignores = json.loads(tokenizer.to_str())["model"]["ignore_merges"]
    return [ignores, *(tokenizer.pre_tokenizer.pre_tokenize_str(text) for text in _PROBES)]


def _tokens(tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in _PROBES]
