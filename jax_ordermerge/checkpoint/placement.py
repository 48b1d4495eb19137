"""Arrays read from files straight onto devices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Index = tuple[slice, ...]


def place(abstract: jax.ShapeDtypeStruct, read: Callable[[Index], np.ndarray]) -> jax.Array:
    """Return an array of this shape, dtype and sharding; each process reads its own slices only.

    Args:
        abstract: without a sharding the array goes to the default device, uncommitted.
        read: takes one slice per axis and returns that part, in any dtype.

    Example:
        >>> place(
        ...     jax.ShapeDtypeStruct((2, 2), "float32"),
        ...     lambda index: np.arange(4).reshape(2, 2)[index],
        ... ).tolist()
        [[0.0, 1.0], [2.0, 3.0]]
    """
    # `make_array_from_callback` calls once per device: replicas share what is read once
    parts: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

    def read_part(index: Index | None) -> np.ndarray:
        index = index or ()
        key = tuple((axis.start, axis.stop) for axis in index)
        if key not in parts:
            parts[key] = np.asarray(read(index), abstract.dtype)
        return parts[key]

    if abstract.sharding is None:
        return jnp.asarray(read_part((slice(None),) * len(abstract.shape)))
    return jax.make_array_from_callback(
        abstract.shape, abstract.sharding, read_part, dtype=abstract.dtype
    )
