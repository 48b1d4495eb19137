"""The training of a population: files, clocks and messages around the pure step.

The same call again continues from the last checkpoint, or reports that all is done. Interrupted or
not, these have the same bits: parameters, optimizer state, metrics (except times), and the losses
of samples.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jax_ordermerge import layout as layouts
from jax_ordermerge import processes
from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.checkpoint.orbax import Checkpoints, save_timeout
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import PeerLost, Stopped, UserError
from jax_ordermerge.json_types import Json
from jax_ordermerge.layout import RunLayout
from jax_ordermerge.merge import trajectory
from jax_ordermerge.train import batches, recorder, resume, trackers, validation
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.programs import LoadBase, Programs
from jax_ordermerge.train.progress import Display, Watcher
from jax_ordermerge.train.recorder import Clock, Recorder
from jax_ordermerge.train.spec import TrainingSpec
from jax_ordermerge.train.step import Metrics, TrainState
from jax_ordermerge.train.validation import Best
from jax_ordermerge.tree import Tree

T = TypeVar("T")
# (what members have for themselves, what they share) -> texts for a row of the generated samples
Sample = Callable[[Tree, Tree], Json]
# Steps that the host may be ahead of the devices. JAX starts steps without waiting for them. A
# little ahead, the devices never wait for the host; not far ahead, a request to stop is answered
# soon and few batches are in memory.
_AHEAD = 2
# Waiting for a save is worth a warning from this share of the time between two saves on, and from
# these seconds on: the steps of a small model are shorter than any save.
_NOTICED_SHARE, _NOTICED_SECONDS = 0.1, 10.0


def train(
    spec: TrainingSpec,
    model: ModelConfig,
    base: Tree | LoadBase,
    examples: Examples,
    mesh: Mesh,
    layout: RunLayout,
    *,
    held_out: Examples | None = None,
    members: Sequence[int] | None = None,
    watch: Watcher | None = None,
    on_checkpoint: Callable[[], None] | None = None,
    sample: Sample | None = None,
) -> Json:
    """Fine-tune the members of a population, each in its own order, or continue doing so.

    Args:
        spec: settings of the training.
        model: the architecture.
        base: float32 parameters of the base, or a function that loads them. It is called only when
            they are needed: at the start, and, in any dtype, wherever a frozen base is read
            (`lora`).
        examples: tokenized training examples.
        mesh: its `order` axis divides the number of members.
        layout: run directory that is written.
        held_out: examples that are never trained on, where the settings ask for validation losses.
        members: numbers of the members to train, by default all. A member alone becomes what it
            becomes in the population.
        watch: receives messages and metrics, by default a display on the terminal.
        on_checkpoint: is called, in a thread of its own, whenever a checkpoint is complete.
        sample: answers fixed prompts with the weights of the members every `sample_every` steps.

    Returns:
        What is in the training state of the run directory.

    Raises:
        UserError: the checkpoint there is of another training, processes were given different
            things, or a loss is not finite or a spike (step, member and samples are named).
        Stopped: SIGTERM or SIGINT asked for it; a checkpoint is saved.
        PeerLost: another process ended.
    """
    plan = batches.make_plan(spec, examples, members, mesh=mesh)
    _check(plan, mesh, held_out)  # before anything is written
    programs = Programs(model, plan, mesh, held_out)
    try:
        with contextlib.ExitStack() as stack:
            shown: Watcher = watch or stack.enter_context(
                Display(plan.steps, members=len(plan.members))
            )
            training = Training(programs, layout, shown, sample)
            return training.run(base if callable(base) else lambda: base, on_checkpoint)
    except jax.errors.JaxRuntimeError as error:
        # with several processes a broken collective is how the loss of one of them shows
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:200]
        raise PeerLost(
            f"work shared with the other processes failed ({reason}): one of them has ended, its"
            " own log says why; start all again to continue"
        ) from error


def merged_steps(plan: Plan) -> list[int]:
    """Return the steps whose checkpoints merges average; empty where they take the last weights.

    Raises:
        UserError: the training saves fewer checkpoints than are averaged.
    """
    last = plan.spec.checkpoints_merged
    if last == 1:
        return []
    every = plan.spec.training.checkpoint_every or plan.epoch_steps
    return trajectory.planned_steps(plan.steps, every, last)


def _check(plan: Plan, mesh: Mesh, held_out: Examples | None) -> None:
    """Refuse what cannot be trained."""
    merged_steps(plan)
    training, population = plan.spec.training, plan.spec.population.total
    if training.validates and held_out is None:
        raise UserError(
            "training.checkpoint = best and training.validate_every need validation examples"
        )
    if training.mixing and len(plan.members) < population:
        raise UserError(
            f"training.mixing ({training.mixing.kind}) lets all members act on each other; member"
            f" {', '.join(map(str, plan.members))} cannot be trained without the other"
            f" {population - len(plan.members)}: give more devices or memory, or set"
            " training.mixing=null"
        )
    if len(plan.members) % mesh.shape["order"]:
        raise UserError(
            f"{len(plan.members)} members cannot be divided over mesh.order ="
            f" {mesh.shape['order']}; choose a divisor for mesh.order"
        )


class Due(NamedTuple):
    """What is done after a step."""

    log: bool
    save: bool
    validate: bool
    sample: bool


class Training:
    """One session of a training. `run` is its main path, `_take_steps` the loop over the steps."""

    def __init__(
        self,
        programs: Programs,
        layout: RunLayout,
        watch: Watcher,
        sample: Sample | None = None,
    ) -> None:
        self.programs, self.layout, self.watch, self.sample = programs, layout, watch, sample
        self.spec, self.plan = programs.spec, programs.plan
        self.recorder = Recorder(programs.plan, programs.model, programs.mesh)
        self.saved = time.monotonic()  # when the last checkpoint was begun
        self.warned = False  # that saves take too long

    def run(self, load_base: LoadBase, on_checkpoint: Callable[[], None] | None = None) -> Json:
        """Start or continue, take the steps that are left, and write what follows from them."""
        programs, plan, layout = self.programs, self.plan, self.layout
        training = self.spec.training
        with Checkpoints(
            layout.checkpoints,
            training.keep_checkpoints,
            steps=merged_steps(plan),
            on_saved=on_checkpoint,
            timeout=save_timeout(
                resume.checkpoint_bytes(programs), training.checkpoint_bytes_per_second
            ),
        ) as checkpoints:
            # ---------------------------------------------------------------- start or continue
            # Processes that disagree on data, orders or checkpoint would wait in different
            # collectives or train on mixed batches; so they are compared before the first step.
            start = checkpoints.latest()
            processes.check_alike({**resume.identity(programs), "checkpoints": start})
            state: TrainState | None
            if start is None:
                state, best = programs.initial_state(load_base), validation.initial(programs.best)
                recorder.save_orders(layout, plan)
            else:
                resume.check_same(checkpoints, start, programs)
                if start < plan.steps:
                    self.watch.log(f"continuing from step {start} of {plan.steps} ({layout.root})")
                state, best = resume.restore(checkpoints, start, programs, self.recorder)
            # Rows may be there of steps after the checkpoint, whose weights were lost with the
            # process. Those steps are taken again.
            for path in (layout.training_log, layout.generated_samples):
                last = self.recorder.last_rows.get(path.name)
                if recorder.restore_rows(path, start or 0, last):
                    self.watch.log(f"{path} ended within a line; repaired up to step {start or 0}")
            self._describe_members()

            # ---------------------------------------------------------------- the steps
            if state is None:
                self.watch.log(f"training is already complete: {plan.steps} steps ({layout.root})")
            else:
                device = programs.mesh.devices.flat[0]
                # of a CPU nobody expects it
                if self.recorder.peak_flops is None and device.platform != "cpu":
                    self.watch.log(
                        "MFU is not shown: the peak FLOP/s of device kind"
                        f" {device.device_kind!r} is not known"
                    )
                best = self._take_steps(start or 0, state, best, load_base, checkpoints)

            # ---------------------------------------------------------------- what follows
            best_losses, best_steps = to_host((best.loss, best.step))
        # only now: leaving the block waited until the last checkpoint is complete on the disk
        return self._finish(best_losses, best_steps)

    def _take_steps(
        self,
        start: int,
        state: TrainState,
        best: Best,
        load_base: LoadBase,
        checkpoints: Checkpoints,
    ) -> Best:
        """Take the steps after `start`, and return the best weights."""
        programs, plan, spec, record = self.programs, self.plan, self.spec, self.recorder
        with contextlib.ExitStack() as stack:
            opened = trackers.open_trackers(spec.tracking, self.layout, plan.members, start)
            for tracker in opened:
                stack.callback(tracker.close)
            watchers: tuple[trackers.Tracker | Watcher, ...] = (*opened, self.watch)
            frozen = programs.load_frozen(load_base)
            stack.enter_context(recorder.count_compilations(record.totals))
            # ahead of time, so that no rate of the log contains the compilation
            before = time.monotonic()
            compiled_step, mix = programs.compile_step(), programs.compile_mixing()
            validate = programs.compile_validation()
            record.exclude(time.monotonic() - before)
            feed = stack.enter_context(
                contextlib.closing(batches.feed(plan, programs.batch, start))
            )
            stop = stack.enter_context(processes.StopSignal())
            clock = Clock(record.totals)
            pending: list[tuple[int, Metrics]] = []  # metrics that are still on the devices
            for step, batch in enumerate(feed, start=start):
                # ------------------------------------------------------------ the step
                # The state is donated to the step and replaced by its result: nothing else may hold
                # on to it. A checkpoint copies it before the next step begins.
                done = step + 1
                with clock.devices():
                    state, metrics = compiled_step(state, batch, frozen)
                    state = mix(state, done)
                    pending.append((step, metrics))
                    limit_run_ahead(pending)
                # every process asks after every step: they agree on the step to stop at
                due, stops = self._due(done), stop.reached(done)
                if not (any(due) or stops):
                    continue

                # ------------------------------------------------------------ its metrics
                # Metrics stay on the devices until they are needed: a transfer after each step
                # would make the devices wait. A loss that is not finite is seen here, so before
                # anything is saved, if some steps late.
                with clock.devices():
                    jax.block_until_ready(metrics)
                for number, fetched in fetch(pending):
                    record.record(number, fetched)
                pending = []
                if validate and due.validate:
                    with clock.devices():
                        best, losses = validate(best, programs.weights(state), done, frozen)
                        names = programs.source_names
                        record.record_validation(step, to_host(losses), names)
                clock.read()

                # ------------------------------------------------------------ what is due
                if self.sample and due.sample:
                    answers = self.sample(programs.weights(state), frozen)
                    row = {"step": done, "members": list(plan.members), **answers}
                    record.append(self.layout.generated_samples, row)
                    clock.skip()  # generation is no part of the speed of training
                if due.log or due.validate:
                    row = record.next_row(done, float(fetched.learning_rate[0]))
                    record.append(self.layout.training_log, row)
                    for watcher in watchers:  # the last one may end the training
                        watcher.metrics(row)
                # last, so that the recorder in the checkpoint knows of the row above
                if due.save or stops:
                    waited = resume.save(checkpoints, done, programs, record, state, best)
                    self._warn_of_waiting(waited)
                    self.saved = time.monotonic()
                if stops:
                    message = f"stopped by {stop.name} after step {done} of {plan.steps}, with a"
                    message += f" checkpoint; the same command continues ({self.layout.root})"
                    raise Stopped(message, stop.code)
        return best

    def _due(self, done: int) -> Due:
        """Return what to do after `done` steps; everything that is asked for after the last one."""
        training, epoch = self.spec.training, self.plan.epoch_steps

        def every(steps: int) -> bool:
            return done == self.plan.steps or done % steps == 0

        log = every(training.log_every)
        return Due(
            log=log,
            save=every(training.checkpoint_every or epoch) or (log and self._is_save_overdue()),
            validate=self.programs.held_out is not None and every(training.validate_every or epoch),
            sample=self.spec.sample_every is not None and every(self.spec.sample_every),
        )

    def _is_save_overdue(self) -> bool:
        """Return whether the last checkpoint is older than `training.checkpoint_minutes`."""
        minutes = self.spec.training.checkpoint_minutes
        if minutes is None:
            return False
        # Clocks differ between processes, which save together: that of the first counts. Asked at
        # logged steps only, because the answer takes a message between the processes.
        return bool(processes.broadcast(time.monotonic() - self.saved >= 60 * minutes))

    def _warn_of_waiting(self, waited: float) -> None:
        """Log once that the training waits for its checkpoints."""
        warning = describe_waiting(waited, time.monotonic() - self.saved)
        if warning and not self.warned:
            self.watch.log(warning)
            self.warned = True

    def _describe_members(self) -> None:
        """Log where a member is not simply the last weights of a training of its own."""
        training, fused = self.spec.training, self.programs.fused_members
        if fused > 1:
            self.watch.log(
                f"{fused} members at a time are one program (lora.fused): each is the member alone"
                " up to rounding, not bit for bit"
            )
        elif self.spec.is_fused:
            self.watch.log(
                "lora.fused changes nothing here: each device group has one member"
                f" ({len(self.plan.members)} members, mesh.order ="
                f" {self.programs.mesh.shape['order']})"
            )
        if training.ema is not None:
            self.watch.log(
                f"the members are averages of their weights (training.ema = {training.ema})"
            )
        if training.mixing is not None:
            self.watch.log(
                "members act on each other while they train (training.mixing ="
                f" {training.mixing.kind})"
            )
        if training.checkpoint == "best":
            self.watch.log(
                "each member is what it was at its lowest validation loss"
                " (training.checkpoint = best)"
            )

    def _finish(self, best_losses: jax.Array, best_steps: jax.Array) -> Json:
        """Write what is derived from the last checkpoint."""
        # The state comes last: where it exists, everything is complete. A process that is killed
        # before leaves a complete checkpoint, from which the same call writes these files.
        arrays = {"losses": self.recorder.losses, "ids": self.plan.ids}
        layouts.write_npz(self.layout.training_losses, arrays)
        totals = self.recorder.totals
        state: Json = {
            "seconds": totals.seconds,
            "tokens": totals.tokens,
            "device": jax.devices()[0].device_kind,
            "devices": self.programs.mesh.size,
            "compilations": totals.compilations,
            "versions": recorder.versions(),
            "parameters": parameter_count(self.programs.model),
        }
        # the members of such a training have no bits of their own
        if self.programs.fused_members > 1:
            state["fused_members"] = self.programs.fused_members
        if self.programs.held_out:
            state["best_steps"] = best_steps.tolist()
            state["best_validation_losses"] = best_losses.tolist()
        layouts.write_json(self.layout.training_state, state)
        return state


def describe_waiting(waited: float, between: float) -> str | None:
    """Return what to do where the training waits for a checkpoint; None where it hardly does.

    Args:
        waited: seconds that the training waited for the previous save to end.
        between: seconds since that save began, with those of `waited`.

    Example:
        >>> describe_waiting(1.0, 60.0) is None
        True
        >>> describe_waiting(45.0, 60.0)
        'training waited 45 s for a checkpoint, 75 % of the 60 s since it was begun: ...'
    """
    if waited < max(_NOTICED_SHARE * between, _NOTICED_SECONDS):
        return None
    return (
        f"training waited {waited:,.0f} s for a checkpoint, {100 * waited / between:.0f} % of"
        f" the {between:,.0f} s since it was begun: saves take longer than the steps between them;"
        " save less often (training.checkpoint_every, training.checkpoint_minutes) or on faster"
        " storage"
    )


# ---------------------------------------------------------------------------------- transfers


def limit_run_ahead(pending: Sequence[tuple[int, Metrics]]) -> None:
    """Wait until the devices are no more than `_AHEAD` steps behind the host."""
    if len(pending) > _AHEAD:
        jax.block_until_ready(pending[-1 - _AHEAD][1].loss)


def fetch(pending: Iterable[tuple[int, Metrics]]) -> list[tuple[int, Metrics]]:
    """Return the metrics of steps as numpy, with the members of all processes."""
    if jax.process_count() == 1:
        return jax.device_get(list(pending))  # one transfer for all of them
    return [(step, to_host(metrics)) for step, metrics in pending]


def to_host(values: T) -> T:
    """Return arrays as numpy, with the members of all processes."""
    if jax.process_count() == 1:
        return jax.device_get(values)
    return multihost_utils.process_allgather(values, tiled=True)
