"""Fisher-weighted average: each element counts by how much it matters to its member.

Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging",
https://arxiv.org/abs/2111.09832, equation 5.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parameters import weights_or_ones
from jax_ordermerge.merge.methods.parts import Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded
from jax_ordermerge.merge.methods.table import METHODS, Method


def prepare(tensor: Tensor) -> Prepared:
    """Fisher-weighted average: theta_j = sum_i w_i F_ij theta_ij / sum_i w_i F_ij, per element j.

    Args:
        tensor: of M models, followed by the diagonals of their M Fisher matrices (see
            `train.fisher`). Of its 2M weights the first M count. They are 1 each by default.

    Raises:
        UserError: the number of inputs is odd.
    """
    if tensor.count % 2:
        raise UserError(
            "merge method fisher takes models and as many Fisher diagonals after them; "
            f"{tensor.count} were given"
        )
    return {"weights": np.float32(weights_or_ones(tensor)[: tensor.count // 2])}


def apply(part: Part, *, weights: jax.Array) -> jax.Array:
    """Average the first half of the members, weighted by the second half."""
    count = len(part.members) // 2
    models, fisher = part.floats()[:count], part.floats()[count:]
    # Products are rounded and terms added in the order of the members, as in `combine`. The divisor
    # adds the very products w_i F_i that the numerator multiplies.
    weighted_fisher = [rounded(weights[i] * fisher[i]) for i in range(count)]
    divisor = functools.reduce(jnp.add, weighted_fisher)
    numerator = functools.reduce(
        jnp.add, [rounded(f * x) for f, x in zip(weighted_fisher, models, strict=True)]
    )
    # where F is 0 for all members the weights alone decide; the paper's equation is 0 / 0 there
    plain = combine(models, weights) / jnp.sum(weights)
    return jnp.where(divisor > 0, numerator / jnp.where(divisor > 0, divisor, 1.0), plain)


METHODS.register(
    "fisher",
    Method(
        prepare,
        apply,
        "arXiv 2111.09832, equation 5",
        needs_base=lambda parameters: False,
        members=(2, math.inf),
        needs="fisher",
    ),
)
