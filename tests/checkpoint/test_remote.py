"""Directories in a bucket, on an S3 emulation, with another machine and a kill at any operation."""

import itertools
import json
import pathlib
import shutil

import fsspec
import pytest

from jax_ordermerge.checkpoint import convert, object_store, remote
from jax_ordermerge.data import files
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources import references

FIRST = {
    "config.yaml": b"a: 1",
    "checkpoints/2/_CHECKPOINT_METADATA": b"{}",
    "checkpoints/2/state/d/1": b"two" * 50,
    "log": b"1\n",
}
SECOND = {
    "config.yaml": b"a: 1",
    "checkpoints/4/_CHECKPOINT_METADATA": b"{4}",
    "checkpoints/4/state/d/1": b"four",
    "log": b"1\n2\n",
}


def write(directory, files):
    shutil.rmtree(directory / "checkpoints", ignore_errors=True)
    for name, content in files.items():
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def read(directory):
    files = (
        path for path in directory.rglob("*") if path.is_file() and ".ordermerge" not in path.parts
    )
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def objects(url):
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return {
        name.removeprefix(url.removeprefix("s3://") + "/"): store.cat_file(name)
        for name in store.find(url)
    }


def elsewhere(url, monkeypatch, folder):
    """Return the files that a machine without a local copy fetches."""
    with monkeypatch.context() as patch:
        patch.setenv("ORDERMERGE_CACHE", str(folder))
        mirror = remote.Mirror(url)
        mirror.open()
        return read(mirror.local)


def saved(url, files):
    mirror = remote.Mirror(url)
    mirror.open()
    write(mirror.local, files)
    mirror.save()
    return mirror


def test_another_machine_finds_saved_files_and_no_removed_ones(bucket, tmp_path, monkeypatch):
    mirror = saved(f"{bucket}/runs/one", FIRST)
    assert elsewhere(mirror.url, monkeypatch, tmp_path / "b") == FIRST
    write(mirror.local, SECOND)
    (mirror.local / "checkpoints" / "6.orbax-checkpoint-tmp-1").mkdir()
    (mirror.local / "checkpoints" / "6.orbax-checkpoint-tmp-1" / "half").write_text("")
    (mirror.local / ".merge.json.partial").write_text("")
    mirror.save()
    assert elsewhere(mirror.url, monkeypatch, tmp_path / "b") == SECOND
    assert elsewhere(mirror.url, monkeypatch, tmp_path / "c") == SECOND
    assert {
        name: content
        for name, content in objects(mirror.url).items()
        if not name.startswith(".ordermerge/")
    } == SECOND


def test_unchanged_files_are_not_copied_again(bucket, monkeypatch):
    mirror = saved(f"{bucket}/run", FIRST)
    with (mirror.local / "log").open("a") as file:
        file.write("2\n")
    done = []
    watched(monkeypatch, lambda name, path: done.append((name, path.rpartition("/run/")[2])))
    mirror.save()
    listing = json.loads(objects(mirror.url)[".ordermerge/files.json"])
    waiting = f".ordermerge/waiting/{object_store.File(*listing['files']['log']).digest}"
    assert done == [
        ("pipe_file", waiting),
        ("pipe_file", ".ordermerge/files.json"),
        ("cp_file", waiting),
        ("rm_file", waiting),
    ]
    done.clear()
    mirror.save()
    assert done == []


def watched(monkeypatch, before_operation):
    """Call a function before every change of the bucket."""
    real = object_store.open_store

    class Store:
        def __init__(self, store):
            self.store = store

        def __getattr__(self, name):
            method = getattr(self.store, name)
            if name not in ("pipe_file", "put_file", "cp_file", "rm_file"):
                return method

            def call(*arguments):
                before_operation(name, arguments[1] if name == "put_file" else arguments[0])
                return method(*arguments)

            return call

    monkeypatch.setattr(object_store, "open_store", lambda url: Store(real(url)))


class Killed(BaseException):
    """An exception that no code catches."""


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [2**20, 4], ids=["small files", "large files"])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new_content(
    bucket, tmp_path, monkeypatch, at_once
):
    monkeypatch.setattr(remote, "_READ_ONCE_BYTES", at_once)
    third = SECOND | {"log": b"1\n2\n3\n", "merge.json": b"{}"}
    seen = set()
    for count in itertools.count():
        url = f"{bucket}/run{count}"
        mirror = saved(url, FIRST)
        write(mirror.local, SECOND)
        left = iter(range(count))

        def before_operation(name, path, left=left):
            if next(left, None) is None:
                raise Killed

        with monkeypatch.context() as patch:
            watched(patch, before_operation)
            try:
                mirror.save()
                ended = True
            except Killed:
                ended = False
        content = elsewhere(url, monkeypatch, tmp_path / f"b{count}")
        assert content in (FIRST, SECOND)
        seen.add("new" if content == SECOND else "old")
        assert remote.fetch(f"{url}/log").read_bytes() == content["log"]
        # the same machine continues, no matter what it had copied
        again = remote.Mirror(url)
        again.open()
        assert read(again.local) == SECOND
        write(again.local, third)
        again.save()
        assert elsewhere(url, monkeypatch, tmp_path / f"c{count}") == third
        assert not any("waiting" in name for name in objects(url))
        if ended:
            break
    assert seen == {"old", "new"}
    assert count >= 8


def test_the_bucket_counts_if_another_machine_continued(bucket, tmp_path, monkeypatch):
    here = saved(f"{bucket}/run", FIRST)
    (here.local / "unsaved").write_text("")
    assert remote.Mirror(here.url).open() is False  # no other machine: unsaved files stay
    assert (here.local / "unsaved").is_file()
    with monkeypatch.context() as patch:
        patch.setenv("ORDERMERGE_CACHE", str(tmp_path / "b"))
        saved(here.url, SECOND)
    with pytest.raises(UserError, match="was written by another process meanwhile"):
        here.save()
    assert remote.Mirror(here.url).open() is True
    assert read(here.local) == SECOND


def test_files_of_others_are_not_overwritten(bucket):
    fsspec.filesystem("s3").pipe_file(f"{bucket}/run/notes.txt", b"mine")
    with pytest.raises(
        UserError, match=r"run is not empty and was not written by a run; give another address"
    ):
        remote.Mirror(f"{bucket}/run").open()
    with (
        pytest.raises(UserError, match="run is not empty; give a new address"),
        remote.new_directory(f"{bucket}/run"),
    ):
        pass
    assert objects(bucket) == {"run/notes.txt": b"mine"}


def test_an_object_changed_from_outside_is_noticed(bucket, tmp_path, monkeypatch):
    mirror = saved(f"{bucket}/run", FIRST)
    fsspec.filesystem("s3").pipe_file(f"{mirror.url}/log", b"other")
    with pytest.raises(UserError, match="run/log is lost or was changed from outside"):
        elsewhere(mirror.url, monkeypatch, tmp_path / "b")


def test_a_new_directory_is_there_when_the_block_has_ended(bucket):
    url = f"{bucket}/merged/one"

    def interrupted():
        with remote.new_directory(url) as directory:
            write(directory, FIRST)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert objects(bucket) == {}
    with remote.new_directory(url) as directory:
        write(directory, SECOND)
    assert read(remote.fetch(url)) == SECOND
    with pytest.raises(UserError, match="merged/one is not empty"), remote.new_directory(url):
        pass


def test_models_and_data_are_read_from_a_bucket(bucket, monkeypatch):
    base = pathlib.Path(convert.resolve("embedded:quickstart"))
    store = fsspec.filesystem("s3")
    for file in base.iterdir():
        store.put_file(str(file), f"{bucket}/base/{file.name}")
    without = convert.resolve(f"{bucket}/base", weights=False)
    assert not list(without.glob("*.safetensors"))
    assert read(convert.resolve(f"{bucket}/base")) == read(base)
    watched_reads = []
    monkeypatch.setattr(remote, "_get", lambda *arguments: watched_reads.append(arguments))
    assert references.open_model(f"{bucket}/base").label == f"{bucket}/base"
    assert watched_reads == []  # the copy is up to date
    monkeypatch.undo()


@pytest.mark.parametrize(
    "name", ["../outside", "a/../../outside", "a//outside", ".ordermerge/files.json"]
)
def test_names_that_lead_out_of_the_directory_are_refused(bucket, tmp_path, monkeypatch, name):
    store, url = fsspec.filesystem("s3"), f"{bucket}/run"
    file = object_store.File("0", 1)
    store.pipe_file(
        f"{url}/.ordermerge/files.json",
        json.dumps({"version": "a", "files": {name: file}, "gone": []}).encode(),
    )
    with pytest.raises(UserError, match="which is no path below a directory"):
        remote.Mirror(url).open()
    monkeypatch.setattr(object_store, "open_store", lambda url: Listed())

    class Listed:
        def exists(self, name):
            return False

        def find(self, url, detail):
            return {f"{bucket.removeprefix('s3://')}/base/{name}": {"size": 1}}

    with pytest.raises(UserError, match="which is no path below a directory"):
        remote.fetch(f"{bucket}/base")
    assert not list(tmp_path.rglob("outside"))


def test_data_are_read_again_when_they_have_changed(bucket):
    store = fsspec.filesystem("s3")
    for count in (1, 2):
        store.pipe_file(f"{bucket}/train.jsonl", b'{"text": "a"}\n' * count)
        assert len(files.load(f"{bucket}/train.jsonl")) == count


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("s3://orders/../other", "expected s3://BUCKET/PATH without empty parts"),
        ("az://orders/run", "az:// is not supported, only gs:// and s3://"),
    ],
)
def test_addresses_that_are_refused(path, message):
    with pytest.raises(UserError, match=message):
        remote.address(path)


def test_absent_files_are_one_line(bucket):
    saved(f"{bucket}/run", FIRST)
    for path, message in {
        f"{bucket}/none": "none not found",
        f"{bucket}/run/merged/average": "run holds no complete merged/average; it has checkpoints,"
        " config.yaml, log",
        "s3://no-such-bucket-here/run": "The specified bucket does not exist",
    }.items():
        with pytest.raises(UserError, match=message):
            remote.fetch(path)


def test_a_store_without_its_package_is_named(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(
        UserError, match=r"needs the package gcsfs: pip install 'jax_ordermerge\[gcs\]'"
    ):
        remote.fetch("gs://orders/base")


def test_a_browser_shows_a_report_that_was_replaced(bucket):
    mirror = saved(f"{bucket}/run", {"report.html": b"first", "orders.npz": b"x"})
    write(mirror.local, {"report.html": b"second"})
    mirror.save()
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    assert store.cat_file(f"{bucket}/run/report.html") == b"second"
    assert store.info(f"{bucket}/run/report.html")["ContentType"] == "text/html; charset=utf-8"
    assert "text" not in store.info(f"{bucket}/run/orders.npz")["ContentType"]
