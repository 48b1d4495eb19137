"""An interrupted merge continues to the same bytes; a full disk or a second writer is refused."""

import errno
import json
import os
import random
import socket
import subprocess
import time

import numpy as np
import pytest

from jax_ordermerge import arch
from jax_ordermerge.checkpoint import safetensors, shards
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.sources.storage import Directory
from tests import preloaded

CONFIG = arch.ModelConfig(
    vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two members and a base, sparsely changed."""
    root, generator = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    base = {
        name: generator.normal(size=spec.hf_shape).astype(np.float32)
        for name, spec, _ in arch.hf_tensors(CONFIG)
    }
    for model in ("base", "one", "two"):
        changed = {
            name: x
            + (
                0
                if model == "base"
                else generator.normal(size=x.shape) * (generator.random(x.shape) < 0.4)
            )
            for name, x in base.items()
        }
        safetensors.write(root / model, changed.items(), config=CONFIG, dtype="bfloat16")
    return root


def planned(root, method="selection", **parameters):
    settings = (
        {"parameters": parameters or {"resample": "exhaustive"}}
        if method == "selection"
        else {"parameters": parameters}
    )
    return plan.uniform(
        [Directory(root / "one"), Directory(root / "two")],
        Directory(root / "base"),
        method=method,
        **settings,
    )


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def expected(models):
    engine.merge_plan(planned(models), models / "expected", shard_bytes=40_000)
    return contents(models / "expected")


def interrupt_after(count):
    def progress(done, total, name):
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_the_number_of_workers_and_the_slabs_change_nothing(models, expected, tmp_path):
    for i, settings in enumerate(
        [{"workers": 1}, {"workers": 7}, {"slab_elements": 256, "workers": 3}]
    ):
        engine.merge_plan(planned(models), tmp_path / str(i), shard_bytes=40_000, **settings)
        files = contents(tmp_path / str(i))
        assert files.keys() == expected.keys()
        assert all(files[name] == expected[name] for name in files if name != "merge.json")


def test_an_interrupted_merge_goes_on_where_it_stopped(models, expected, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        engine.merge_plan(
            planned(models), out, shard_bytes=40_000, workers=1, progress=interrupt_after(9)
        )
    assert not out.exists()
    journal = tmp_path / "out.partial" / "journal-0"
    done = [json.loads(line)["name"] for line in journal.read_text().splitlines() if line]
    assert len(done) >= 9
    journal.write_text(journal.read_text() + '\n{"name": "cut off')
    merged = []
    original = engine._Merger.merge
    monkeypatch.setattr(
        engine._Merger,
        "merge",
        lambda merger, output: merged.append(output.name) or original(merger, output),
    )
    engine.merge_plan(planned(models), out, shard_bytes=40_000)
    assert sorted(merged) == sorted({name for name, _, _ in arch.hf_tensors(CONFIG)} - set(done))
    assert contents(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bytes_lost_since_the_interruption_are_made_again(models, expected, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        engine.merge_plan(
            planned(models), out, shard_bytes=40_000, workers=1, progress=interrupt_after(9)
        )
    first = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
    with first.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\x00" * 50)
    engine.merge_plan(planned(models), out, shard_bytes=40_000)
    assert contents(out) == expected


def test_another_recipe_starts_anew(models, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        engine.merge_plan(planned(models), out, workers=1, progress=interrupt_after(5))
    engine.merge_plan(planned(models, "average"), out)
    engine.merge_plan(planned(models, "average"), tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_full_disk_is_one_line_and_leaves_nothing(models, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    for module, name in ((shards, "_allocate"), (os, "pwrite")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            with pytest.raises(UserError, match="the disk is full; free some space"):
                engine.merge_plan(planned(models), tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


def test_a_real_full_disk(models, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(small)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        with pytest.raises(UserError, match="the disk is full"):
            engine.merge_plan(planned(models), small / "out")
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_two_writers_of_one_directory(models, tmp_path):
    def second(done, total, name):
        if done == 3:
            with pytest.raises(UserError, match="being written by another process"):
                engine.merge_plan(planned(models), tmp_path / "out")

    engine.merge_plan(planned(models), tmp_path / "out", progress=second)


SCRIPT = """
import sys, time
from pathlib import Path
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.sources.storage import Directory
root, out = Path(sys.argv[1]), Path(sys.argv[2])
members = [Directory(root / "one"), Directory(root / "two")]
merge_plan = plan.uniform(members, Directory(root / "base"), method="selection",
                          parameters={"resample": "exhaustive"})
print("ready", flush=True)
# slow on purpose, so that the moments spread over the work
engine.merge_plan(merge_plan, out, shard_bytes=40_000, workers=2,
                  progress=lambda *_: time.sleep(float(sys.argv[3])))
print("done", flush=True)
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(models, expected, tmp_path):
    """SIGKILL: the output is absent or complete, and a resumed merge ends with the same bytes."""
    draw, out = random.Random(0), tmp_path / "out"
    killed = 0
    for _ in range(60):
        with preloaded.Command([models, out, "0.05"], code=SCRIPT) as process:
            while not process.stdout:
                assert process.poll() is None, process.stderr
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 1.2))
            process.kill()
            process.wait()
            finished = process.stdout == "ready\ndone\n"
        if finished:
            assert contents(out) == expected
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        else:
            killed += 1
            assert not out.exists() or contents(out) == expected
        if killed >= 20:
            break
    assert killed >= 20
    if not out.exists():
        engine.merge_plan(planned(models), out, shard_bytes=40_000)
    assert contents(out) == expected


TWO = """
import sys
from pathlib import Path
port, index, root, out = sys.argv[1:]
from jax_ordermerge import processes
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import engine, plan
from jax_ordermerge.merge.sources.storage import Directory
processes.start_distributed(f"127.0.0.1:{port}", 2, int(index), 60)
root, out = Path(root), Path(out)
members = [Directory(root / "one"), Directory(root / "two")]
merge_plan = plan.uniform(members, Directory(root / "base"), method="selection",
                          parameters={"resample": "exhaustive"})
names = []
engine.merge_plan(merge_plan, out, shard_bytes=40_000,
                  progress=lambda done, count, name: names.append(name))
print(len(names))
try:
    engine.merge_plan(merge_plan, out)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_two_processes_share_a_merge(models, expected, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    running = [preloaded.Command([port, i, models, tmp_path / "out"], code=TWO) for i in range(2)]
    shares = []
    for process in running:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr[-3000:]
        share, refusal = stdout.splitlines()[-2:]  # the runtime may talk before
        shares.append(int(share))
        assert "is not empty" in refusal or "process 0 could not" in refusal
    assert sum(shares) == len(list(arch.hf_tensors(CONFIG)))
    assert min(shares) > 0
    assert contents(tmp_path / "out") == expected
