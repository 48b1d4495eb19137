"""The compiled programs of a training, and the shapes that they are compiled for.

Nothing here reads or writes a file, and the devices of the mesh need not be present: a planner
compiles the same step for hardware that is elsewhere.
"""

import functools
from collections.abc import Callable

from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.config import OPTIMIZERS
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.model import layers
from jax_ordermerge.train import batches, compiler_options, mixing, optimizer, validation
from jax_ordermerge.train import frozen as frozen_base
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.batches import Plan
from jax_ordermerge.train.frozen import Storage
from jax_ordermerge.train.step import TrainState
from jax_ordermerge.train.trainable import make_trainable
from jax_ordermerge.tree import Tree, unflatten

LoadBase = Callable[[], Tree]


class Programs:
    """What a training compiles.

    Attributes:
        model: the architecture.
        plan: what is trained on.
        spec: settings of the training.
        mesh: the mesh.
        held_out: validation examples; None where no validation losses are measured.
        trainable: which tensors are trained, and the objective.
        storage: how the frozen base is stored.
        tx: the optimizer.
        state, frozen, batch, best: shapes, dtypes and shardings of the training state, of the
            frozen base, of a batch, and of the best weights.
    """

    def __init__(
        self, model: ModelConfig, plan: Plan, mesh: Mesh, held_out: Examples | None = None
    ) -> None:
        self.model, self.plan, self.spec, self.mesh = model, plan, plan.spec, mesh
        # Validation examples may be there for a search alone.
        self.held_out = held_out if self.spec.training.validates else None
        self.trainable = make_trainable(self.spec, model, mesh)
        trained, frozen = self.trainable.trained, self.trainable.frozen
        members = len(plan.members)
        # For what is trained: with adapters the base has no moments.
        self.tx = optimizer.make_optimizer(self.spec.training, plan.steps, trained)
        params = convert.abstract_tensors(trained, mesh, members=members)
        memory = self.spec.training.optimizer_memory
        self.state = steps.abstract_state(params, self.tx, mesh, optimizer_memory=memory)
        self.storage = Storage.of(self.spec)
        self.frozen = frozen_base.abstract(frozen, self.storage, mesh)
        self.batch = batches.abstract_batch(plan, mesh)
        # a second copy of the weights costs memory, so there is one only where it is asked for
        stored = self.weights(self.state) if self.spec.training.checkpoint == "best" else {}
        self.best = validation.abstract(stored, members, mesh)

    def weights(self, state: TrainState) -> Tree:
        """Return the weights of the members: their averages where `training.ema` asks for them."""
        return state.params if self.spec.training.ema is None else state.opt_state.ema

    @property
    def members_branch(self) -> str:
        """Where in a checkpoint the members are."""
        if self.spec.training.checkpoint == "best":
            return validation.BRANCH
        return "params" if self.spec.training.ema is None else optimizer.AVERAGES

    @property
    def fused_members(self) -> int:
        """How many members are one program; 1 where they run one after another."""
        # a member that has its devices for itself has nobody to share the base's products with
        return len(self.plan.members) // self.mesh.shape["order"] if self.spec.is_fused else 1

    # ------------------------------------------------------------------------------ arrays

    def initial_state(self, load_base: LoadBase) -> TrainState:
        """Return the state before the first step."""
        starts = self.trainable.starts(load_base, self.plan.members)
        return steps.initial_state(starts, self.tx, self.state)

    def load_frozen(self, load_base: LoadBase) -> Tree:
        """Return what all members share unchanged; `{}` if nothing."""
        if not self.frozen:
            return {}
        return frozen_base.place(load_base(), self.trainable.frozen, self.storage, self.mesh)

    # ------------------------------------------------------------------------------ programs

    def compile_step(self) -> steps.Step:
        """Compile the training step of all members."""
        # accumulated gradients are divided over the devices as the parameters are
        trained = self.trainable.trained
        specs = {s.path: meshes.partition(s.axes, s.shape, self.mesh) for s in trained}
        shapes = optimizer.DistinctShapes()
        elementwise = OPTIMIZERS[self.spec.training.optimizer.kind].elementwise
        if elementwise and layers.choose_form(self.mesh) == "by_head":
            shapes = optimizer.distinct_shapes(trained, self.mesh)
        is_fused = self.fused_members > 1
        memory = self.spec.training.optimizer_memory
        one_member = functools.partial(steps.train_step, optimizer_memory=memory)
        build = steps.fused_step if is_fused else one_member
        step = build(
            self.trainable.objective,
            self.tx,
            optimizer.make_schedule(self.spec.training, self.plan.steps),
            lengths=self.plan.lengths,
            specs=unflatten(specs),
            shapes=shapes,
        )
        options = compiler_options.resolve(self.spec.model, self.mesh)
        arguments = self.state, self.batch, self.frozen
        return steps.compile_step(step, self.mesh, *arguments, options, fused=is_fused)

    def compile_mixing(self) -> Callable[[TrainState, int], TrainState]:
        """Return `(state, steps done) -> state`, the mixing after a step; by default nothing."""
        # Not a part of the step: mixing is the one thing that crosses members, and is not due after
        # every step.
        settings = self.spec.training.mixing
        if settings is None:
            return lambda state, done: state
        return mixing.compile_mixing(
            settings, self.trainable.trained, self.spec.seed, self.mesh, self.state.params
        )

    @property
    def source_names(self) -> list[str]:
        """Names of the sources of the validation examples, where there are several."""
        names = [] if self.held_out is None else list(self.held_out.rows_by_source)
        return names if len(names) > 1 else []

    def compile_validation(self) -> validation.Measure | None:
        """Compile the validation losses; None where they are not measured."""
        # A program of its own, so that the training step is the same program with or without it:
        # what is watched must not change the bits of what is trained.
        if self.held_out is None:
            return None
        lengths = pack.bucket_lengths(self.held_out.longest, self.spec.data.buckets)
        batch = validation.device_batches(self.held_out, self.plan.microbatch, lengths, self.mesh)
        return validation.compile_measure(
            self.trainable.objective,
            self.mesh,
            self.best,
            self.weights(self.state),
            batch,
            self.frozen,
            lengths,
            sources=max(len(self.source_names), 1),
        )
