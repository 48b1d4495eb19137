"""Generation speed as ratios, measured side by side, each program in a separate process.

    python benchmarks/generate.py    # about 6 minutes on two idle CPU cores; --rounds 1 is quick

1. One model against transformers on torch with its defaults (dynamic cache, sdpa): the same small
   Llama and prompts, fp32, greedy, no end token. Generated tokens per second of a call, then
   separately for the prompt (one new token) and for further tokens.
2. Four members in one program against four runs one after another.

Only one worker computes at a time. The table is appended to benchmarks/RESULTS.md. The first part
needs torch; its row says where it is absent.
"""

import argparse
import contextlib
import datetime as dt
import importlib.util
import os
import pathlib
import platform
import statistics
from typing import Any

import jax
import numpy as np
from train import CONFIG, MEMBERS, Worker

from jax_ordermerge import tree
from jax_ordermerge.arch import parameter_count
from jax_ordermerge.evaluate import decode
from jax_ordermerge.model import llama

BATCH, PROMPT, NEW = 32, 96, 256
PROMPTS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, PROMPT))

# ---------------------------------------------------------------- in the workers


class Ours:
    """Our generator; with 0 members it is one model without a member axis."""

    def __init__(self, members: int, new: int) -> None:
        models = [llama.init_params(CONFIG, seed) for seed in range(max(members, 1))]
        self.params = jax.block_until_ready(tree.stack(models) if members else models[0])
        self.generate: Any = decode.generate_members if members else decode.generate
        self.new = new
        self.facts = {"device": jax.devices()[0].device_kind}

    def step(self) -> None:
        """Generate."""
        self.generate(
            CONFIG,
            self.params,
            PROMPTS.tolist(),
            max_new_tokens=self.new,
            eos_ids=(),
            dtype="float32",
            batch=BATCH,
        )


class Transformers:
    """Transformers on torch."""

    def __init__(self, new: int) -> None:
        import torch
        import transformers

        self.facts = {"version": torch.__version__}
        config = transformers.LlamaConfig(**CONFIG.to_hf("float32"), attn_implementation="sdpa")
        self.model = transformers.LlamaForCausalLM(config).eval()
        self.tokens = torch.from_numpy(PROMPTS)
        self.options = {
            "attention_mask": torch.ones_like(self.tokens),
            "max_new_tokens": new,
            "min_new_tokens": new,
        }
        self.inference = torch.inference_mode

    def step(self) -> None:
        """Generate."""
        with self.inference():
            self.model.generate(
                self.tokens, do_sample=False, eos_token_id=None, pad_token_id=0, **self.options
            )


# ---------------------------------------------------------------- in the parent


def measure(workers: list[Worker], rounds: int) -> list[list[float]]:
    """Return the seconds of each worker in each round. The workers take turns."""
    times = [[worker.step() for worker in workers] for _ in range(rounds)]
    return [list(column) for column in zip(*times, strict=True)]


def against_torch(rounds: int) -> list[str]:
    """Measure whole calls and calls for one token; return rows of the table."""
    if importlib.util.find_spec("torch") is None:
        return ["| one model | | torch is not installed | |"]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(contextlib.closing(Worker(build, *arguments, new)))
            for build, arguments in ((Ours, (0,)), (Transformers, ()))
            for new in (NEW, 1)
        ]
        version = workers[2].facts["version"]
        ours, ours_first, torch, torch_first = map(np.array, measure(workers, rounds))
    rows = []
    for name, count, our_seconds, torch_seconds in (
        ("generated tokens/s", BATCH * NEW, ours, torch),
        ("prompt tokens/s (first new token)", BATCH * PROMPT, ours_first, torch_first),
        ("further tokens/s", BATCH * (NEW - 1), ours - ours_first, torch - torch_first),
    ):
        our_rate, torch_rate = np.median(count / our_seconds), np.median(count / torch_seconds)
        ratio = np.median(torch_seconds / our_seconds)
        rows.append(
            f"| one model, {name} | {our_rate:,.0f} | transformers + torch {version} "
            f"{torch_rate:,.0f} | {ratio:.2f} times theirs |"
        )
    return rows


def population(rounds: int) -> tuple[str, str]:
    """Measure four members in one program against four runs.

    Returns:
        a row of the table, and the device.
    """
    with (
        contextlib.closing(Worker(Ours, MEMBERS, NEW)) as members,
        contextlib.closing(Worker(Ours, 0, NEW)) as single,
    ):
        pairs = [
            (members.step(), sum(single.step() for _ in range(MEMBERS))) for _ in range(rounds)
        ]
    program, runs = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    row = (
        f"| {MEMBERS} members, seconds per call | {program:.2f} | {MEMBERS} runs one after another "
        f"{runs:.2f} | {ratio:.3f} of theirs |"
    )
    return row, single.facts["device"]


def main() -> None:
    """Measure and append to RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; medians are shown")
    rounds = parser.parse_args().rounds
    rows = against_torch(rounds)
    row, device = population(rounds)
    cpu = f"{os.cpu_count()} x {platform.machine()} {device}"
    text = f"""
## Generation, {dt.date.today()}, {cpu}, jax {jax.__version__}

`python benchmarks/generate.py --rounds {rounds}`: {parameter_count(CONFIG) / 1e6:.1f} M parameters \
(hidden {CONFIG.hidden_size}, {CONFIG.num_layers} layers, vocabulary {CONFIG.vocab_size}), batch \
{BATCH}, {PROMPT} prompt tokens, {NEW} new ones, fp32, greedy; medians; each program in a separate \
process.

| what | ours | against | ratio |
|---|---|---|---|
"""
    text += "\n".join([*rows, row, ""])
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
