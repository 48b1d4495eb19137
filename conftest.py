"""The test rig: offline, 8 CPU devices, rank promotion raises, warnings are errors, matmuls at highest precision."""

import os
import pathlib
import shutil
import tempfile

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.update(
    JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore_glob = ["tests/golden/make_*.py"]  # scripts that make goldens: run by hand

SHARED = pathlib.Path(__file__).resolve().parents[1] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """What one test, or a command that it starts, compiled is there for the others of this session, and gone with it.

    A directory given in JAX_COMPILATION_CACHE_DIR is shared with other sessions; workers find it there too.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        jax.config.update("jax_compilation_cache_dir", compiled)
        config.add_cleanup(lambda: shutil.rmtree(compiled, ignore_errors=True))


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
