"""Inner products of models and of task vectors."""

import jax
import numpy as np

from jax_ordermerge.merge.methods.parts import Part, Tensor
from jax_ordermerge.merge.methods.reductions import block_sums


def gram(part: Part, *, of: str) -> list[jax.Array]:
    """Return the partial sums of the inner products of all pairs, for `Tensor.total`.

    Args:
        part: a part of a tensor.
        of: see `gram_matrix`.

    Returns:
        The upper triangle row by row, each float32[blocks, 32]. A list: stacking the pairs would
        take longer than adding them up.
    """
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
        >>> members = [jax.numpy.array([1.0, 2.0]), jax.numpy.array([0.0, 1.0])]
        >>> gram_matrix(InMemoryTensor(members, None), "members").tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    return symmetric(tensor.total(gram, of=of), tensor.count)
