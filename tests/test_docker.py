"""Docker images pin the dependencies of the project. The images themselves are not built here."""

import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement

DOCKER = pathlib.Path(__file__).parents[1] / "docker"
LINES = [
    line
    for line in (DOCKER / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
]


def name(text):
    return re.sub(r"[-_.]+", "-", text).lower()


PINS = {name(line.partition("==")[0]): line.partition("==")[2] for line in LINES}


def test_every_dependency_is_pinned_within_its_range():
    project = tomllib.loads((DOCKER.parent / "pyproject.toml").read_text())["project"]
    direct = [Requirement(text) for text in project["dependencies"]]
    assert direct
    direct += [
        Requirement(text)
        for extra in ("gcs", "s3")
        for text in project["optional-dependencies"][extra]
    ]
    assert not [
        str(requirement)
        for requirement in direct
        if not requirement.specifier.contains(
            PINS.get(name(requirement.name), ""), prereleases=True
        )
    ]


def test_accelerators_are_of_the_same_jax():
    assert PINS["jaxlib"] == PINS["jax-cuda13-plugin"] == PINS["jax-cuda13-pjrt"] == PINS["jax"]
    assert "libtpu" in PINS


@pytest.mark.parametrize(("kind", "extra"), [("tpu", "tpu"), ("gpu", "cuda")])
def test_images_use_the_pins(kind, extra):
    text = (DOCKER / f"Dockerfile.{kind}").read_text()
    assert f'pip install -c docker/constraints.txt ".[{extra},gcs,s3]"' in text
    assert re.search(r"^FROM python:3\.\d+\.\d+-", text, re.MULTILINE)
