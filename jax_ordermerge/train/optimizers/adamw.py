"""AdamW."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class AdamW(OptimizerSettings):
    """Adam with decoupled weight decay.

    Source: Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.
    """

    beta1: Fraction = Field(
        0.9,
        description="decay of the mean of the gradients",
        json_schema_extra={"unit": "per step"},
    )
    beta2: Fraction = Field(
        0.999,
        description="decay of the mean of their squares",
        json_schema_extra={"unit": "per step"},
    )
    epsilon: PositiveFloat = Field(
        1e-8,
        description="added to the root of the mean square",
        json_schema_extra={"unit": "gradient"},
    )


def direction(settings: AdamW, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Adam without weight decay and learning rate."""
    import optax

    return optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)


OPTIMIZERS.register("adamw", Optimizer(AdamW, direction, elementwise=True))
