"""Generation speed as ratios, measured side by side, each program in a process of its own.

    python benchmarks/generate.py            # about 6 minutes on two idle CPU cores; --rounds 1 for a look

1. One model against transformers on torch (its defaults: a dynamic cache, sdpa): the same small Llama, the same prompts, fp32, greedy,
   no end token. Generated tokens a second of the whole call, then apart: the prompt (one new token) and a further token.
2. Four members in one program against four runs one after another.

Only one worker computes at a time. Appends the table to benchmarks/RESULTS.md. Needs torch for the first part and says so where it is
absent.
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
    """The project's generator; members 0 is one model without a member axis."""

    def __init__(self, members: int, new: int) -> None:
        made = [llama.init_params(CONFIG, seed) for seed in range(max(members, 1))]
        self.params = jax.block_until_ready(tree.stack(made) if members else made[0])
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


class Theirs:
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


def medians(workers: list[Worker], rounds: int) -> list[list[float]]:
    """Return the seconds of each worker in each round, all workers in turn."""
    return [
        list(column)
        for column in zip(*([one.step() for one in workers] for _ in range(rounds)), strict=True)
    ]


def against_torch(rounds: int) -> list[str]:
    """Measure whole calls and calls for one token; return rows of the table."""
    if importlib.util.find_spec("torch") is None:
        return ["| one model | | torch is not installed | |"]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(contextlib.closing(Worker(build, *given, new)))
            for build, given in ((Ours, (0,)), (Theirs, ()))
            for new in (NEW, 1)
        ]
        version = workers[2].facts["version"]
        own, own_first, other, other_first = (
            np.array(column) for column in medians(workers, rounds)
        )
    rows = []
    for what, count, ours, theirs in (
        ("generated tokens/s", BATCH * NEW, own, other),
        ("prompt tokens/s (first new token)", BATCH * PROMPT, own_first, other_first),
        ("further tokens/s", BATCH * (NEW - 1), own - own_first, other - other_first),
    ):
        one, two, ratio = (
            float(np.median(x)) for x in (count / ours, count / theirs, theirs / ours)
        )
        rows.append(
            f"| one model, {what} | {one:,.0f} | transformers + torch {version} {two:,.0f} | {ratio:.2f} times theirs |"
        )
    return rows


def population(rounds: int) -> tuple[str, str]:
    """Measure four members in one program against four runs; return a row of the table and the device."""
    with (
        contextlib.closing(Worker(Ours, MEMBERS, NEW)) as together,
        contextlib.closing(Worker(Ours, 0, NEW)) as alone,
    ):
        pairs = [
            (together.step(), sum(alone.step() for _ in range(MEMBERS))) for _ in range(rounds)
        ]
    one, four = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    row = f"| {MEMBERS} members, seconds a call | {one:.2f} | {MEMBERS} runs one after another {four:.2f} | {ratio:.3f} of theirs |"
    return row, alone.facts["device"]


def main() -> None:
    """Measure and append to RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="repetitions; medians are shown")
    rounds = parser.parse_args().rounds
    rows = against_torch(rounds)
    row, device = population(rounds)
    text = "\n".join(
        [
            f"\n## Generation, {dt.date.today()}, {os.cpu_count()} x {platform.machine()} {device}, jax {jax.__version__}",
            "",
            f"`python benchmarks/generate.py --rounds {rounds}`: {parameter_count(CONFIG) / 1e6:.1f} M parameters (hidden"
            f" {CONFIG.hidden_size}, {CONFIG.num_layers} layers, vocabulary {CONFIG.vocab_size}), batch {BATCH}, {PROMPT} prompt tokens,"
            f" {NEW} new ones, fp32, greedy; medians; each program in a process of its own.",
            "",
            "| what | ours | against | ratio |",
            "|---|---|---|---|",
            *rows,
            row,
            "",
        ]
    )
    print(text)
    with (pathlib.Path(__file__).parent / "RESULTS.md").open("a") as file:
        file.write(text)


if __name__ == "__main__":
    main()
