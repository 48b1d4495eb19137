"""Lion."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class Lion(OptimizerSettings):
    """The sign of an interpolation of momentum and gradient.

    Source: Chen et al. 2023, https://arxiv.org/abs/2302.06675.
    """

    beta1: Fraction = Field(
        0.9, description="share of the mean in the sign", json_schema_extra={"unit": "per step"}
    )
    beta2: Fraction = Field(
        0.99,
        description="decay of the mean of the gradients",
        json_schema_extra={"unit": "per step"},
    )


def direction(settings: Lion, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Lion without weight decay and learning rate."""
    import optax

    return optax.scale_by_lion(settings.beta1, settings.beta2)


OPTIMIZERS.register("lion", Optimizer(Lion, direction, elementwise=True))
