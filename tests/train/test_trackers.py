"""Trackers hold the rows of the training log once each, also after a resume."""

import json
import os
import subprocess
import sys
import types

import pytest

from jax_ordermerge import config
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import trackers
from jax_ordermerge.train.spec import TrackingSpec


def events(directory):
    """Return (name, step, value) of event files as TensorBoard shows them.

    A restart hides what came at its step or later.
    """
    from tensorboardX.proto import event_pb2

    scalars = []
    for file in sorted(directory.glob("events.out.tfevents.*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):  # length (8 bytes), its checksum (4), record, its checksum (4)
            size = int.from_bytes(raw[at : at + 8], "little")
            event = event_pb2.Event.FromString(raw[at + 12 : at + 12 + size])
            at += size + 16
            if event.session_log.status == event_pb2.SessionLog.START:
                scalars = [scalar for scalar in scalars if scalar[1] < event.step]
            scalars += [
                (value.tag, event.step, value.simple_value) for value in event.summary.value
            ]
    return scalars


def test_tensorboard_holds_the_lines_of_each_member_once(tmp_path, tiny_train):
    pytest.importorskip("tensorboardX")
    sections = {"tracking": {"tensorboard": True}, "training": {"checkpoint_every": 2}}
    with pytest.raises(KeyboardInterrupt):
        tiny_train(tmp_path, make_mesh(), stop_at=3, **sections)
    run = tiny_train(tmp_path, make_mesh(), **sections)
    for member in range(2):
        scalars = events(tmp_path / "tracking" / f"member_{member}")
        for name in ("loss", "grad_norm"):
            seen = [(step, value) for tag, step, value in scalars if tag == name]
            assert [step for step, _ in seen] == [line["step"] for line in run.lines()]
            assert [value for _, value in seen] == pytest.approx(
                [line[name][member] for line in run.lines()], rel=1e-6
            )


def test_wandb_continues_its_runs(tmp_path, monkeypatch):
    opened, logged = [], []

    class Run:
        def __init__(self, step):
            self.step = step

        def log(self, values, step):
            logged.append((step, values))

        def finish(self, quiet):
            logged.append("finished")

    def init(**settings):
        opened.append(settings)
        return Run(step=0 if len(opened) <= 2 else 4)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    tracking = TrackingSpec("tiny", config.Tracking(wandb="orders"), {})
    for _ in range(2):
        for tracker in trackers.open_trackers(tracking, RunLayout(tmp_path), (0, 1), 0):
            tracker.metrics({"step": 3, "loss": [1.0, 2.0]})
            tracker.metrics({"step": 4, "loss": [1.5, 2.5]})
            tracker.close()
    first, again = opened[:2], opened[2:]
    assert [entry["id"] for entry in first] == [entry["id"] for entry in again]
    assert len({entry["id"] for entry in first}) == 2
    assert len({entry["group"] for entry in opened}) == 1
    assert [entry["name"] for entry in first] == ["tiny/member_0", "tiny/member_1"]
    assert {entry["project"] for entry in opened} == {"orders"}
    steps = [entry[0] for entry in logged if entry != "finished"]
    assert steps == [3, 3, 4, 4, 4, 4]
    assert (
        json.loads((tmp_path / "tracking" / "wandb.json").read_text())["ids"]["1"] == first[1]["id"]
    )


def test_trackio_holds_each_row_once_also_after_a_resume(tmp_path):
    """With the real package, in a process of its own: it reads its directory when imported."""
    pytest.importorskip("trackio", reason="needs the extra trackio")
    code = f"""
import pathlib
from jax_ordermerge import config
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.train import trackers
from jax_ordermerge.train.spec import TrackingSpec

tracking = TrackingSpec("tiny", config.Tracking(trackio="orders"), {{"seed": 3}})
layout = RunLayout(pathlib.Path({str(tmp_path / "run")!r}))
for steps in ((1, 2), (2, 3)):  # the training was killed after step 2, its checkpoint is of step 1
    (tracker,) = trackers.open_trackers(tracking, layout, (0, 1), steps[0] - 1)
    for step in steps:
        tracker.metrics({{"step": step, "loss": [1.0 * step, 2.0 * step], "mfu": None}})
    tracker.close()

from trackio.sqlite_storage import SQLiteStorage
for name in sorted(SQLiteStorage.get_runs("orders")):
    rows = SQLiteStorage.get_logs("orders", name)
    print(name.split("/")[1], [(row["step"], row["loss"]) for row in rows])
"""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "member_0 [(1, 1.0), (2, 2.0), (3, 3.0)]",
        "member_1 [(1, 2.0), (2, 4.0), (3, 6.0)]",
    ]


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"tracking.wandb needs the package wandb, .* pip install 'jax_ordermerge\[wandb\]'",
    ):
        trackers.check(config.Tracking(wandb="orders"))


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    """A machine with the package of W&B, and nothing that says who its user is."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: name)
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC", "WANDB_BASE_URL", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_wandb_without_a_key_is_refused_before_the_training(no_key, monkeypatch):
    tracking = config.Tracking(wandb="orders")
    with pytest.raises(UserError, match="wandb = orders needs a key of W&B: run wandb login"):
        trackers.check(tracking)
    trackers.check(tracking, several=True)  # only the first process needs one
    trackers.check(config.Tracking())
    for name, value in (("WANDB_API_KEY", "x"), ("WANDB_MODE", "offline")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            trackers.check(tracking)
    (no_key / ".netrc").write_text("machine api.wandb.ai login user password x\n")
    trackers.check(tracking)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.here:8080/x")
    with pytest.raises(UserError, match="needs a key"):
        trackers.check(tracking)


def test_wandb_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    class UsageError(Exception):
        pass

    def init(**settings):
        raise UsageError("api_key not configured (no-tty).\nsecond line")

    errors = types.SimpleNamespace(Error=UsageError)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, errors=errors))
    with pytest.raises(UserError, match=r"does not start \(api_key not .*\); run wandb login"):
        trackers.Wandb(
            TrackingSpec("tiny", config.Tracking(wandb="orders"), {}), RunLayout(tmp_path), (0,)
        )
