"""The scripts for Cloud TPU, run against a fake gcloud whose slices are local directories."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[2] / "tpu_scripts"
HERE = pathlib.Path(__file__).parent
COMMANDS = ("create", "setup", "run", "watch", "fetch", "delete")
CREATE = ("--type", "v5p-16", "--runtime", "v2-alpha-tpuv5", "--spot")
EVERYTHING = (
    *CREATE,
    "--package",
    "jax_ordermerge[tpu]",
    "--config",
    "one.yaml",
    "--interval",
    "0.05",
)


class Cloud:
    """A directory that acts as the cloud."""

    def __init__(self, root):
        self.root = root
        (root / "shared").mkdir()
        (root / "one.yaml").write_text("name: one\n")
        self.plan()

    def plan(self, **settings):
        """Say what happens: steps of a run, states, failures, preemptions."""
        (self.root / "plan.json").write_text(json.dumps({"steps": 3} | settings))

    def call(self, script, *options):
        environment = os.environ | {"PATH": f"{HERE}:{os.environ['PATH']}", "STUB": str(self.root)}
        command = ["bash", str(SCRIPTS / f"{script}.sh"), "--name", "slice", *options]
        return subprocess.run(
            command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=120
        )

    @property
    def calls(self):
        file = self.root / "calls.txt"
        return file.read_text().splitlines() if file.exists() else []

    def steps(self, *wanted):
        """Return the calls of these kinds, in order."""
        steps = (" ".join(line.split()[2:4]) for line in self.calls)
        return [step for step in steps if step in wanted]

    def resources(self):
        file = self.root / "state.json"
        state = json.loads(file.read_text()) if file.exists() else {"resources": {}, "nodes": {}}
        return {**state["resources"], **state["nodes"]}

    def logs(self):
        return {
            str(file.relative_to(self.root)): file.read_text()
            for file in sorted(self.root.glob("logs/**/*.log"))
        }


@pytest.fixture
def cloud(tmp_path):
    return Cloud(tmp_path)


@pytest.mark.parametrize("script", [*COMMANDS, "lib"])
def test_shellcheck_finds_nothing(script):
    checker = shutil.which(
        "shellcheck", path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert checker, "shellcheck comes with the extra: pip install -e '.[test]'"
    done = subprocess.run(
        [checker, "-x", "-P", "SCRIPTDIR", SCRIPTS / f"{script}.sh"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def options_of(script):
    """Return the names of the options that a script parses."""
    source = (SCRIPTS / f"{script}.sh").read_text().replace("\\\n", " ")
    valued, flags = re.search(r"^parse '(.*?)' +'(.*?)'", source, re.MULTILINE).groups()
    return {*valued.split(), *flags.split()}


@pytest.mark.parametrize("script", COMMANDS)
def test_help_names_every_option(script, cloud):
    text = cloud.call(script, "--help").stdout
    # watch.sh refers to the help of the scripts that it calls
    inherited = (
        options_of("create") | options_of("setup") | options_of("run")
        if script == "watch"
        else set()
    )
    assert not [
        option
        for option in {*options_of(script), "name", "project", "zone", "dry-run"} - inherited
        if f"--{option}" not in text
    ]
    # what it calls may be given to it
    assert inherited <= options_of(script)
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("create", CREATE),
        ("setup", ("--package", "jax_ordermerge[tpu]")),
        ("run", ("--config", "one.yaml")),
        ("watch", (*EVERYTHING, "--fetch", "/x")),
        ("fetch", ("--from", "/x")),
        ("delete", ()),
    ],
)
def test_dry_run_prints_and_calls_nothing(script, options, cloud):
    done = cloud.call(script, *options, "--dry-run", "--project", "mine", "--zone", "there")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
    assert lines
    assert all("--project=mine" in line or "\\n" in line or "$'" in line for line in lines)
    assert cloud.calls == []
    assert sorted(path.name for path in cloud.root.iterdir()) == ["one.yaml", "plan.json", "shared"]


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("create", ("--typ", "x"), "unknown option --typ"),
        ("create", ("--runtime", "x"), "--type is missing"),
        ("create", (*CREATE, "--reserved"), "exclude each other"),
        ("create", ("--type",), "--type needs a value"),
        ("create", (*CREATE, "--slices", "0"), "expected a positive number"),
        ("run", ("--config", "absent.yaml"), "config absent.yaml not found"),
        ("setup", ("--package", "absent.whl"), "wheel absent.whl not found"),
        ("delete", ("--name", "Not-good"), "expected lower-case letters"),
    ],
)
def test_bad_input(script, options, message, cloud):
    done = cloud.call(script, *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert cloud.calls == []


def test_slices_are_created_as_asked(cloud):
    done = cloud.call(
        "create",
        *CREATE,
        "--slices",
        "2",
        "--network",
        "net",
        "--interval",
        "0.05",
        "--project",
        "mine",
    )
    assert done.returncode == 0, done.stderr
    create = next(line for line in cloud.calls if "queued-resources create" in line).split()[4:]
    assert set(create) == {
        "slice",
        "--accelerator-type=v5p-16",
        "--runtime-version=v2-alpha-tpuv5",
        "--node-count=2",
        "--node-prefix=slice",
        "--spot",
        "--network=net",
        "--project=mine",
    }
    assert sorted(cloud.resources()) == ["slice", "slice-0", "slice-1"]
    assert "slice may be there (state ACTIVE)" in cloud.call("create", *CREATE).stderr
    assert sorted(cloud.resources()) == ["slice", "slice-0", "slice-1"]


@pytest.mark.parametrize(
    "plan",
    [
        {"states": ["WAITING_FOR_RESOURCES", "FAILED"]},
        {"states": ["WAITING_FOR_RESOURCES"]},
        {
            "states": ["WAITING_FOR_RESOURCES", "SUSPENDED"],
            "fail": [{"step": "queued-resources delete", "times": 2}],
        },
        {"fail": [{"step": "queued-resources create"}]},
    ],
)
def test_creation_that_fails_leaves_nothing(plan, cloud):
    cloud.plan(**plan)
    done = cloud.call("create", *CREATE, "--timeout", "1", "--interval", "0.2")
    assert done.returncode == 1
    assert cloud.resources() == {}


def test_a_failed_describe_is_repeated(cloud):
    cloud.plan(fail=[{"step": "queued-resources describe", "times": 2, "holding": "never"}])
    assert cloud.call("create", *CREATE, "--interval", "0.05").returncode == 0
    cloud.plan(
        fail=[{"step": "queued-resources describe", "times": 1, "message": "network is down"}]
    )
    assert cloud.call("delete", "--interval", "0.05").returncode == 0
    assert cloud.resources() == {}


def test_different_versions_on_a_worker_are_named(cloud):
    cloud.plan(other_versions=["1"])
    cloud.call("create", *CREATE, "--interval", "0.05")
    done = cloud.call("setup", "--package", "jax_ordermerge[tpu] @ git+https://example.org/it's")
    assert done.returncode == 2
    assert "worker 1 of slice has other versions" in done.stderr
    assert (cloud.root / "installed.txt").read_text().splitlines() == [
        "jax_ordermerge[tpu] @ git+https://example.org/it's"
    ] * 2


def test_a_wheel_is_copied_to_the_workers(cloud):
    (cloud.root / "a-1.whl").write_text("wheel")
    cloud.call("create", *CREATE, "--interval", "0.05")
    done = cloud.call("setup", "--package", "a-1.whl")
    assert done.returncode == 0, done.stderr
    assert (cloud.root / "slice" / "1" / "ordermerge" / "a-1.whl").read_text() == "wheel"
    homes = [cloud.root / "slice" / str(worker) for worker in range(2)]
    assert (cloud.root / "installed.txt").read_text().splitlines() == [
        f"jax_ordermerge[tpu] @ file://{home}/ordermerge/a-1.whl" for home in homes
    ]


@pytest.mark.parametrize("slices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_preempted_twice_resumed_finished_deleted(slices, cloud):
    cloud.plan(steps=6, preempt=[3, 6])
    (cloud.root / "shared" / "report.html").write_text("the report")
    shared = cloud.root / "shared"
    options = ("--slices", str(slices), "--fetch", str(shared / "report.html"), "--to", "results")
    done = cloud.call("watch", *EVERYTHING, *options, "--", "--set", "output=/mnt/a b")
    assert done.returncode == 0, done.stderr
    assert (
        cloud.steps("queued-resources create", "queued-resources delete")
        == ["queued-resources create", "queued-resources delete"] * 3
    )
    assert done.stderr.count("preempted (") == 2
    assert cloud.resources() == {}
    assert (shared / "checkpoint").read_text() == "6"
    assert (cloud.root / "results" / "report.html").read_text() == "the report"
    logs = cloud.logs()
    last = max(name.split("/")[2] for name in logs)
    assert len([name for name in logs if last in name]) == 2 * slices
    for name, text in logs.items():
        assert (
            "arguments: run config.yaml --set distributed.coordinator=auto --set output=/mnt/a b\n"
            in text
        )
        assert text.endswith("ordermerge: exit 0\n") == (last in name)
    starts = {name: int(text.partition("from step ")[2].split()[0]) for name, text in logs.items()}
    # On a busy machine one worker begins late, and finds the checkpoint of the other.
    first = min(name.split("/")[2] for name in logs)
    assert min(start for name, start in starts.items() if first in name) == 0
    steps = [start for name, start in starts.items() if name.endswith("/0.log")]
    assert steps == sorted(steps)
    assert steps[-1] > 0


@pytest.mark.parametrize(
    ("codes", "code", "runs"),
    [
        ([2], 2, 1),  # bad input is not tried again
        pytest.param([1, 1], 1, 2, marks=pytest.mark.slow),
        ([134], 0, 2),  # a peer was lost: all are started again
        pytest.param([143, 143], 0, 3, marks=pytest.mark.slow),  # stopped with a checkpoint
    ],
)
def test_exit_codes_of_a_run(codes, code, runs, cloud):
    cloud.plan(codes=codes)
    done = cloud.call("watch", *EVERYTHING)
    assert done.returncode == code, done.stderr
    assert len(cloud.steps("queued-resources create")) == runs
    assert cloud.resources() == {}


@pytest.mark.parametrize(
    "fail",
    [
        {"step": "tpu-vm ssh", "holding": "uv pip install"},
        pytest.param({"step": "tpu-vm scp"}, marks=pytest.mark.slow),
        pytest.param({"step": "tpu-vm ssh", "holding": "setsid"}, marks=pytest.mark.slow),
        {"step": "tpu-vm ssh", "holding": "exit_code"},
    ],
)
def test_a_step_that_fails_leaves_nothing(fail, cloud):
    cloud.plan(fail=[fail])
    done = cloud.call("watch", *EVERYTHING, "--preemptions", "1")
    assert done.returncode not in (0, 2)
    assert len(cloud.steps("queued-resources create")) == 2
    assert cloud.resources() == {}


def test_preemptions_are_limited(cloud):
    cloud.plan(preempt=[1, 2, 3])
    done = cloud.call("watch", *EVERYTHING, "--preemptions", "1")
    assert done.returncode == 143
    assert cloud.resources() == {}


def test_run_joins_a_run_in_progress(cloud):
    cloud.call("create", *CREATE, "--interval", "0.05")
    cloud.call("setup", "--package", "jax_ordermerge")
    cloud.plan(steps=4, fail=[{"step": "tpu-vm ssh", "holding": "exit_code", "times": 1000}])
    cut_off = cloud.call("run", "--config", "one.yaml", "--interval", "0.01")
    assert cut_off.returncode != 0
    cloud.plan(steps=4)
    done = cloud.call("run", "--config", "one.yaml", "--interval", "0.05")
    assert done.returncode == 0, done.stderr
    assert (cloud.root / "shared" / "checkpoint").read_text() == "4"
    assert [file.read_text() for file in (cloud.root / "shared").glob("runs-*")] == [
        "x",
        "x",
    ]  # each worker began once
    assert "slice" in cloud.resources()


def test_kept_slices_are_named(cloud):
    done = cloud.call("watch", *EVERYTHING, "--keep")
    assert done.returncode == 0, done.stderr
    assert "slice is kept" in done.stderr
    assert "slice" in cloud.resources()
