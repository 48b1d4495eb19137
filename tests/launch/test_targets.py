"""What each target asks of its machines: accelerators, secrets, capacity, queues, what follows a failure."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from jax_ordermerge.commands.launch import make_job
from jax_ordermerge.config import load_config, make_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.launch import render
from tests.launch.test_launch import EXPERIMENT, GPU, OPTIONS, ROOT, TPU, VOLUME, validate

MODELS = {
    "7b": EXPERIMENT | {"name": "seven"},
    "70b": EXPERIMENT
    | {
        "name": "seventy",
        "mesh": {"order": 2, "fsdp": -1, "tensor": 4},
        "population": {"members": 2},
        "training": {"checkpoint_minutes": 10},
    },
}
TPU_VM = OPTIONS["tpu-vm"]
MATRIX = [
    ("tpu-vm", TPU_VM),
    ("tpu-vm", TPU_VM | {"slices": "2", "reservation": "r", "labels": "a=b", "secret": "hub"}),
    (
        "tpu-vm",
        TPU_VM | {"type": "v6e-64", "flex_start": "true", "max_duration": "24h", "env_file": "a b"},
    ),
    ("tpu-vm", TPU_VM | {"type": "v5litepod-16", "internal_ips": "true", "network": "n"}),
    ("gke", TPU | VOLUME),
    ("gke", TPU | VOLUME | {"slices": "2", "queue": "q", "priority_class": "high"}),
    ("gke", TPU | {"accelerator": "tpu7x", "topology": "4x4x4", "volume": "runs"}),
    ("gke", GPU | VOLUME | {"pull_secret": "pull", "labels": "team=a,cost=b", "memory": "400Gi"}),
    ("slurm", {"nodes": "1", "gpus": "8"}),
    ("slurm", {"nodes": "4", "cpus": "8", "env_file": "~/hub.env", "image": "ghcr.io/me/i:1"}),
    ("slurm", {"nodes": "4", "gpus": "8", "tasks": "1", "env_file": "hub.env", "crashes": "0"}),
    ("ssh", {"hosts": "one"}),
    ("ssh", {"hosts": "me@one,two", "env_file": "my hub.env"}),
]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("target", "options"), MATRIX)
def test_every_target_is_valid(model, target, options, tmp_path):
    text = render.render(make_job(make_config(MODELS[model])), target, options)
    if target == "gke":
        validate(text)
        return
    script = tmp_path / "script.sh"
    script.write_text(text)
    checker = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    for command in (["bash", "-n"], [checker]):
        done = subprocess.run([*command, script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def pod(text):
    (job,) = validate(text)["JobSet"]["spec"]["replicatedJobs"]
    return job["template"]["spec"]["template"]


def rendered(target, options, **changes):
    return render.render(make_job(make_config(EXPERIMENT | changes)), target, options)


# ------------------------------------------------------------------------------- accelerators


@pytest.mark.parametrize(
    ("target", "options", "platforms"),
    [
        ("gke", TPU | VOLUME, "tpu,cpu"),
        ("gke", GPU | VOLUME, "cuda,cpu"),
        ("slurm", {"nodes": "4"}, "cuda,cpu"),
        ("slurm", {"nodes": "2", "gpus": "0", "tasks": "2"}, "cpu"),
        ("ssh", {"hosts": "a,b"}, "cuda,cpu"),
    ],
)
def test_a_missing_accelerator_is_an_error(target, options, platforms):
    text = rendered(target, options)
    if target == "gke":
        (container,) = pod(text)["spec"]["containers"]
        assert {"name": "JAX_PLATFORMS", "value": platforms} in container["env"]
    else:
        assert re.findall(r"JAX_PLATFORMS=(\S+)", text) == [platforms]


def test_the_gpu_image_sees_gpus():
    """By enroot's 98-nvidia.sh and GKE's page on GPUs, see docker/Dockerfile.gpu."""
    text = (ROOT / "docker" / "Dockerfile.gpu").read_text()
    environment = dict(
        pair.split("=", 1)
        for line in re.findall(r"^ENV (.*)$", text, re.MULTILINE)
        for pair in line.split()
    )
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"
    # enroot's default is utility alone, without the driver's libcuda
    assert set(environment["NVIDIA_DRIVER_CAPABILITIES"].split(",")) == {"compute", "utility"}
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == "/usr/local/nvidia/lib64"


def test_a_chip_of_tpu7x_is_two_devices():
    options = TPU | {"accelerator": "tpu7x", "topology": "4x4x4", "volume": "runs"}
    for fsdp, fits in ((32, True), (16, False)):
        mesh = {"order": 4, "fsdp": fsdp}
        if fits:
            text = rendered("gke", options, mesh=mesh)
        else:
            with pytest.raises(UserError, match="does not use all of the 128 devices"):
                rendered("gke", options, mesh=mesh)
    spec = pod(text)["spec"]
    assert spec["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert spec["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


# ------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("image", "container", "written"),
    [
        ("ghcr.io/me/i:1", "pyxis", "--container-image=ghcr.io#me/i:1 "),
        ("localhost:5000/i", "pyxis", "--container-image=localhost:5000#i "),
        ("me/i:1", "pyxis", "--container-image=me/i:1 "),  # Docker Hub
        ("nvcr.io#nvidia/jax:1", "pyxis", "--container-image=nvcr.io#nvidia/jax:1 "),
        ("images/i.sqsh", "pyxis", "--container-image=images/i.sqsh "),
        ("/images/i", "pyxis", "--container-image=/images/i "),
        ("ghcr.io/me/i:1", "apptainer", " docker://ghcr.io/me/i:1 "),
        ("i.sif", "apptainer", " i.sif "),
    ],
)
def test_images_have_the_form_of_their_runtime(image, container, written):
    text = rendered("slurm", {"nodes": "4", "image": image, "container": container})
    assert written in text


# ------------------------------------------------------------------------------------ secrets


def test_no_secret_is_in_a_script(monkeypatch, tmp_path):
    token = "hf_notARealTokenButUnique"
    monkeypatch.setenv("HF_TOKEN", token)
    file = tmp_path / "hub.env"
    file.write_text(f"HF_TOKEN={token}\n")
    for target, options in MATRIX:
        if "env_file" in options:
            options = options | {"env_file": str(file)}
        assert token not in rendered(target, options)


def slurm(text, tmp_path, code, restarts):
    """Run a job script with stand-ins for the commands of SLURM; return its end."""
    commands = {
        "srun": f'echo "srun $SRUN_CPUS_PER_TASK $HF_TOKEN" >> seen; exit {code}',
        "scontrol": 'echo "$*" >> requeued',
        "sleep": "exit 0",
        "scancel": "exit 0",
    }
    (tmp_path / "bin").mkdir(exist_ok=True)
    for name, body in commands.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(text)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_RESTART_COUNT": str(restarts),
        "SLURM_CPUS_PER_TASK": "8",
    }
    return subprocess.run(
        ["bash", "job.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("code", "crashes", "requeues"),
    [(137, 2, 2), (134, 0, 0), (143, 0, 4), (1, 3, 0), (2, 3, 0), (0, 3, 0)],
)
def test_how_often_a_job_starts_again(code, crashes, requeues, tmp_path):
    text = rendered("slurm", {"nodes": "4", "crashes": str(crashes), "requeues": "4"})
    for restarts in range(5):
        assert slurm(text, tmp_path, code, restarts).returncode == code
    file = tmp_path / "requeued"
    lines = file.read_text().splitlines() if file.exists() else []
    assert lines == ["requeue 7"] * requeues


def test_processes_of_slurm_get_their_cores_and_the_token(tmp_path):
    text = rendered("slurm", {"nodes": "4", "cpus": "8", "env_file": "hub.env"})
    refused = slurm(text, tmp_path, 0, 0)
    assert (refused.returncode, "must exist with mode 600" in refused.stderr) == (2, True)
    (tmp_path / "hub.env").write_text("HF_TOKEN=secret\n")
    (tmp_path / "hub.env").chmod(0o640)
    assert slurm(text, tmp_path, 0, 0).returncode == 2
    (tmp_path / "hub.env").chmod(0o600)
    done = slurm(text, tmp_path, 0, 0)
    assert (tmp_path / "seen").read_text() == "srun 8 secret\n"
    assert (done.returncode, "secret" in done.stdout + done.stderr) == (0, False)


def test_hosts_get_the_token_by_ssh_and_keep_no_copy(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(
        '#!/bin/bash\n[[ $1 == -n ]] && shift\nprintf "%s\\n" "$2" >> ssh.txt\nexec bash -c "$2"\n'
    )
    run = 'echo "$HF_TOKEN $*" >> ../seen; ls -l *.env >> ../seen 2>/dev/null; exit 0'
    (tmp_path / "bin" / "fake").write_text(f"#!/bin/bash\n{run}\n")
    for name in ("ssh", "fake"):
        (tmp_path / "bin" / name).chmod(0o755)
    secrets = tmp_path / "my hub.env"
    secrets.write_text("HF_TOKEN=secret\n")
    options = {"hosts": "a,b", "env_file": str(secrets), "directory": "work", "command": "fake"}
    (tmp_path / "go.sh").write_text(rendered("ssh", options))
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}

    def go():
        return subprocess.run(
            ["bash", "go.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    secrets.chmod(0o644)
    refused = go()
    assert (refused.returncode, "chmod 600" in refused.stderr) == (2, True)
    secrets.chmod(0o600)
    done = go()
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert sorted(line for line in seen if line.startswith("secret ")) == [
        f"secret run llama-2-7b.yaml --set distributed.index={index}" for index in range(2)
    ]
    assert list((tmp_path / "work").glob("*.env")) == []
    logs = "".join(file.read_text() for file in (tmp_path / "logs").rglob("*.log"))
    assert "secret" not in logs + done.stdout + done.stderr + (tmp_path / "ssh.txt").read_text()


# ------------------------------------------------------------------------------ GKE and Kueue


def test_what_follows_a_failure_on_gke():
    """The rules as JobSet and Kubernetes apply them: the first that matches decides."""
    jobset = validate(rendered("gke", TPU | VOLUME | {"restarts": "3"}))["JobSet"]["spec"]
    assert jobset["failurePolicy"]["maxRestarts"] == 3
    rules = jobset["failurePolicy"]["rules"]
    pods = jobset["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]

    def action(exit_code, *, disrupted=False):
        """Return the action of the JobSet, None for a restart that counts."""
        for index, rule in enumerate(pods):
            if "onPodConditions" in rule:
                matches = disrupted
                message = f"Pod default/a has condition DisruptionTarget matching FailJob rule at index {index}"
            else:
                matches = exit_code in rule["onExitCodes"]["values"]
                message = f"Container ordermerge for pod default/a failed with exit code {exit_code} matching FailJob rule at index {index}"
            if matches:
                assert rule["action"] == "FailJob"
                for policy in rules:
                    patterns = policy.get("onJobFailureMessagePatterns", [""])
                    if any(re.search(pattern, message) for pattern in patterns):
                        assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]
                        return policy["action"]
        return None

    uncounted = "RestartJobSetAndIgnoreMaxRestarts"
    assert action(143, disrupted=True) == action(137, disrupted=True) == uncounted
    assert action(143) == uncounted  # its peers stop with a checkpoint
    assert action(2) == action(137) == "FailJobSet"
    assert action(1) is action(134) is None


def test_queue_priority_labels_and_secrets_of_gke():
    options = GPU | {
        "volume": "runs",
        "queue": "team-queue",
        "priority_class": "high",
        "labels": "team=a,cost=b",
        "pull_secret": "registry",
        "memory": "400Gi",
        "reservation": "mine",
    }
    text = rendered("gke", options)
    jobset = validate(text)["JobSet"]
    assert jobset["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "team-queue",
        "team": "a",
        "cost": "b",
    }
    template = pod(text)
    assert template["metadata"]["labels"] == {"team": "a", "cost": "b"}
    assert template["spec"]["priorityClassName"] == "high"
    assert template["spec"]["imagePullSecrets"] == [{"name": "registry"}]
    assert template["spec"]["nodeSelector"]["cloud.google.com/reservation-name"] == "mine"
    assert template["spec"]["containers"][0]["resources"]["requests"] == {"memory": "400Gi"}
    flexible = pod(rendered("gke", TPU | {"volume": "runs", "flex_start": "true"}))
    assert flexible["spec"]["nodeSelector"]["cloud.google.com/gke-flex-start"] == "true"


def test_spot_says_what_is_lost():
    assert "checkpoint_minutes=10" in rendered("gke", TPU | VOLUME)
    assert "checkpoint_minutes=10" in rendered("tpu-vm", TPU_VM | {"spot": "true"})
    assert "checkpoint_minutes=10" not in rendered("tpu-vm", TPU_VM)
    by_time = {"training": {"checkpoint_minutes": 10}}
    assert "checkpoint_minutes=10" not in rendered("gke", TPU | VOLUME, **by_time)


# ------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize(
    ("target", "options", "change", "message"),
    [
        ("gke", GPU | {"spot": "1", "flex_start": "1"}, {}, "spot and flex_start exclude"),
        ("gke", GPU | {"accelerator": "h100"}, {}, "accelerator = h100: .*begins with nvidia-"),
        ("gke", TPU | {"accelerator": "tpu-v9"}, {}, "accelerator = tpu-v9: .*tpu7x"),
        ("gke", TPU | {"topology": "4x4"}, {}, "a slice of v5p has 3 sides, as in v5p:4x4x4"),
        ("gke", GPU | {"labels": "a"}, {}, "labels = a: expected KEY=VALUE"),
        ("gke", GPU | {"labels": "a=b,a=c"}, {}, "each key once"),
        ("gke", GPU | {"labels": "a=B C"}, {}, "labels"),
        ("tpu-vm", TPU_VM | {"type": "v5p-7"}, {}, "counts cores, two per chip"),
        ("tpu-vm", TPU_VM | {"type": "v9-8"}, {}, "expected v4-N, v5p-N, v5litepod-N, v6e-N"),
        ("tpu-vm", TPU_VM | {"type": "tpu7x-8"}, {}, "use --target gke accelerator=tpu7x"),
        ("tpu-vm", TPU_VM | {"flex_start": "1"}, {}, "flex_start and max_duration belong"),
        (
            "tpu-vm",
            TPU_VM | {"flex_start": "1", "max_duration": "1h"},
            {},
            "offered for v5e and v6e, not for v5p-64",
        ),
        ("tpu-vm", TPU_VM | {"spot": "1", "reservation": "r"}, {}, "spot and reservation exclude"),
        ("tpu-vm", TPU_VM, {"mesh": {"order": 4, "fsdp": 4}}, "of the 32 devices"),
        (
            "tpu-vm",
            {key: value for key, value in TPU_VM.items() if key != "nfs"},
            {"output": "gs://orders/runs"},
            "several hosts need a common disk .* give nfs=HOST:/SHARE",
        ),
        (
            "tpu-vm",
            {key: value for key, value in TPU_VM.items() if key != "nfs"},
            {},
            "nothing is mounted there; give nfs=HOST:/SHARE",
        ),
        ("slurm", {"image": "a#b", "container": "apptainer"}, {}, "is the form of pyxis"),
        ("ssh", {"hosts": "a,b,c"}, {"mesh": {"order": 4, "fsdp": 4}}, "of the 24 devices"),
    ],
)
def test_refused(target, options, change, message):
    with pytest.raises(UserError, match=message) as error:
        rendered(target, options, **change)
    assert "\n" not in str(error.value)


def test_one_host_may_write_to_a_bucket():
    options = {key: value for key, value in TPU_VM.items() if key != "nfs"}
    options |= {"type": "v6e-8"}
    assert "--fetch" not in rendered("tpu-vm", options, output="gs://orders/runs")
    for target in ("slurm", "ssh"):
        text = rendered(target, OPTIONS[target] | {}, output="gs://orders/runs")
        assert "ORDERMERGE_CACHE" in text
        assert "ORDERMERGE_CACHE" not in rendered(target, OPTIONS[target])


def test_the_config_in_a_manifest_has_what_was_set(tmp_path):
    text = rendered("gke", TPU | VOLUME, training={"checkpoint_minutes": 7.5})
    data = validate(text)["ConfigMap"]["data"]["config.yaml"]
    (tmp_path / "config.yaml").write_text(data)
    assert yaml.safe_load(data)["training"] == {"checkpoint_minutes": 7.5}
    assert load_config(tmp_path / "config.yaml").training.checkpoint_minutes == 7.5
