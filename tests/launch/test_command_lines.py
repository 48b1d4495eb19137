"""gcloud and kubectl accept every command line that the pages show and the scripts call."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

from tests.launch.command_lines import FLAGS, ROOT, check, documented

SCRIPTS = ROOT / "tpu_scripts"
# every option of each script, so that every flag it can pass is there
ALL = {
    "create": [
        ["--type=v6e-8", "--runtime=v2", "--slices=2", "--flex-start", "--max-duration=24h"],
        ["--type=v5p-8", "--runtime=v2", "--spot", "--labels=a=b", "--internal-ips"],
        ["--type=v5p-8", "--runtime=v2", "--reserved", "--network=n", "--subnetwork=s"],
        ["--type=v5p-8", "--runtime=v2", "--reservation=r", "--service-account=me@x"],
    ],
    "setup": [
        ["--package=x", "--nfs=h:/s", "--secret=hub", "--constraints=one.yaml", "--env-file=e"],
        ["--package=x", "--internal-ips", "--slices=2"],
    ],
    "run": [["--config=one.yaml"], ["--config=one.yaml", "--internal-ips"]],
    "fetch": [["--from=/x"], ["--from=/x", "--internal-ips"]],
    "delete": [[]],
}


def called(folder: pathlib.Path) -> list[str]:
    """Return the gcloud calls of the scripts, by --dry-run."""
    (folder / "one.yaml").write_text("name: one\n")
    (folder / "e").write_text("HF_TOKEN=x\n")
    (folder / "e").chmod(0o600)
    lines = []
    for script, calls in ALL.items():
        for options in calls:
            common = ["--name=one", "--project=p", "--zone=z", "--dry-run"]
            done = subprocess.run(
                ["bash", SCRIPTS / f"{script}.sh", *common, *options],
                cwd=folder,
                capture_output=True,
                text=True,
            )
            assert done.returncode == 0, done.stderr
            # $'...' of printf %q is bash's own quoting; shlex knows '...' only
            lines += [
                re.sub(r"\$'(?:[^'\\]|\\.)*'", "--command=true", line)
                for line in done.stdout.splitlines()
                if line.startswith("gcloud ")
            ]
    return lines


def test_there_are_lines():
    assert len(documented("gcloud")) >= 12
    assert len(documented("kubectl")) >= 5


@pytest.mark.parametrize("line", [*documented("gcloud"), *documented("kubectl")])
def test_flags_of_the_pages(line):
    assert check(line) is None


def test_flags_of_the_scripts(tmp_path):
    lines = called(tmp_path)
    assert len(lines) >= 20
    assert [wrong for wrong in map(check, lines) if wrong] == []


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("kubectl logs -f -l a=b --max-log-request=8", "--max-log-request is no flag"),
        ("gcloud compute tpus queued-resources create x --flex", "--flex is no flag"),
        ("gcloud compute tpus tpu-vm ssh x --tunnel-through-iap", "is no flag of gcloud compute"),
        ("gcloud compute tpus tpu-vm ssh x --worker", "--worker needs a value"),
        ("gcloud compute tpu list", "no command that is recorded"),
    ],
)
def test_a_mistake_is_noticed(line, wrong):
    assert wrong in check(line)


def test_filestore_is_told_its_zone():
    """gcloud reads compute/zone for TPUs and VMs, but not for Filestore."""
    lines = [line for line in documented("gcloud") if " filestore " in line]
    assert len(lines) >= 3
    assert all("--zone=" in line for line in lines)


# ------------------------------------------------------------------------ the programs themselves


def gcloud(line: str, folder: pathlib.Path) -> str:
    """Return what gcloud says to a line without an account: it parses first, and asks nobody."""
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(folder),
        "CLOUDSDK_CORE_PROJECT": "project",
        "CLOUDSDK_COMPUTE_ZONE": "us-east5-a",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
    }
    done = subprocess.run(
        ["bash", "-c", line], env=environment, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcloud") is None, reason="gcloud is not installed")
def test_gcloud_parses_every_line(tmp_path):
    (tmp_path / "token").write_text("not a token")
    lines = [
        line.replace("$HOME/.cache/huggingface/token", str(tmp_path / "token"))
        for line in [*documented("gcloud"), *called(tmp_path)]
        # these would ask a person, or write the configuration
        if not line.startswith(("gcloud auth login", "gcloud config set"))
    ]
    for line in dict.fromkeys(lines):
        # a directory that setup.sh and run.sh make
        line = re.sub(r"--output-directory=\S+", f"--output-directory={tmp_path}", line)
        # all that is missing is an account
        assert "You do not currently have an active account selected" in gcloud(line, tmp_path), (
            line
        )
    create = "gcloud filestore instances create a --tier=ZONAL --network=name=default"
    share = "--file-share=name=share,capacity=10TiB"
    assert "Failed to find attribute [zone]" in gcloud(f"{create} {share}", tmp_path)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_parses_every_line(tmp_path):
    # a cluster that is not there, on a port that nothing listens on
    cluster = "{name: a, cluster: {server: 'http://127.0.0.1:9'}}"
    context = "{name: a, context: {cluster: a}}"
    (tmp_path / "config").write_text(
        f"apiVersion: v1\nkind: Config\nclusters: [{cluster}]\ncontexts: [{context}]\n"
        "current-context: a\n"
    )
    (tmp_path / "jobset.yaml").write_text("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n")
    (tmp_path / "token").write_text("not a token")
    environment = os.environ | {"KUBECONFIG": str(tmp_path / "config")}
    for line in dict.fromkeys(documented("kubectl")):
        line = line.replace("$HOME/.cache/huggingface/token", str(tmp_path / "token"))
        if " create secret " in line:
            line += " --dry-run=client -o name"
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        # a cluster is all that is missing
        assert done.returncode == 0 or "127.0.0.1:9" in done.stderr, done.stderr
        assert "unknown flag" not in done.stderr


def test_the_table_says_what_it_was_made_from():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", FLAGS["recorded"])
    assert set(FLAGS["versions"]) == {"gcloud", "kubectl"}
