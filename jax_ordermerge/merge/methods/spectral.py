"""What methods that see a matrix through its singular vectors have in common.

A formula is a function of the task vectors of one matrix. It is written once, for numpy and for
`jax.numpy`. On CPU it runs in numpy, in float64 with one rounding to float32 at the end: so files
and populations of any mesh have the same bits. Accelerators run it in float32, as the papers' code
does.

Axis letters: `m`, `n` rows and columns of the matrix, `r` its rank.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.parts import AnyArray, Part, Prepared, Tensor
from jax_ordermerge.merge.methods.reductions import rounded
from jax_ordermerge.merge.methods.table import Parameters, Unit

# `formula(xp, task_vectors, *numbers, **static) -> [m, n]`, with xp numpy or jax.numpy. Task
# vectors are computed when they are read, so that numpy holds one of them at a time.
Formula = Callable[..., AnyArray]

# One matrix at a time: LAPACK uses every core for one, and each needs several times its size.
_LOCK = threading.Lock()


class _TaskVectors(Sequence[np.ndarray]):
    """The task vectors of a matrix in float64, each computed when it is read."""

    def __init__(self, members: Sequence[np.ndarray], base: np.ndarray) -> None:
        self._members, self._base = members, base.astype(np.float64)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, index: Any) -> Any:
        # not kept: in float64 the task vectors of all members are four times the models in bfloat16
        return self._members[index].astype(np.float64) - self._base


def is_spectral(tensor: Tensor) -> bool:
    """Return whether a method acts on the singular vectors of a tensor.

    It does on the matrices of layers. All other tensors are averaged, as the papers do: vectors
    have no singular vectors, and rows of an embedding or a head are tokens, which do not act on one
    another.
    """
    return len(tensor.shape) == 2 and tensor.in_layer


def prepare(tensor: Tensor, **prepared: Any) -> Prepared:
    """Return the arguments of `apply`, without the formula.

    Args:
        tensor: the tensor.
        prepared: what the formula takes after the task vectors, and `weights`, of the average.
    """
    return {**prepared, "spectral": is_spectral(tensor)}


def apply(
    part: Part,
    formula: Formula,
    numbers: Sequence[jax.Array] = (),
    *,
    spectral: bool,
    scale: jax.Array,
    weights: jax.Array,
    **static: Any,
) -> jax.Array:
    """Return theta_0 + scale times the formula, or times the weighted sum of the task vectors.

    Args:
        part: the whole tensor.
        formula: see `Formula`.
        numbers: arrays of the formula.
        spectral: whether the formula applies, see `is_spectral`.
        scale: float32.
        weights: float32[M], of the sum.
        static: values of the formula that select the program.
    """
    if spectral:
        change = _compute(part, functools.partial(formula, **static), numbers)
    else:
        change = combine(part.task_vectors(), weights)
    return part.base_float() + rounded(scale * change)


def _compute(part: Part, formula: Formula, numbers: Sequence[jax.Array]) -> jax.Array:
    # Layer after layer where the layers are mapped: all of them together would need the memory of
    # as many decompositions.
    @jax.custom_batching.sequential_vmap
    def compute(
        members: tuple[jax.Array, ...], base: jax.Array, numbers: tuple[jax.Array, ...]
    ) -> jax.Array:
        return jax.lax.platform_dependent(
            members,
            base,
            numbers,
            cpu=functools.partial(_on_host, formula),
            default=functools.partial(_on_device, formula),
        )

    return compute(part.members, part.base, tuple(numbers))


def _on_device(
    formula: Formula,
    members: tuple[jax.Array, ...],
    base: jax.Array,
    numbers: tuple[jax.Array, ...],
) -> jax.Array:
    return formula(jnp, Part(members, base, None).task_vectors(), *numbers).astype(jnp.float32)


def _on_host(
    formula: Formula,
    members: tuple[jax.Array, ...],
    base: jax.Array,
    numbers: tuple[jax.Array, ...],
) -> jax.Array:
    # not jax.pure_callback, for the reason given in `row_ranks`
    result = jax.ShapeDtypeStruct(base.shape, jnp.float32)
    write = functools.partial(_write, formula, len(members))
    return buffer_callback(write, result)(*members, base, *numbers)


def _write(formula: Formula, count: int, _: Any, out: Any, *inputs: Any) -> None:
    arrays = [np.asarray(x) for x in inputs]
    members, base, numbers = arrays[:count], arrays[count], arrays[count + 1 :]
    result = np.asarray(out)
    # LAPACK does not come to an end, or raises, where an element is not a number
    if not all(np.isfinite(x.astype(np.float32)).all() for x in (*members, base)):
        result[...] = np.nan
        return
    with _LOCK:
        result[...] = formula(np, _TaskVectors(members, base), *numbers)


def left_vectors(xp: ModuleType, matrices: Sequence[AnyArray]) -> tuple[AnyArray, AnyArray]:
    """Return the left singular vectors [m, r] and values [r] of M matrices side by side.

    Args:
        xp: numpy or jax.numpy.
        matrices: [m, n] each.

    Returns:
        U and s, the largest value first; r = min(m, M n). Of a zero value the vector is of no use.

    Example:
        >>> left_vectors(np, [np.diag([1.0, 2.0]), np.diag([0.0, 2.0])])[1].round(6).tolist()
        [2.828427, 1.0]
    """
    if xp is jnp:
        # the Gram matrix in float32 would lose values below 3e-4 of the largest
        u, s, _ = jnp.linalg.svd(jnp.concatenate([*matrices], axis=1), full_matrices=False)
        return u, s
    rows, columns = matrices[0].shape
    if rows > columns * len(matrices):
        # the Gram matrix of the shorter side: its cost grows with the third power
        u, s, _ = svd(np, np.concatenate([*matrices], axis=1))
        return u, s
    # A fifth of the time of LAPACK's decomposition. In float64 values down to 1e-8 of the largest
    # survive the square, and `significant` drops more than these.
    gram = sum(matrix @ matrix.T for matrix in matrices)
    squares, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1], np.sqrt(np.maximum(squares[::-1], 0))


def svd(xp: ModuleType, matrix: AnyArray) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return U [m, r], s [r] and V^T [r, n] with r = min(m, n).

    Vectors whose values are not `significant` may be anything: mask them.

    Example:
        >>> u, s, vt = svd(np, np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        >>> s.tolist(), ((u * s) @ vt).tolist()
        ([4.0, 3.0], [[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])
    """
    if xp is jnp:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        return u, s, vt
    if matrix.shape[0] > matrix.shape[1]:
        v, s, ut = svd(xp, matrix.T)
        return ut.T, s, v.T
    u, s = left_vectors(xp, [matrix])
    # V^T = S^-1 U^T M; where s is 0 the rows are 0, and not NaN
    return u, s, (u / np.where(s > 0, s, 1)[None]).T @ matrix


def significant(xp: ModuleType, values: AnyArray, shape: tuple[int, int]) -> AnyArray:
    """Return which singular values, largest first, are more than rounding in float32.

    The limit is that of `numpy.linalg.matrix_rank`.

    Example:
        >>> significant(np, np.array([2.0, 1e-9, 0.0]), (3, 3)).tolist()
        [True, False, False]
    """
    limit = max(shape) * np.finfo(np.float32).eps * values[0]
    # strictly: of a zero matrix no value counts
    return xp.asarray(values > limit)


def polar(xp: ModuleType, matrix: AnyArray) -> AnyArray:
    """Return the orthogonal factor P Q^T of a matrix P D Q^T, [m, n].

    Where the rank is not full, the factor of the significant values alone. The papers' code leaves
    to rounding which vectors complete it.

    Example:
        >>> polar(np, np.diag([5.0, -2.0, 0.0])).tolist()
        [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    u, s, vt = svd(xp, matrix)
    # masked in U alone: each term of the product has one vector of both sides
    return (u * significant(xp, s, matrix.shape)[None]) @ vt


def unit(parameters: Parameters) -> Unit:
    """Return the unit of these methods: the tensor."""
    return "tensor"
