"""One run at a time writes a directory; what a lost process left behind stops no other one."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jax_ordermerge.checkpoint import remote
from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import context, pipeline, run_lock
from jax_ordermerge.layout import RunLayout

HOLD = """
import pathlib, sys, time
from jax_ordermerge.experiment import run_lock
from jax_ordermerge.layout import RunLayout
with run_lock.hold(RunLayout(pathlib.Path(sys.argv[1])), print):
    print("held", flush=True)
    time.sleep(600)
"""


def ignore(line):
    """Take the place of the log."""


@pytest.fixture
def layout(tmp_path):
    return RunLayout(tmp_path / "run")


@pytest.fixture
def other_process(layout):
    """A process that holds the lock."""
    arguments = [sys.executable, "-c", HOLD, str(layout.root)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def write_lock(layout, **facts):
    layout.root.mkdir(exist_ok=True)
    layout.lock.write_text(json.dumps(dataclasses.asdict(run_lock.Holder(**facts))))


def test_the_second_of_two_runs_is_refused_in_one_line(folder, layout, other_process, monkeypatch):
    monkeypatch.setattr(
        pipeline, "open_run", lambda *args, **kwargs: pytest.fail("the model is loaded")
    )
    config = load_config(folder / "tiny.yaml", [f"output={layout.root}"])
    with pytest.raises(UserError) as error:
        pipeline.run(config, log=ignore)
    assert re.fullmatch(
        rf"{re.escape(str(layout.root))} is being written by process {other_process.pid} on"
        rf" {re.escape(socket.gethostname())} since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait until"
        r" it ends, or choose another directory with --set output=DIRECTORY",
        str(error.value),
    )
    assert [path.name for path in layout.root.iterdir()] == ["writer.lock"]


def test_two_runs_that_load_at_the_same_time(folder, layout, monkeypatch):
    """Both find the directory free; the other one has the lock when this one has loaded."""
    original = context.open_run

    def slow(*args):
        ctx = original(*args)
        write_lock(
            layout,
            host="here",
            pid=os.getpid(),
            machine=run_lock._machine(),
            started=run_lock._start_time(os.getpid()),
        )
        return ctx

    monkeypatch.setattr(pipeline, "open_run", slow)
    config = load_config(folder / "tiny.yaml", [f"output={layout.root}"])
    with pytest.raises(UserError, match=f"is being written by process {os.getpid()} on here since"):
        pipeline.run(config, log=ignore)
    assert [path.name for path in layout.root.iterdir()] == ["writer.lock"]


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(layout, other_process, reaped):
    other_process.kill()
    if reaped:
        other_process.wait()
    else:
        # a zombie has a number still
        os.waitid(os.P_PID, other_process.pid, os.WEXITED | os.WNOWAIT)
    run_lock.check_free(layout, ignore)
    lines = []
    with run_lock.hold(layout, lines.append):
        assert json.loads(layout.lock.read_text())["pid"] == os.getpid()
    assert not layout.lock.exists()
    assert len(lines) == 1
    assert f"process {other_process.pid} on {socket.gethostname()} since" in lines[0]
    assert lines[0].endswith("has ended without releasing the run; going on in its place")


def test_a_number_that_another_process_has_now(layout):
    write_lock(layout, pid=os.getpid(), machine=run_lock._machine(), started="1")
    with run_lock.hold(layout, ignore):
        pass


@pytest.mark.parametrize("content", ['{"host": "else', "", "[]", '{"colour": "red"}'])
def test_a_lock_that_cannot_be_read_is_one_of_an_unknown_process(layout, content, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.2)
    layout.root.mkdir()
    layout.lock.write_text(content)
    with run_lock.hold(layout, ignore):
        assert json.loads(layout.lock.read_text())["pid"] == os.getpid()


def test_a_process_of_another_machine_is_watched(layout, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 2.0)
    facts = {
        "host": "far",
        "pid": 7,
        "since": "2026-01-02 03:04:05 UTC",
        "machine": "far",
        "token": "t",
    }
    write_lock(layout, **facts)
    beat = threading.Timer(0.5, lambda: write_lock(layout, **facts, beats=1))
    beat.start()
    lines = []
    with pytest.raises(
        UserError, match="written by process 7 on far since 2026-01-02 03:04:05 UTC;"
    ):
        run_lock.check_free(layout, lines.append)
    beat.join()
    assert len(lines) == 1
    assert "waiting up to 2 s for a sign of life of process 7 on far since" in lines[0]
    # it beats no more: a preempted machine
    start = time.monotonic()
    with run_lock.hold(layout, ignore):
        assert time.monotonic() - start > 2.0
    assert not layout.lock.exists()


def compete(root, start, results):
    start.wait()
    try:
        with run_lock.hold(RunLayout(root), ignore):
            results.put("held")
            time.sleep(3)
    except UserError as error:
        results.put(str(error))


def test_one_of_several_takes_a_stale_lock_over(layout):
    write_lock(layout, pid=2**30, machine=run_lock._machine(), started="1")
    spawn = multiprocessing.get_context("fork")
    start, results = spawn.Event(), spawn.Queue()
    processes = [
        spawn.Process(target=compete, args=(layout.root, start, results)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    start.set()
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert outcomes.count("held") == 1
    assert sum("is being written by process" in outcome for outcome in outcomes) == 3


def test_a_process_whose_lock_was_taken_over_stops(layout, monkeypatch, capsys):
    """A machine that slept finds another one in its place."""
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    stopped = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        with run_lock.hold(layout, ignore):
            write_lock(layout, host="far", pid=7, since="noon", token="t")
            assert stopped.wait(10)
        assert layout.lock.exists()  # it is that of the other process
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == (
        f"error: {layout.root} was taken over by process 7 on far since noon; stopping\n"
    )


def test_beats_are_counted_and_the_lock_is_released_after_a_failure(layout, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT", 0.05)
    with contextlib.suppress(KeyboardInterrupt), run_lock.hold(layout, ignore):
        time.sleep(0.5)
        assert json.loads(layout.lock.read_text())["beats"] > 2
        # a bucket gets what is complete, and no locks
        assert remote._finished(layout.root) == []
        raise KeyboardInterrupt
    assert not layout.lock.exists()


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\)"),
        run_lock.hold(RunLayout(tmp_path / "file" / "run"), ignore),
    ):
        pass


def test_a_file_in_place_of_the_run_is_refused(tmp_path):
    run = RunLayout(tmp_path / "notes.txt")
    run.root.write_text("mine")
    with pytest.raises(UserError, match=r"notes\.txt is a file; give another path"):
        run_lock.check_free(run, print)
    with pytest.raises(UserError, match="is no directory"), run_lock.hold(run, print):
        pass
    assert run.root.read_text() == "mine"
