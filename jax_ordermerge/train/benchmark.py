"""A look at the first steps of a training: how fast they are, and a profile of them. Nothing is written but the profile."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.config import Config
from jax_ordermerge.errors import UserError
from jax_ordermerge.train import batches, loop
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.recorder import Clock
from jax_ordermerge.tree import Tree

_TRACED = 3  # steps in a profile


class StepTiming(NamedTuple):
    """What a look saw; rates are of all members together.

    Attributes:
        compilation: seconds.
        step: seconds a step.
        tokens: a second, without padding.
        mfu: None where the peak of the device is not known.
        host: share of the time outside the compiled step.
    """

    compilation: float
    step: float
    tokens: float
    mfu: float | None
    host: float

    def __str__(self) -> str:
        mfu = "unknown for this device" if self.mfu is None else f"{100 * self.mfu:.1f} %"
        return (
            f"{self.step:.4f} s a step, {self.tokens:,.0f} tokens/s, MFU {mfu}, host outside the compiled step {100 * self.host:.1f} %,"
            f" compilation {self.compilation:.1f} s"
        )


def look(
    config: Config,
    model: ModelConfig,
    base: Callable[[], Tree],
    plan: Plan,
    mesh: Mesh,
    *,
    count: int,
    profile: Path | None = None,
) -> StepTiming:
    """Take the first steps of a training and measure those after the first.

    Args:
        config, model, mesh: as in `loop.train`.
        base: loads the parameters of the base.
        plan: what is trained on.
        count: steps, at least 2; with a profile the last 3 are traced and not measured, so that it takes at least 5.
        profile: directory for a trace of the last steps, to be opened with XProf or Perfetto.

    Raises:
        UserError: too few steps.
    """
    traced = _TRACED if profile else 0
    if not 2 + traced <= count <= plan.steps:
        raise UserError(
            f"--steps {count}: expected {2 + traced} to {plan.steps}, the steps of the whole training"
        )
    training = loop.Training(config, model, plan, mesh, config.directory)
    began = time.monotonic()
    compiled, mix = training.compile(), training.compile_mixing()
    compilation = time.monotonic() - began
    state = training.start(base)
    frozen = training.held(base)
    clock = Clock(training.journal.totals)
    pending: list[Any] = []
    lines: dict[int, dict[str, Any]] = {}
    with batches.Feed(plan, training.batch, 0) as feed:
        for step, batch in enumerate(itertools.islice(feed, count)):
            if profile and step == count - traced:
                jax.profiler.start_trace(str(profile))
            with clock.devices():
                state, metrics = compiled(state, batch, frozen)
                state = mix(state, step + 1)
                pending.append((step, metrics))
                loop.follow(pending)
            if step + 1 in (1, count - traced, count):  # the first step still loads the program
                with clock.devices():
                    jax.block_until_ready(metrics)
                for number, fetched in loop.fetch(pending):
                    training.journal.record(number, fetched)
                pending = []
                clock.read()
                lines[step + 1] = training.journal.line(step + 1, 0.0)
    if profile:
        jax.profiler.stop_trace()
    measured = count - traced
    seen = lines[measured]
    seconds = (seen["seconds"] - lines[1]["seconds"]) / (measured - 1)
    return StepTiming(
        compilation, seconds, seen["tokens_per_second"], seen["mfu"], seen["host_fraction"]
    )
