"""The benchmark of some steps leaves the run alone; cached programs are not compiled again."""

import os
import pathlib
import subprocess
import sys

import pytest

from jax_ordermerge.config import load_config
from jax_ordermerge.errors import UserError
from jax_ordermerge.experiment import pipeline
from tests.commands.test_cli import call


def test_a_benchmark_writes_nothing_but_the_profile(folder, tmp_path):
    messages = []
    config = load_config(folder / "tiny.yaml", [f"output={tmp_path / 'run'}"])
    timing = pipeline.benchmark(config, steps=6, profile=tmp_path / "profile", log=messages.append)
    assert "s per step" in str(timing)
    assert "tokens/s, MFU unknown for this device, host outside the compiled step" in str(timing)
    assert timing.to_json()["seconds_per_step"] == timing.step > 0
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert [path.name for path in tmp_path.iterdir()] == ["profile"]
    with pytest.raises(
        UserError, match="--steps 99: expected 2 to 10, the steps of the whole training"
    ):
        pipeline.benchmark(config, steps=99, log=messages.append)


def test_a_profile_goes_with_steps(folder, tmp_path, capsys):
    assert call("train", folder / "tiny.yaml", "--profile", tmp_path) == 2
    assert "--profile would be ignored: it goes with --steps" in capsys.readouterr().err


PROGRAM = """
import sys
import jax
from jax_ordermerge.config import load_config
from jax_ordermerge.experiment import pipeline
seen = []
jax.monitoring.register_event_listener(lambda event, **_: seen.append(event))
pipeline.benchmark(load_config(sys.argv[1], [f"compilation_cache={sys.argv[2]}"]), steps=2)
for event in ("compile_requests_use_cache", "cache_hits"):
    print(seen.count(f"/jax/compilation_cache/{event}"))
"""


@pytest.mark.slow
def test_a_second_start_compiles_nothing_anew(folder, tmp_path):
    root = pathlib.Path(__file__).parents[2]
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    messages = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(folder / "tiny.yaml"), str(tmp_path / "compiled")],
            cwd=root,
            env=environment,
            text=True,
            capture_output=True,
            check=True,
        ).stdout.split()
        for _ in range(2)
    ]
    (requests, hits), (requests_again, hits_again) = (
        [int(count) for count in output[-2:]] for output in messages
    )
    assert requests_again == requests > hits
    assert hits_again == requests
