"""Stochastic gradient descent."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class Sgd(OptimizerSettings):
    """Gradient descent with momentum; weight decay is a penalty on the loss, as in torch."""

    momentum: Fraction = Field(
        0.9, description="decay of the sum of the gradients", json_schema_extra={"unit": "per step"}
    )
    nesterov: bool = Field(False, description="look one step ahead")


def direction(settings: Sgd, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return the momentum, or the gradient itself where there is none."""
    import optax

    if not settings.momentum:
        return optax.identity()  # saves the memory of a trace
    return optax.trace(settings.momentum, settings.nesterov)


OPTIMIZERS.register("sgd", Optimizer(Sgd, direction, decoupled_decay=False, elementwise=True))
