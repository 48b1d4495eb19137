"""AdamW."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import PositiveFloat

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.999
    epsilon: PositiveFloat = 1e-8


def direction(settings: AdamW, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Adam without weight decay and learning rate."""
    import optax

    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)


OPTIMIZERS.register("adamw", Optimizer(AdamW, direction, elementwise=True))
