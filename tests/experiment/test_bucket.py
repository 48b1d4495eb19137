"""A run in a bucket, with base and data there, too: it is killed and continues elsewhere."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import time

import fsspec
import pytest
import typer.testing
import yaml

from jax_ordermerge.checkpoint import object_store, remote
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.cli import app
from jax_ordermerge.config import load_config, to_dict
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline, remote_run
from jax_ordermerge.experiment.run_config import read_config
from tests import preloaded

SETTINGS = ["training.epochs=4", "training.checkpoint_every=2", "evaluation.tasks=[]", "name=tiny"]


def saved_files(url):
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return json.loads(store.cat_file(f"{url}/.ordermerge/files.json"))["files"]


def options(settings):
    return [part for item in settings for part in ("--set", item)]


@pytest.mark.slow
def test_killed_and_gone_on_with_on_another_machine_it_ends_with_the_same_bits(
    bucket, folder, tmp_path, monkeypatch
):
    """Ends with what a run on a disk ends with, and what comes after a run finds it in the bucket."""
    store, run = fsspec.filesystem("s3"), f"{bucket}/runs/tiny"
    for file in (*(folder / "base").iterdir(), folder / "train.jsonl", folder / "test.jsonl"):
        store.put_file(str(file), f"{bucket}/{file.relative_to(folder)}")
    settings = [
        *SETTINGS,
        f"model.base={bucket}/base",
        f"data.train={bucket}/train.jsonl",
        f"data.test={bucket}/test.jsonl",
        f"output={bucket}/runs/{{name}}",
    ]

    command = ["train", folder / "tiny.yaml", *options(settings)]
    with preloaded.Command(command) as process:
        until = time.monotonic() + 120
        while not any(name.startswith("checkpoints/") for name in bucket_files(run)):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert not any(name.startswith("metrics/state") for name in bucket_files(run))

    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path / "another"))
    messages = []
    copy = pipeline.run(load_config(folder / "tiny.yaml", settings), log=messages.append)
    assert messages[0] == f"{run} is copied to {copy}"
    assert messages[-1] == f"done: {run}/report.html"
    lines = [
        json.loads(line)
        for line in store.cat_file(f"{run}/metrics/train.jsonl").decode().splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(2, 21, 2))

    on_disk = pipeline.run(
        load_config(folder / "tiny.yaml", [*SETTINGS, "name=disk", f"output={tmp_path / 'disk'}"]),
        log=messages.append,
    )
    for name in (
        "merged/average/model.safetensors",
        "merged/selection/model.safetensors",
        "analysis.json",
        "losses/final.npz",
    ):
        assert store.cat_file(f"{run}/{name}") == (on_disk / name).read_bytes(), name
    assert set(saved_files(run)) == {
        p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()
    } - {".ordermerge/files.json"}

    # a third machine that has only the address
    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path / "third"))
    assert f"everything is done: {run}/report.html\n" in call("run", run)
    assert call("report", run) == f"wrote {run}/report.html\n"
    assert (
        call("convert", run, f"{bucket}/exported", "--member", "0") == f"wrote {bucket}/exported\n"
    )
    merged = call(
        "merge",
        f"{run}/member_0",
        f"{run}/member_1",
        "--method",
        "average",
        "--dtype",
        "bfloat16",
        "--out",
        f"{bucket}/merged",
    )
    assert merged == f"wrote {bucket}/merged\n"
    same = call("diff", f"{bucket}/merged", f"{run}/merged/average")
    assert "equal" in same
    assert Reader(remote.fetch(f"{bucket}/exported")).names == Reader(folder / "base").names
    assert (
        call("compare", run, str(on_disk), "--out", f"{bucket}/comparison")
        == f"wrote {bucket}/comparison/comparison.html\n"
    )
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: linear\nmodels:\n- model: {bucket}/merged\n- model: {run}/member_1\nparameters: {{weight: 1}}\ndtype: bfloat16\n"
    )
    assert call("merge", str(recipe), f"{bucket}/again").endswith(f"wrote {bucket}/again\n")


def bucket_files(run):
    with contextlib.suppress(FileNotFoundError):
        return saved_files(run)
    return {}


def call(*arguments):
    result = typer.testing.CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_another_config_is_refused_before_anything_is_written(bucket, folder):
    mirror = remote.Mirror(f"{bucket}/run")
    mirror.open()
    (mirror.local / "config.yaml").write_text(load_config_text(folder, ["training.epochs=3"]))
    mirror.save()
    before = saved_files(mirror.url)
    with pytest.raises(UserError, match=r"made with another config \(training.epochs: 3 -> 2\)"):
        pipeline.run(load_config(folder / "tiny.yaml", [f"output={mirror.url}"]))
    assert saved_files(mirror.url) == before


def load_config_text(folder, overrides):
    return yaml.safe_dump(to_dict(load_config(folder / "tiny.yaml", overrides)))


def test_a_run_is_read_by_its_address(bucket, folder):
    store = fsspec.filesystem("s3")
    store.put_file(str(folder / "tiny.yaml"), f"{bucket}/tiny.yaml")
    store.pipe_file(f"{bucket}/run/config.yaml", load_config_text(folder, ["seed=5"]).encode())
    assert read_config(pathlib.Path(f"{bucket}/tiny.yaml"), ["seed=7"]).seed == 7
    config = read_config(pathlib.Path(f"{bucket}/run"))
    assert (config.seed, config.location) == (5, f"{bucket}/run")
    with pytest.raises(UserError, match=r"none/config\.yaml not found"):
        read_config(f"{bucket}/none")


def together(folder, run, caches):
    """Train by two processes with different copy directories; return exit codes and messages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = [
        *SETTINGS,
        f"output={run}",
        "mesh.fsdp=-1",
        f"distributed.coordinator=127.0.0.1:{port}",
        "distributed.processes=2",
    ]
    running = [
        preloaded.Command(
            [
                "merge",
                folder / "tiny.yaml",
                *options([*settings, f"distributed.index={index}"]),
            ],
            env={
                **os.environ,
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                "ORDERMERGE_CACHE": str(cache),
            },
        )
        for index, cache in enumerate(caches)
    ]
    messages = [process.communicate(timeout=200)[1] for process in running]
    return [process.returncode for process in running], messages


@pytest.mark.slow
def test_several_processes_share_the_copy_or_are_refused(bucket, folder, tmp_path):
    codes, messages = together(folder, f"{bucket}/apart", [tmp_path / "a", tmp_path / "b"])
    assert codes == [2, 2]
    assert all(
        "is not seen by all processes" in item
        and "set ORDERMERGE_CACHE to a directory on a file system" in item
        for item in messages
    )
    assert bucket_files(f"{bucket}/apart") == {}
    codes, messages = together(folder, f"{bucket}/run", [tmp_path / "a", tmp_path / "a"])
    assert codes == [0, 0], "\n".join(messages)
    names = bucket_files(f"{bucket}/run")
    assert {
        "merged/average/model.safetensors",
        "checkpoints/20/_CHECKPOINT_METADATA",
        "merge.json",
    } <= names.keys()


def test_a_bucket_out_of_reach_does_not_end_a_training_but_a_stage(bucket, monkeypatch):
    mirror, messages = remote.Mirror(f"{bucket}/run"), []
    mirror.open()
    (mirror.local / "file").write_text("whole")
    copy = remote_run.BucketCopy(mirror, messages.append)

    def unreachable(url):
        raise OSError("connection refused")

    with monkeypatch.context() as patch:
        patch.setattr(object_store, "open_store", unreachable)
        copy.try_save()
        with pytest.raises(
            UserError,
            match=r"run cannot be written \(OSError: connection refused\); check the address",
        ):
            copy.save()
    assert len(messages) == 1
    assert messages[0].endswith("the run goes on and copies again with the next complete files")
    copy.try_save()
    assert list(bucket_files(mirror.url)) == ["file"]
