"""What training leaves behind besides weights: metrics line by line, the loss of each sample when it was seen, the orders, the state."""

import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ordermerge.errors import UserError
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.step import Metrics


class Journal:
    """The record of a training: exact after a resume, because everything in it is kept in the checkpoint.

    Attributes:
        losses: float32[M, epochs, n], mean loss of each sample's response tokens at the step where it was seen; NaN where not yet.
        window: of each step since the last line, `(losses, gradient norms)` of the members.
        seconds, tokens: wall time and real tokens so far, over all sessions.
    """

    def __init__(self, plan: Plan) -> None:
        self.losses = np.full((len(plan.members), plan.orders.shape[1], len(plan.examples)), np.nan, np.float32)
        self.window: list[tuple[list[float], list[float]]] = []
        self.seconds, self.tokens = 0.0, 0
        self._plan = plan
        self._last = (0.0, 0)  # seconds and tokens at the last line

    def record(self, step: int, metrics: Metrics) -> None:
        """Take in a step's metrics, fetched to the host, with a leading `M`.

        Raises:
            UserError: a loss or gradient is not finite; step, member and samples are named.
        """
        self._check_finite(step, metrics)
        epoch = step // self._plan.epoch_steps
        for place, (ids, losses, tokens) in enumerate(zip(metrics.ids, *metrics.examples, strict=True)):
            seen = tokens > 0
            self.losses[place, epoch, ids[seen]] = losses[seen] / tokens[seen]
        self.window.append((metrics.loss.tolist(), metrics.grad_norm.tolist()))
        self.tokens += self._plan.tokens(step)

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        bad = ~(np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm))
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        ids, sums = metrics.ids[place], metrics.examples.losses[place]
        wrong = ids[(ids >= 0) & ~np.isfinite(sums)]
        named = wrong if wrong.size else ids[ids >= 0]
        shown = ", ".join(map(str, self._plan.ids[named[:8]].tolist())) + (", ..." if named.size > 8 else "")
        raise UserError(
            f"training diverged at step {step + 1}: member {self._plan.members[place]} has loss {metrics.loss[place]} and gradient norm"
            f" {metrics.grad_norm[place]} on samples {shown}; nothing was overwritten, lower training.learning_rate or mend the samples"
        )

    def line(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return the metrics since the last line, means over its steps, and start a new window. `step` counts from 1."""
        losses, norms = (np.mean(values, axis=0, dtype=np.float64).tolist() for values in zip(*self.window, strict=True))
        seconds, tokens = self.seconds - self._last[0], self.tokens - self._last[1]
        self.window, self._last = [], (self.seconds, self.tokens)
        return {
            "step": step,
            "epoch": step / self._plan.epoch_steps,
            "learning_rate": learning_rate,
            "loss": losses,
            "grad_norm": norms,
            "tokens_per_second": tokens / seconds if seconds > 0 else 0.0,
            "seconds": self.seconds,
        }

    def to_metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it besides `losses`: a copy, since a checkpoint is written while training goes on."""
        return {"window": list(self.window), "seconds": self.seconds, "tokens": self.tokens, "last": self._last}

    def restore(self, losses: np.ndarray, kept: dict[str, Any]) -> None:
        """Take back `losses` and what `to_metadata` returned."""
        self.losses = np.array(losses)
        self.window = [(loss, norm) for loss, norm in kept["window"]]
        self.seconds, self.tokens = kept["seconds"], kept["tokens"]
        self._last = tuple(kept["last"])


# ------------------------------------------------------------------------------------------------------------------------ files
# Only process 0 writes.


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Append a line of JSON."""
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")


def truncate_lines(path: Path, step: int) -> None:
    """Keep the lines up to a step: what came after it was lost with the process and is trained again."""
    if jax.process_index() != 0 or not path.is_file():
        return
    kept = []
    for text in path.read_text().splitlines(keepends=True):
        # a killed process may leave half a line; it is later than any checkpoint
        if not text.endswith("\n") or json.loads(text)["step"] > step:
            break
        kept.append(text)
    write_bytes(path, "".join(kept).encode())


def save_orders(directory: Path, plan: Plan) -> None:
    """Write `member_{m}.npz` with `epoch_{e}`, int64[steps, batch] of sample ids (-1 on padding), and `digests.json`.

    Args:
        directory: `orders/` of the run.
        plan: whose orders.
    """
    for member, epochs in zip(plan.members, plan.orders, strict=True):
        named = {f"epoch_{e}": np.where(rows >= 0, plan.ids[rows], -1) for e, rows in enumerate(epochs)}
        write_arrays(directory / f"member_{member}.npz", named)
    write_json(directory / "digests.json", plan.digests)


def write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz file whole."""
    whole = io.BytesIO()
    np.savez_compressed(whole, **arrays)  # type: ignore[arg-type]  # the stubs take any keyword for allow_pickle
    write_bytes(path, whole.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole."""
    write_bytes(path, json.dumps(value, indent=1, allow_nan=False).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its name and rename it when whole."""
    if jax.process_index() != 0:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial")
    beside.write_bytes(content)
    os.replace(beside, path)


def versions(names: Sequence[str] = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")) -> dict[str, str]:
    """Return the versions of libraries that decide the bits."""
    from importlib import metadata

    return {name: metadata.version(name) for name in names}
