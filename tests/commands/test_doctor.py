"""`ordermerge doctor` reports every error of a machine, and none of a healthy one."""

import collections
import ctypes
import importlib.metadata
import os
import pathlib
import shutil
import socket

import huggingface_hub
import numpy as np
import pytest
import typer.testing

from jax_ordermerge import processes
from jax_ordermerge.cli import app
from jax_ordermerge.commands import doctor
from jax_ordermerge.commands.doctor import devices, inputs, storage
from jax_ordermerge.config import load_config, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.context import start_devices
from tests import preloaded

ROOT = pathlib.Path(__file__).parents[2]


def pretend(monkeypatch, **versions):
    """Let packages seem to have other versions; None stands for an absent package."""
    installed = importlib.metadata.version

    def version(name):
        pretended = versions.get(name.replace("-", "_"), "installed")
        if pretended is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name) if pretended == "installed" else pretended

    monkeypatch.setattr(importlib.metadata, "version", version)


def by_subject(findings):
    return {finding.subject: finding for finding in findings}


def test_versions_of_this_machine_go_together():
    (finding,) = doctor.check_versions()
    assert finding.verdict == "ok", finding.detail
    assert f"jax {importlib.metadata.version('jax')}" in finding.detail


@pytest.mark.parametrize(
    ("versions", "message"),
    [
        ({"flax": "0.10.0"}, "needs flax"),
        ({"transformers": "4.57.0"}, "needs transformers"),
        ({"jaxlib": "0.9.0"}, "needs jaxlib"),
        ({"libtpu": "0.0.1"}, "needs libtpu"),
        ({"optax": None}, "needs optax, which is not installed"),
        ({"jax_cuda12_plugin": "0.10.2", "jax_cuda13_plugin": "0.10.2"}, "two CUDA plugins"),
        ({"jax_metal": "0.1.1"}, "made for jax 0.4"),
    ],
)
def test_conflicting_packages_are_named(versions, message, monkeypatch):
    pretend(monkeypatch, **versions)
    findings = doctor.check_versions()
    assert {finding.verdict for finding in findings} == {"error"}
    assert any(message in finding.detail for finding in findings), findings


def quickstart(output, *settings):
    return load_config(ROOT / "configs" / "quickstart.yaml", [f"output={output}", *settings])


def test_a_healthy_machine(tmp_path):
    config = quickstart(tmp_path / "runs" / "one", "mesh.order=2", "mesh.fsdp=-1")
    findings = by_subject(doctor.examine(config))
    assert {finding.verdict for finding in findings.values()} == {"ok"}, findings
    assert list(findings) == [
        *("versions", "processes", "devices", "mesh", "exchange", "base", "data"),
        *("memory", "disk", "output", "saves"),
    ]
    assert findings["exchange"].detail.startswith("a sum over 8 devices is right; each receives")
    assert findings["devices"].detail.startswith("8 x cpu")
    assert findings["mesh"].detail == "order 2 x fsdp 4"
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_does_not_fit(tmp_path):
    mesh, population = {"order": 3, "fsdp": -1}, {"members": 3}
    config = make_config({"output": str(tmp_path), "mesh": mesh, "population": population})
    finding = by_subject(doctor.examine(config))["mesh"]
    assert finding.verdict == "error"
    assert "8 devices cannot be divided by 3" in finding.detail


@pytest.mark.parametrize("platforms", ["cuda,cpu", "tpu,cpu"])
def test_the_cpu_where_an_accelerator_was_meant(platforms, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)  # as launch scripts set it
    config = make_config({"output": str(tmp_path), "mesh": {"fsdp": 1}})
    findings = by_subject(doctor.examine(config))
    wanted = platforms.split(",")[0]
    assert findings["devices"].verdict == "error"
    assert f"asks for {wanted}, but jax finds the CPU only" in findings["devices"].detail
    with pytest.raises(UserError, match=f"asks for {wanted}"):
        start_devices(config)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    start_devices(config)


SEVEN_B = ROOT / "configs" / "llama2_7b_gsm8k.yaml"
PARAMETERS = 6_738_415_616  # of Llama-2-7B


def test_a_7b_model_on_a_small_machine_is_not_fit(tmp_path, monkeypatch):
    """Members of 7B, their base out of reach, on 67 GiB of disk and the memory of this machine."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 67 * 2**30))
    monkeypatch.setattr(devices, "host_memory", lambda: 64 * 2**30)
    # a share of 2 TiB at 88 MiB/s per TiB
    monkeypatch.setattr(storage, "measure_speed", lambda directory, size: 184.5e6)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(devices, "ACCELERATORS", ())
    monkeypatch.setattr(devices, "measure_flops", lambda: 1e10)  # a laptop's
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    arguments = [str(SEVEN_B), "--set", "mesh.fsdp=1", "--set", f"output={tmp_path / 'run'}"]
    result = typer.testing.CliRunner().invoke(app, ["doctor", *arguments])
    assert result.exit_code == 1
    assert "fit to run" not in result.output
    assert "not fit: 4 of 13 findings would make a run fail (base, memory, accelerator, disk)" in (
        result.output
    )
    findings = by_subject(
        doctor.examine(load_config(SEVEN_B, ["mesh.fsdp=1", f"output={tmp_path / 'run'}"]))
    )
    # by hand: three checkpoints of 12 bytes per parameter and member, four merges in bfloat16
    size = (3 * 12 * 4 + 4 * 2) * PARAMETERS / 2**30
    assert f"only 67 GiB free at {tmp_path}, the run writes {size:.0f}" in findings["disk"].detail
    saved = 12 * 4 * PARAMETERS
    assert findings["saves"].detail == (
        f"a checkpoint of {saved / 1e9:.1f} GB takes {saved / 184.5e6:,.0f} s at the 184 MB/s"
        " measured"
    )
    # 8 devices divide the memory of the machine
    assert f"of {0.92 * 64 / 8:.1f} GiB per device" in findings["memory"].detail
    assert findings["token"].verdict == "note"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "splash"}, "model.attention = splash is of a TPU, but jax finds the CPU"),
        ({"compiler_preset": "async_collectives"}, "is for gpu, but jax finds the CPU only"),
    ],
)
def test_a_config_for_an_accelerator_on_the_cpu(settings, message, tmp_path):
    config = make_config({"output": str(tmp_path), "mesh": {"fsdp": 1}, "model": settings})
    finding = by_subject(doctor.examine(config))["accelerator"]
    assert finding.verdict == "error"
    assert message in finding.detail


def test_a_mesh_that_does_not_fit_hides_no_other_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WRITTEN_BYTES", 2**20)
    config = load_config(SEVEN_B, ["mesh.order=3", "population.members=3", f"output={tmp_path}"])
    config = config.model_copy(update={"output": str(tmp_path)})
    findings = by_subject(doctor.examine(config))
    assert [findings[name].verdict for name in ("mesh", "base", "disk")] == ["error"] * 3
    assert "memory" not in findings


def test_what_is_absent_is_named(tmp_path):
    run = tmp_path / "run"
    findings = by_subject(doctor.examine(quickstart(run, f"model.base={tmp_path / 'none'}")))
    assert findings["base"].detail.startswith(f"model directory {tmp_path / 'none'} not found")
    assert "memory" not in findings  # not even the shape is known
    findings = by_subject(doctor.examine(quickstart(run, f"data.train={tmp_path / 'none.jsonl'}")))
    assert findings["data"].verdict == "error"
    assert "none.jsonl" in findings["data"].detail
    findings = by_subject(doctor.examine(quickstart(run, "data.max_length=100000")))
    assert findings["base"].verdict == "error"
    assert "data.max_length" in findings["base"].detail
    assert not run.exists()


def test_what_a_run_has_written_counts_as_free(tmp_path, monkeypatch):
    run = str(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").write_bytes(bytes(3 * 2**20))
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, 2 * 2**20))
    needed = 4 * 2**20
    assert storage.check_output(run, needed, run)[0].verdict == "ok"
    assert storage.check_output(run, needed)[0].verdict == "error"
    assert storage.check_output(run, 6 * 2**20, run)[0].verdict == "error"


def test_drivers_are_asked_by_their_c_interfaces(monkeypatch):
    class Library:
        def __init__(self, name):
            self.name = name

        def nvmlInit_v2(self):
            return 0

        def nvmlSystemGetDriverVersion(self, text, length):
            text.value = b"580.95.05"
            return 0

        def cuDriverGetVersion(self, number):
            number._obj.value = 13020
            return 0

        @property
        def cudnnGetVersion(self):
            version = type("Version", (), {"__call__": lambda self: 91002})
            return version()

    monkeypatch.setattr(ctypes, "CDLL", Library)
    described = devices.describe_driver("gpu")
    assert described == "driver 580.95.05, CUDA of the driver 13.2, cuDNN 9.10.2"

    def absent(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    described = devices.describe_driver("gpu")
    assert described == "driver not known, CUDA of the driver not known, cuDNN not known"


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    assert by_subject(storage.check_output(str(path / "run")))["output"].verdict == "error"
    monkeypatch.setattr(storage, "_MIN_DISK_BYTES", 2**70)
    findings = storage.check_output(str(tmp_path))
    assert [(finding.subject, finding.verdict) for finding in findings] == [
        ("disk", "error"),
        ("output", "ok"),
    ]


def test_a_bucket_out_of_reach_is_one_line():
    _, _, finding = storage.check_output("nowhere://bucket/run")
    assert finding == (
        "output",
        "error",
        "nowhere://bucket/run: nowhere:// is not supported, only gs:// and s3://",
    )


def test_a_bucket(bucket):
    findings = storage.check_output(f"{bucket}/run")[1:]
    assert [(finding.subject, finding.verdict) for finding in findings] == [
        ("copy", "ok"),
        ("output", "ok"),
    ]
    finding = storage.check_output("s3://no-such-bucket/run")[-1]
    assert finding.verdict == "error"
    assert "\n" not in finding.detail
    assert "The specified bucket does not exist" in finding.detail


def call(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    return preloaded.run(["doctor", *arguments], cwd=cwd, env=environment)


def test_exit_codes(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "model: {base: 'embedded:quickstart'}\ndata: {max_length: 64}\nmesh: {order: 1, fsdp: 1}\n"
    )
    well = call("one.yaml", cwd=tmp_path)
    assert well.returncode == 0, well.stdout + well.stderr
    assert well.stdout.endswith("fit to run\n")
    ill = call("one.yaml", "--set", "distributed.coordinator=auto", cwd=tmp_path)
    assert ill.returncode == 1
    assert "could not start with coordinator auto" in " ".join(ill.stdout.split())
    versions = call("--versions", cwd=tmp_path)
    assert versions.returncode == 0
    assert versions.stdout.splitlines()[0].startswith("python 3.")


PROGRAM = """
import pathlib, sys
from jax_ordermerge import processes
from jax_ordermerge.commands.doctor import devices, storage

port, index, shared, apart = sys.argv[1:]
processes.start_distributed(f"127.0.0.1:{port}", 2, int(index), 60)
storage._SHOW_UP = 8.0
for finding in devices.check_exchange():
    print(finding.detail)
for directory in (shared, apart):
    for finding in storage.check_shared(pathlib.Path(directory)):
        print(finding.verdict, finding.detail)
print(storage.measure_speed(pathlib.Path(apart), 2**20))
"""


@pytest.mark.slow
def test_two_processes_see_one_directory_or_not(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for name in ("shared", "0", "1"):
        (tmp_path / name).mkdir()
    running = []
    for index in "01":
        arguments = [port, index, str(tmp_path / "shared"), str(tmp_path / index)]
        running.append(
            preloaded.Command(arguments, code=PROGRAM, env={**os.environ, "XLA_FLAGS": ""})
        )
    try:
        outputs = [process.communicate(timeout=240) for process in running]
    finally:
        for process in running:
            process.kill()
    speeds = set()
    for index, (stdout, stderr) in enumerate(outputs):
        assert running[index].returncode == 0, stderr[-3000:]
        lines = [line for line in stdout.splitlines() if not line.startswith("[Gloo]")]
        exchange, shared, apart, speed = lines
        assert exchange.startswith("a sum over 2 devices is right; each receives")
        assert shared == f"ok all 2 processes see one {tmp_path / 'shared'}"
        assert apart.startswith(
            f"error process {index} does not see what processes {1 - index} write to"
        )
        speeds.add(float(speed))
    assert len(speeds) == 1  # both know the slowest
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0", "1", "shared"]


@pytest.mark.parametrize("check", ["check_inputs", "plan_needs", "check_output"])
def test_peers_of_a_process_with_an_unexpected_error_end_too(check, monkeypatch, tmp_path):
    """Both sides of the exchange in this process: of the one that fails, and of its peer."""
    flags = []

    def exchange(flag):  # the other process has failed, or this one
        flags.append(int(flag))
        return np.array([int(flag), peer_failed])

    for name in ("check_devices", "check_exchange"):
        monkeypatch.setattr(devices, name, lambda *arguments: [])
    monkeypatch.setattr(devices, "all_agree", lambda flag: flag)
    # compiling a plan takes seconds, and nothing of it is looked at
    monkeypatch.setattr(inputs, "check_inputs", lambda config: (object(), []))
    monkeypatch.setattr(inputs, "plan_needs", lambda *arguments, **options: None)
    monkeypatch.setattr(inputs, "check_needs", lambda needs: [])
    monkeypatch.setattr(processes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes.multihost_utils, "process_allgather", exchange)
    # without the links of two processes nothing may be asked of them
    monkeypatch.setattr(storage, "check_shared", lambda directory: pytest.fail("waits"))
    run, peer_failed = quickstart(tmp_path / "run"), 1
    with pytest.raises(UserError, match="process 1 could not check base, data and plan; see"):
        list(doctor.examine(run))
    assert flags == [0]
    peer_failed = 0

    def fail(*arguments, **options):
        raise RuntimeError("a defect")

    module = storage if check == "check_output" else inputs
    monkeypatch.setattr(module, check, fail)
    with pytest.raises(RuntimeError, match="a defect"):
        list(doctor.examine(run))
    # it has told its peer before it ends
    assert flags[-1] == 1
