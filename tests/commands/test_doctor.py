"""`ordermerge doctor` reports every error of a machine, and none of a healthy one."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

from jax_ordermerge.commands import doctor
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment.context import start_devices

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


def test_a_healthy_machine(tmp_path):
    config = make_config(
        {"output": str(tmp_path / "runs" / "one"), "mesh": {"order": 2, "fsdp": -1}}
    )
    findings = by_subject(doctor.examine(config))
    assert {finding.verdict for finding in findings.values()} == {"ok"}, findings
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


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("")
    assert by_subject(doctor.check_output(str(path / "run")))["output"].verdict == "error"
    monkeypatch.setattr(doctor, "_MIN_DISK_BYTES", 2**70)
    findings = doctor.check_output(str(tmp_path))
    assert [(finding.subject, finding.verdict) for finding in findings] == [
        ("disk", "error"),
        ("output", "ok"),
    ]


def test_a_bucket_out_of_reach_is_one_line():
    _, _, finding = doctor.check_output("nowhere://bucket/run")
    assert finding == (
        "output",
        "error",
        "nowhere://bucket/run: nowhere:// is not supported, only gs:// and s3://",
    )


def test_a_bucket(bucket):
    findings = doctor.check_output(f"{bucket}/run")[1:]
    assert [(finding.subject, finding.verdict) for finding in findings] == [
        ("copy", "ok"),
        ("output", "ok"),
    ]
    finding = doctor.check_output("s3://no-such-bucket/run")[-1]
    assert finding.verdict == "error"
    assert "\n" not in finding.detail
    assert "The specified bucket does not exist" in finding.detail


def call(*arguments, cwd):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
    }
    return subprocess.run(
        [sys.executable, "-m", "jax_ordermerge", "doctor", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_exit_codes(tmp_path):
    (tmp_path / "one.yaml").write_text("mesh: {order: 1, fsdp: 1}\n")
    well = call("one.yaml", cwd=tmp_path)
    assert well.returncode == 0, well.stdout + well.stderr
    assert well.stdout.endswith("fit to run\n")
    ill = call("one.yaml", "--set", "distributed.coordinator=auto", cwd=tmp_path)
    assert ill.returncode == 1
    assert "could not start with coordinator auto" in " ".join(ill.stdout.split())
    versions = call("--versions", cwd=tmp_path)
    assert versions.returncode == 0
    assert versions.stdout.splitlines()[0].startswith("python 3.")
