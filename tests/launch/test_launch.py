"""Launch scripts and manifests: valid, complete, and refused where they could not run."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from typing import ClassVar

import jsonschema
import kubernetes_validate
import pytest
import typer.testing
import yaml
from pydantic import Field

from jax_ordermerge.cli import app
from jax_ordermerge.commands.launch import make_job
from jax_ordermerge.config import load_config, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.launch import render
from jax_ordermerge.launch.submit import submit
from jax_ordermerge.launch.target import TARGETS, Target

ROOT = pathlib.Path(__file__).parents[2]
JOBSET = json.loads((pathlib.Path(__file__).parent / "jobset-v1alpha2.json").read_text())
KUBERNETES = "1.32"
EXPERIMENT = {
    "name": "Llama_2 7b",
    "model": {"base": "embedded:quickstart"},
    "data": {"train": "generated:quickstart"},
    "output": "/mnt/shared/runs/{name}",
    "mesh": {"order": 4, "fsdp": -1},
    "population": {"members": 4},
}
JOB = make_job(make_config(EXPERIMENT))
TPU = {"image": "r/i:1", "accelerator": "tpu-v5p-slice", "topology": "4x4x2"}
GPU = {"image": "r/i:1", "accelerator": "nvidia-h100-80gb", "nodes": "2", "gpus": "8"}
VOLUME = {
    "volume": "runs",
    "storage": "1Ti",
    "token_secret": "hub",
    "spot": "true",
    "service_account": "me",
}
OPTIONS = {
    "tpu-vm": {
        "type": "v5p-64",
        "runtime": "v2-alpha-tpuv5",
        "package": "jax_ordermerge[tpu] @ git+https://example.org/it's",
        "nfs": "10.0.0.2:/share",
    },
    "gke": GPU,
    "slurm": {"nodes": "4", "gpus": "8"},
    "skypilot": {"accelerators": "H100:8", "nodes": "4", "package": "x", "volume": "runs"},
    "ssh": {"hosts": "me@one,two", "gpus": "8"},
}


def validate(text):
    """Validate the documents of a manifest for Kubernetes or JobSet; return them by kind."""
    documents = list(yaml.safe_load_all(text))
    for document in documents:
        if document["kind"] != "JobSet":
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        jsonschema.validate(document, JOBSET)
        for job in document["spec"]["replicatedJobs"]:
            template = {
                "apiVersion": "batch/v1",
                "kind": "Job",
                "metadata": {"name": "job"},
                **job["template"],
            }
            kubernetes_validate.validate(template, KUBERNETES, strict=True)
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("options", [TPU, TPU | {"slices": "2"} | VOLUME, GPU, GPU | VOLUME])
def test_manifest_is_valid(options):
    manifests = validate(render.render(JOB, "gke", options))
    assert ("PersistentVolumeClaim" in manifests) == ("storage" in options)
    (job,) = manifests["JobSet"]["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    tpu = "topology" in options
    assert job["replicas"] == int(options.get("slices", 1))
    assert job["template"]["spec"]["completions"] == (8 if tpu else 2)
    assert pod["containers"][0]["resources"]["limits"] == (
        {"google.com/tpu": 4} if tpu else {"nvidia.com/gpu": 8}
    )
    mounts = pod["containers"][0]["volumeMounts"]
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in mounts}
    inside = yaml.safe_load(manifests["ConfigMap"]["data"]["config.yaml"])
    if tpu:
        assert inside["distributed"] == {"coordinator": "auto"}
    else:
        name = manifests["JobSet"]["metadata"]["name"]
        assert inside["distributed"] == {
            "coordinator": f"{name}-nodes-0-0.{name}:8476",
            "processes": 2,
        }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "failurePolicy", "maxRestarts"), "3"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMod"), "Indexed"),
        (
            (
                "spec",
                "replicatedJobs",
                0,
                "template",
                "spec",
                "template",
                "spec",
                "containers",
                0,
                "imag",
            ),
            "x",
        ),
    ],
)
def test_the_schemas_notice_a_mistake(path, value):
    documents = list(yaml.safe_load_all(render.render(JOB, "gke", TPU)))
    node = documents[-1]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        validate(yaml.safe_dump_all(documents))


def written_config(target, text):
    if target == "gke":
        (data,) = [
            document["data"]
            for document in yaml.safe_load_all(text)
            if document["kind"] == "ConfigMap"
        ]
        return data["config.yaml"]
    if target == "skypilot":
        text = yaml.safe_load(text)["run"]
    return re.search(r"<<'CONFIG'\n(.*?)^CONFIG$", text, re.DOTALL | re.MULTILINE).group(1)


def test_a_run_in_a_bucket_has_a_place_for_its_copy_and_fetches_nothing():
    job = make_job(make_config(EXPERIMENT | {"output": "s3://orders/runs/{name}"}))
    manifests = validate(render.render(job, "gke", GPU | VOLUME))
    (replicated,) = manifests["JobSet"]["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    assert {"name": "ORDERMERGE_CACHE", "value": "/mnt/shared/copies"} in container["env"]
    # workers that mount a share have a place for the copy, too
    assert "--fetch" not in render.render(job, "tpu-vm", OPTIONS["tpu-vm"])


@pytest.mark.parametrize("target", TARGETS)
def test_the_config_is_in_the_text(target, tmp_path):
    config = make_config(
        {
            **EXPERIMENT,
            "distributed": {"timeout": 7},
            "data": {"train": 'it\'s $HOME `x` "y".jsonl'},
        }
    )
    file = tmp_path / "config.yaml"
    file.write_text(
        written_config(target, render.render(make_job(config), target, OPTIONS[target]))
    )
    there = load_config(file)
    assert there.distributed.coordinator is not None
    assert there.distributed.timeout == 7
    assert there.model_copy(update={"distributed": config.distributed}) == config


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ("tpu-vm", OPTIONS["tpu-vm"]),
        (
            "tpu-vm",
            OPTIONS["tpu-vm"] | {"slices": "2", "spot": "true", "project": "p", "zone": "z"},
        ),
        ("slurm", OPTIONS["slurm"]),
        (
            "slurm",
            {
                "nodes": "4",
                "gpus": "8",
                "tasks": "1",
                "image": "a.sqsh",
                "mounts": "/a:/b",
                "partition": "p",
                "time": "12:00:00",
            },
        ),
        (
            "slurm",
            {
                "nodes": "4",
                "gpus": "8",
                "image": "a.sif",
                "container": "apptainer",
                "setup": "module load x",
            },
        ),
        ("ssh", OPTIONS["ssh"] | {"setup": "source venv/bin/activate"}),
    ],
)
def test_scripts_satisfy_shellcheck(target, options, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(render.render(JOB, target, options))
    checker = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checker, "shellcheck comes with the extra: pip install -e '.[test]'"
    done = subprocess.run([checker, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_one_process_a_node_sees_all_its_gpus():
    per_gpu = render.render(JOB, "slurm", {"nodes": "4", "gpus": "8"})
    per_node = render.render(JOB, "slurm", {"nodes": "4", "gpus": "8", "tasks": "1"})
    assert "--ntasks-per-node=8\n" in per_gpu
    assert "JAX_LOCAL_DEVICE_IDS" not in per_gpu
    assert "--ntasks-per-node=1\n" in per_node
    assert "JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5,6,7\n" in per_node


@pytest.mark.parametrize(
    ("target", "options", "change", "message"),
    [
        ("slum", {}, {}, r"unknown launch target 'slum' \(did you mean 'slurm'\?\)"),
        ("slurm", {"node": "4"}, {}, r"slurm: unknown key node \(did you mean 'nodes'\?\)"),
        ("slurm", {"nodes": "four"}, {}, "slurm: nodes = 'four'"),
        ("slurm", {"partition": "a b"}, {}, "slurm: partition = 'a b'"),
        (
            "slurm",
            {"nodes": "1", "gpus": "2"},
            {},
            "mesh order=4, fsdp=-1 does not use all of the 2 devices",
        ),
        ("slurm", {"gpus": "8", "tasks": "3"}, {}, "give 1 .all GPUs. or 8"),
        ("gke", {"image": "x"}, {}, "gke: accelerator is missing"),
        ("gke", TPU | {"topology": ""}, {}, "gke: topology = ''"),
        (
            "gke",
            {"image": "x", "accelerator": "tpu-v5p-slice"},
            {},
            "topology is missing for tpu-v5p-slice",
        ),
        ("gke", GPU | {"slices": "2"}, {}, "are of TPUs, not of nvidia-h100-80gb"),
        (
            "gke",
            GPU,
            {"output": "gs://orders/runs"},
            "several hosts need a common disk .*; give volume=NAME",
        ),
        (
            "gke",
            TPU,
            {"output": "runs/{name}"},
            r"is deleted with its machine; give --set output=/mnt/shared/runs/\{name\}",
        ),
        (
            "tpu-vm",
            OPTIONS["tpu-vm"] | {"spot": "1", "reserved": "1"},
            {},
            "spot and reserved exclude each other",
        ),
        ("ssh", {}, {}, "ssh: hosts is missing"),
    ],
)
def test_refused(target, options, change, message):
    with pytest.raises(UserError, match=message):
        render.render(make_job(make_config(EXPERIMENT | change)), target, options)


# --------------------------------------------------------------------------- a target from outside


class Queue(Target):
    """A toy queue. Its template is the file queue.sh beside this test."""

    template: ClassVar[str] = "queue.sh"
    submit_command: ClassVar[tuple[str, ...]] = ("sh",)
    priority: int = Field(0, description="place in the queue")

    def distributed(self, job):
        return {"coordinator": f"{job.slug}:1", "processes": 2}


@pytest.fixture
def queue():
    TARGETS.register("queue", Queue)
    yield "queue"
    TARGETS.unregister("queue")


def test_a_registered_target_is_rendered_described_and_submitted(queue, tmp_path):
    text = render.render(JOB, queue, {"priority": "3"})
    assert (
        text.splitlines()[0] == "echo llama-2-7b with priority 3 in '/mnt/shared/runs/Llama_2 7b'"
    )
    config = yaml.safe_load(text.partition("CONFIG\n")[2].partition("CONFIG\n")[0])
    assert config["distributed"] == {"coordinator": "llama-2-7b:1", "processes": 2}
    assert render.describe(queue) == [("priority", "0", "place in the queue")]
    script = tmp_path / "job"
    script.write_text("exit 5")
    assert submit(queue, script) == 5
    with pytest.raises(UserError, match=r"queue: unknown key prio \(did you mean 'priority'\?\)"):
        render.render(JOB, queue, {"prio": "3"})


def command(*arguments, cwd, path=None):
    environment = (
        os.environ
        | {"PYTHONPATH": str(ROOT)}
        | ({"PATH": f"{path}:{os.environ['PATH']}"} if path else {})
    )
    return subprocess.run(
        [sys.executable, "-m", "jax_ordermerge", "launch", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_tpu_script_calls_watch(tmp_path):
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "watch.sh").write_text(
        '#!/bin/sh\nprintf "<%s>" "$@"; cat "$PWD"/one.yaml >/dev/null; exit 7\n'
    )
    (tmp_path / "scripts" / "watch.sh").chmod(0o755)
    options = [
        f"{name}={value}"
        for name, value in (OPTIONS["tpu-vm"] | {"scripts": "scripts", "spot": "true"}).items()
    ]
    done = command(
        "one.yaml", "--target", "tpu-vm", *options, "--out", "go.sh", "--submit", cwd=tmp_path
    )
    assert done.returncode == 7, done.stderr
    assert "<--name><llama-2-7b><--type><v5p-64>" in done.stdout
    assert "<--package><jax_ordermerge[tpu] @ git+https://example.org/it's>" in done.stdout
    assert "<--fetch></mnt/shared/runs/Llama_2 7b/report.html>" in done.stdout


@pytest.mark.slow
def test_ssh_runs_on_all_hosts(tmp_path):
    """Two hosts that are folders here: a stand-in for ssh, real processes, a real run."""
    from tests.experiment import tiny

    tiny.make_base(tmp_path / "base")
    config = tiny.make_config(tmp_path, mesh={"order": 2, "fsdp": -1})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(
        '#!/bin/bash\n[[ $1 == -n ]] && shift\nexec bash -c "$2"\n'
    )
    (tmp_path / "bin" / "ssh").chmod(0o755)
    run = f"env XLA_FLAGS= {sys.executable} -m jax_ordermerge"
    options = [
        "hosts=127.0.0.1,localhost",
        "gpus=0",
        f"directory={tmp_path}/work",
        "port=18476",
        f"command={run}",
    ]
    done = command(
        str(config), "--target", "ssh", *options, "--submit", cwd=tmp_path, path=tmp_path / "bin"
    )
    logs = [(tmp_path / "logs" / "tiny" / f"{index}.log").read_text() for index in range(2)]
    assert done.returncode == 0, logs
    assert (tmp_path / "run" / "report.html").is_file()


def typed():
    """The launch commands of the documentation, as they are typed."""
    for file in ("README.md", "docs/pods.md", "docs/gpu_clusters.md"):
        text = (ROOT / file).read_text().replace("\\\n", " ")
        yield from (
            pytest.param(line, id=f"{file}-{line[20:90]}")
            for line in re.findall(r"^    (ordermerge launch .*)$", text, re.MULTILINE)
        )


@pytest.mark.parametrize("line", list(typed()))
def test_commands_of_the_documentation(line, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(line)[1:]
    arguments[arguments.index("--out") + 1] = str(tmp_path / "written")
    done = typer.testing.CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "Llama-2-7b" in (tmp_path / "written").read_text() or "--target gke" in line


def test_submit_without_the_program(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="needs sbatch, which is not installed here"):
        submit("slurm", tmp_path / "x")
