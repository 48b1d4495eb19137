"""Training speed as ratios, measured side by side, each program in its own process.

    python benchmarks/train.py            # about 7 minutes on two idle CPU cores; --rounds 3: less

1. One member against transformers on torch: the same small Llama, batches of one shape, fp32,
   AdamW, medians of alternating steps.
2. Four members in one program against four runs one after another: steps only, and compilation.
3. Packing against padding, rows of 512 tokens, examples as long as those of GSM8K
   (gsm8k_lengths.json): useful tokens per second.
4. The host's share: one member trained by the real loop (batches, metrics, a line and a checkpoint
   every 4 steps; the shape of 1), and the fraction of wall time in which the host neither starts
   the compiled step nor waits for it. It is the `host_fraction` of metrics/train.jsonl over all
   lines but the first. Batches and checkpoints that other threads make are not in it; on a CPU they
   slow the step instead.

Only one worker computes at a time: in one process the thread pools of the two runtimes would
disturb each other. Appends the table to benchmarks/RESULTS.md. The first part needs torch, and the
table says so if it is not installed.
"""

import argparse
import contextlib
import datetime as dt
import importlib.util
import itertools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, Protocol

import jax
import numpy as np

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, parameter_count, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Model, Population, Training
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.model import llama
from jax_ordermerge.train import loop, objective, optimizer
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.spec import TrainingSpec

CONFIG = ModelConfig(
    vocab_size=32000, hidden_size=288, intermediate_size=768, num_layers=6, num_heads=6
)
BATCH, LENGTH, MEMBERS = 16, 256, 4
ROW = 512  # tokens per row in the third part
INTERVAL = 4  # steps between lines of metrics, and between checkpoints, in the fourth part
TRAINING = Training(learning_rate=1e-4, schedule="constant", warmup=0, batch=BATCH)

# ---------------------------------------------------------------- in the workers


class Program(Protocol):
    """A program to compare: facts for the table, and one training step at a time."""

    facts: dict[str, Any]

    def step(self) -> None:
        """Run one step and wait for it."""


def full_rows(members: int) -> dict[str, np.ndarray]:
    """Return a batch of full rows of random tokens, arrays [M, 1, B, T]."""
    tokens = (
        np.random.default_rng(0)
        .integers(0, CONFIG.vocab_size, (members, 1, BATCH, LENGTH + 1))
        .astype(np.int32)
    )
    rows = tokens[..., :-1]
    return {
        "tokens": np.ascontiguousarray(rows),
        "targets": np.ascontiguousarray(tokens[..., 1:]),
        "positions": np.broadcast_to(np.arange(LENGTH, dtype=np.int32), rows.shape).copy(),
        "segments": np.ones_like(rows),
        "weights": np.ones(rows.shape, np.float32),
        "ids": np.zeros((members, 1, BATCH), np.int32),
        "bucket": np.zeros((members, 1), np.int32),
    }


def gsm8k_rows(packed: bool) -> dict[str, np.ndarray]:
    """Return a batch of rows of `ROW` random tokens for one member, arrays [1, 1, B, T].

    The examples are as long as those of GSM8K: one per row, or packed.
    """
    counts = json.loads((pathlib.Path(__file__).parent / "gsm8k_lengths.json").read_text())
    lengths = np.repeat([int(length) for length in counts], list(counts.values()))
    random = np.random.default_rng(0)
    sizes = random.choice(lengths[lengths <= ROW], 4096)
    texts = [random.integers(1, CONFIG.vocab_size, size) for size in sizes]
    answers = Ragged.of([np.ones(size) for size in sizes], np.bool_)
    examples = Examples(Ragged.of(texts, np.int32), answers, np.arange(len(sizes)))
    rows = pack.pack_tightly(sizes, ROW) if packed else np.arange(len(sizes))
    # tight packing begins with the fullest rows, so a batch takes rows at random
    chosen = random.permutation(len(rows))[:BATCH]
    batch = pack.step_batch(examples, rows[chosen], microbatch=BATCH, lengths=(ROW,))
    return {name: array[None] for name, array in batch.items()}


class Ours:
    """A population in the trainer of this package."""

    def __init__(self, members: int, rows: str = "full") -> None:
        mesh = meshes.make_mesh()
        batch = full_rows(members) if rows == "full" else gsm8k_rows(rows == "packed")
        tx = optimizer.make_optimizer(TRAINING, 1000, tensor_table(CONFIG))
        abstract = steps.abstract_state(
            convert.abstract_params(CONFIG, mesh, members=members), tx, mesh
        )
        step = steps.train_step(
            objective.sft(CONFIG, dtype="float32"),
            tx,
            optimizer.make_schedule(TRAINING, 1000),
            lengths=[batch["tokens"].shape[-1]],
        )
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("order"))
        shapes = {
            name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for name, x in batch.items()
        }
        self.inputs = {name: jax.device_put(x, place) for name, x in batch.items()}
        start = time.perf_counter()
        self.program = steps.compile_step(step, mesh, abstract, shapes, {})
        useful = int((batch["segments"] > 0).sum())
        self.facts = {
            "compilation": time.perf_counter() - start,
            "device": jax.devices()[0].device_kind,
            "tokens": useful,
        }
        self.state = steps.initial_state([llama.init_params(CONFIG, 0)], tx, abstract)

    def step(self) -> None:
        """Run one step of all members and wait for it."""
        self.state, metrics = self.program(self.state, self.inputs, {})
        jax.block_until_ready((self.state, metrics))


class Theirs:
    """Transformers on torch."""

    def __init__(self) -> None:
        import torch
        import transformers

        self.facts = {"version": torch.__version__}
        config = transformers.LlamaConfig(**CONFIG.to_hf("float32"), attn_implementation="sdpa")
        self.model = transformers.LlamaForCausalLM(config)
        self.adam = torch.optim.AdamW(
            self.model.parameters(), lr=TRAINING.learning_rate, weight_decay=TRAINING.weight_decay
        )
        self.tokens = torch.from_numpy(
            np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH))
        )
        self.clip = torch.nn.utils.clip_grad_norm_

    def step(self) -> None:
        """Run one step."""
        self.adam.zero_grad(set_to_none=True)
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.clip(self.model.parameters(), 1.0)  # the default of Training
        self.adam.step()


def serve(pipe: Connection, build: Callable[..., Program], *arguments: Any) -> None:
    """Build a program, warm it up, then answer each True with the seconds of one step."""
    program = build(*arguments)
    program.step()
    pipe.send(program.facts)
    while pipe.recv():
        start = time.perf_counter()
        program.step()
        pipe.send(time.perf_counter() - start)


# ---------------------------------------------------------------- in the parent


class Worker:
    """A program in its own process, which is idle until a step is requested."""

    def __init__(self, build: Callable[..., Program], *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, remote = context.Pipe()
        self.process = context.Process(target=serve, args=(remote, build, *arguments), daemon=True)
        self.process.start()
        remote.close()  # so that `recv` fails if the worker dies
        self.facts = self.pipe.recv()

    def step(self) -> float:
        """Return the seconds of one step."""
        self.pipe.send(True)
        return self.pipe.recv()

    def close(self) -> None:
        """End the process."""
        self.pipe.send(False)
        self.process.join()


def against_torch(single: Worker, rounds: int) -> str:
    """Measure alternating steps of one member and of torch; return a row of the table."""
    tokens = BATCH * LENGTH
    if importlib.util.find_spec("torch") is None:
        seconds = statistics.median(single.step() for _ in range(rounds))
        return f"| one member, tokens/s | {tokens / seconds:,.0f} | torch is not installed | |"
    with contextlib.closing(Worker(Theirs)) as torch:
        pairs = [(single.step(), torch.step()) for _ in range(rounds)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    against = f"transformers + torch {torch.facts['version']} {tokens / theirs:,.0f}"
    return f"| one member, tokens/s | {tokens / ours:,.0f} | {against} | {ratio:.2f} times theirs |"


def population(single: Worker, rounds: int) -> list[str]:
    """Measure four members in one program against four runs; return rows of the table."""
    with contextlib.closing(Worker(Ours, MEMBERS)) as population:
        pairs = [
            (population.step(), sum(single.step() for _ in range(MEMBERS))) for _ in range(rounds)
        ]
    program, runs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    once, per_run = population.facts["compilation"], single.facts["compilation"]
    return [
        f"| {MEMBERS} members, seconds per step | {program:.2f} | {MEMBERS} runs one after another"
        f" {runs:.2f} | {ratio:.3f} of theirs |",
        f"| compilation | {once:.1f} s once | {MEMBERS} times {per_run:.1f} s |"
        f" {once / (MEMBERS * per_run):.2f} of theirs |",
    ]


def packing(rounds: int) -> str:
    """Measure packed rows against rows of one example; return a row of the table."""
    with (
        contextlib.closing(Worker(Ours, 1, "packed")) as packed,
        contextlib.closing(Worker(Ours, 1, "padded")) as padded,
    ):
        pairs = [(packed.step(), padded.step()) for _ in range(rounds)]
    cells = []
    tokens = packed.facts["tokens"], padded.facts["tokens"]
    for count, seconds in zip(tokens, zip(*pairs, strict=True), strict=True):
        rate, filled = count / statistics.median(seconds), count / (BATCH * ROW)
        cells.append(f"{rate:,.0f} ({filled:.0%} full)")
    ratio = statistics.median((b / tokens[1]) / (a / tokens[0]) for a, b in pairs)
    label = f"packing rows of {ROW}, useful tokens/s"
    return f"| {label} | {cells[0]} | padding {cells[1]} | {ratio:.2f} times |"


class Record:
    """A watcher that collects the lines of metrics of a training."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def log(self, text: str) -> None:
        """See `progress.Watcher`; nothing is shown."""

    def metrics(self, line: Mapping[str, Any]) -> None:
        """See `progress.Watcher`."""
        self.lines.append(dict(line))


def train_in_loop(pipe: Connection, count: int) -> None:
    """Train one member by the real loop and send its lines of metrics."""
    random, record = np.random.default_rng(0), Record()
    rows = [random.integers(1, CONFIG.vocab_size, LENGTH) for _ in range(count * BATCH)]
    texts = Examples(
        Ragged.of(rows, np.int32),
        Ragged.of([np.ones(LENGTH)] * len(rows), np.bool_),
        np.arange(len(rows)),
    )
    training = TRAINING.model_copy(
        update={"epochs": 1, "log_every": INTERVAL, "checkpoint_every": INTERVAL}
    )
    with tempfile.TemporaryDirectory() as output:
        spec = TrainingSpec(
            model=Model(compute_dtype="float32"),
            population=Population(members=1),
            training=training,
        )
        loop.train(
            spec,
            CONFIG,
            lambda: llama.init_params(CONFIG, 0),
            texts,
            meshes.make_mesh(),
            RunLayout(pathlib.Path(output)),
            watch=record,
        )
    pipe.send(record.lines)


def host(rounds: int) -> str:
    """Measure the host's share in the real loop; return a row of the table."""
    context = multiprocessing.get_context("spawn")
    pipe, remote = context.Pipe()
    arguments = (remote, (rounds + 1) * INTERVAL)
    process = context.Process(target=train_in_loop, args=arguments, daemon=True)
    process.start()
    remote.close()
    lines = pipe.recv()
    process.join()
    seconds = [line["seconds"] - before["seconds"] for before, line in itertools.pairwise(lines)]
    outside = sum(
        line["host_fraction"] * time for line, time in zip(lines[1:], seconds, strict=True)
    )
    steps = f"{sum(seconds):.0f} s of {len(seconds) * INTERVAL} steps"
    share = f"{outside / sum(seconds):.2%}"
    return f"| host outside the compiled step, of {steps} | {share} | target: at most 3 % | |"


def main() -> None:
    """Measure and append to RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="repetitions; medians are shown")
    rounds = parser.parse_args().rounds
    with contextlib.closing(Worker(Ours, 1)) as single:
        rows = [against_torch(single, rounds), *population(single, rounds)]
    rows += [packing(rounds), host(rounds)]
    machine = f"{os.cpu_count()} x {platform.machine()} {single.facts['device']}"
    lines = [
        f"\n## Training, {dt.date.today()}, {machine}, jax {jax.__version__}",
        "",
        f"`python benchmarks/train.py --rounds {rounds}`: {parameter_count(CONFIG) / 1e6:.1f} M"
        f" parameters (hidden {CONFIG.hidden_size}, {CONFIG.num_layers} layers, vocabulary"
        f" {CONFIG.vocab_size}), batch {BATCH}, length {LENGTH}, fp32, AdamW; medians; each"
        " program in its own process.",
        "",
        "| measured | ours | against | ratio |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    text = "\n".join(lines)
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
