"""The test rig: offline, 8 CPU devices, rank promotion raises, warnings are errors, matmuls at highest precision."""

import os
import pathlib

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.update(
    JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore_glob = ["tests/golden/make_*.py"]  # scripts that make goldens: run by hand

SHARED = pathlib.Path(__file__).resolve().parents[1] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Real models and data beside the project; absent on most machines."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data (real models and data) is absent")
    return SHARED
