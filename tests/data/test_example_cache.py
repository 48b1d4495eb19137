"""Tokenized examples on the disk: the same as tokenized ones, never stale, never in the way."""

import dataclasses
import datetime as dt
import json
import multiprocessing
import os

import numpy as np
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.config.data import DataSource
from jax_ordermerge.data import chat, dates, example_cache, source
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.data.provenance import DataFile, SourceInfo
from jax_ordermerge.errors import UserError
from tests.data.rows import write

ROWS = [{"question": f"{n} + {n}?", "answer": f"{2 * n} é"} for n in range(20)]
PAIRS = [{"prompt": "a", "chosen": f"b{n}", "rejected": f"c{n}"} for n in range(9)]
TALKS = [
    {
        "messages": [
            {"role": ("user", "assistant")[turn % 2], "content": f"{n}.{turn}"} for turn in range(4)
        ]
    }
    for n in range(6)
]
# drops the mark of earlier answers, so that each answer is an example with a row number
CHANGING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}!{% endif %}{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n!{% endif %}"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tokenized(monkeypatch):
    """Sources that were tokenized, and not read from the cache."""
    calls = []
    tokenize_source = source._tokenize_source
    monkeypatch.setattr(
        source,
        "_tokenize_source",
        lambda found, *rest: (calls.append(found.path), tokenize_source(found, *rest))[1],
    )
    return calls


def same(a, b):
    """Whether two values are equal in all their fields, types and dtypes."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        names = [field.name for field in dataclasses.fields(a)]
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, Ragged):
        return same(a.flat, b.flat) and same(a.offsets, b.offsets)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    return a == b


@pytest.mark.parametrize(
    ("rows", "settings", "template"),
    [
        (ROWS, {"max_length": 34}, None),
        (PAIRS, {}, None),
        (TALKS, {}, CHANGING),
        ([{"text": "abc " * 30}, {"text": "d"}], {"max_length": 16}, None),
    ],
    ids=["questions", "pairs", "answers of conversations", "windows"],
)
def test_the_same_examples_come_back(
    rows, settings, template, folder, tmp_path, byte_tokenizer, tokenized
):
    path = write(tmp_path / "a.jsonl", rows)
    tokenizer = byte_tokenizer(chat_template=template)
    data = Data(train=path, validation_examples=2, **settings)
    first = source.load_splits(data, tokenizer, seed=0)
    again = source.load_splits(data, tokenizer, seed=0)
    assert tokenized == [path]
    assert first.keys() == again.keys()
    assert all(same(first[name], again[name]) for name in first)
    assert len(list(folder.iterdir())) == 1


def filled():
    """Examples in which no field has its default."""
    rows = Ragged.of([[1, 2], [3]], np.int32)
    masks = Ragged.of([[0, 1], [1]], np.bool_)
    info = SourceInfo(
        "n",
        "p",
        "alpaca",
        "chat",
        1.5,
        (DataFile("f", 2, "0a"),),
        ("README",),
        {"question": "problem"},
        ("id",),
        {"read": 2},
        ("no text: 1 row",),
        3,
        9,
    )
    examples = Examples(
        tokens=rows,
        answers=masks,
        ids=np.arange(2),
        prompts=["a\ud800", "é"],
        responses=["", "b"],
        counts={"read": 2},
        sources=(info,),
        reference=np.zeros((2, 2), np.float32),
        rows=np.array([4, 4]),
        ends=(2, 7),
        source=np.zeros(2, np.int32),
    )
    return dataclasses.replace(examples, rejected=examples)


def test_every_field_is_stored(tmp_path):
    examples = filled()
    for record in (examples, examples.sources[0]):
        for field in dataclasses.fields(record):
            default = (
                field.default_factory()
                if field.default_factory is not dataclasses.MISSING
                else field.default
            )
            # a new field must be filled above
            assert not same(getattr(record, field.name), default), field.name
    entry = example_cache.Entry(tmp_path / "x.examples", {"f": "0a"})
    example_cache.write(entry, examples)
    assert same(example_cache.read(entry, DataSource(path="p", name="n", weight=1.5)), examples)


def test_a_field_of_an_unknown_type_is_refused(tmp_path):
    entry = example_cache.Entry(tmp_path / "x.examples", {"f": "0a"})
    for value in (object(), {1, 2}, np.float32(1), np.array([object()])):
        with pytest.raises((TypeError, ValueError), match=r"cannot be stored|allow_pickle"):
            example_cache.write(entry, dataclasses.replace(filled(), reference=value))
    assert list(tmp_path.iterdir()) == []


def test_any_change_is_a_miss(folder, tmp_path, byte_tokenizer, tokenized, chatml, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    tokenizer = byte_tokenizer(chat_template=chatml)

    def is_tokenized(settings=(), tokenizer=tokenizer, **source_settings):
        before = len(tokenized)
        sources = DataSource(path=path, **source_settings) if source_settings else path
        source.tokenize(sources, Data(train=path, **dict(settings)), tokenizer)
        return len(tokenized) > before

    assert is_tokenized()
    assert not is_tokenized()
    for settings in (
        {"max_length": 60},
        {"too_long": "truncate"},
        {"limit": 5},
        {"template": "plain"},
        {"template": "chat"},
        {"format": "question_answer"},
        {"learn": "last"},
        {"bad_rows": "drop"},
        {"columns": {"question": "answer"}},
        {"ignore_columns": ["x"]},
    ):
        assert is_tokenized(settings), settings
        assert not is_tokenized(settings), settings
    # what a source says is as what the section says, under its own name
    assert is_tokenized(template="alpaca")
    # the splits, packing and buckets are made of the same examples
    assert not is_tokenized({"validation_examples": 3, "packing": "packs", "buckets": [16]})
    # the tokenizer: its template, its special tokens, its vocabulary, its flags
    assert is_tokenized(tokenizer=byte_tokenizer(chat_template=chatml + " "))
    assert is_tokenized(tokenizer=byte_tokenizer(chat_template=chatml, bos=False))
    assert is_tokenized(tokenizer=byte_tokenizer(chat_template=chatml, eos="<|im_end|>"))
    more = byte_tokenizer(chat_template=chatml)
    more.add_tokens(["answer"])
    assert is_tokenized(tokenizer=more)
    assert not is_tokenized(tokenizer=byte_tokenizer(chat_template=chatml))
    # the code and the libraries
    with monkeypatch.context() as patch:
        patch.setattr(example_cache, "_code_digest", lambda: "other")
        assert is_tokenized()
    version = example_cache.importlib.metadata.version
    with monkeypatch.context() as patch:
        patch.setattr(
            example_cache.importlib.metadata,
            "version",
            lambda name: "0" if name == "tokenizers" else version(name),
        )
        assert is_tokenized()
    # the bytes of the file; its time does not count
    os.utime(path, (0, 0))
    assert not is_tokenized()
    write(tmp_path / "a.jsonl", [*ROWS[:-1], {"question": "q", "answer": "38 \u00e9"}])
    assert is_tokenized()


def test_a_clock_in_the_template_is_a_change(
    folder, tmp_path, byte_tokenizer, chatml, tokenized, monkeypatch
):
    path = write(tmp_path / "a.jsonl", ROWS)
    data = Data(train=path, template="chat")
    template = "{{ strftime_now('%Y-%m-%d') }}" + chatml

    def load(day, pinned=None):
        monkeypatch.setattr(dates, "today", lambda: day)
        tokenizer = byte_tokenizer(chat_template=template)
        if pinned:
            dates.pin_local_date(tokenizer, pinned)
        source.tokenize(path, data, tokenizer)
        return len(tokenized)

    first, second = dt.date(2030, 1, 1), dt.date(2030, 1, 2)
    assert [load(first), load(first), load(second)] == [1, 1, 2]
    # a pinned date is an input, today is not
    assert [load(first, first), load(second, first), load(second, second)] == [3, 3, 4]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content[:200] + bytes([content[200] ^ 1]) + content[201:],
        lambda content: b"PK" + content,
    ],
    ids=["empty", "head", "cut", "bit", "other"],
)
def test_a_damaged_file_is_written_again(damage, folder, tmp_path, byte_tokenizer, tokenized):
    path = write(tmp_path / "a.jsonl", ROWS)
    tokenizer = byte_tokenizer()
    first = source.tokenize(path, Data(), tokenizer)
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(damage(content))
    assert same(source.tokenize(path, Data(), tokenizer), first)
    assert file.read_bytes() == content
    assert same(source.tokenize(path, Data(), tokenizer), first)
    assert len(tokenized) == 2


def test_a_file_that_changes_while_it_is_read_is_not_stored(
    folder, tmp_path, byte_tokenizer, monkeypatch
):
    path = write(tmp_path / "a.jsonl", ROWS)
    read = source.files.read

    def change_then_read(*args, **options):
        write(tmp_path / "a.jsonl", ROWS[:5])
        return read(*args, **options)

    monkeypatch.setattr(source.files, "read", change_then_read)
    assert len(source.tokenize(path, Data(), byte_tokenizer())) == 5
    assert not folder.exists()


def test_names_and_weights_are_those_of_the_config(
    folder, tmp_path, byte_tokenizer, tokenized, monkeypatch
):
    paths = [write(tmp_path / f"{name}.jsonl", ROWS[:n]) for name, n in (("a", 9), ("b", 4))]
    tokenizer = byte_tokenizer()
    source.load_splits(Data(train=paths), tokenizer, seed=0)
    named = [{"path": paths[0], "name": "x", "weight": 2}, {"path": paths[1], "weight": 0.5}]
    cached = source.load_splits(Data(train=named), tokenizer, seed=0)["train"]
    assert len(tokenized) == 2
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", "off")
    assert same(source.load_splits(Data(train=named), tokenizer, seed=0)["train"], cached)
    assert len(tokenized) == 4


def test_off_and_directories_that_cannot_be_written(tmp_path, byte_tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.delenv("ORDERMERGE_CACHE", raising=False)
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", "off")
    expected = source.tokenize(path, Data(), byte_tokenizer())
    assert not (tmp_path / "user").exists()
    # a file where the directory should be
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", path)
    assert same(source.tokenize(path, Data(), byte_tokenizer()), expected)
    monkeypatch.delenv("ORDERMERGE_EXAMPLE_CACHE")
    source.tokenize(path, Data(), byte_tokenizer())
    assert len(list((tmp_path / "user" / "jax_ordermerge" / "examples").iterdir())) == 1


def test_a_user_without_a_home_and_a_file_that_cannot_be_opened(
    tmp_path, byte_tokenizer, monkeypatch
):
    path = write(tmp_path / "a.jsonl", ROWS)
    for name in ("ORDERMERGE_EXAMPLE_CACHE", "ORDERMERGE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home():
        # what expanduser raises where the user is not in /etc/passwd
        raise RuntimeError("could not determine the home directory")

    with monkeypatch.context() as patch:
        patch.setattr(example_cache.user_cache, "directory", no_home)
        assert len(source.tokenize(path, Data(), byte_tokenizer())) == 20
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", str(tmp_path / "cache"))

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(example_cache.remote, "file_digest", refuse)
    monkeypatch.setattr(source.files, "_read_bytes", refuse)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read: .*Permission denied"):
        source.tokenize(path, Data(), byte_tokenizer())


def test_the_oldest_files_go_first(folder, tmp_path, byte_tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", ROWS)
    for length in (40, 50, 60):
        source.tokenize(path, Data(max_length=length), byte_tokenizer())
        for number, file in enumerate(
            sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
        ):
            os.utime(file, (number, number))
    source.tokenize(path, Data(max_length=40), byte_tokenizer())  # is used now
    size = max(file.stat().st_size for file in folder.iterdir())
    oldest = min(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    monkeypatch.setattr(example_cache, "LIMIT_BYTES", 3 * size)
    source.tokenize(path, Data(max_length=70), byte_tokenizer())
    assert len(list(folder.iterdir())) == 3
    assert not oldest.exists()


def test_errors_are_not_hidden_and_hub_names_are_not_kept(
    folder, tmp_path, byte_tokenizer, tokenized
):
    path = write(tmp_path / "a.jsonl", [*ROWS, {"question": "q", "answer": ""}])
    for _ in range(2):
        with pytest.raises(UserError, match="row 20 has no response"):
            source.tokenize(path, Data(), byte_tokenizer())
    for _ in range(2):
        source.tokenize("generated:quickstart", Data(template="plain"), byte_tokenizer())
    assert tokenized == [path, path, "generated:quickstart"]
    entry = example_cache.locate(DataSource(path="nobody/hub"), Data(), "train", "tokenizer")
    assert entry is None


def write_again(entry, examples):
    for _ in range(20):
        example_cache.write(entry, examples)


def test_several_processes_write_the_same_file(tmp_path):
    entry = example_cache.Entry(tmp_path / "x.examples", {"f": "0a"})
    examples = filled()
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_again, args=(entry, examples)) for _ in range(3)]
    for writer in writers:
        writer.start()
    found = DataSource(path="p", name="n", weight=1.5)
    while any(writer.is_alive() for writer in writers):
        read = example_cache.read(entry, found)
        assert read is None or same(read, examples)
    assert [writer.exitcode for writer in writers if writer.join() is None] == [0, 0, 0]
    assert same(example_cache.read(entry, found), examples)
    assert [file.name for file in tmp_path.iterdir()] == ["x.examples"]


def test_the_file_holds_no_code(folder, tmp_path, byte_tokenizer):
    source.tokenize(write(tmp_path / "a.jsonl", ROWS), Data(), byte_tokenizer())
    (file,) = folder.iterdir()
    payload = tmp_path / "payload.npz"
    payload.write_bytes(file.read_bytes()[32:])
    with np.load(payload, allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays.files)
        assert json.loads(arrays["tree"].tobytes())[0] == "Examples"


def test_templates_are_in_the_examples(folder, tmp_path, byte_tokenizer, chatml):
    """The same rows under two templates, from the cache, have the tokens of each."""
    path = write(tmp_path / "a.jsonl", TALKS)
    for template in (chatml, chatml.replace("<|im_end|>", "</s>"), chatml):
        tokenizer = byte_tokenizer(chat_template=template)
        examples = source.tokenize(path, Data(), tokenizer)
        records, _ = source.formats.read_rows(TALKS, "messages")
        encoded = chat.encode(list(records.values()), "chat", tokenizer)
        assert [row.tolist() for row in examples.tokens] == [item.tokens for item in encoded]
