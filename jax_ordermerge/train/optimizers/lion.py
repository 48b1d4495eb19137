"""Lion."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class Lion(OptimizerSettings):
    """The sign of an interpolation of momentum and gradient.

    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675.
    """

    beta1: Fraction = 0.9
    beta2: Fraction = 0.99


def direction(settings: Lion, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Lion without weight decay and learning rate."""
    import optax

    return optax.scale_by_lion(settings.beta1, settings.beta2)


OPTIMIZERS.register("lion", Optimizer(Lion, direction, elementwise=True))
