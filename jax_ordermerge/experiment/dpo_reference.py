"""Preference pairs in a run: their log-probabilities under the base, and what a model prefers."""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jax_ordermerge import processes
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import metrics
from jax_ordermerge.experiment import losses, models
from jax_ordermerge.experiment.context import Log, RunContext
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import read_npz, write_npz
from jax_ordermerge.model import preference

_PAUSE = 10.0  # seconds between messages


def add_reference_logprobs(ctx: RunContext) -> RunContext:
    """Return the context with the log-probabilities of its preference pairs under the base.

    They are measured once for all members and stored in the run directory. Without pairs the
    context is returned as it is.

    Raises:
        UserError: the stored values are of other pairs or of another base.
    """
    if ctx.config.objective.kind != "dpo":
        return ctx
    # The base as training holds it, quantized or not: members start there, so the first margins are
    # exactly 0. It is loaded for the first split that is measured, and not at all where all splits
    # are stored.
    base = functools.cache(lambda: models.training_base(ctx))
    key = f"{ctx.base_digest} {ctx.config.base_dtype} {ctx.config.model.compute_dtype}"
    if ctx.config.lora is not None and ctx.config.lora.quantizes:
        key += f" {ctx.config.lora.block}"

    def measure(name: str) -> np.ndarray:
        examples = ctx.splits[name]
        ctx.log(f"reference: the base on {len(examples)} pairs of {name}")
        progress = Progress(ctx.log, name, 2 * len(examples))
        sequences = losses.sequence_losses(ctx, base(), examples, on_progress=progress)
        losses.require_finite(sequences, examples, "base")
        return -sequences.sums.astype(np.float32)  # a loss is a negative log-probability

    # Of all splits: the validation loss and the evaluation are of pairs, too.
    splits = {
        name: with_reference(
            examples, ctx.layout.reference_logprobs(name), key, functools.partial(measure, name)
        )
        for name, examples in ctx.splits.items()
    }
    return dataclasses.replace(ctx, splits=splits)


def with_reference(
    examples: Examples, path: Path, key: str, measure: Callable[[], np.ndarray]
) -> Examples:
    """Return pairs with their reference log-probabilities, read from a file or measured now.

    Args:
        examples: n preference pairs.
        path: npz with `logps` float32[n, 2], `ids` int64[n] and `of`; written where it is absent.
        key: what else decides the values: base and dtypes.
        measure: returns float32[n, 2].

    Raises:
        UserError: the file is of other pairs or of another base.
    """
    # Values of other pairs would not fail but train towards something else, silently.
    key = f"{key} {examples.digest}"
    # all processes decide alike: each of them takes part in the measurement
    if not processes.broadcast(path.is_file()):
        logps = measure()
        write_npz(path, {"logps": logps, "ids": examples.ids, "of": np.array(key)})
        return dataclasses.replace(examples, reference=logps)
    arrays = read_npz(path)
    if str(arrays["of"]) != key:
        raise UserError(
            f"{path} was measured on other pairs or with another base; restore them, or choose"
            " another directory with --set output=DIRECTORY"
        )
    return dataclasses.replace(examples, reference=arrays["logps"])


def choices(examples: Examples, sums: np.ndarray) -> tuple[Json, list[Json]]:
    """Return how often a model gives the chosen response the higher reward, and each preference.

    Args:
        examples: n pairs with a reference.
        sums: [n, 2], summed token losses of both responses under the model.

    Returns:
        summary and items, as `harness.run` returns them.
    """
    assert examples.reference is not None
    assert examples.rejected is not None
    # the factor beta of the rewards has no influence on which of two is higher
    scores = preference.scores(jnp.asarray(-sums), jnp.asarray(examples.reference), beta=1.0)
    correct = (np.asarray(scores["rewards/accuracies"]) > 0).tolist()
    items = [
        {
            "id": int(examples.ids[row]),
            "prompt": examples.prompts[row],
            "reference": examples.responses[row],
            "answer": (examples if chosen else examples.rejected).responses[row],
            "correct": chosen,
        }
        for row, chosen in enumerate(correct)
    ]
    mean, error = metrics.accuracy(correct)
    # in the form of a task, so that reports and comparisons need no case for it
    return {"accuracy": mean, "se": error, "n": len(correct)}, items


class Progress:
    """Log how far a measurement has come, at most every ten seconds.

    Example:
        >>> clock = iter([0.0, 4.0, 12.0, 13.0]).__next__
        >>> progress = Progress(print, "reference", 100, clock)
        >>> for done in (10, 30, 40):
        ...     progress(done)
          reference: 30/100 sequences, 28 s left
    """

    def __init__(
        self, log: Log, name: str, total: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._log, self._name, self._total, self._clock = log, name, total, clock
        self._start = self._last = clock()

    def __call__(self, done: int) -> None:
        """Take the number of sequences that are done."""
        now = self._clock()
        if now - self._last >= _PAUSE:
            self._last = now
            left = (now - self._start) * (self._total - done) / done
            self._log(f"  {self._name}: {done}/{self._total} sequences, {left:.0f} s left")
