"""The training of a population: files, clocks and messages around the pure step.

Same call again: continues from the last checkpoint, or says that all is done. What is bitwise the same, interrupted or not:
parameters, optimizer state, metrics (but for times), and the losses of samples.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import mesh as meshes
from jax_ordermerge import processes
from jax_ordermerge.arch import ModelConfig, parameter_count
from jax_ordermerge.checkpoint import convert, orbax
from jax_ordermerge.config import Config
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import PeerLost, Stopped, UserError
from jax_ordermerge.train import batches, flops, mixing, optimizers, recorder, trackers, validation
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.progress import Display, Watcher
from jax_ordermerge.train.recorder import Clock, Journal
from jax_ordermerge.train.trainable import split
from jax_ordermerge.tree import Tree, unflatten

# What may differ when a training continues: it decides when something is written, not what.
_FREE_TO_CHANGE = {"log_every", "checkpoint_every", "keep_checkpoints", "spike"}
# (what members have for themselves, what they share) -> a line of samples.jsonl
Sample = Callable[[Tree, Tree], dict[str, Any]]
_AHEAD = 2  # steps the host may start before the devices have ended them, so that a request to stop is soon followed


def train(
    config: Config,
    model: ModelConfig,
    base: Tree | Callable[[], Tree],
    examples: Examples,
    mesh: Mesh,
    *,
    held_out: Examples | None = None,
    directory: Path | None = None,
    members: Sequence[int] | None = None,
    watch: Watcher | None = None,
    saved: Callable[[], None] | None = None,
    sample: Sample | None = None,
) -> dict[str, Any]:
    """Fine-tune the members of a population, each in its own order, or continue where an earlier call stopped.

    Args:
        config: of the run.
        model: the architecture.
        base: float32 parameters of the base, or a function that loads them; it is called only when they are needed: at the beginning,
            or, in any dtype, wherever a frozen base is read (`lora`).
        examples: tokenized training examples.
        mesh: its `order` axis divides the number of members.
        held_out: examples that are never trained on, where the config asks for validation losses.
        directory: run directory, by default that of the config.
        members: which members of the population to train, by default all. A member alone becomes what it becomes among others.
        watch: is told messages and metrics, by default a display on the terminal.
        saved: is called, in a thread of its own, whenever a checkpoint is complete.
        sample: answers fixed prompts with the members' weights every `samples.every` steps, for `metrics/samples.jsonl`.

    Returns:
        What is in `metrics/state.json`.

    Raises:
        UserError: the checkpoint there is of another training; processes were given different things; a loss is not finite or a spike
            (step, member and samples are named).
        Stopped: SIGTERM or SIGINT asked for it; a checkpoint is saved.
        PeerLost: another process ended.
    """
    if config.training.validates and held_out is None:
        raise UserError(
            "training.checkpoint = best and training.validate_every need validation examples"
        )
    plan = batches.make_plan(config, examples, members, alike=mesh.size > mesh.shape["order"])
    if config.training.mixing and len(plan.members) < config.population.members:
        raise UserError(
            f"training.mixing ({config.training.mixing.kind}) lets all members act on each other; member"
            f" {', '.join(map(str, plan.members))} cannot be trained without the other"
            f" {config.population.members - len(plan.members)}: give more devices or memory, or set training.mixing=null"
        )
    if len(plan.members) % mesh.shape["order"]:
        raise UserError(
            f"{len(plan.members)} members cannot be divided over mesh.order = {mesh.shape['order']}; choose a divisor for mesh.order"
        )
    training = Training(
        config, model, plan, mesh, directory or config.directory, held_out=held_out, sample=sample
    )
    try:
        with contextlib.ExitStack() as stack:
            shown: Watcher = watch or stack.enter_context(Display(plan.steps, plan.members))
            return training.run(base, shown, saved)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        reason = str(error).splitlines()[0][:200]
        raise PeerLost(
            f"work shared with the other processes failed ({reason}): one of them has ended, its own log says why; start all again to continue"
        ) from error


class Training:
    """One training: what is constant in it, and the steps of its life in the order they are called."""

    def __init__(
        self,
        config: Config,
        model: ModelConfig,
        plan: Plan,
        mesh: Mesh,
        directory: Path,
        *,
        held_out: Examples | None = None,
        sample: Sample | None = None,
    ) -> None:
        self.config, self.model, self.plan, self.mesh, self.directory = (
            config,
            model,
            plan,
            mesh,
            directory,
        )
        self.held_out = held_out if config.training.validates else None
        self.sample = sample
        self.log, self.samples = (
            directory / "metrics" / f"{name}.jsonl" for name in ("train", "samples")
        )
        self.device_kind = mesh.devices.flat[0].device_kind
        peak = flops.peak(self.device_kind, config.model.compute_dtype)
        self.journal = Journal(plan, model, peak and peak * mesh.size)
        self.split = split(config, model, mesh)
        self.tx = optimizers.optimizer(config.training, plan.steps, self.split.trained)
        params = convert.abstract_tensors(self.split.trained, mesh, members=len(plan.members))
        self.abstract = steps.abstract_state(params, self.tx, mesh)
        self.frozen = convert.abstract_tensors(self.split.frozen, mesh, dtype=config.base_dtype)
        self.batch = batches.abstract_batch(plan, mesh)
        kept = self._weights(self.abstract) if config.training.checkpoint == "best" else {}
        self.best = validation.abstract(kept, len(plan.members), mesh)

    def run(
        self,
        base: Tree | Callable[[], Tree],
        watch: Watcher,
        saved: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        load = base if callable(base) else lambda: base
        keep = self.config.training.keep_checkpoints
        with orbax.Checkpoints(self.directory / "checkpoints", keep, saved) as checkpoints:
            start = checkpoints.latest()
            processes.check_alike({**self._identity(), "checkpoints": start})
            if start is None:
                state = self.start(load)
                best = validation.initial(self.best)
                for file in (self.log, self.samples):
                    recorder.truncate_lines(file, 0)
                recorder.save_orders(self.directory / "orders", self.plan)
            else:
                self._check_same(checkpoints.metadata(start), start)
                if start < self.plan.steps:
                    watch.log(
                        f"continuing from step {start} of {self.plan.steps} ({self.directory})"
                    )
                state, best = self._restore(checkpoints, start)
            if self.config.training.ema is not None:
                watch.log(
                    f"the members are averages of their weights (training.ema = {self.config.training.ema})"
                )
            if self.config.training.mixing is not None:
                watch.log(
                    f"members act on each other while they train (training.mixing = {self.config.training.mixing.kind})"
                )
            if self.config.training.checkpoint == "best":
                watch.log(
                    "each member is what it was at its lowest validation loss (training.checkpoint = best)"
                )
            if start == self.plan.steps:
                watch.log(
                    f"training is already complete: {self.plan.steps} steps ({self.directory})"
                )
            else:
                with contextlib.ExitStack() as stack:
                    opened = trackers.trackers(
                        self.config, self.directory, self.plan.members, start or 0
                    )
                    for tracker in opened:
                        stack.callback(tracker.close)
                    shown = trackers.Several(watch, opened) if opened else watch
                    best = self._train(state, best, self.held(load), start or 0, checkpoints, shown)
            found = fetch_one((best.loss, best.step))
        return self._finish(*found)

    def start(self, load: Callable[[], Tree]) -> steps.TrainState:
        """Return the state before the first step."""
        return steps.initial_state(self.split.start(load), self.tx, self.abstract)

    def held(self, load: Callable[[], Tree]) -> Tree:
        """Return what all members share as it is."""
        return steps.place(load(), self.frozen) if self.frozen else {}

    # --------------------------------------------------------------------------------------------------------------- the steps

    def compile(self) -> steps.Step:
        """Return the compiled step."""
        specs = {s.path: meshes.partition(s.axes, s.shape, self.mesh) for s in self.split.trained}
        one = steps.train_step(
            self.split.objective,
            self.tx,
            optimizers.schedule(self.config.training, self.plan.steps),
            lengths=self.plan.lengths,
            specs=unflatten(specs),
        )
        return steps.compile_step(one, self.mesh, self.abstract, self.batch, self.frozen)

    def compile_mixing(self) -> Callable[[steps.TrainState, int], steps.TrainState]:
        """Return what follows a step, of (state, steps done): nothing where members know nothing of each other."""
        settings = self.config.training.mixing
        if settings is None:
            return lambda state, done: state
        return mixing.compile_mixing(
            settings, self.split.trained, self.config.seed, self.mesh, self.abstract.params
        )

    def _weights(self, state: steps.TrainState) -> Tree:
        """What of a state the members are."""
        return state.params if self.config.training.ema is None else state.opt_state.ema

    def _compile_validation(
        self,
    ) -> Callable[[validation.Best, Tree, int, Tree], tuple[validation.Best, jax.Array]]:
        assert self.held_out is not None
        lengths = pack.bucket_lengths(self.held_out.longest, self.config.data.buckets)
        batch = validation.device_batches(self.held_out, self.plan.microbatch, lengths, self.mesh)
        weights = self._weights(self.abstract)
        return validation.compile_measure(
            self.split.objective, self.mesh, self.best, weights, batch, self.frozen, lengths
        )

    def _train(
        self,
        state: steps.TrainState,
        best: validation.Best,
        frozen: Tree,
        start: int,
        checkpoints: orbax.Checkpoints,
        watch: Watcher,
    ) -> validation.Best:
        if self.journal.peak is None:
            watch.log(
                f"MFU is not shown: the peak FLOP/s of device kind {self.device_kind!r} is not known"
            )
        began = time.monotonic()
        compiled, mix = self.compile(), self.compile_mixing()
        validate = self._compile_validation() if self.held_out else None
        self.journal.pass_over(time.monotonic() - began)
        clock = Clock(self.journal.totals)
        pending: list[tuple[int, steps.Metrics]] = []
        with batches.Feed(self.plan, self.batch, start) as feed, processes.StopSignal() as stop:
            for step, batch in enumerate(feed, start=start):
                with clock.devices():
                    state, metrics = compiled(state, batch, frozen)
                    state = mix(state, step + 1)
                    pending.append((step, metrics))
                    follow(pending)
                logs, saves, validates, samples = self._due(step + 1)
                stops = stop.reached(step + 1)
                if not (logs or saves or validates or samples or stops):
                    continue
                with clock.devices():
                    jax.block_until_ready(metrics)
                # the only transfer from the devices; a loss that is not finite is found here, before anything is saved
                for number, fetched in fetch(pending):
                    self.journal.record(number, fetched)
                pending = []
                if validate and validates:
                    with clock.devices():
                        best, losses = validate(best, self._weights(state), step + 1, frozen)
                        self.journal.validated(step, fetch_one(losses))
                clock.read()
                if self.sample and samples:
                    answers = self.sample(self._weights(state), frozen)
                    recorder.append_line(
                        self.samples,
                        {"step": step + 1, "members": list(self.plan.members), **answers},
                    )
                    clock.skip()
                if logs or validates:
                    _log(self, step + 1, float(fetched.learning_rate[0]), watch)
                if saves or stops:
                    self._save(state, best, step + 1, checkpoints)
                if stops:
                    raise Stopped(
                        f"stopped by {stop.name} after step {step + 1} of {self.plan.steps}, with a checkpoint; the same command continues"
                        f" ({self.directory})",
                        stop.code,
                    )
        return best

    def _due(self, done: int) -> tuple[bool, bool, bool, bool]:
        """Whether to log, to save, to measure validation losses, and to answer prompts after so many steps."""
        training, last, asks = (
            self.config.training,
            done == self.plan.steps,
            self.config.samples.every,
        )
        saves, validates = (
            training.checkpoint_every or self.plan.epoch_steps,
            training.validate_every or self.plan.epoch_steps,
        )
        return (
            last or done % training.log_every == 0,
            last or done % saves == 0,
            self.held_out is not None and (last or done % validates == 0),
            asks is not None and (last or done % asks == 0),
        )

    # --------------------------------------------------------------------------------------------------------------- checkpoints

    def _save(
        self,
        state: steps.TrainState,
        best: validation.Best,
        done: int,
        checkpoints: orbax.Checkpoints,
    ) -> None:
        losses = jax.make_array_from_callback(
            self.journal.losses.shape,
            NamedSharding(self.mesh, P()),
            lambda index: self.journal.losses[index].copy(),
        )
        tree = {
            "params": state.params,
            "optimizer": state.opt_state,
            "step": state.step,
            "losses": losses,
        }
        if self.held_out:
            tree["best"] = best
        metadata = {
            **self._identity(),
            "steps": self.plan.steps,
            "weights": self._branch(),
            "mesh": dict(self.mesh.shape),
            "journal": self.journal.to_metadata(),
        }
        checkpoints.save(done, tree, metadata)

    def _branch(self) -> str:
        """Where in a checkpoint the members lie."""
        if self.config.training.checkpoint == "best":
            return validation.BRANCH
        return "params" if self.config.training.ema is None else optimizers.AVERAGES

    def _restore(
        self, checkpoints: orbax.Checkpoints, done: int
    ) -> tuple[steps.TrainState, validation.Best]:
        losses = jax.ShapeDtypeStruct(
            self.journal.losses.shape, jnp.float32, sharding=NamedSharding(self.mesh, P())
        )
        wanted: dict[str, Any] = {"losses": losses}
        if done < self.plan.steps:
            wanted |= {
                "params": self.abstract.params,
                "optimizer": self.abstract.opt_state,
                "step": self.abstract.step,
            }
        if self.held_out:
            wanted["best"] = self.best if done < self.plan.steps else self.best._replace(weights={})
        found = checkpoints.restore(done, wanted)
        self.journal.restore(np.asarray(found["losses"]), checkpoints.metadata(done)["journal"])
        for file in (self.log, self.samples):
            recorder.truncate_lines(file, done)
        best = found["best"] if self.held_out else validation.initial(self.best)
        return steps.TrainState(
            found.get("params", {}), found.get("optimizer"), found.get("step")
        ), best

    def _identity(self) -> dict[str, Any]:
        """Everything that decides the result, for the checkpoint."""
        config = self.config
        deciding = {
            "training": config.training.model_dump(mode="json", exclude=_FREE_TO_CHANGE),
            "model": config.model.model_dump(mode="json", include={"compute_dtype", "remat"}),
            "objective": config.objective.model_dump(mode="json"),
            "architecture": repr(self.model),
            "lengths": self.plan.lengths,
        } | (
            {"lora": config.lora.model_dump(mode="json"), "base_dtype": config.base_dtype}
            if config.lora
            else {}
        )
        if self.held_out:
            deciding["validation"] = self.held_out.digest
        return {
            "members": list(self.plan.members),
            "population": config.population.members,
            "seed": config.seed,
            "level": config.population.level,
            "orders": self.plan.digests,
            "data": self.plan.examples.digest,
            "lora": config.lora
            and config.lora.model_dump(mode="json", include={"rank", "alpha", "rslora", "targets"}),
            "config": hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest(),
        }

    def _check_same(self, kept: dict[str, Any], step: int) -> None:
        for name, value in self._identity().items():
            if kept.get(name) != value:
                raise UserError(
                    f"checkpoint {step} in {self.directory} is of another training ({name} differs); choose another output directory"
                )

    def _finish(self, losses: np.ndarray, at: np.ndarray) -> dict[str, Any]:
        """Write what is derived from the last checkpoint. The state is written last: it says that all is whole."""
        recorder.write_arrays(
            self.directory / "losses" / "train.npz",
            {"losses": self.journal.losses, "ids": self.plan.ids},
        )
        device = jax.devices()[0]
        state = {
            "seconds": self.journal.totals.seconds,
            "tokens": self.journal.totals.tokens,
            "device": device.device_kind,
            "devices": self.mesh.size,
            "compilations": 1,
            "versions": recorder.versions(),
            "parameters": parameter_count(self.model),
        }
        if self.held_out:
            state |= {"best_steps": at.tolist(), "best_validation_losses": losses.tolist()}
        recorder.write_json(self.directory / "metrics" / "state.json", state)
        return state


def _log(training: Training, done: int, learning_rate: float, watch: Watcher) -> None:
    line = training.journal.line(done, learning_rate)
    recorder.append_line(training.log, line)
    watch.line(line)


def follow(pending: Sequence[tuple[int, steps.Metrics]]) -> None:
    """Wait until the devices are no more than a few steps behind the host."""
    if len(pending) > _AHEAD:
        jax.block_until_ready(pending[-1 - _AHEAD][1].loss)


def fetch(pending: Iterable[tuple[int, steps.Metrics]]) -> list[tuple[int, steps.Metrics]]:
    """Return the metrics of steps as numpy, the members of all processes together."""
    if jax.process_count() == 1:
        return jax.device_get(list(pending))
    return [(step, fetch_one(metrics)) for step, metrics in pending]


def fetch_one(values: Any) -> Any:
    """Return arrays as numpy, the members of all processes together."""
    return (
        jax.device_get(values)
        if jax.process_count() == 1
        else multihost_utils.process_allgather(values, tiled=True)
    )


def compile_training(config: Config, model: ModelConfig, plan: Plan, mesh: Mesh) -> Any:
    """Return the compiled step of a training that is only planned, `jax.stages.Compiled`; the devices of the mesh need not be here."""
    return Training(config, model, plan, mesh, config.directory).compile()
