"""Several processes train by the command line as one does: stopped, killed, misconfigured."""

import contextlib
import functools
import os
import pathlib
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.experiment.run_config import read_config
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.layout import RunLayout, read_npz
from jax_ordermerge.mesh import make_mesh
from jax_ordermerge.train import members
from tests import preloaded

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT = 10


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def training(
    folders, output, *overrides, devices=2, flags=(), indices=None, process_overrides=None
):
    """Start `ordermerge train` in one process per folder.

    `process_overrides` are overrides of single processes, by index.
    """
    port = free_port()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
    }
    settings = [
        f"output={output}",
        "mesh.fsdp=-1",
        "training.epochs=8",
        "training.log_every=2",
        "training.checkpoint_every=10",
        *overrides,
    ]
    if len(folders) > 1:
        settings = [
            f"distributed.coordinator=127.0.0.1:{port}",
            f"distributed.processes={len(folders)}",
            f"distributed.heartbeat_timeout={HEARTBEAT}",
            *settings,
        ]
    running = [
        preloaded.Command(
            ["train", "tiny.yaml", *flags]
            + [
                part
                for override in [
                    *settings,
                    f"distributed.index={index}",
                    *(process_overrides or {}).get(index, []),
                ]
                for part in ("--set", override)
            ],
            env=environment,
            cwd=folders[index],
        )
        for index in (range(len(folders)) if indices is None else indices)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


def ended(process, seconds):
    """Return exit code and what was printed to stderr."""
    _, stderr = process.communicate(timeout=seconds)
    return process.returncode, stderr


def wait_for_lines(output, count, seconds=120):
    log, deadline = output / "metrics" / "train.jsonl", time.monotonic() + seconds
    while time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} lines in {log} within {seconds} s")


def complete(folder, output, *overrides, processes=2, devices=2):
    with training([folder] * processes, output, *overrides, devices=devices) as running:
        for process in running:
            code, stderr = ended(process, 240)
            assert code == 0, stderr[-3000:]


def result(folder, output):
    config = read_config(folder / "tiny.yaml", [f"output={output}", "training.epochs=8"])
    model = convert.load_config(convert.resolve(config.model.base))
    layout = RunLayout(output)
    trained = members.restore_members(training_spec(config), model, make_mesh(), layout)
    return trained, read_npz(layout.training_losses)["losses"]


@pytest.fixture(scope="module")
def uninterrupted(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    complete(folder, output)
    return result(folder, output)


def assert_same(population, expected):
    ours, theirs = jax.device_get((jax.tree.leaves(population), jax.tree.leaves(expected)))
    assert all(x.tobytes() == y.tobytes() for x, y in zip(ours, theirs, strict=True))


@pytest.fixture(scope="module")
def one_process(folder, tmp_path_factory):
    """Return a function that trains on a mesh of 8 devices in one process and returns the result."""

    @functools.cache
    def train(*mesh):
        output = tmp_path_factory.mktemp("one") / "run"
        complete(folder, output, *mesh, processes=1, devices=8)
        return result(folder, output)

    return train


APART = (
    "mesh.order=2",
    "mesh.fsdp=2",
    "mesh.tensor=2",
)  # a member in each of two processes: only the order axis is across
ACROSS = "mesh.order=1", "mesh.fsdp=4", "mesh.tensor=2"  # parameters of a member in both


@pytest.mark.slow
def test_two_processes_have_the_bits_of_one_where_members_are_not_divided(
    folder, tmp_path, one_process
):
    complete(folder, tmp_path / "run", *APART, devices=4)
    assert_same(result(folder, tmp_path / "run"), one_process(*APART))


@pytest.mark.slow
def test_two_processes_do_as_one_where_members_are_divided(folder, tmp_path, one_process):
    complete(folder, tmp_path / "run", *ACROSS, devices=4)
    ours, theirs = (
        jax.device_get(jax.tree.leaves(population))
        for population in (result(folder, tmp_path / "run"), one_process(*ACROSS))
    )
    for x, y in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_what_two_processes_began_one_ends_and_the_other_way_round(
    folder, tmp_path, one_process, first, then
):
    output = tmp_path / "run"
    with training([folder] * first, output, *APART, devices=8 // first) as running:
        wait_for_lines(output, 4)
        running[0].send_signal(signal.SIGTERM)
        assert [ended(process, 60)[0] for process in running] == [143] * first
    step = orbax.latest(output / "checkpoints")
    assert 8 <= step < 40
    complete(folder, output, *APART, processes=then, devices=8 // then)
    assert_same(result(folder, output), one_process(*APART))


@pytest.mark.slow
def test_two_processes_take_a_look_as_one(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ORDERMERGE_EXAMPLE_CACHE", str(tmp_path / "cache"))
    with training([folder, folder], tmp_path / "run", flags=["--steps", "3"]) as both:
        for process in both:
            code, stderr = ended(process, 120)
            assert code == 0, stderr[-3000:]
    assert not (tmp_path / "run").exists()
    # the examples stay, the shares that each has tokenized do not
    cached = [path.name for path in (tmp_path / "cache").iterdir()]
    assert cached
    assert not [name for name in cached if "-of-" in name]


@pytest.mark.slow
def test_sigterm_to_one_stops_both_at_the_same_step(folder, tmp_path, uninterrupted):
    output = tmp_path / "run"
    with training([folder, folder], output) as both:
        wait_for_lines(output, 6)
        both[1].send_signal(signal.SIGTERM)
        messages = [ended(process, 60) for process in both]
    assert [code for code, _ in messages] == [143, 143], messages
    step = orbax.latest(output / "checkpoints")
    assert all(
        f"stopped by SIGTERM after step {step} of 40, with a checkpoint" in stderr
        for _, stderr in messages
    )
    assert not (output / "metrics" / "state.json").exists()
    complete(folder, output)
    assert_same(result(folder, output), uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_ends_the_other_and_the_restart_continues(
    folder, tmp_path, uninterrupted, lost
):
    output = tmp_path / "run"
    with training([folder, folder], output) as both:
        wait_for_lines(output, 7)
        both[lost].kill()
        code, stderr = ended(both[1 - lost], HEARTBEAT + 20)
    # collectives notice at once and end with our line; a process that waits elsewhere is ended by
    # jax when heartbeats are missed
    assert code in (1, -signal.SIGABRT), (code, stderr[-3000:])
    assert "one of them has ended, its own log says why" in stderr or "another task died" in stderr
    complete(folder, output)
    assert_same(result(folder, output), uninterrupted)


@pytest.mark.slow
def test_processes_with_different_data_or_config_do_not_start(folder, tmp_path):
    changed = tmp_path / "other"
    shutil.copytree(folder, changed)
    rows = (changed / "train.jsonl").read_text().splitlines()
    (changed / "train.jsonl").write_text("\n".join([*rows[1:], rows[0]]))
    with training([folder, changed], tmp_path / "run", "data.train=train.jsonl") as both:
        messages = [ended(process, 120) for process in both]
    assert [code for code, _ in messages] == [2, 2], messages
    for _, stderr in messages:
        assert (
            "error: process 1 differs from process 0 in data.train, data.validation; start every process with the same"
            in stderr
        )
    with training(
        [folder, folder], tmp_path / "run2", process_overrides={1: ["seed=5", "training.epochs=3"]}
    ) as both:
        messages = [ended(process, 120) for process in both]
    assert [code for code, _ in messages] == [2, 2], messages
    for _, stderr in messages:
        assert "error: process 1 differs from process 0 in seed, training; start" in stderr
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "run2").exists()


@pytest.mark.parametrize("index", [0, 1])
def test_a_start_without_the_peer_fails_in_time_with_one_line(folder, tmp_path, index):
    began = time.monotonic()
    with training([folder, folder], tmp_path / "run", "distributed.timeout=2", indices=[index]) as (
        process,
    ):
        code, stderr = ended(process, 60)
    assert code == 1
    assert stderr.strip().startswith(
        f"error: process {index} of 2 did not find all its peers within 2 s (coordinator 127.0.0.1:"
    )
    assert len(stderr.strip().splitlines()) == 1
    assert time.monotonic() - began < 2 + 20  # the start of Python and jax on a busy machine
    assert not (tmp_path / "run").exists()
