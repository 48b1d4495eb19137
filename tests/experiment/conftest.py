"""The tiny folder of this room's tests."""

import pytest

from tests.experiment import tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with base, data and tiny.yaml; tests that change something copy it."""
    path = tmp_path_factory.mktemp("tiny")
    tiny.make_base(path / "base")
    tiny.make_config(path)
    return path
