"""Settings and fixtures of all tests.

Tests run offline on 8 CPU devices. Rank promotion raises, warnings are errors, and matmuls have the
highest precision.
"""

import contextlib
import ctypes
import gc
import os
import pathlib
import resource
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.update(
    JAX_PLATFORMS="cpu",
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    # tests that change the code by monkeypatch would read what other code has tokenized
    ORDERMERGE_EXAMPLE_CACHE="off",
    MPLBACKEND="agg",
    # a command whose stderr is no terminal sets these for its process, which here is that of all tests
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    # each worker has one core; threads that wait for each other tripled the time of simulations
    OPENBLAS_NUM_THREADS="1",
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import jax
import pytest

from jax_ordermerge import console

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")

collect_ignore_glob = ["tests/golden/make_*.py"]  # they make goldens and are run by hand

MOST_MAPS = {"module": 10_000, "slow test": 30_000}  # the module with the most adds 38,000
MOST_BYTES = 3 << 29  # 1.6 GB: two workers, and what they start, are to fit into 8 GB
# What cannot be freed, as imports, may be more than MOST_BYTES. Without a margin above it, each test
# would free the programs of the one before and trace them again.
MARGIN = 1 << 29
SHARED = pathlib.Path(__file__).resolve().parents[1] / "shared" / "data"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Share compiled programs between the tests of this session, and the commands that they start.

    With JAX_COMPILATION_CACHE_DIR they are shared with other sessions, too. The variable also tells
    the workers of pytest-xdist where they are.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        cache = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled-")
        jax.config.update("jax_compilation_cache_dir", cache)
        config.add_cleanup(lambda: shutil.rmtree(cache, ignore_errors=True))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(autouse=True)
def printing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print everything at the start of each test, whatever options a test before it has given."""
    monkeypatch.setattr(console._Settings, "quiet", False)
    monkeypatch.setattr(console._Settings, "as_json", False)


def _count_maps() -> int:
    """Return the number of maps of memory of this process, 0 where that is not known."""
    maps = pathlib.Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def _resident_bytes() -> int:
    """Return the memory of this process, 0 where that is not known."""
    sizes = pathlib.Path("/proc/self/statm")
    return int(sizes.read_text().split()[1]) * resource.getpagesize() if sizes.exists() else 0


_most_bytes = MOST_BYTES  # after which programs are freed next


def _free_programs(most_maps: int) -> None:
    """Free all compiled programs, if this process has more than so many maps or much memory.

    Each program takes some maps. Linux allows a process 65,530 of them, and beyond that LLVM ends
    it with a segmentation fault, in whichever test comes next. What a later test needs of the
    programs comes from the cache on the disk.
    """
    global _most_bytes
    if _resident_bytes() > _most_bytes:
        _return_memory()
    if _count_maps() > most_maps or _resident_bytes() > _most_bytes:
        jax.clear_caches()
        gc.collect()
        _return_memory()
        _most_bytes = max(MOST_BYTES, _resident_bytes() + MARGIN)


def _return_memory() -> None:
    # glibc keeps what was freed: without this the memory of two thirds of the programs stays
    with contextlib.suppress(AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="module", autouse=True)
def _free_programs_of_a_module() -> Iterator[None]:
    yield
    _free_programs(MOST_MAPS["module"])


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Free programs also within a module, after slow tests only: to count maps takes a while."""
    if "slow" in item.keywords:
        _free_programs(MOST_MAPS["slow test"])


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an emulation of S3 on loopback; it is the only network that tests use."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("store") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=out,
            stderr=out,
        )
    try:
        deadline = time.monotonic() + 60
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the object store did not start"
            with (
                contextlib.suppress(OSError),
                socket.create_connection(("127.0.0.1", port), timeout=1),
            ):
                break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def bucket(object_store: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of an empty bucket for one test; local copies lie in `tmp_path / "cache"`."""
    import fsspec

    for name, value in {
        "AWS_ENDPOINT_URL": object_store,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "nothing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "ORDERMERGE_CACHE": str(tmp_path / "cache"),
    }.items():
        monkeypatch.setenv(name, value)
    name = f"orders-{secrets.token_hex(4)}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Directory of real models and data beside the project; absent on most machines."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared/data (real models and data) is absent")
    return SHARED
