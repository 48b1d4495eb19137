"""Directories, globs and lists of files, on a disk and in a bucket."""

import os
import shutil
import subprocess

import pyarrow as pa
import pytest

from jax_ordermerge.config import Data
from jax_ordermerge.data import files
from jax_ordermerge.data.files import load, read
from jax_ordermerge.errors import UserError
from tests.data.rows import ROWS, load_train, write

PARTS = {"b.jsonl": ROWS[:3], "c/a.csv": ROWS[3:5], "c/d/e.jsonl.zst": ROWS[5:9], "c.tsv": ROWS[9:]}
# by the names of directories and files, part by part: c is before c.tsv
ORDER = ["b.jsonl", "c/a.csv", "c/d/e.jsonl.zst", "c.tsv"]


@pytest.fixture
def folder(tmp_path):
    """A directory that holds the rows in order, and what is no data."""
    for name in reversed(PARTS):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "d" / name, PARTS[name])
    (tmp_path / "d/README.md").write_text("# Read me")
    (tmp_path / "d/c/LICENSE").write_text("MIT")
    (tmp_path / "d/.cache").mkdir()
    (tmp_path / "d/.cache/x.jsonl").write_text("{")
    (tmp_path / "d/c/._a.csv").write_text("{")
    return tmp_path / "d"


def test_a_directory_is_its_files_in_the_order_of_their_names(folder):
    table = read(str(folder))
    assert table.rows == ROWS
    assert [file.path for file in table.files] == [f"{folder}/{name}" for name in ORDER]
    assert [file.rows for file in table.files] == [3, 2, 4, 3]
    assert table.passed_over == (f"{folder}/README.md", f"{folder}/c/LICENSE")
    assert read(f"{folder}/") == table


def test_a_limit_ends_the_reading(folder):
    table = read(str(folder), limit=4)
    assert table.rows == ROWS[:4]
    assert [file.rows for file in table.files] == [3, 1]
    assert len(read(str(folder), limit=3).files) == 1


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("d/*.jsonl", ["b.jsonl"]),
        ("d/**/*.[cj]s*", ["b.jsonl", "c/a.csv", "c/d/e.jsonl.zst"]),
        ("d/c*", ["c/a.csv", "c/d/e.jsonl.zst", "c.tsv"]),
        ("d/**", ORDER),
        ("d/?.*", ["b.jsonl", "c.tsv"]),
        ("*/c/.*.csv", None),
    ],
)
def test_globs(folder, pattern, names):
    pattern = f"{folder.parent}/{pattern}"
    if names is None:
        # hidden files are matched by a dot alone; this one has a header only
        with pytest.raises(UserError, match="holds no rows"):
            read(pattern)
        return
    table = read(pattern)
    assert [file.path for file in table.files] == [f"{folder}/{name}" for name in names]
    assert table.rows == [row for name in names for row in PARTS[name]]


def test_a_name_with_brackets_is_a_file(tmp_path):
    assert load(write(tmp_path / "a[1].jsonl")) == ROWS
    write(tmp_path / "a1.jsonl", ROWS[:1])
    assert load(str(tmp_path / "a[1].jsonl")) == ROWS
    (tmp_path / "a[1].jsonl").unlink()
    assert load(str(tmp_path / "a[1].jsonl")) == ROWS[:1]


def test_names_that_stand_for_no_data(tmp_path, folder):
    for path, message in (
        ("x/*.jsonl", r"x/\*.jsonl matches no data file, nothing; expected .json"),
        ("d/*.md", "matches no data file, only .*README.md; expected .json"),
        ("e", "e matches no data file, nothing"),
        ("absent", "absent not found; expected a file"),
    ):
        (tmp_path / "e").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / path))
    (folder / "info.json").write_text('{"features": {}}')
    with pytest.raises(UserError, match=r"d/info.json: expected a list of objects"):
        load(str(folder))


def test_links(folder):
    (folder / "link").symlink_to(folder)
    with pytest.raises(UserError, match="d/link is a link to a directory above it"):
        load(str(folder))
    (folder / "link").unlink()
    shutil.move(folder / "c", folder.parent / "elsewhere")
    (folder / "c").symlink_to(folder.parent / "elsewhere")
    assert load(str(folder)) == ROWS


def test_the_same_file_twice(folder, byte_tokenizer, monkeypatch):
    def load_sources(*train):
        return load_train(Data(train=train), byte_tokenizer())

    monkeypatch.chdir(folder)
    (folder / "link.jsonl").symlink_to("b.jsonl")
    for train in (
        ["b.jsonl", "./b.jsonl"],
        ["b.jsonl", str(folder / "b.jsonl")],
        ["b.jsonl", "link.jsonl"],
        ["*.jsonl"],
        ["b.jsonl", {"path": "link.jsonl", "name": "link"}],
    ):
        with pytest.raises(UserError, match=r"d/b.jsonl is read twice, by .*; give weight: 2"):
            load_sources(*train)
    twice = load_sources(
        {"path": "b.jsonl", "name": "gsm8k"},
        {"path": "b.jsonl", "name": "plain", "template": "plain"},
    )
    assert twice.row_numbers.tolist() == [0, 1, 2] * 2
    assert twice.tokens[0].tolist() != twice.tokens[3].tolist()
    with pytest.raises(UserError, match="quickstart@train is read twice"):
        load_sources("generated:quickstart", "generated:quickstart@train")
    with pytest.raises(UserError, match="split = train is of hub datasets"):
        load_sources({"path": "b.jsonl", "split": "train"})


def test_copies_of_a_file(folder, byte_tokenizer):
    shutil.copy(folder / "b.jsonl", folder / "c/copy.jsonl")
    with pytest.raises(UserError, match=r"d/c/copy.jsonl is a copy of .*/d/b.jsonl; remove one"):
        load_train(Data(train=str(folder)), byte_tokenizer())
    one, two = f"{folder}/b.jsonl", f"{folder}/c/copy.jsonl"
    with pytest.raises(UserError, match=r"copy.jsonl is a copy of .*/b.jsonl"):
        load_train(Data(train=[one, two]), byte_tokenizer())
    named = [{"path": one, "name": "one"}, {"path": two, "name": "two"}]
    assert len(load_train(Data(train=named), byte_tokenizer())) == 6
    for name in ("e", "f"):
        (folder / f"c/{name}.jsonl").write_text("")  # shards of few rows may be empty
    (folder / "c/copy.jsonl").unlink()
    assert len(load_train(Data(train=str(folder)), byte_tokenizer())) == 12


def test_what_is_no_regular_file(folder):
    (folder / "x.jsonl").symlink_to(folder / "absent.jsonl")
    with pytest.raises(UserError, match=r"d/x.jsonl is a broken link, or no regular file"):
        load(str(folder))
    (folder / "x.jsonl").unlink()
    os.mkfifo(folder / "pipe.jsonl")  # it would wait for a writer
    for path in (folder, folder / "pipe.jsonl", folder / "*"):
        with pytest.raises(UserError, match=r"d/pipe.jsonl is a broken link, or no regular file"):
            load(str(path))


def test_errors_name_the_file_and_its_row(folder, byte_tokenizer):
    write(folder / "c/a.csv", [ROWS[0], {"question": "q", "answer": ""}])
    write(folder / "f.jsonl", [{"question": "q"}, ROWS[1], {"answer": "a"}])
    with pytest.raises(UserError) as caught:
        load_train(Data(train=str(folder)), byte_tokenizer())
    assert str(caught.value) == (
        f"{folder}/c/a.csv: row 1 has no response (column 'answer' is empty); 2 more rows too:"
        f" {folder}/f.jsonl row 0, {folder}/f.jsonl row 2; remove rows without a response"
    )


def test_all_forms_give_the_same_tokens_and_digests(tmp_path, folder, byte_tokenizer):
    tokenizer = byte_tokenizer()
    kinds = "json wrapped.json jsonl csv tsv json.gz jsonl.gz csv.gz tsv.gz json.zst jsonl.zst"
    names = [f"a.{kind}" for kind in f"{kinds} csv.zst tsv.zst parquet JSONL".split()]
    trains = [write(tmp_path / name) for name in names]
    trains += [str(folder), f"{folder}/**", [f"{folder}/{name}" for name in ORDER]]
    examples = [load_train(Data(train=train), tokenizer) for train in trains]
    assert len({part.digest for part in examples}) == 1
    assert examples[0].ids.tolist() == list(range(12))


def test_text_files_of_every_codec(tmp_path, byte_tokenizer):
    text = "One é.\n<|endoftext|>\nTwo."
    (tmp_path / "a.txt").write_text(text)
    for name in ("a.txt.gz", "a.txt.zst"):
        with pa.output_stream(tmp_path / name, compression="detect") as stream:
            stream.write(text.encode())
        assert load(str(tmp_path / name)) == load(str(tmp_path / "a.txt"))


def test_damaged_zstd_files(tmp_path):
    content = (tmp_path / "a.jsonl.zst", write(tmp_path / "a.jsonl.zst"))[0].read_bytes()
    # frames may follow each other, as pzstd writes them
    (tmp_path / "a.jsonl.zst").write_bytes(content * 2)
    assert load(str(tmp_path / "a.jsonl.zst")) == ROWS * 2
    for damaged in (content[: len(content) // 2], b"plain", content + b"more"):
        (tmp_path / "a.jsonl.zst").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a.jsonl.zst cannot be read: .*(ZSTD|Truncated)"):
            load(str(tmp_path / "a.jsonl.zst"))


def test_files_of_the_zstd_program(tmp_path):
    if shutil.which("zstd") is None:
        pytest.skip("the program zstd is absent")
    path = write(tmp_path / "a.jsonl")
    subprocess.run(["zstd", "-q", "-19", "--long=24", path], check=True)
    assert load(f"{path}.zst") == ROWS


def test_tabs_and_quotes(tmp_path):
    (tmp_path / "a.tsv").write_bytes(
        b'question\tanswer\r\n"a\tb"\the said "no"\r\n"x ""y"""\t"two\nlines"\r\n'
    )
    assert load(str(tmp_path / "a.tsv")) == [
        {"question": "a\tb", "answer": 'he said "no"'},
        {"question": 'x "y"', "answer": "two\nlines"},
    ]
    (tmp_path / "a.tsv").write_text('question\tanswer\n"Hm" she said\tyes\n')
    with pytest.raises(UserError, match=r"a.tsv cannot be read: '\t' expected after"):
        load(str(tmp_path / "a.tsv"))


def test_an_empty_file_among_others_is_counted(folder):
    (folder / "a.jsonl").write_text("")
    table = read(str(folder))
    assert (table.rows, table.files[0].rows) == (ROWS, 0)


def test_directories_and_globs_in_a_bucket(bucket, folder):
    import fsspec

    store = fsspec.filesystem("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            store.put_file(str(path), f"{bucket}/d/{path.relative_to(folder)}")
    for path in (f"{bucket}/d", f"{bucket}/d/", f"{bucket}/d/**"):
        table = read(path)
        assert table.rows == ROWS
        assert [file.path for file in table.files] == [f"{bucket}/d/{name}" for name in ORDER]
        assert table.passed_over == (f"{bucket}/d/README.md", f"{bucket}/d/c/LICENSE")
    assert load(f"{bucket}/d/c/*.csv") == PARTS["c/a.csv"]
    with pytest.raises(UserError, match="matches no data file, nothing"):
        load(f"{bucket}/d/*.parquet")
    assert (
        len(set(files.identify(f"{bucket}/d", None) + files.identify(f"{bucket}/d/**", None))) == 4
    )
