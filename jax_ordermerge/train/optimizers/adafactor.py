"""Adafactor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings

if TYPE_CHECKING:
    import optax


class Adafactor(OptimizerSettings):
    """Adam's second moment, factored into means of rows and columns; no momentum.

    Source: Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235.
    """

    epsilon: PositiveFloat = Field(
        1e-30,
        description="added to the squared gradient",
        json_schema_extra={"unit": "squared gradient"},
    )
    decay_rate: Fraction = Field(
        0.8,
        description="beta2 of step t is 1 - t^-decay_rate",
        json_schema_extra={"unit": "exponent"},
    )
    min_dim_size_to_factor: PositiveInt = Field(
        128,
        description="a matrix with a smaller side keeps the second moment of every element",
        json_schema_extra={"unit": "elements"},
    )
    scale_parameter: bool = Field(
        True, description="the learning rate is relative to the RMS of each tensor"
    )


def direction(settings: Adafactor, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Adafactor without weight decay and learning rate."""
    import jax
    import optax

    from jax_ordermerge import tree

    relative = (optax.scale_by_param_block_rms(),) if settings.scale_parameter else ()
    tx = optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=settings.decay_rate,
            min_dim_size_to_factor=settings.min_dim_size_to_factor,
            epsilon=settings.epsilon,
        ),
        optax.clip_by_block_rms(1.0),
        *relative,
    )
    # Means and RMS are of one tensor. Stacked parameters [L, ...] hold L tensors, so `vmap` keeps
    # their layers apart.
    by_layer = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    labels = {spec.path: "stacked" if spec.stacked else "single" for spec in table}
    return optax.partition({"stacked": by_layer, "single": tx}, tree.unflatten(labels))


OPTIMIZERS.register("adafactor", Optimizer(Adafactor, direction))
