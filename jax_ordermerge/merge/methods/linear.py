"""Linear combinations of models, and their inner products.

Many methods reduce to a linear combination once its coefficients are known. Where the result lies
in the span of the models, the coefficients follow from the matrix of inner products.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.merge.methods.parts import Part, Tensor
from jax_ordermerge.merge.methods.reductions import block_sums, rounded


def combine(terms: Sequence[jax.Array], weights: jax.Array) -> jax.Array:
    """Return sum_i w_i x_i, float32[*s].

    The terms are added in the order of the members, and every operation rounds.

    Args:
        terms: M arrays [*s].
        weights: [M].

    Example:
        >>> combine([jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0])], jnp.array([1.0, 0.5])).tolist()
        [2.5, 4.0]
    """
    # why not `tensordot`: XLA chooses the order of its additions by shape and device
    total = rounded(weights[0] * terms[0].astype(jnp.float32))
    for i in range(1, len(terms)):
        total = total + rounded(weights[i] * terms[i].astype(jnp.float32))
    return total


def apply_linear(part: Part, *, coefficients: jax.Array, of: str) -> jax.Array:
    """Return sum_i c_i theta_i, or theta_0 + sum_i c_i tau_i for task vectors."""
    if of == "task_vectors":
        return part.base_float() + combine(part.task_vectors(), coefficients)
    return combine(part.members, coefficients)


def gram(part: Part, *, of: str) -> list[jax.Array]:
    """Return the partial sums of the inner products of all pairs, for `Tensor.total`.

    Args:
        part: a part of a tensor.
        of: see `gram_matrix`.

    Returns:
        The upper triangle row by row, each float32[blocks, 32]. A list: stacking the pairs would
        take longer than adding them up.
    """
    # Task vectors are subtracted first. Why not <theta_i, theta_j> less the products with theta_0:
    # task vectors are far shorter than models, so nearly all digits would cancel.
    vectors = part.task_vectors() if of == "task_vectors" else part.floats()
    return [
        block_sums(vectors[i] * vectors[j])
        for i in range(len(vectors))
        for j in range(i, len(vectors))
    ]


def symmetric(upper: list[np.ndarray], size: int) -> np.ndarray:
    """Return the symmetric matrix [size, size] whose upper triangle is given row by row.

    Example:
        >>> symmetric([np.float64(1), np.float64(2), np.float64(3)], 2).tolist()
        [[1.0, 2.0], [2.0, 3.0]]
    """
    # each pair was summed once: both halves have the same bits
    matrix = np.zeros((size, size))
    matrix[np.triu_indices(size)] = np.array(upper)
    return matrix + np.triu(matrix, 1).T


def gram_matrix(tensor: Tensor, of: str) -> np.ndarray:
    """Return the matrix of inner products <x_i, x_j>, float64.

    Args:
        tensor: the tensor.
        of: "members" (x_i = theta_i) or "task_vectors" (x_i = theta_i - theta_0).

    Example:
        >>> from jax_ordermerge.merge.methods.parts import InMemoryTensor
        >>> members = [jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])]
        >>> gram_matrix(InMemoryTensor(members, None), "members").tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    return symmetric(tensor.total(gram, of=of), tensor.count)
