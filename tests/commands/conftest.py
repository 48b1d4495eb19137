"""The tiny experiment of tests/experiment, for the tests of commands."""

from tests.experiment.conftest import folder

__all__ = ["folder"]
