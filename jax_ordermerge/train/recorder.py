"""What training leaves behind besides weights: metrics line by line, the loss of each sample when it was seen, the orders, the state."""

import collections
import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import atomic
from jax_ordermerge.errors import UserError
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.flops import training_flops
from jax_ordermerge.train.step import Metrics

_RECENT, _ENOUGH = 50, 10  # steps whose median loss is the usual one, and how many it takes


@dataclasses.dataclass
class Totals:
    """Sums over all sessions of a training.

    Attributes:
        seconds: of wall time.
        device_seconds: of them, those in which the host started the devices' work or waited for it.
        tokens: trained on, without padding.
        flops: that these tokens need.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0

    def since(self, before: "Totals") -> "Totals":
        """Return what came after `before`.

        Example:
            >>> Totals(3.0, 2.0, 10).since(Totals(1.0, 1.0, 4))
            Totals(seconds=2.0, device_seconds=1.0, tokens=6, flops=0.0)
        """
        now, then = dataclasses.astuple(self), dataclasses.astuple(before)
        return Totals(*(x - y for x, y in zip(now, then, strict=True)))


class Clock:
    """Adds wall time to totals, and to `device_seconds` that inside `devices`.

    Example:
        >>> times = iter([0.0, 1.0, 4.0, 5.0]).__next__
        >>> totals = Totals()
        >>> clock = Clock(totals, times)
        >>> with clock.devices():
        ...     pass
        >>> clock.read()
        >>> totals.seconds, totals.device_seconds
        (5.0, 3.0)
    """

    def __init__(self, totals: Totals, now: Callable[[], float] = time.monotonic) -> None:
        self._totals, self._now, self._at = totals, now, now()

    @contextlib.contextmanager
    def devices(self) -> Iterator[None]:
        """Count the time in the block as that of the devices."""
        began = self._now()
        yield
        self._totals.device_seconds += self._now() - began

    def read(self) -> None:
        """Add the time since the last call."""
        now = self._now()
        self._totals.seconds += now - self._at
        self._at = now

    def skip(self) -> None:
        """Leave out the time since the last call of either: nothing was trained in it."""
        self._at = self._now()


class Journal:
    """The record of a training: exact after a resume, because everything in it is kept in the checkpoint.

    Attributes:
        losses: float32[M, epochs, n], mean loss of each sample's response tokens, or that of a pair, at the step where it was seen; NaN
            where not yet.
        window: of each step since the last line, what is averaged in a line: name and the members' values.
        recent: the members' losses at the last steps, by which a spike is known.
        totals: see `Totals`.
        peak: FLOP/s of all devices together, None where it is not known.
    """

    def __init__(self, plan: Plan, model: ModelConfig, peak: float | None = None) -> None:
        """Start an empty one.

        Args:
            plan: what is trained on.
            model: by which FLOPs are counted.
            peak: see above.
        """
        self.losses = np.full(
            (len(plan.members), plan.orders.shape[1], len(plan.examples)), np.nan, np.float32
        )
        self.window: list[dict[str, list[float]]] = []
        self.recent: collections.deque[list[float]] = collections.deque(maxlen=_RECENT)
        self.totals = Totals()
        self._plan, self._model, self.peak = plan, model, peak
        self._last = Totals()  # at the last line
        self._validation: list[float] | None = None  # measured since the last line

    def record(self, step: int, metrics: Metrics) -> None:
        """Take in a step's metrics, fetched to the host, with a leading `M`.

        Raises:
            UserError: a loss or gradient is not finite, or a loss is a spike; step, member and samples are named.
        """
        self._check_finite(step, metrics)
        self._check_spike(step, metrics)
        epoch = step // self._plan.epoch_steps
        losses, weights, scores = metrics.examples
        seen = weights > 0
        for place, ids in enumerate(metrics.ids):
            own = seen[place]
            self.losses[place, epoch, ids[own]] = losses[place][own] / weights[place][own]
        means = {
            name: [float(own[at].mean()) for own, at in zip(values, seen, strict=True)]
            for name, values in (scores or {}).items()
        }
        self.window.append(
            {"loss": metrics.loss.tolist(), "grad_norm": metrics.grad_norm.tolist(), **means}
        )
        self.recent.append(metrics.loss.tolist())
        self.totals.tokens += self._plan.tokens(step)
        self.totals.flops += training_flops(
            self._model, self._plan.lengths_seen(step), self._plan.config.lora
        )

    def validated(self, step: int, losses: np.ndarray) -> None:
        """Take in the members' validation losses after a step, for the line that follows.

        Raises:
            UserError: one is not finite.
        """
        for member, loss in zip(self._plan.members, losses.tolist(), strict=True):
            if not np.isfinite(loss):
                raise UserError(
                    f"training diverged at step {step + 1}: member {member} has validation loss {loss}; nothing was overwritten,"
                    " lower training.learning_rate or mend the validation examples"
                )
        self._validation = losses.tolist()

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        bad = ~(np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm))
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        ids, sums = metrics.ids[place], metrics.examples.losses[place]
        wrong = ids[(ids >= 0) & ~np.isfinite(sums)]
        raise UserError(
            f"training diverged at step {step + 1}: member {self._plan.members[place]} has loss {metrics.loss[place]} and gradient norm"
            f" {metrics.grad_norm[place]} on samples {self._named(wrong if wrong.size else ids[ids >= 0])}; nothing was overwritten,"
            " lower training.learning_rate or mend the samples"
        )

    def _check_spike(self, step: int, metrics: Metrics) -> None:
        factor = self._plan.config.training.spike
        if factor is None or len(self.recent) < _ENOUGH:
            return
        usual = np.median(np.array(self.recent), axis=0)
        bad = metrics.loss > factor * usual
        if not bad.any():
            return
        place = int(np.flatnonzero(bad)[0])
        ids, sums, weights = (
            part[place] for part in (metrics.ids, metrics.examples.losses, metrics.examples.weights)
        )
        worst_first = ids[ids >= 0][
            np.argsort(-(sums / np.maximum(weights, 1))[ids >= 0], kind="stable")
        ]
        raise UserError(
            f"loss spike at step {step + 1}: member {self._plan.members[place]} has loss {metrics.loss[place]:.4g}, more than training.spike"
            f" = {factor:g} times the median {usual[place]:.4g} of the {len(self.recent)} steps before, on samples"
            f" {self._named(worst_first)} (worst first); nothing was overwritten, lower training.learning_rate, mend the samples, or"
            " allow it with --set training.spike=null"
        )

    def _named(self, rows: Any) -> str:
        return ", ".join(map(str, self._plan.ids[rows[:8]].tolist())) + (
            ", ..." if rows.size > 8 else ""
        )

    def pass_over(self, seconds: float) -> None:
        """Count seconds in which nothing was trained (compiling), so that no rate has them."""
        for totals in (self.totals, self._last):
            totals.seconds += seconds
            totals.device_seconds += seconds

    def line(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Return the metrics since the last line, means over its steps, and start a new window. `step` counts from 1."""
        means = {
            name: np.mean([step[name] for step in self.window], axis=0, dtype=np.float64).tolist()
            for name in self.window[0]
        }
        new = self.totals.since(self._last)
        self.window, self._last = [], dataclasses.replace(self.totals)
        measured, self._validation = self._validation, None
        seconds = max(new.seconds, 1e-9)
        return {
            "step": step,
            "epoch": step / self._plan.epoch_steps,
            "learning_rate": learning_rate,
            **means,
            **({} if measured is None else {"validation_loss": measured}),
            "tokens_per_second": new.tokens / seconds,
            "mfu": None if self.peak is None else new.flops / seconds / self.peak,
            "host_fraction": 1 - new.device_seconds / seconds,
            "seconds": self.totals.seconds,
        }

    def to_metadata(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of it besides `losses`: a copy, since a checkpoint is written while training goes on."""
        return {
            "window": list(self.window),
            "recent": list(self.recent),
            "totals": dataclasses.asdict(self.totals),
            "last": dataclasses.asdict(self._last),
        }

    def restore(self, losses: np.ndarray, kept: dict[str, Any]) -> None:
        """Take back `losses` and what `to_metadata` returned."""
        self.losses = np.array(losses)
        self.window = list(kept["window"])
        self.recent.extend(kept["recent"])
        self.totals, self._last = Totals(**kept["totals"]), Totals(**kept["last"])


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
    """Write `member_{m}.npz` with `epoch_{e}`, int64[steps, batch] (packed [steps, batch, S]) of sample ids (-1 on padding), and `digests.json`.

    Args:
        directory: `orders/` of the run.
        plan: whose orders.
    """
    for member, epochs in zip(plan.members, plan.orders, strict=True):
        named = {
            f"epoch_{e}": np.where(rows >= 0, plan.ids[rows], -1) for e, rows in enumerate(epochs)
        }
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
    if jax.process_index() == 0:
        atomic.replace(path, content)


def versions(
    names: Sequence[str] = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"),
) -> dict[str, str]:
    """Return the versions of libraries that decide the bits."""
    from importlib import metadata

    return {name: metadata.version(name) for name in names}
