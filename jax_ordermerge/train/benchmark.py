"""Timing of the first steps of a training, and a profile of them. Only the profile is written."""

import contextlib
import itertools
import time
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.train import batches, loop
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.programs import LoadBase, Programs
from jax_ordermerge.train.recorder import Clock, Recorder
from jax_ordermerge.train.step import Metrics

_TRACED = 3  # steps in a profile


class StepTiming(NamedTuple):
    """Timing of the steps of all members together.

    Attributes:
        compilation: seconds.
        step: seconds per step.
        tokens: tokens per second, without padding.
        mfu: None where the peak of the device is not known.
        host: fraction of the time outside the compiled step.
    """

    compilation: float
    step: float
    tokens: float
    mfu: float | None
    host: float

    def to_json(self) -> Json:
        """Return the timing under names that have their units."""
        return {
            "compilation_seconds": self.compilation,
            "seconds_per_step": self.step,
            "tokens_per_second": self.tokens,
            "mfu": self.mfu,
            "host_fraction": self.host,
        }

    def __str__(self) -> str:
        mfu = "unknown for this device" if self.mfu is None else f"{100 * self.mfu:.1f} %"
        return (
            f"{self.step:.4f} s per step, {self.tokens:,.0f} tokens/s, MFU {mfu}, host outside the"
            f" compiled step {100 * self.host:.1f} %, compilation {self.compilation:.1f} s"
        )


def measure_steps(
    model: ModelConfig,
    load_base: LoadBase,
    plan: Plan,
    mesh: Mesh,
    *,
    count: int,
    profile: Path | None = None,
) -> StepTiming:
    """Take the first steps of a training and time those after the first.

    It drives the same feed, compiled step and record as `loop.train`.

    Args:
        model: the architecture.
        load_base: loads the parameters of the base.
        plan: what is trained on.
        mesh: the mesh.
        count: steps, at least 2. With a profile at least 5: the last 3 are traced and not timed.
        profile: directory for a trace of the last steps, to be opened with XProf or Perfetto.

    Raises:
        UserError: too few or too many steps.
    """
    traced = _TRACED if profile else 0
    if not 2 + traced <= count <= plan.steps:
        raise UserError(
            f"--steps {count}: expected {2 + traced} to {plan.steps}, the steps of the whole"
            " training"
        )
    programs = Programs(model, plan, mesh)
    # The recorder of a training, so that the time of the host is that of a training.
    record = Recorder(plan, model, mesh)
    start = time.monotonic()
    compiled_step, mix = programs.compile_step(), programs.compile_mixing()
    compilation = time.monotonic() - start
    # after the compilation: nothing of the population is in memory while the compiler works
    state, frozen = programs.initial_state(load_base), programs.load_frozen(load_base)
    clock = Clock(record.totals)
    pending: list[tuple[int, Metrics]] = []
    rows: dict[int, Json] = {}
    timed = count - traced
    with contextlib.closing(batches.feed(plan, programs.batch, 0)) as feed:
        for step, batch in enumerate(itertools.islice(feed, count)):
            if profile and step == timed:
                jax.profiler.start_trace(str(profile))
            with clock.devices():
                state, metrics = compiled_step(state, batch, frozen)
                state = mix(state, step + 1)
                pending.append((step, metrics))
                loop.limit_run_ahead(pending)
            # Rates are those since the row before. The first step has a row of its own and is not
            # timed, since it still loads the program; nor are traced steps, since tracing slows
            # them.
            if step + 1 in (1, timed, count):
                with clock.devices():
                    jax.block_until_ready(metrics)
                for number, fetched in loop.fetch(pending):
                    record.record(number, fetched)
                pending = []
                clock.read()
                rows[step + 1] = record.next_row(step + 1, 0.0)
    if profile:
        jax.profiler.stop_trace()
    first, last = rows[1], rows[timed]
    return StepTiming(
        compilation=compilation,
        step=(last["seconds"] - first["seconds"]) / (timed - 1),
        tokens=last["tokens_per_second"],
        mfu=last["mfu"],
        host=last["host_fraction"],
    )
