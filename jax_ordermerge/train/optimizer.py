"""The optimizer of a training: clipping, direction, weight decay, learning rate, averages.

The directions are those of `train.optimizers`. Parameters are nested dicts, so a leaf of an
optimizer's state that lies in a dict is shaped like a parameter (a moment), and a leaf that is a
field of a NamedTuple is a counter or a constant.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jax_ordermerge import hash_rng, rng, tree
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config import OPTIMIZERS, Training
from jax_ordermerge.config.training import Bfloat16Moments, Constant, Cosine, Linear, Wsd
from jax_ordermerge.tree import PyTree, Tree

# Where a checkpoint `{"params": ..., "optimizer": state}` holds the averages of `averaged`.
AVERAGES = "optimizer/ema"
_DECAYED: dict[str, Callable[[TensorSpec], bool]] = {
    "matrices": lambda spec: spec.is_matrix,
    "hidden": lambda spec: spec.is_hidden_matrix,
    "all": lambda spec: True,
}


def make_schedule(training: Training, steps: int) -> optax.Schedule:
    """Return the learning rate by step: linear warm-up from 0, then the schedule of the config.

    Args:
        training: its `warmup` and the `decay` of wsd are fractions of `steps` if below 1, else
            numbers of steps.
        steps: number of steps of the whole training.

    Example:
        >>> rate = make_schedule(Training(learning_rate=1.0, schedule="linear", warmup=2), 6)
        >>> [round(float(rate(step)), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
        >>> wsd = {"kind": "wsd", "decay": 2}
        >>> rate = make_schedule(Training(learning_rate=1.0, schedule=wsd, warmup=2), 6)
        >>> [round(float(rate(step)), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]

    Source (wsd): Hu et al. 2024, MiniCPM, https://arxiv.org/abs/2404.06395. Its decay is linear
    here, as in Hägele et al. 2024, https://arxiv.org/abs/2405.18392.
    """
    warmup = _step_count(training.warmup, steps)
    rest = max(steps - warmup, 1)
    peak, fraction = training.learning_rate, training.final_fraction
    after_warmup: optax.Schedule
    match training.schedule:
        case Cosine():
            after_warmup = optax.cosine_decay_schedule(peak, rest, alpha=fraction)
        case Linear():
            after_warmup = optax.linear_schedule(peak, peak * fraction, rest)
        case Wsd(decay=length):
            decay = max(min(_step_count(length, steps), rest), 1)
            after_warmup = optax.linear_schedule(
                peak, peak * fraction, decay, transition_begin=rest - decay
            )
        case Constant():
            after_warmup = optax.constant_schedule(peak)
    if not warmup:
        return after_warmup
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after_warmup], [warmup])


def _step_count(amount: float, steps: int) -> int:
    return min(round(amount * steps) if amount < 1 else round(amount), steps)


def make_optimizer(
    training: Training, steps: int, table: Sequence[TensorSpec]
) -> optax.GradientTransformation:
    """Return the optimizer of a config.

    It clips by the global norm, computes the direction of the update, adds weight decay,
    multiplies by the learning rate and averages the weights.

    Args:
        training: the config.
        steps: number of steps of the whole training.
        table: declares every trainable parameter.

    Raises:
        UserError: the installed optax lacks the optimizer.

    Example:
        >>> table = [TensorSpec("w", (2, 3), ("heads", "embed"), "normal", "w", "attention")]
        >>> params = {"w": jnp.ones((2, 3))}
        >>> settings = Training(
        ...     optimizer={"kind": "sgd", "momentum": 0},
        ...     learning_rate=0.5,
        ...     warmup=0,
        ...     clip_norm=None,
        ... )
        >>> tx = make_optimizer(settings, 10, table)
        >>> tx.update(params, tx.init(params), params)[0]["w"][0].tolist()
        [-0.5, -0.5, -0.5]
    """
    clip = () if training.clip_norm is None else (optax.clip_by_global_norm(training.clip_norm),)
    optimizer = OPTIMIZERS[training.optimizer.kind]
    direction = optimizer.direction(training.optimizer, table)
    if isinstance(training.moments, Bfloat16Moments):
        direction = in_bfloat16(direction, stochastic=training.moments.rounding == "stochastic")
    decays = tree.unflatten({spec.path: _DECAYED[training.decay_on](spec) for spec in table})
    decay = optax.add_decayed_weights(training.weight_decay, mask=decays)
    # Decoupled decay stays out of the moments. The decay of SGD is the gradient of a penalty, so
    # it must pass through the momentum.
    update = (direction, decay) if optimizer.decoupled_decay else (decay, direction)
    rate = optax.scale_by_learning_rate(make_schedule(training, steps))
    tx = optax.chain(*clip, *update, rate)
    return tx if training.ema is None else averaged(tx, training.ema)


class RoundedState(NamedTuple):
    """State of `in_bfloat16`.

    Attributes:
        step: int32 scalar, number of updates; it selects the random bits.
        inner: state of the optimizer, its moments in bfloat16.
    """

    step: jax.Array
    inner: optax.OptState


def in_bfloat16(
    tx: optax.GradientTransformation, *, stochastic: bool
) -> optax.GradientTransformation:
    """Store the moments of an optimizer in bfloat16 between steps and compute in float32.

    Args:
        tx: the optimizer; its parameters are a nested dict.
        stochastic: round stochastically rather than to nearest.

    Example:
        >>> tx = in_bfloat16(optax.scale_by_adam(), stochastic=True)
        >>> params = {"w": jnp.ones(2)}
        >>> _, state = tx.update(params, tx.init(params))
        >>> state.inner.mu["w"].dtype, state.inner.nu["w"].dtype, state.inner.count.dtype
        (dtype(bfloat16), dtype(bfloat16), dtype('int32'))
    """
    # optax's `mu_dtype` is no alternative: it leaves `nu` in float32.
    #
    # Why stochastic rounding: bfloat16 has 8 significant bits, so neighbours are 0.4 to 0.8 %
    # apart. With beta2 = 0.999 a step lowers `nu` by at most 0.1 %, which rounding to nearest
    # undoes every time: `nu` never falls, and it grows only where the squared gradient is some 3
    # to 5 times larger. Stochastic rounding preserves the mean.

    def round_moment(path: jax.tree_util.KeyPath, moment: jax.Array, step: jax.Array) -> jax.Array:
        if not stochastic:
            return moment.astype(jnp.bfloat16)
        # The bits depend on parameter and step alone, so they are the same on every mesh and for
        # every member: a member in a population stays equal to the member alone.
        key_bits = jnp.asarray(rng.stream_key_bits(0, "moments", jax.tree_util.keystr(path)))
        random_bits = hash_rng.random_bits(key_bits, hash_rng.element_index(moment.shape), step)
        return hash_rng.round_stochastically(moment, random_bits)

    def init(params: Tree) -> RoundedState:
        inner = _map_moments(lambda _, moment: moment.astype(jnp.bfloat16), tx.init(params))
        return RoundedState(jnp.zeros((), jnp.int32), inner)

    def update(
        grads: Tree, state: RoundedState, params: Tree | None = None
    ) -> tuple[Tree, RoundedState]:
        wide = _map_moments(lambda _, moment: moment.astype(jnp.float32), state.inner)
        updates, inner = tx.update(grads, wide, params)
        inner = _map_moments(lambda path, moment: round_moment(path, moment, state.step), inner)
        return updates, RoundedState(state.step + 1, inner)

    return optax.GradientTransformation(init, update)


def _map_moments(
    fn: Callable[[jax.tree_util.KeyPath, jax.Array], jax.Array], state: optax.OptState
) -> optax.OptState:
    return jax.tree.map_with_path(
        lambda path, x: fn(path, x) if isinstance(path[-1], jax.tree_util.DictKey) else x, state
    )


class AveragedState(NamedTuple):
    """State of `averaged`.

    Attributes:
        step: int32 scalar, number of updates.
        ema: float32 averages, shaped like the parameters; before the first update the parameters.
        inner: state of the optimizer.
    """

    step: jax.Array
    ema: Tree
    inner: optax.OptState


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the weights after each update.

    After t updates it is the mean of the weights theta_1 ... theta_t, theta_s weighted in
    proportion to decay^(t - s). The initial weights have no part in it, however short the
    training: this is the bias correction of Adam. The updates are those of `tx`.

    Args:
        tx: the optimizer.
        decay: below 1; the average looks back over about 1 / (1 - decay) steps.

    Example:
        >>> tx = averaged(optax.sgd(1.0), 0.5)
        >>> params = {"w": jnp.float32(0)}
        >>> state = tx.init(params)
        >>> for _ in range(2):  # weights 1, then 2
        ...     updates, state = tx.update({"w": jnp.float32(-1)}, state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> round(float(state.ema["w"]), 4)  # (1 * 0.5 + 2) / 1.5
        1.6667
    """

    def init(params: Tree) -> AveragedState:
        # a copy, because the train step donates the parameters and would free the averages too
        averages = jax.tree.map(jnp.copy, params)
        return AveragedState(jnp.zeros((), jnp.int32), averages, tx.init(params))

    def update(grads: Tree, state: AveragedState, params: Tree) -> tuple[Tree, AveragedState]:
        updates, inner = tx.update(grads, state.inner, params)
        step = optax.safe_increment(state.step)
        log = jnp.log(jnp.float32(decay))
        # (1 - decay) / (1 - decay^t), by expm1 because 1 - decay cancels for a decay near 1
        step_size = jnp.expm1(log) / jnp.expm1(log * step)
        ema = optax.incremental_update(optax.apply_updates(params, updates), state.ema, step_size)
        return updates, AveragedState(step, ema, inner)

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class DistinctShapes:
    """Shapes in which no two tensors are equal in shape and divided differently.

    The second of two gets a further axis of size 1. That changes no value where the optimizer works
    element by element (`Optimizer.elementwise`).

    Attributes:
        widened: paths of the parameters that get the axis.

    Example:
        >>> shapes = DistinctShapes(frozenset({"o"}))
        >>> wide = shapes.widen({"q": jnp.ones((2, 2)), "o": jnp.ones((2, 2))})
        >>> wide["q"].shape, wide["o"].shape
        ((2, 2), (1, 2, 2))
        >>> shapes.narrow(wide)["o"].shape
        (2, 2)
    """

    widened: frozenset[str] = frozenset()

    def widen(self, values: PyTree) -> PyTree:
        """Return parameters, gradients or a state of the optimizer with the further axes."""
        return self._map(lambda x: x[None], values)

    def narrow(self, values: PyTree) -> PyTree:
        """Invert `widen`."""
        return self._map(lambda x: x[0], values)

    def _map(self, reshape: Callable[[jax.Array], jax.Array], values: PyTree) -> PyTree:
        def leaf(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
            # a moment lies in its state as the parameter lies in the dict of parameters
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            return reshape(x) if "/".join(names) in self.widened else x

        return jax.tree.map_with_path(leaf, values) if self.widened else values


def distinct_shapes(table: Sequence[TensorSpec], mesh: Mesh) -> DistinctShapes:
    """Return the shapes in which the parameters of a table are updated on a mesh.

    Example:
        >>> from jax_ordermerge.mesh import make_mesh
        >>> table = [
        ...     TensorSpec("q", (2, 2), ("heads", "embed"), "normal", "q", "attention"),
        ...     TensorSpec("o", (2, 2), ("embed", "heads"), "normal", "o", "attention"),
        ... ]
        >>> distinct_shapes(table, make_mesh(1, 2)).widened
        frozenset({'o'})
        >>> distinct_shapes(table, make_mesh()).widened
        frozenset()
    """
    # XLA merges equal scalars that are broadcast to equal shapes before it divides the program, and
    # gives what meets there one sharding. So it moved gradient and moments of the output projection
    # to the sharding of the queries' and back: 8 all-to-alls a step, and memory for the copies.
    first: dict[tuple[int, ...], PartitionSpec] = {}
    widened = set()
    for spec in table:
        divided = meshes.partition(spec.axes, spec.shape, mesh)
        if first.setdefault(spec.shape, divided) != divided:
            widened.add(spec.path)
    return DistinctShapes(frozenset(widened))
