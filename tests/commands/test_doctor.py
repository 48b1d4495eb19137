"""The doctor sees what is wrong, and says nothing of what is right."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

from jax_ordermerge.commands import doctor
from jax_ordermerge.config import make_config

ROOT = pathlib.Path(__file__).parents[2]


def pretend(monkeypatch, **versions):
    """Let packages seem to have other versions; None for one that is not there."""
    real = importlib.metadata.version

    def version(name):
        found = versions.get(name.replace("-", "_"), "real")
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name) if found == "real" else found

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_versions_of_this_machine_go_together():
    (found,) = doctor.versions()
    assert found.verdict == "ok", found.detail
    assert f"jax {importlib.metadata.version('jax')}" in found.detail


@pytest.mark.parametrize(
    ("versions", "says"),
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
def test_what_does_not_go_together_is_named(versions, says, monkeypatch):
    pretend(monkeypatch, **versions)
    found = doctor.versions()
    assert {one.verdict for one in found} == {"bad"}
    assert any(says in one.detail for one in found), found


def test_a_healthy_machine(tmp_path):
    config = make_config(
        {"output": str(tmp_path / "runs" / "one"), "mesh": {"order": 2, "fsdp": -1}}
    )
    found = {one.what: one for one in doctor.examine(config)}
    assert {one.verdict for one in found.values()} == {"ok"}, found
    assert found["devices"].detail.startswith("8 x cpu")
    assert found["mesh"].detail == "order 2 x fsdp 4"
    assert list(tmp_path.iterdir()) == []


def test_a_mesh_that_does_not_fit(tmp_path):
    found = {
        one.what: one
        for one in doctor.examine(
            make_config(
                {
                    "output": str(tmp_path),
                    "mesh": {"order": 3, "fsdp": -1},
                    "population": {"members": 3},
                }
            )
        )
    }
    assert found["mesh"].verdict == "bad"
    assert "8 devices cannot be divided by 3" in found["mesh"].detail


def test_an_output_that_cannot_be_written(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    found = {one.what: one for one in doctor.check_output(str(file / "run"))}
    assert found["output"].verdict == "bad"
    monkeypatch.setattr(doctor, "_LEAST_DISK", 2**70)
    assert {one.what: one.verdict for one in doctor.check_output(str(tmp_path))} == {
        "disk": "bad",
        "output": "ok",
    }


def test_a_bucket_out_of_reach_is_one_line():
    _, _, found = doctor.check_output("nowhere://bucket/run")
    assert found == (
        "output",
        "bad",
        "nowhere://bucket/run: addresses of nowhere:// are not offered, only gs:// and s3://",
    )


def test_a_bucket(bucket):
    assert [(one.what, one.verdict) for one in doctor.check_output(f"{bucket}/run")][1:] == [
        ("copy", "ok"),
        ("output", "ok"),
    ]
    found = doctor.check_output("s3://no-such-bucket/run")[-1]
    assert found.verdict == "bad"
    assert "\n" not in found.detail
    assert "The specified bucket does not exist" in found.detail


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
