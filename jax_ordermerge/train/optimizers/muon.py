"""Muon for the matrices of the layers, Adam for every other tensor."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from pydantic import Field, PositiveFloat

from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config.training import OPTIMIZERS, Fraction, Optimizer, OptimizerSettings
from jax_ordermerge.errors import UserError

if TYPE_CHECKING:
    import optax

# RMS to which Muon's updates are scaled: that of Adam's, so that both take one learning rate
# (Liu et al. 2025, https://arxiv.org/abs/2502.16982, section 2.2).
_ADAM_RMS: Final = 0.2


class Muon(OptimizerSettings):
    """Orthogonalized momentum of matrices; Adam of embeddings, head, norms and biases.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """

    momentum: Fraction = Field(
        0.95,
        description="decay of the sum of the gradients",
        json_schema_extra={"unit": "per step"},
    )
    nesterov: bool = Field(True, description="look one step ahead")
    beta1: Fraction = Field(
        0.9,
        description="of Adam, for tensors that are no matrices of a layer",
        json_schema_extra={"unit": "per step"},
    )
    beta2: Fraction = Field(
        0.999,
        description="of Adam, for tensors that are no matrices of a layer",
        json_schema_extra={"unit": "per step"},
    )
    epsilon: PositiveFloat = Field(
        1e-8, description="added where Muon and Adam divide", json_schema_extra={"unit": "gradient"}
    )


def direction(settings: Muon, table: Sequence[TensorSpec]) -> "optax.GradientTransformation":
    """Return Muon and Adam without weight decay and learning rate.

    `optax.contrib.muon` is not used: its Adam would be Nesterov's, and its weight decay would
    ignore the mask.

    Raises:
        UserError: the installed optax lacks Muon.
    """
    import jax
    import optax

    from jax_ordermerge import tree

    if not hasattr(optax.contrib, "scale_by_muon"):
        raise UserError(
            f"training.optimizer = muon: optax {optax.__version__} has no"
            " optax.contrib.scale_by_muon; install another version or choose adamw"
        )
    # matrices are [..., out, in]; leading axes (layers) are batched, each is orthogonalized alone
    dimensions = optax.contrib.MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)
    orthogonalize = optax.contrib.scale_by_muon(
        beta=settings.momentum,
        eps=settings.epsilon,
        nesterov=settings.nesterov,
        weight_dimension_numbers=lambda updates: jax.tree.map(lambda _: dimensions, updates),
    )
    # the RMS of an orthogonal matrix is 1 / sqrt(its longer side)
    rescale = optax.stateless_with_tree_map(
        lambda update, _: update * (_ADAM_RMS * max(update.shape[-2:]) ** 0.5)
    )
    adam = optax.scale_by_adam(settings.beta1, settings.beta2, settings.epsilon)
    labels = {spec.path: "hidden" if spec.is_hidden_matrix else "other" for spec in table}
    return optax.partition(
        {"hidden": optax.chain(orthogonalize, rescale), "other": adam}, tree.unflatten(labels)
    )


OPTIMIZERS.register("muon", Optimizer(Muon, direction))
