"""What is installed from a built wheel or sdist works without a clone."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile

import pytest

from jax_ordermerge import __version__
from jax_ordermerge.config import shipped

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def build(source: pathlib.Path, kind: str, out: pathlib.Path) -> pathlib.Path:
    """Build a wheel or sdist with the hatchling of this environment, and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, env=ENVIRONMENT)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A directory of programs: an environment that has the wheel, and dependencies from this one."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    site = next(folder.glob("lib/python*/site-packages"))
    # a path in a .pth file is searched for packages; the .pth files in it, among them that of an
    # editable installation of the clone, are not read
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--ignore-installed"]
    subprocess.run([*pip, *options, str(wheel)], check=True, env=ENVIRONMENT)
    return folder / "bin"


def run(installed: pathlib.Path, folder: pathlib.Path, *arguments: str) -> str:
    done = subprocess.run(
        [str(installed / arguments[0]), *arguments[1:]],
        cwd=folder,
        env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


@pytest.mark.slow
def test_the_wheel_runs_without_the_clone(installed, tmp_path):
    place = run(
        installed, tmp_path, "python", "-c", "import jax_ordermerge as m; print(m.__file__)"
    )
    assert pathlib.Path(place.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "ordermerge", "--version") == f"ordermerge {__version__}\n"
    rows = json.loads(run(installed, tmp_path, "ordermerge", "configs", "--json"))
    assert [row["name"] for row in rows] == [x.name for x in shipped.list_configs()]
    assert all(pathlib.Path(row["path"]).is_relative_to(installed.parent) for row in rows)
    # its base and its data travel too; the path in a clone goes for the name
    for target in ("quickstart", "configs/quickstart.yaml"):
        data = json.loads(run(installed, tmp_path, "ordermerge", "data", target, "--json"))
        assert data["splits"]["train"]["examples"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build(source, "wheel", tmp_path / "wheel")
    contents = []
    for path in (wheel, again):
        with zipfile.ZipFile(path) as archive:
            contents.append({info.filename: info.CRC for info in archive.infolist()})
    assert contents[0] == contents[1]
    assert "jax_ordermerge/configs/quickstart.yaml" in contents[0]
    assert "jax_ordermerge/py.typed" in contents[0]
    shutil.rmtree(tmp_path)
