"""What a training leaves behind besides weights: metrics, the loss of each sample, the orders."""

import collections
import contextlib
import dataclasses
import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ordermerge import layout as layouts
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.train import flops
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.step import Metrics

# A spike is measured against the median loss of the last _WINDOW steps: a median, because a mean
# would rise with the spikes that it should find. Fewer than _ENOUGH steps say too little: the first
# losses of a training fall fast.
_WINDOW, _ENOUGH = 50, 10
_COMPILED = "/jax/core/compile/backend_compile_duration"

# ---------------------------------------------------------------------------------- time and work


@dataclasses.dataclass
class Totals:
    """Sums over all sessions of a training.

    Attributes:
        seconds: wall time.
        device_seconds: part of it in which the host started work of the devices or waited for it.
        tokens: tokens trained on, without padding.
        flops: FLOPs that these tokens need.
        compilations: programs that were compiled, or loaded from the compilation cache.
    """

    seconds: float = 0.0
    device_seconds: float = 0.0
    tokens: int = 0
    flops: float = 0.0
    compilations: int = 0

    def since(self, before: "Totals") -> "Totals":
        """Return what came after `before`.

        Example:
            >>> Totals(3.0, 2.0, 10).since(Totals(1.0, 1.0, 4))
            Totals(seconds=2.0, device_seconds=1.0, tokens=6, flops=0.0, compilations=0)
        """
        now, then = dataclasses.astuple(self), dataclasses.astuple(before)
        return Totals(*(x - y for x, y in zip(now, then, strict=True)))


class Clock:
    """Adds wall time to totals, and the time inside `devices` to `device_seconds` as well.

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
        self._totals, self._now, self._last = totals, now, now()

    @contextlib.contextmanager
    def devices(self) -> Iterator[None]:
        """Count the time in the block as that of the devices."""
        start = self._now()
        yield
        self._totals.device_seconds += self._now() - start

    def read(self) -> None:
        """Add the time since the last call."""
        now = self._now()
        self._totals.seconds += now - self._last
        self._last = now

    def skip(self) -> None:
        """Leave out the time since the last call of `read` or `skip`: nothing was trained in it."""
        self._last = self._now()


@contextlib.contextmanager
def count_compilations(totals: Totals) -> Iterator[None]:
    """Count in `totals.compilations` what this thread compiles in the block.

    Example:
        >>> totals = Totals()
        >>> with count_compilations(totals):
        ...     _ = jax.jit(lambda x: x + 1).lower(1.0).compile()
        >>> totals.compilations
        1
    """
    # JAX reports each compilation, so those that nobody asked for are counted too. Other threads
    # are not: saving and feeding may compile small helpers there.
    thread = threading.get_ident()

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILED and threading.get_ident() == thread:
            totals.compilations += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield
    finally:
        # whoever cleared all listeners meanwhile removed this one too
        with contextlib.suppress(AssertionError):
            jax.monitoring.unregister_event_duration_listener(count)


# ---------------------------------------------------------------------------------- metrics


class Recorder:
    """The record of a training. It is exact after a resume: all of it is in the checkpoint.

    Attributes:
        losses: float32[M, epochs, n], the mean loss of each sample (over its response tokens, or of
            its pair) at the step where it was seen; NaN where it was not seen yet.
        window: for each step since the last row of metrics, what a row averages: values by name
            and member.
        recent: losses of the members at the last steps, which a spike is measured against.
        totals: see `Totals`.
        last_rows: the last row of each log, by the name of its file.
        peak_flops: FLOP/s of all devices together; None where the device is not in the table.
    """

    def __init__(self, plan: Plan, model: ModelConfig, mesh: Mesh) -> None:
        """Start an empty record of a plan; MFU is that of a model on the devices of a mesh."""
        shape = (len(plan.members), plan.orders.shape[1], len(plan.examples))
        # small: one number per member, epoch and sample
        self.losses = np.full(shape, np.nan, np.float32)
        self.window: list[dict[str, list[float]]] = []
        self.recent: collections.deque[list[float]] = collections.deque(maxlen=_WINDOW)
        self.totals = Totals()
        device_kind, dtype = mesh.devices.flat[0].device_kind, plan.spec.model.compute_dtype
        peak = flops.peak_flops(device_kind, dtype)
        self.peak_flops = None if peak is None else peak * mesh.size
        self._plan, self._model = plan, model
        self._last = Totals()  # at the last row
        self._validation: dict[str, list[float]] = {}  # measured since the last row
        self.last_rows: dict[str, Json] = {}

    def record(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step, fetched to the host, with a leading `M`.

        Raises:
            UserError: a loss or gradient is not finite, or a loss is a spike. Step, member and
                samples are named.
        """
        # before anything is recorded: a checkpoint never holds a step that was refused
        self._check_finite(step, metrics)
        self._check_spike(step, metrics)
        epoch = step // self._plan.epoch_steps
        losses, weights, scores = metrics.examples
        seen = weights > 0  # padding, and samples without a response token, have no loss
        for position, ids in enumerate(metrics.ids):
            mask = seen[position]
            means = losses[position][mask] / weights[position][mask]
            self.losses[position, epoch, ids[mask]] = means
        row = {"loss": metrics.loss.tolist(), "grad_norm": metrics.grad_norm.tolist()}
        for name, values in (scores or {}).items():
            row[name] = [float(x[mask].mean()) for x, mask in zip(values, seen, strict=True)]
        self.window.append(row)
        self.recent.append(row["loss"])
        lengths = self._plan.sequence_lengths(step)
        self.totals.tokens += int(lengths.sum())
        # Of real tokens: padding and recomputation would make a training look faster than it
        # learns.
        self.totals.flops += flops.training_flops(self._model, lengths, self._plan.spec.lora)

    def record_validation(
        self, step: int, losses: jax.Array | np.ndarray, sources: Sequence[str] = ()
    ) -> None:
        """Record the validation losses of the members after a step, for the row that follows.

        Args:
            step: which.
            losses: [M, 1 + S], on all examples and on those of each source.
            sources: their names, [S].

        Raises:
            UserError: a loss is not finite.
        """
        columns = np.asarray(losses).T.tolist()
        for member, loss in zip(self._plan.members, columns[0], strict=True):
            if not np.isfinite(loss):
                raise UserError(
                    f"training diverged at step {step + 1}: member {member} has validation loss"
                    f" {loss}; nothing was overwritten, lower training.learning_rate or mend the"
                    " validation examples"
                )
        # not in the checkpoint: a row follows at once, before anything is saved
        names = ["validation_loss", *(f"validation_loss/{source}" for source in sources)]
        self._validation = dict(zip(names, columns, strict=True))

    def _check_finite(self, step: int, metrics: Metrics) -> None:
        bad = ~(np.isfinite(metrics.loss) & np.isfinite(metrics.grad_norm))
        if not bad.any():
            return
        position = int(np.flatnonzero(bad)[0])
        ids, sums = metrics.ids[position], metrics.examples.losses[position]
        # a gradient may overflow though all losses are finite: then all samples are named
        culprits = ids[(ids >= 0) & ~np.isfinite(sums)]
        samples = self._sample_ids(culprits if culprits.size else ids[ids >= 0])
        raise UserError(
            f"training diverged at step {step + 1}: member {self._plan.members[position]} has loss"
            f" {metrics.loss[position]} and gradient norm {metrics.grad_norm[position]} on samples"
            f" {samples}; nothing was overwritten, lower training.learning_rate or mend the samples"
        )

    def _check_spike(self, step: int, metrics: Metrics) -> None:
        factor = self._plan.spec.training.spike
        if factor is None or len(self.recent) < _ENOUGH:
            return
        usual = np.median(np.array(self.recent), axis=0)
        bad = metrics.loss > factor * usual
        if not bad.any():
            return
        position = int(np.flatnonzero(bad)[0])
        ids = metrics.ids[position]
        sums, weights = (x[position] for x in metrics.examples[:2])
        means = (sums / np.maximum(weights, 1))[ids >= 0]
        # Several samples share a step, and the loss of the step does not say which of them it is.
        worst_first = ids[ids >= 0][np.argsort(-means, kind="stable")]
        raise UserError(
            f"loss spike at step {step + 1}: member {self._plan.members[position]} has loss"
            f" {metrics.loss[position]:.4g}, more than training.spike = {factor:g} times the median"
            f" {usual[position]:.4g} of the {len(self.recent)} steps before, on samples"
            f" {self._sample_ids(worst_first)} (worst first); nothing was overwritten, lower"
            " training.learning_rate, mend the samples, or allow it with --set training.spike=null"
        )

    def _sample_ids(self, rows: jax.Array | np.ndarray) -> str:
        ids = ", ".join(map(str, self._plan.ids[np.asarray(rows[:8])].tolist()))
        return ids + (", ..." if rows.size > 8 else "")

    def exclude(self, seconds: float) -> None:
        """Count seconds in which nothing was trained (compiling), so that no rate contains them."""
        # Into the totals and into those at the last row: their difference, from which rates are
        # computed, stays as it is, while `seconds` of the log is all of the wall time.
        for totals in (self.totals, self._last):
            totals.seconds += seconds
            totals.device_seconds += seconds

    def next_row(self, step: int, learning_rate: float) -> Json:
        """Return the metrics since the last row, means over its steps, and start a new window.

        Args:
            step: steps done.
            learning_rate: of the last step.
        """
        # of Python floats, as JSON restores them: a resumed window has a mean of the same bits
        means = {
            name: np.mean([step[name] for step in self.window], axis=0, dtype=np.float64).tolist()
            for name in self.window[0]
        }
        means |= self._validation
        new = self.totals.since(self._last)
        self.window, self._last, self._validation = [], dataclasses.replace(self.totals), {}
        seconds = max(new.seconds, 1e-9)  # a clock of low resolution may not have moved
        return {
            "step": step,
            "epoch": step / self._plan.epoch_steps,
            "learning_rate": learning_rate,
            **means,
            "tokens_per_second": new.tokens / seconds,
            "mfu": None if self.peak_flops is None else new.flops / seconds / self.peak_flops,
            "host_fraction": 1 - new.device_seconds / seconds,
            "seconds": self.totals.seconds,
        }

    def append(self, log: Path, row: Json) -> None:
        """Append a row to a log."""
        layouts.append_jsonl(log, row)
        self.last_rows[log.name] = row

    # ------------------------------------------------------------------------------ checkpoints

    def to_metadata(self) -> Json:
        """Return what a checkpoint holds of it besides `losses`.

        It is a copy: a checkpoint is written while the training goes on.
        """
        return {
            "window": list(self.window),
            "recent": list(self.recent),
            "totals": dataclasses.asdict(self.totals),
            "last": dataclasses.asdict(self._last),
            "last_rows": dict(self.last_rows),
        }

    def restore(self, losses: np.ndarray, state: Json) -> None:
        """Continue from `losses` and from what `to_metadata` returned."""
        self.losses = np.array(losses)  # a copy: arrays of JAX cannot be written to
        self.window = list(state["window"])
        self.recent.extend(state["recent"])
        self.totals, self._last = Totals(**state["totals"]), Totals(**state["last"])
        # checkpoints of an earlier version have no rows
        self.last_rows = dict(state.get("last_rows", {}))


# ---------------------------------------------------------------------------------- files


def restore_rows(path: Path, step: int, last: Json | None) -> bool:
    """Bring a log to what it was after a step: what came later was lost and is trained again.

    Args:
        path: of the log.
        step: of the checkpoint; 0 where the training begins.
        last: the last row until then, from the checkpoint. It is added where a lost machine cut it
            off or had not written it; its step is not trained again.

    Returns:
        Whether the last line was cut off.
    """
    rows = [row for row in layouts.read_jsonl(path) if row["step"] <= step]
    cut_off = layouts.is_cut_off(path)
    if last is not None and all(row["step"] < last["step"] for row in rows):
        rows.append(last)
    # no file where there was none: an empty one would look like a log without rows
    if rows or path.is_file():
        layouts.write_jsonl(path, rows)
    return cut_off


def save_orders(layout: RunLayout, plan: Plan) -> None:
    """Write the sample ids of each member and epoch, -1 on padding, and the digests of the orders.

    `epoch_{e}` of a member is int64[steps, batch], packed [steps, batch, S].
    """
    for member, epochs in zip(plan.members, plan.orders, strict=True):
        ids = {
            f"epoch_{e}": np.where(rows >= 0, plan.ids[rows], -1) for e, rows in enumerate(epochs)
        }
        layouts.write_npz(layout.member_order(member), ids)
    layouts.write_json(layout.order_digests, plan.digests)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the bits of a result."""
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    return {name: importlib.metadata.version(name) for name in libraries}
