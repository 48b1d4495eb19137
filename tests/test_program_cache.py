"""Where compiled programs are kept, and how many."""

import os
import subprocess
import sys

import jax
import pytest

from jax_ordermerge import program_cache

VARIABLES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user's cache, and none of the variables; the directory of the programs."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("ORDERMERGE_CACHE", str(tmp_path))
    program_cache.default_directory.cache_clear()
    yield program_cache.default_directory()
    program_cache.default_directory.cache_clear()


@pytest.fixture
def setting():
    """The directory that jax has, restored after the test."""
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_in_the_users_cache_by_version_and_processor(user, tmp_path, monkeypatch):
    program_cache.set_default()
    assert os.environ[VARIABLES[0]] == str(user)
    assert os.environ[VARIABLES[1]] == "0"
    assert user.parent == tmp_path / "programs"
    assert jax.lib.__version__ in user.name
    assert not user.parent.exists()  # jax makes it with the first program
    monkeypatch.setattr(program_cache, "_processor_digest", lambda: "another")
    program_cache.default_directory.cache_clear()
    assert program_cache.default_directory() != user


def test_what_the_environment_says_is_left(user, monkeypatch):
    monkeypatch.setenv(VARIABLES[0], "elsewhere")
    program_cache.set_default()
    assert os.environ[VARIABLES[0]] == "elsewhere"
    assert VARIABLES[1] not in os.environ


def test_a_cache_that_cannot_be_written_is_none(user, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    program_cache.default_directory.cache_clear()
    program_cache.set_default()
    assert program_cache.default_directory() is None
    assert VARIABLES[0] not in os.environ
    program_cache.prune()


@pytest.mark.parametrize(
    ("given", "by_default", "expected"),
    [
        ("off", True, None),
        (None, True, "default"),
        (None, False, None),
        ("named", False, "named"),
    ],
)
def test_a_config_chooses(user, setting, given, by_default, expected):
    jax.config.update("jax_compilation_cache_dir", str(user))
    program_cache.configure(given, by_default=by_default)
    assert jax.config.jax_compilation_cache_dir == {"default": str(user)}.get(expected, expected)


def test_several_processes_use_what_the_environment_names(user, setting):
    jax.config.update("jax_compilation_cache_dir", "shared")
    program_cache.configure(None, by_default=False)
    assert jax.config.jax_compilation_cache_dir == "shared"


def test_the_programs_used_longest_ago_go_first(user):
    program_cache.set_default()
    for number, directory in enumerate((user.parent / "old", user)):
        directory.mkdir(parents=True)
        for day in range(3):
            path = directory / f"{day}-cache"
            path.write_bytes(bytes(10))
            os.utime(path, (100 * day + number,) * 2)
    program_cache.prune(limit=35)
    left = {path.relative_to(user.parent).as_posix() for path in user.parent.glob("*/*")}
    assert left == {f"{user.name}/1-cache", "old/2-cache", f"{user.name}/2-cache"}


def test_the_directory_of_somebody_else_is_left(user, monkeypatch, tmp_path):
    (user / "x-cache").parent.mkdir(parents=True)
    (user / "x-cache").write_bytes(bytes(10))
    monkeypatch.setenv(VARIABLES[0], str(tmp_path / "mine"))
    program_cache.prune(limit=0)
    assert (user / "x-cache").exists()


def test_the_command_line_sets_it_before_jax_starts(user, tmp_path):
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from jax_ordermerge import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "import os\n"
        "assert 'jax' not in sys.modules\n"
        f"print(os.environ['{VARIABLES[0]}'])"
    )
    lines = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines[-1] == str(user)
    assert not list(tmp_path.iterdir())
