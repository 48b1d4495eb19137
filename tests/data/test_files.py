"""Every kind of file, and hub datasets, into rows."""

import gzip
import json
import math

import pytest

from jax_ordermerge.data.files import load, read
from jax_ordermerge.errors import UserError
from tests.data.rows import ROWS, write


@pytest.mark.parametrize(
    "name", ["a.json", "wrapped.json", "a.jsonl", "a.jsonl.gz", "a.json.gz", "a.parquet", "a.csv"]
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    assert load(write(tmp_path / name)) == ROWS
    assert load(write(tmp_path / name), limit=5) == ROWS[:5]


def test_text_files(tmp_path):
    (tmp_path / "one.txt").write_text("To be,\n\nor not.\n")
    (tmp_path / "two.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert load(str(tmp_path / "one.txt")) == [{"text": "To be,\n\nor not."}]
    assert load(str(tmp_path / "two.txt")) == [{"text": "One."}, {"text": "Two."}]


def test_generated():
    train, test = load("generated:quickstart"), load("generated:quickstart", "test")
    assert load("generated:quickstart@test") == test != train
    assert load("generated:quickstart", limit=3) == train[:3]
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        load("generated:quikstart")


def test_hub_names_reach_datasets(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, subset, *, split):
        asked.append((name, subset, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load("openai/gsm8k:main@train[:50%]", limit=2) == ROWS[:2]
    assert load("tatsu-lab/alpaca", "test") == ROWS
    assert [file.path for file in read("tatsu-lab/alpaca", "test").files] == [
        "tatsu-lab/alpaca@test"
    ]
    del asked[2]
    assert asked == [("openai/gsm8k", "main", "train[:50%]"), ("tatsu-lab/alpaca", None, "test")]


def test_hub_out_of_reach_is_one_line(monkeypatch):
    import datasets

    def load_dataset(name, subset, *, split):
        raise ConnectionError(
            "Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nand more"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        load("owner/name")
    assert "hub dataset owner/name (split train) cannot be loaded: Couldn't reach" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", None, "data file .*a.json not found"),
        ("a", None, "data .*a not found; expected a file"),
        ("a.xlsx", b"x", "has an unknown suffix; expected .json .jsonl"),
        ("a.json", b"{", "a.json cannot be read: Expecting property name"),
        ("a.json", b'{"rows": []}', r'expected a list of objects, or \{"data"'),
        ("a.json", b"[]", "holds no rows"),
        ("a.json", b"[1]", "row 0 is int, expected an object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text"\n', "line 3 is not JSON"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.parquet", b"plain", "a.parquet cannot be read"),
        (
            "a.csv",
            b"text\na,b\n",
            "line 2 has 2 fields, the header has 1; put a text that holds ','",
        ),
        ("a.tsv", b'\n\nx\ty\n"a\nb"\tc\n1\t2\t3\n', "line 6 has 3 fields, .* holds the tab in"),
        ("a.txt", b"\xff\xfe\xff", r"a.txt is not UTF-8 \(byte 0\); convert it"),
        ("a.csv", "text\né".encode("latin-1"), r"a.csv is not UTF-8 \(byte 5\)"),
        ("a.json", '[{"text": "a"}]'.encode("utf-16"), "a.json is not UTF-8"),
        ("a.txt", "plain".encode("utf-16-le"), "a.txt holds null characters; is it UTF-16?"),
        ("a.csv", b"", "holds no rows"),
        ("a.csv", b"text,id\n", "holds no rows"),
        ("a.csv", b"text,id,text\na,1,b\n", "the header names 'text' more than once"),
        ("a.csv", b'text,id\n"a,1\nb,2\n', "a.csv cannot be read: unexpected end of data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', "line 2 .* 'text' stands twice"),
        ("a.json", b'[{"m": [{"role": "a", "role": "b"}]}]', "the key 'role' stands twice"),
        ("a.jsonl", b'{"a": ' + b"[" * 99999 + b"]" * 99999 + b"}", "line 1 .* nested too deeply"),
        ("a.jsonl", b'{"a": ' + b"9" * 5000 + b"}", "line 1 .* 5000 digits"),
        ("a.json", b'{"data": [{"text": "a"}], "test": [{"text": "b"}]}', "lists: data, test; one"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "a.jsonl.gz cannot be read"),
        ("a.txt", b" \n", "holds no rows"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_long_cells_and_lines_under_the_name_of_json(tmp_path):
    rows = [{"text": "x" * 200_000}, {"text": "y"}]
    assert load(write(tmp_path / "a.csv", rows)) == rows
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, ROWS)))
    assert load(str(tmp_path / "lines.json")) == ROWS
    (tmp_path / "lines.json").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(UserError, match=r"lines.json: line 2 is not JSON"):
        load(str(tmp_path / "lines.json"))


def test_line_ends_and_columns_of_spreadsheets(tmp_path):
    for name, content, rows in (
        ("a.csv", b'\xef\xbb\xbfa,b\r\nx,"1\r\n2"\r\n', [{"a": "x", "b": "1\r\n2"}]),
        ("a.csv", b"\n\na,b\n1,2\n\n3\n", [{"a": "1", "b": "2"}, {"a": "3", "b": None}]),
        ("a.csv", b",a\n0,x\n", [{"Unnamed: 0": "0", "a": "x"}]),  # the index of pandas
        ("a.jsonl", b'{"a": "x\\r\\n"}\r\n\r\n', [{"a": "x\r\n"}]),
        ("a.txt", b"x\r\ny\r\n", [{"text": "x\ny"}]),
    ):
        (tmp_path / name).write_bytes(content)
        assert load(str(tmp_path / name)) == rows


def test_numbers_and_maps_are_those_of_json(tmp_path):
    """Arrow makes 3.0 of 3 where another row has 2.5; JSON does not tell the two apart."""
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"a": 3, "b": {"c": [1, 2.5]}}, {"a": 2.5, "b": {"c": [None]}}]
    for name in ("a.jsonl", "a.parquet"):
        loaded = load(write(tmp_path / name, rows))
        assert loaded == rows
        assert [type(row["a"]) for row in loaded] == [int, float]
        assert type(loaded[0]["b"]["c"][0]) is int
    (tmp_path / "a.jsonl").write_text('{"a": 3.0, "b": 1e22, "c": 1e999, "d": -0.0}')
    ((whole, large, infinite, nought),) = [row.values() for row in load(str(tmp_path / "a.jsonl"))]
    assert (str(whole), str(large), str(nought)) == ("3", "1e+22", "0")
    assert math.isinf(infinite)
    table = pa.table({"m": pa.array([[("x", 1)]], pa.map_(pa.string(), pa.int64()))})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert load(str(tmp_path / "a.parquet")) == [{"m": {"x": 1}}]
