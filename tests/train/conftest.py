"""A tiny model and tiny data.

Every program that a test compiles costs seconds, so trainings are shared where possible.
"""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import make_config
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.experiment.specs import training_spec
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.model import llama
from jax_ordermerge.train import loop
from jax_ordermerge.train.spec import TrainingSpec

MODEL = ModelConfig(
    vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2
)


class Recorder:
    """Watches a training; stops it, as a kill would, when it comes to a step."""

    def __init__(self, stop_at: int | None = None, on_line=None) -> None:
        self.messages, self.lines, self.stop_at, self.on_line = [], [], stop_at, on_line

    def log(self, text):
        self.messages.append(text)

    def metrics(self, row):
        self.lines.append(row)
        if self.on_line:
            self.on_line(row)
        if self.stop_at == row["step"]:
            raise KeyboardInterrupt


@dataclasses.dataclass
class Trained:
    directory: pathlib.Path
    spec: TrainingSpec
    watch: Recorder

    @property
    def layout(self):
        return RunLayout(self.directory)

    def file(self, name):
        return self.directory / name

    def lines(self):
        return [
            json.loads(text) for text in self.file("metrics/train.jsonl").read_text().splitlines()
        ]

    def losses(self):
        with np.load(self.file("losses/train.npz")) as saved:
            return saved["losses"]


@pytest.fixture(scope="session")
def tiny_model():
    return MODEL


@pytest.fixture(scope="session")
def tiny_examples():
    """21 examples of 4 to 23 tokens; file numbers that are not row numbers."""
    random = np.random.default_rng(0)
    rows = [random.integers(1, MODEL.vocab_size, random.integers(4, 24)) for _ in range(21)]
    answers = [np.arange(len(row)) >= 2 for row in rows]
    return Examples(Ragged.of(rows, np.int32), Ragged.of(answers, np.bool_), np.arange(21) + 100)


@pytest.fixture(scope="session")
def tiny_base():
    return llama.init_params(MODEL, 0)


@pytest.fixture(scope="session")
def tiny_spec():
    """Return `(training={...}, ...) -> TrainingSpec`.

    It has 2 members, 2 epochs of 3 steps, buckets and accumulation.
    """

    def build(**sections):
        raw = {
            "model": {"compute_dtype": "float32"},
            "data": {"buckets": [16]},
            "population": {"members": 2},
            "training": {
                "epochs": 2,
                "batch": 8,
                "microbatch": 4,
                "learning_rate": 1e-2,
                "warmup": 1,
                "weight_decay": 0.1,
                "log_every": 1,
            },
        }
        for name, change in sections.items():
            raw[name] = {**raw.get(name, {}), **change}
        return training_spec(make_config(raw))

    return build


@pytest.fixture(scope="session")
def tiny_train(tiny_examples, tiny_base, tiny_spec):
    """Return a function that trains in a directory and returns what is there."""

    def run(
        directory,
        mesh,
        *,
        members=None,
        stop_at=None,
        on_line=None,
        held_out=None,
        base=None,
        **sections,
    ):
        spec = tiny_spec(**sections)
        watch = Recorder(stop_at, on_line)
        loop.train(
            spec,
            MODEL,
            tiny_base if base is None else base,
            tiny_examples,
            mesh,
            RunLayout(directory),
            members=members,
            watch=watch,
            held_out=held_out,
        )
        return Trained(directory, spec, watch)

    return run


@pytest.fixture(scope="session")
def recorder():
    """Return the class of the watcher."""
    return Recorder


@pytest.fixture(scope="session")
def same_bits():
    """Return a function that says whether two trees are equal bit for bit."""

    def same(a, b):
        left, right = jax.device_get((jax.tree.leaves(a), jax.tree.leaves(b)))
        return len(left) == len(right) and all(
            x.tobytes() == y.tobytes() for x, y in zip(left, right, strict=True)
        )

    return same
