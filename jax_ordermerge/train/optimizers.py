"""Optimizers and learning rates by name: optax's, put together for stacked layers and for the tensor table.

Parameters are nested dicts, so in an optimizer's state what lies in a dict is shaped by a parameter (a moment), and what is a field
of its own is a counter or a constant.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jax_ordermerge import hash_rng, rng, tree
from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config import Training
from jax_ordermerge.errors import UserError
from jax_ordermerge.tree import Tree

# RMS of Adam's updates, to which Muon's are scaled: both then take one learning rate (Liu et al. 2025, section 2.2).
_MUON_RMS = 0.2
# Where a checkpoint `{"params": ..., "optimizer": state}` holds the averages of `averaged`.
AVERAGES = "optimizer/ema"


def schedule(training: Training, steps: int) -> optax.Schedule:
    """Return learning rate by step: linear warm-up from 0, then cosine, linear, constant, or constant with a linear end (wsd).

    Args:
        training: `warmup` and `decay` below 1 are fractions of `steps`, else numbers of steps.
        steps: of the whole training.

    Example:
        >>> rate = schedule(Training(learning_rate=1.0, schedule="linear", warmup=2), 6)
        >>> [round(float(rate(step)), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
        >>> rate = schedule(Training(learning_rate=1.0, schedule="wsd", warmup=2, decay=2), 6)
        >>> [round(float(rate(step)), 2) for step in range(7)]
        [0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]

    Source (wsd): Hu et al. 2024, MiniCPM, https://arxiv.org/abs/2404.06395; its end here is linear as in Hägele et al. 2024,
    https://arxiv.org/abs/2405.18392.
    """
    warmup = _count(training.warmup, steps)
    peak, last, rest = (
        training.learning_rate,
        training.learning_rate * training.final_fraction,
        max(steps - warmup, 1),
    )
    after: optax.Schedule
    match training.schedule:
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=training.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, last, rest)
        case "wsd":
            decay = max(min(_count(training.decay or 0.0, steps), rest), 1)
            after = optax.linear_schedule(peak, last, decay, transition_begin=rest - decay)
        case "constant":
            after = optax.constant_schedule(peak)
    return (
        optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
        if warmup
        else after
    )


def _count(amount: float, steps: int) -> int:
    return min(round(amount * steps) if amount < 1 else round(amount), steps)


def optimizer(
    training: Training, steps: int, table: Sequence[TensorSpec]
) -> optax.GradientTransformation:
    """Return the optimizer of a config: clipping by global norm, direction, weight decay, learning rate, average of the weights.

    Weight decay is decoupled (times the learning rate, not part of the moments) but for SGD, where it is the gradient of a penalty.

    Args:
        training: the config.
        steps: of the whole training.
        table: declares every trainable parameter.

    Raises:
        UserError: the installed optax lacks the optimizer.

    Example:
        >>> table = [TensorSpec("w", (2, 3), ("heads", "embed"), "normal", "w", "attention")]
        >>> params = {"w": jnp.ones((2, 3))}
        >>> tx = optimizer(
        ...     Training(optimizer="sgd", momentum=0, learning_rate=0.5, warmup=0, clip_norm=None),
        ...     10,
        ...     table,
        ... )
        >>> tx.update(params, tx.init(params), params)[0]["w"][0].tolist()
        [-0.5, -0.5, -0.5]

    Source: AdamW, Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101; the others stand at `_direction`.
    """
    clip = () if training.clip_norm is None else (optax.clip_by_global_norm(training.clip_norm),)
    direction = _direction(training, table)
    if training.moments_dtype == "bfloat16":
        direction = in_bfloat16(direction, stochastic=training.moments_rounding == "stochastic")
    decay = optax.add_decayed_weights(
        training.weight_decay, mask=_by_tensor(table, _DECAYED[training.decay_on])
    )
    middle = (decay, direction) if training.optimizer == "sgd" else (direction, decay)
    tx = optax.chain(*clip, *middle, optax.scale_by_learning_rate(schedule(training, steps)))
    return tx if training.ema is None else averaged(tx, training.ema)


def _by_tensor(table: Sequence[TensorSpec], value: Callable[[TensorSpec], Any]) -> Tree:
    return tree.unflatten({spec.path: value(spec) for spec in table})


def _matrix(spec: TensorSpec) -> bool:
    return len(spec.hf_shape) >= 2


def _hidden(spec: TensorSpec) -> bool:
    return _matrix(spec) and spec.kind not in ("embedding", "head")


_DECAYED: dict[str, Callable[[TensorSpec], bool]] = {
    "matrices": _matrix,
    "hidden": _hidden,
    "all": lambda spec: True,
}

# ----------------------------------------------------------------------------------------------------------------------- directions


def _direction(training: Training, table: Sequence[TensorSpec]) -> optax.GradientTransformation:
    """Return what makes a direction of the gradient, before weight decay and learning rate.

    Source: Adafactor, Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235 (without momentum); Lion, Chen et al. 2023,
    https://arxiv.org/abs/2302.06675; Muon, Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    match training.optimizer:
        case "adamw":
            return optax.scale_by_adam(training.beta1, training.beta2, training.epsilon)
        case "lion":
            return optax.scale_by_lion(training.beta1, training.beta2)
        case "sgd":
            return (
                optax.trace(training.momentum, training.nesterov)
                if training.momentum
                else optax.identity()
            )
        case "adafactor":
            # its means and RMS are of one tensor, never over the layers
            one = _adafactor(training)
            labels = _by_tensor(table, lambda spec: "stacked" if spec.stacked else "single")
            return optax.partition({"stacked": _by_layer(one), "single": one}, labels)
        case "muon":
            labels = _by_tensor(table, lambda spec: "hidden" if _hidden(spec) else "other")
            adam = optax.scale_by_adam(training.beta1, training.beta2, training.epsilon)
            return optax.partition({"hidden": _muon(training), "other": adam}, labels)


def _adafactor(training: Training) -> optax.GradientTransformation:
    scaled = (optax.scale_by_param_block_rms(),) if training.scale_parameter else ()
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=training.decay_rate,
            min_dim_size_to_factor=training.min_dim_size_to_factor,
            epsilon=training.epsilon,
        ),
        optax.clip_by_block_rms(1.0),
        *scaled,
    )


def _by_layer(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply `tx` to every layer of stacked parameters [L, ...] alone."""
    return optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))


def _muon(training: Training) -> optax.GradientTransformation:
    """Muon of matrices [..., out, in], each orthogonalized alone; optax's `muon` would also make Adam Nesterov's and not mask its decay."""
    contrib = optax.contrib
    if not hasattr(contrib, "scale_by_muon"):
        raise UserError(
            f"training.optimizer = muon: optax {optax.__version__} has no optax.contrib.scale_by_muon; install another or choose adamw"
        )
    numbers = contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    orthogonal = contrib.scale_by_muon(
        beta=training.momentum,
        eps=training.epsilon,
        nesterov=training.nesterov,
        weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: numbers, updates),
    )
    # the RMS of an orthogonal matrix is 1 / sqrt(its longer side)
    return optax.chain(
        orthogonal,
        optax.stateless_with_tree_map(lambda u, _: u * (_MUON_RMS * max(u.shape[-2:]) ** 0.5)),
    )


# ---------------------------------------------------------------------------------------------------------------------------- state


class RoundedState(NamedTuple):
    """State of `in_bfloat16`.

    Attributes:
        count: int32 scalar, updates done; it names the random bits.
        inner: of the optimizer, its moments bfloat16.
    """

    count: Any
    inner: Any


def in_bfloat16(
    tx: optax.GradientTransformation, *, stochastic: bool
) -> optax.GradientTransformation:
    """Keep the moments of an optimizer in bfloat16 between steps and compute in float32. (optax's `mu_dtype` leaves `nu` as it is.)

    bfloat16 keeps 8 significant bits: neighbours are 0.4 to 0.8 % apart. With beta2 = 0.999 a step changes `nu` by at most -0.1 %
    where the gradient shrinks, which rounding to nearest takes back every time: `nu` never falls, and grows only where the squared
    gradient is some 3 to 5 times larger. Stochastic rounding goes up or down with the probability that keeps the mean. Its bits
    are named by parameter and step, the same for every member and on every mesh.

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

    def narrow(state: Any, count: jax.Array) -> Any:
        def one(path: Any, x: jax.Array) -> jax.Array:
            if not stochastic:
                return x.astype(jnp.bfloat16)
            words = jnp.asarray(rng.stream_key_bits(0, "moments", jax.tree_util.keystr(path)))
            return hash_rng.round_stochastically(
                x, hash_rng.random_words(words, hash_rng.element_index(x.shape), count)
            )

        return _map_moments(one, state)

    def init(params: Tree) -> RoundedState:
        return RoundedState(
            jnp.zeros((), jnp.int32),
            _map_moments(lambda _, x: x.astype(jnp.bfloat16), tx.init(params)),
        )

    def update(
        grads: Tree, state: RoundedState, params: Tree | None = None
    ) -> tuple[Tree, RoundedState]:
        wide = _map_moments(lambda _, x: x.astype(jnp.float32), state.inner)
        updates, inner = tx.update(grads, wide, params)
        return updates, RoundedState(state.count + 1, narrow(inner, state.count))

    return optax.GradientTransformation(init, update)


def _map_moments(fn: Callable[[Any, jax.Array], jax.Array], state: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, x: fn(path, x) if isinstance(path[-1], jax.tree_util.DictKey) else x, state
    )


class AveragedState(NamedTuple):
    """State of `averaged`.

    Attributes:
        count: int32 scalar, updates done.
        ema: float32 averages, shaped like the parameters; before the first update the parameters themselves.
        inner: of the optimizer.
    """

    count: Any
    ema: Tree
    inner: Any


def averaged(tx: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the weights after every update; the updates stay as they are.

    After t updates it is the mean of the weights theta_1 ... theta_t with weights proportional to decay^(t - s): the initial
    weights are not in it, however short the training (the bias correction of Adam).

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
        # a copy, lest the averages be donated with the parameters
        return AveragedState(
            jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params), tx.init(params)
        )

    def update(grads: Tree, state: AveragedState, params: Tree) -> tuple[Tree, AveragedState]:
        updates, inner = tx.update(grads, state.inner, params)
        count = optax.safe_increment(state.count)
        log = jnp.log(jnp.float32(decay))
        step_size = jnp.expm1(log) / jnp.expm1(log * count)  # (1 - decay) / (1 - decay^t)
        ema = optax.incremental_update(optax.apply_updates(params, updates), state.ema, step_size)
        return updates, AveragedState(count, ema, inner)

    return optax.GradientTransformation(init, update)
