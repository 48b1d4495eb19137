"""Tasks of SkyPilot: valid, with scripts that run, and without secrets."""

import os
import re
import subprocess

import jsonschema
import pytest
import yaml

from jax_ordermerge.commands.launch import make_job
from jax_ordermerge.config import make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.launch import render
from tests.launch.test_launch import EXPERIMENT

TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}


def closed(**properties):
    return {"type": "object", "additionalProperties": False, "properties": properties}


# Names and types of the fields that we use, written down from SkyPilot 0.14.1, whose own schema
# (sky/utils/schemas.py, get_task_schema and get_resources_schema) accepts the same tasks.
RESOURCES = closed(
    accelerators=TEXT,
    accelerator_args=closed(runtime_version=TEXT, tpu_name=TEXT, tpu_vm={"type": "boolean"}),
    infra=TEXT,
    image_id=TEXT,
    disk_size=COUNT,
    memory=TEXT,
    labels={"type": "object", "additionalProperties": TEXT},
    use_spot={"type": "boolean"},
    job_recovery=closed(
        strategy=TEXT,
        max_restarts_on_errors=COUNT,
        recover_on_exit_codes={"type": "array", "items": COUNT | {"maximum": 255}},
    ),
)
TASK = closed(
    name=TEXT,
    num_nodes=COUNT,
    resources=RESOURCES,
    file_mounts={"type": "object", "additionalProperties": TEXT},
    volumes={"type": "object", "additionalProperties": TEXT},
    secrets={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup=TEXT,
    run=TEXT,
)
SHARED = {"package": "jax_ordermerge[cuda] @ git+https://example.org/it's", "volume": "runs"}
GPUS = SHARED | {"accelerators": "H100:8", "nodes": "4"}
SLICE = SHARED | {"accelerators": "tpu-v5p-64", "runtime": "v2-alpha-tpuv5"}


def task(options, **changes):
    text = render.render(make_job(make_config(EXPERIMENT | changes)), "skypilot", options)
    document = yaml.safe_load(text)
    jsonschema.Draft202012Validator(TASK).validate(document)
    return document


ALL = {
    "token": "true",
    "labels": "team=a,cost=b",
    "spot": "true",
    "infra": "gcp/us-east5",
    "disk": "500",
    "memory": "400+",
    "image": "docker:ghcr.io/me/i:1",
    "setup": "module load x",
}


@pytest.mark.parametrize("options", [GPUS, SLICE, GPUS | ALL, SLICE | {"constraints": "none"}])
def test_a_task_is_valid(options):
    document = task(options)
    assert document["resources"]["accelerators"] == options["accelerators"]
    assert document["num_nodes"] == int(options.get("nodes", 1))
    assert document["volumes"] == {"/mnt/shared": "runs"}
    assert document["resources"]["job_recovery"]["recover_on_exit_codes"] == [143]
    for script in (document["setup"], document["run"]):
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_field_that_sky_does_not_know_is_noticed():
    document = task(GPUS)
    document["resources"]["use_spots"] = True
    with pytest.raises(jsonschema.ValidationError, match="use_spots"):
        jsonschema.Draft202012Validator(TASK).validate(document)


def test_the_token_is_a_secret_without_a_value(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_notARealToken")
    assert task(GPUS | {"token": "true"})["secrets"] == {"HF_TOKEN": None}
    assert "hf_notARealToken" not in str(task(GPUS | {"token": "true"}))
    assert "secrets" not in task(GPUS)


@pytest.mark.parametrize(
    ("options", "arguments", "platforms"),
    [
        (
            GPUS,
            "run config.yaml --set distributed.coordinator=10.0.0.1:8476 --set distributed.index=2",
            "cuda,cpu",
        ),
        (SLICE, "run config.yaml", "tpu,cpu"),
    ],
)
def test_what_a_node_runs(options, arguments, platforms, tmp_path):
    (tmp_path / "ordermerge" / "venv" / "bin").mkdir(parents=True)
    program = tmp_path / "ordermerge" / "venv" / "bin" / "ordermerge"
    program.write_text('#!/bin/bash\necho "$JAX_PLATFORMS $HF_HOME $*"\n')
    program.chmod(0o755)
    environment = {
        "HOME": str(tmp_path),
        "PATH": os.environ["PATH"],
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3\n10.0.0.4",
        "SKYPILOT_NODE_RANK": "2",
    }
    script = task(options)["run"]
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == f"{platforms} /mnt/shared/huggingface {arguments}\n", done.stderr
    there = yaml.safe_load((tmp_path / "ordermerge" / "config.yaml").read_text())
    assert there["data"] == {"train": "generated:quickstart"}


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        (GPUS | {"accelerators": "H100 8"}, {}, "accelerators = 'H100 8'"),
        (SLICE | {"nodes": "2"}, {}, "a TPU slice is one resource; give nodes=1"),
        (SLICE | {"accelerators": "tpu-v9-8"}, {}, "expected v4-N"),
        (GPUS | {"runtime": "x"}, {}, "runtime is of TPUs, not of H100:8"),
        (GPUS | {"nodes": "3"}, {"mesh": {"order": 4, "fsdp": 4}}, "of the 24 devices"),
        (
            {key: value for key, value in GPUS.items() if key != "volume"},
            {"output": "s3://a/b"},
            "several hosts need a common disk .* give volume=NAME",
        ),
        ({"accelerators": "H100:8", "package": "x"}, {}, "nothing is mounted there"),
    ],
)
def test_refused(options, change, message):
    with pytest.raises(UserError, match=message) as error:
        task(options, **change)
    assert not re.search("\n", str(error.value))
