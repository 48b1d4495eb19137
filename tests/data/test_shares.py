"""Two processes tokenize a share each and get what one process gets. Threads stand in for them."""

import concurrent.futures
import contextlib
import threading

import pytest

from jax_ordermerge import processes
from jax_ordermerge.config import Data
from jax_ordermerge.data import chat, example_cache, shares, source
from jax_ordermerge.errors import UserError
from tests.data.rows import write
from tests.data.test_example_cache import CHANGING, PAIRS, ROWS, TALKS, same

TEXTS = [{"text": "abc " * length} for length in (30, 1, 12)]


@pytest.fixture
def tokenize_by_two(tmp_path, monkeypatch):
    """Return a function that tokenizes in two threads: results, and the rows that each encoded."""
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", str(tmp_path / "cache"))
    thread = threading.local()
    meeting = threading.Barrier(2, timeout=60)

    @contextlib.contextmanager
    def barrier(action):
        try:
            yield
        finally:
            meeting.wait()

    def agree(entry, is_cached):
        meeting.wait()
        return None if is_cached else shares.Shares(entry.path, thread.index, 2)

    encode_rows = chat.encode_rows
    encoded = {0: set(), 1: set()}

    def counted(records, *rest, **options):
        if hasattr(thread, "index"):
            encoded[thread.index] |= set(records)
        return encode_rows(records, *rest, **options)

    def run(index, path, data, make_tokenizer):
        thread.index = index
        try:
            return source.tokenize(path, data, make_tokenizer(), shared=True)
        except UserError as error:
            return str(error)

    def by_two(path, data, make_tokenizer):
        encoded.update({0: set(), 1: set()})
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = [pool.submit(run, index, path, data, make_tokenizer) for index in (0, 1)]
        return [future.result() for future in running], encoded

    monkeypatch.setattr(processes, "barrier", barrier)
    monkeypatch.setattr(source, "agree", agree)
    monkeypatch.setattr(chat, "encode_rows", counted)
    return by_two


@pytest.mark.parametrize(
    ("rows", "settings", "template"),
    [
        (ROWS, {"max_length": 34}, None),
        (PAIRS, {"max_length": 5}, None),
        (TALKS, {}, CHANGING),
        (TEXTS, {"max_length": 16}, None),
        (ROWS[:1], {}, None),
    ],
    ids=["questions", "pairs", "answers of conversations", "windows", "one row"],
)
def test_each_tokenizes_its_share_and_has_all(
    rows, settings, template, tokenize_by_two, tmp_path, byte_tokenizer, monkeypatch
):
    path = write(tmp_path / "a.jsonl", rows)
    data = Data(**settings)
    with monkeypatch.context() as patch:
        patch.setenv("ORDERMERGE_EXAMPLE_CACHE", "off")
        alone = source.tokenize(path, data, byte_tokenizer(chat_template=template))
    results, encoded = tokenize_by_two(path, data, lambda: byte_tokenizer(chat_template=template))
    assert all(same(result, alone) for result in results)
    # every row by one of the two, and about half by each
    assert encoded[0] | encoded[1] == set(range(len(rows)))
    assert not encoded[0] & encoded[1]
    assert 0 <= len(encoded[0]) - len(encoded[1]) <= 1
    # the examples are in the cache, the shares are not, and the next start reads them
    assert len(list((tmp_path / "cache").iterdir())) == 1
    results, encoded = tokenize_by_two(path, data, lambda: byte_tokenizer(chat_template=template))
    assert all(same(result, alone) for result in results)
    assert encoded == {0: set(), 1: set()}


def test_what_is_not_seen_is_tokenized(tokenize_by_two, tmp_path, byte_tokenizer, monkeypatch):
    """Cache directories of two machines: no process reads the share of the other one."""
    path = write(tmp_path / "a.jsonl", ROWS)
    alone = source.tokenize(path, Data(max_length=40), byte_tokenizer())
    (file,) = (tmp_path / "cache").iterdir()
    file.unlink()
    monkeypatch.setattr(example_cache, "load", lambda path: None)
    results, encoded = tokenize_by_two(path, Data(max_length=40), byte_tokenizer)
    assert all(same(result, alone) for result in results)
    assert encoded == {0: set(range(20)), 1: set(range(20))}


def test_bad_rows_of_any_share_are_named_by_all(tokenize_by_two, tmp_path, byte_tokenizer):
    bad = {"question": "\ud800", "answer": "half of a character"}
    path = write(tmp_path / "a.jsonl", [bad, *ROWS, bad])
    first, second = tokenize_by_two(path, Data(), byte_tokenizer)[0]
    assert first == second
    assert "row 0: " in first
    assert first.endswith("1 more rows too: 21")
    assert not list((tmp_path / "cache").iterdir())
