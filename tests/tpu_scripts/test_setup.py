"""What setup.sh brings to the workers: secrets, pinned versions, a mounted share; and what is tried again."""

import json
import re

import pytest

from tests.tpu_scripts.test_tpu_scripts import CREATE, EVERYTHING, Cloud

TOKEN = "hf_notARealTokenButUnique"
CAPACITY = ("--type", "v6e-16", "--runtime", "v2-alpha-tpuv6e")


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


def everything_written(cloud):
    """Return all texts that a run leaves on this machine, but for the file of secrets itself."""
    return "".join(
        file.read_text()
        for file in cloud.root.rglob("*")
        if file.is_file()
        and file.name not in ("hub.env", "env", "plan.json")
        and not file.name.startswith("environment-")
    )


def environments(cloud):
    return [
        json.loads(file.read_text())
        for file in sorted((cloud.root / "shared").glob("environment-*"))
    ]


def test_a_file_of_secrets_reaches_the_run_and_no_log(cloud):
    file = cloud.root / "hub.env"
    file.write_text(f"HF_TOKEN={TOKEN}\n")
    file.chmod(0o644)
    refused = cloud.call("watch", *EVERYTHING, "--env-file", "hub.env")
    assert refused.returncode == 2
    assert "can be read by others: chmod 600 hub.env" in refused.stderr
    assert cloud.calls == []
    file.chmod(0o600)
    done = cloud.call("watch", *EVERYTHING, "--env-file", "hub.env", "--keep")
    assert done.returncode == 0, done.stderr
    assert [one["HF_TOKEN"] for one in environments(cloud)] == [TOKEN, TOKEN]
    assert {one["JAX_PLATFORMS"] for one in environments(cloud)} == {"tpu,cpu"}
    for worker in ("0", "1"):
        private = cloud.root / "slice" / worker / "ordermerge" / "private"
        assert private.stat().st_mode & 0o777 == 0o700
        assert (private / "env").stat().st_mode & 0o777 == 0o600
    assert TOKEN not in everything_written(cloud) + done.stdout + done.stderr


@pytest.mark.parametrize("known", [True, False])
def test_a_secret_is_read_on_the_worker(known, cloud):
    cloud.plan(secrets={"hub": TOKEN} if known else {})
    done = cloud.call("watch", *EVERYTHING, "--secret", "hub", "--keep")
    assert TOKEN not in everything_written(cloud) + done.stdout + done.stderr
    if known:
        assert done.returncode == 0, done.stderr
        assert [one["HF_TOKEN"] for one in environments(cloud)] == [TOKEN, TOKEN]
    else:
        assert done.returncode == 2
        assert "secret hub cannot be read by this VM" in "".join(cloud.logs().values())
        assert environments(cloud) == []


def test_a_lock_of_apt_is_waited_for(cloud):
    (cloud.root / "apt_locked").write_text("x\n" * 3)
    options = ("--package", "jax_ordermerge[tpu]", "--nfs", "10.0.0.2:/share", "--interval", "0.01")
    cloud.call("create", *CREATE, "--interval", "0.05")
    # the share is no mount here: the stand-in of sudo mounts nothing
    mount = str(cloud.root / "mount")
    done = cloud.call("setup", *options, "--mount", mount)
    assert done.returncode == 0, done.stderr
    calls = (cloud.root / "sudo.txt").read_text().splitlines()
    # 3 refusals, then an update and an installation per worker
    assert len([call for call in calls if call.startswith("apt-get")]) == 3 + 2 * 2
    assert f"mount -t nfs 10.0.0.2:/share {mount}" in calls


def test_versions_are_kept_to(cloud):
    (cloud.root / "pins.txt").write_text("jax==0.10.2\n")
    options = ("--package", "jax_ordermerge[tpu]", "--constraints", "pins.txt")
    cloud.call("create", *CREATE, "--interval", "0.05")
    assert cloud.call("setup", *options).returncode == 0
    for worker in ("0", "1"):
        copied = cloud.root / "slice" / worker / "ordermerge" / "constraints.txt"
        assert copied.read_text() == "jax==0.10.2\n"
    (install,) = {line for line in "\n".join(cloud.calls).splitlines() if "uv pip install" in line}
    assert "uv pip install --quiet --python venv/bin/python -c constraints.txt" in install
    absent = cloud.call("setup", "--package", "x", "--constraints", "absent.txt")
    assert (absent.returncode, "constraints absent.txt not found" in absent.stderr) == (2, True)


@pytest.mark.parametrize(("failures", "creations"), [(2, 1), (3, 2)])
def test_setup_is_tried_again_on_the_same_slice(failures, creations, cloud):
    fail = {"step": "tpu-vm ssh", "holding": "uv pip install", "times": failures}
    cloud.plan(fail=[fail])
    done = cloud.call("watch", *EVERYTHING)
    assert done.returncode == 0, done.stderr
    assert len(cloud.steps("queued-resources create")) == creations
    assert cloud.resources() == {}


def test_capacity_and_addresses(cloud):
    done = cloud.call(
        "watch",
        *CAPACITY,
        *EVERYTHING[len(CREATE) :],
        "--flex-start",
        "--max-duration",
        "24h",
        "--labels",
        "team=a,cost=b",
        "--internal-ips",
    )
    assert done.returncode == 0, done.stderr
    (create,) = [line for line in cloud.calls if "queued-resources create" in line]
    # these flags are of the alpha command, as is ssh through IAP
    assert create.startswith("alpha compute tpus queued-resources create slice ")
    assert {"--provisioning-model=flex-start", "--max-run-duration=24h", "--internal-ips",
            "--labels=team=a,cost=b"} <= set(create.split())  # fmt: skip
    text = "\n".join(cloud.calls)  # a command of several lines is several lines here
    connections = len(re.findall("compute tpus tpu-vm (?:ssh|scp)", text))
    assert connections == len(re.findall("^alpha compute tpus tpu-vm (?:ssh|scp)", text, re.M))
    assert connections == text.count("--tunnel-through-iap") > 0
    # nothing else is: deletions and looks at the state are the same in all tracks
    for step in ("queued-resources delete", "queued-resources describe"):
        (line,) = {line for line in cloud.calls if f"tpus {step} " in line}
        assert line.startswith(f"compute tpus {step} slice "), line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--flex-start",), "--flex-start needs --max-duration"),
        (("--max-duration", "1h"), "--max-duration is of --flex-start"),
        (("--spot", "--reservation", "r"), "exclude each other"),
    ],
)
def test_capacity_that_contradicts_itself(options, message, cloud):
    done = cloud.call("create", *CAPACITY, *options)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert cloud.calls == []
