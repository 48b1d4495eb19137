"""Preference pairs in a run: what the base makes of them, measured once for all members, and what a model prefers."""

import dataclasses
import hashlib
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jax_ordermerge import config as schema
from jax_ordermerge import processes
from jax_ordermerge.checkpoint.safetensors import Reader
from jax_ordermerge.config import Config
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate import answers
from jax_ordermerge.experiment.layout import write_bytes
from jax_ordermerge.model import preference

_LOOKED_AT = 2**15  # elements of each tensor that tell one base from another
_PAUSE = 10.0  # seconds between messages


def base_digest(config: Config, base: Path) -> str:
    """Return SHA-256 over what decides the base: its config, and name, shape, dtype and first elements of every tensor.

    Not over all bytes: that would read hundreds of gigabytes again whenever a run continues. Two bases that differ in no tensor's
    first elements are taken for one.
    """
    reader = Reader(base)
    found = hashlib.sha256(
        json.dumps([reader.config, config.model.init, config.seed], sort_keys=True).encode()
    )
    if config.model.init == "pretrained":
        for name in sorted(reader.names):
            info = reader.info(name)
            rows = max(1, _LOOKED_AT * info.shape[0] // max(1, int(np.prod(info.shape))))
            first = reader.read_slice(
                name, (slice(0, rows), *[slice(None)] * (len(info.shape) - 1))
            )
            found.update(
                f"{name} {info.dtype} {info.shape}".encode() + np.ascontiguousarray(first).tobytes()
            )
    return found.hexdigest()


def with_reference(
    examples: Examples, file: Path, of: str, measured: Callable[[], np.ndarray]
) -> Examples:
    """Return pairs with their reference log-probabilities, from the file or, where there is none, measured and written there.

    Args:
        examples: preference pairs.
        file: npz with `logps` float32[n, 2], `ids` int64[n] and `of`.
        of: what else they depend on: base and dtype.
        measured: gives float32[n, 2].

    Raises:
        UserError: the file is of other pairs or of another base.
    """
    of = f"{of} {examples.digest}"
    if not processes.broadcast(file.is_file()):
        whole = io.BytesIO()
        logps = measured()
        np.savez(whole, logps=logps, ids=examples.ids, of=np.array(of))
        write_bytes(file, whole.getvalue())
        return dataclasses.replace(examples, reference=logps)
    with np.load(file) as saved:
        if str(saved["of"]) != of:
            raise UserError(
                f"{file} was measured on other pairs or with another base; restore them, or choose another directory with"
                " --set output=DIRECTORY"
            )
        return dataclasses.replace(examples, reference=saved["logps"])


def losses(
    settings: schema.Objective, examples: Examples, sums: np.ndarray, tokens: np.ndarray
) -> np.ndarray:
    """Return the loss of each pair under a model, float32[n].

    Args:
        settings: of the objective.
        examples: pairs with a reference.
        sums, tokens: [n, 2], summed token losses of both responses under the model, and numbers of tokens.
    """
    assert examples.reference is not None
    logps, reference = jnp.asarray(-sums), jnp.asarray(examples.reference)
    return np.asarray(preference.pair_losses(logps, reference, jnp.asarray(tokens), settings))


def choices(examples: Examples, sums: np.ndarray) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return how often a model gives the chosen response the higher reward, and which response it prefers of each pair.

    Args:
        examples: pairs with a reference.
        sums: [n, 2], summed token losses of both responses under the model.

    Returns:
        What `harness.run_task` returns.
    """
    assert examples.reference is not None
    assert examples.rejected is not None
    correct = (
        np.asarray(
            preference.scores(*map(jnp.asarray, (-sums, examples.reference)), beta=1.0)[
                "rewards/accuracies"
            ]
        )
        > 0
    )
    items = [
        {
            "id": int(examples.ids[row]),
            "prompt": examples.prompts[row],
            "reference": examples.responses[row],
            "answer": (examples if right else examples.rejected).responses[row],
            "correct": bool(right),
        }
        for row, right in enumerate(correct)
    ]
    mean, error = answers.accuracy(correct.tolist())
    return {"accuracy": mean, "se": error, "n": len(correct)}, items


class Progress:
    """Says now and then how far a measurement has come.

    Example:
        >>> clock = iter([0.0, 4.0, 12.0, 13.0]).__next__
        >>> progress = Progress(print, "reference", 100, clock)
        >>> for done in (10, 30, 40):
        ...     progress(done)
          reference: 30/100 sequences, 28 s left
    """

    def __init__(
        self,
        log: Callable[[str], None],
        what: str,
        total: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._what, self._total, self._clock = log, what, total, clock
        self._began = self._shown = clock()

    def __call__(self, done: int) -> None:
        """Take the number of what is done."""
        now = self._clock()
        if now - self._shown >= _PAUSE:
            self._shown = now
            left = (now - self._began) * (self._total - done) / done
            self._say(f"  {self._what}: {done}/{self._total} sequences, {left:.0f} s left")
