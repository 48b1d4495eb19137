"""Training speed as ratios, measured side by side in one run.

    python benchmarks/train.py            # about 6 minutes on two CPU cores; --rounds 3 for a look

1. One member against transformers on torch: the same small Llama, the same batches, fp32, AdamW, interleaved steps, medians.
2. Four members in one program against four runs one after another: steps alone, and with compilation.

Appends the table to benchmarks/RESULTS.md. Needs torch for the first part and says so where it is absent.
"""

import argparse
import datetime as dt
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import Training
from jax_ordermerge.model import llama
from jax_ordermerge.train import objective
from jax_ordermerge.train import step as steps

SHAPE = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_layers": 6, "num_heads": 6}
BATCH, LENGTH, MEMBERS = 16, 256, 4
TRAINING = Training(learning_rate=1e-4, schedule="constant", warmup=0, batch=BATCH)


def timed(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Ours:
    """A population of the project's trainer, its program compiled."""

    def __init__(self, members: int) -> None:
        self.config, mesh = ModelConfig(**SHAPE), meshes.make_mesh()
        tx = steps.optimizer(TRAINING, 1000, self.config)
        abstract = steps.abstract_state(convert.abstract_params(self.config, mesh, members=members), tx, mesh)
        one = steps.train_step(objective.sft(self.config, dtype="float32"), tx, steps.schedule(TRAINING, 1000), lengths=[LENGTH])
        batch = self.batch(members)
        place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("order"))
        shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for name, x in batch.items()}
        self.inputs = {name: jax.device_put(x, place) for name, x in batch.items()}
        start = time.perf_counter()
        self.program = steps.compile_step(one, mesh, abstract, shapes)
        self.compile_seconds = time.perf_counter() - start
        self.state = steps.initial_state(llama.init_params(self.config, 0), tx, abstract)

    def batch(self, members: int) -> dict[str, np.ndarray]:
        """Return random tokens, full rows: [M, 1, B, T]."""
        tokens = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (members, 1, BATCH, LENGTH + 1)).astype(np.int32)
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

    def step(self) -> None:
        """Do one step of all members and wait for it."""
        self.state, metrics = self.program(self.state, self.inputs)
        jax.block_until_ready(metrics)


def torch_step() -> Callable[[], None] | None:
    """Return a step of transformers on torch, or None without torch."""
    try:
        import torch
    except ImportError:
        return None
    import transformers

    config = transformers.LlamaConfig(**ModelConfig(**SHAPE).to_hf("float32"), attn_implementation="sdpa")
    model = transformers.LlamaForCausalLM(config)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (BATCH, LENGTH)))

    def step() -> None:
        adam.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    return step


def against_torch(rounds: int) -> list[str]:
    """Measure interleaved steps; return rows of the table."""
    theirs, ours = torch_step(), Ours(1)
    ours.step()
    tokens = BATCH * LENGTH
    if theirs is None:
        own = statistics.median(timed(ours.step) for _ in range(rounds))
        return [f"| one member | {tokens / own:,.0f} tok/s | torch is not installed |"]
    theirs()
    pairs = [(timed(ours.step), timed(theirs)) for _ in range(rounds)]
    own, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(b / a for a, b in pairs)
    return [
        f"| one member, tokens/s | {tokens / own:,.0f} | transformers + torch {tokens / other:,.0f} | {ratio:.2f} times theirs |"
    ]


def population(rounds: int) -> list[str]:
    """Measure four members in one program against four runs; return rows of the table."""
    together, alone = Ours(MEMBERS), Ours(1)
    together.step()
    alone.step()
    pairs = [(timed(together.step), sum(timed(alone.step) for _ in range(MEMBERS))) for _ in range(rounds)]
    one, four = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    compiled = f"{together.compile_seconds:.1f} s once"
    return [
        f"| {MEMBERS} members, seconds a step | {one:.2f} | {MEMBERS} runs one after another {four:.2f} | {ratio:.3f} of theirs |",
        f"| compilation | {compiled} | {MEMBERS} times {alone.compile_seconds:.1f} s |"
        f" {together.compile_seconds / (MEMBERS * alone.compile_seconds):.2f} of theirs |",
    ]


def main() -> None:
    """Measure and append to RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="repetitions (half as many for populations); medians are shown")
    rounds = parser.parse_args().rounds
    device = jax.devices()[0]
    rows = against_torch(rounds) + population(max(rounds // 2, 2))
    text = "\n".join(
        [
            f"\n## Training, {dt.date.today()}, {os.cpu_count()} x {platform.machine()} {device.device_kind}, jax {jax.__version__}",
            "",
            f"`python benchmarks/train.py --rounds {rounds}`: {parameter_count(ModelConfig(**SHAPE)) / 1e6:.1f} M parameters (hidden"
            f" {SHAPE['hidden_size']}, {SHAPE['num_layers']} layers, vocabulary {SHAPE['vocab_size']}), batch {BATCH}, length {LENGTH},"
            " fp32, AdamW; medians.",
            "",
            "| what | ours | against | ratio |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
