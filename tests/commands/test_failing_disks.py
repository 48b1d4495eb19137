"""Full and read-only disks, files in place of directories, long names: one line, nothing lost."""

import errno
import os

import pytest

from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError, file_error
from tests.commands.test_cli import call


def test_failures_of_files_are_named_with_what_to_do():
    for number, remedy in (
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "give a place that can be written"),
        (errno.EACCES, "may read and write"),
        (errno.ENAMETOOLONG, "255 bytes"),
    ):
        line = file_error(OSError(number, os.strerror(number), "place/file"))
        assert line.startswith(f"place/file: {os.strerror(number)}; ")
        assert remedy in line
    # libraries wrap the failure, or say it in words
    wrapped = RuntimeError("save failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "x.npz")
    assert file_error(wrapped).startswith("x.npz: No space left on device")
    assert "free some space" in file_error(ValueError("Error writing x: No space left on device"))
    for error in (ValueError("shape"), KeyError("No space"), FileNotFoundError(2, "x"), OSError()):
        assert file_error(error) is None


def test_a_path_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "directory").mkdir()
    for good in ("new", "new/deeper", "directory", "directory/new"):
        atomic.check_writable(tmp_path / good)
    for good in ("new.json", "file", "directory/new.json", "new/deeper.json"):
        atomic.check_writable(tmp_path / good, is_file=True)
    for bad, is_file, message in (
        ("file", False, "file is a file; give another path"),
        ("file/below", False, "file is a file; give another path"),
        ("file/below", True, "file is a file; give another path"),
        ("directory", True, "is a directory; give a file"),
        ("x" * 256, False, "File name too long"),
        (f"directory/{'ü' * 128}/a.json", True, "File name too long"),
    ):
        with pytest.raises(UserError, match=message):
            atomic.check_writable(tmp_path / bad, is_file=is_file)
    # root may write anywhere
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(UserError, match="directory may not be written; give another path"):
        atomic.check_writable(tmp_path / "directory" / "new")
    with pytest.raises(UserError, match="directory may not be written; give another path"):
        atomic.check_vacant(tmp_path / "directory" / "new")


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate embedded:quickstart --config tasks.yml --out file",
        "evaluate embedded:quickstart --config tasks.yml --out file/below",
        "compare a b --out file",
        "results a --out directory",
        "results a --out file/a.md",
        "search config.yml --out file",
        "judge a.json b.json --endpoint http://127.0.0.1:9/v1 --model m --out directory",
        "judge a.json b.json --endpoint http://127.0.0.1:9/v1 --model m --replies file/x",
        "train config.yml --steps 5 --profile file",
        "run config.yml --set output=file/run",
        "run config.yml --set output=LONG",
        "report LONG",
        "report file/run",
        "convert embedded:quickstart file/below",
        "report EMPTY",
        "merge -- EMPTY",
        "convert embedded:quickstart EMPTY",
        "merge embedded:quickstart embedded:quickstart --out LONG",
        "evaluate embedded:quickstart --config tasks.yml --out s3://bucket/results",
    ],
)
def test_places_that_cannot_be_written_are_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "directory").mkdir()
    (tmp_path / "tasks.yml").write_text("evaluation: {tasks: [{name: a, data: absent.jsonl}]}\n")
    (tmp_path / "config.yml").write_text(
        "model: {base: embedded:quickstart}\ndata: {train: generated:quickstart}\n"
    )
    before = sorted(tmp_path.rglob("*"))
    long = {"LONG": "x" * 300, "EMPTY": ""}
    assert (
        call(*(long.get(word, word.replace("LONG", "x" * 300)) for word in arguments.split())) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"
