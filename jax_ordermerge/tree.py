"""Nested dicts of arrays: flat views, and populations, which have a leading member axis `M`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = dict[str, Any]  # of arrays
PyTree = Any  # any structure that jax.tree understands


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a/b": leaf}` in insertion order.

    Example:
        >>> flatten({"a": {"b": 1, "c": 2}})
        {'a/b': 1, 'a/c': 2}
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat.update(flatten(value, path))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> Tree:
    """Invert `flatten`.

    Example:
        >>> unflatten({"a/b": 1, "a/c": 2})
        {'a': {'b': 1, 'c': 2}}
    """
    tree: Tree = {}
    for path, value in flat.items():
        # Names hold no slash: they are the fields of the tensor table.
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return tree


def stack(members: Sequence[PyTree]) -> PyTree:
    """Stack trees of equal structure on a new leading axis `M`.

    Example:
        >>> stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])["w"].shape
        (2, 3)
    """
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)


def member(population: PyTree, index: int) -> PyTree:
    """Return one member of a population.

    Example:
        >>> member({"w": jnp.arange(6).reshape(2, 3)}, 1)["w"].tolist()
        [3, 4, 5]
    """
    return jax.tree.map(lambda leaf: leaf[index], population)


def size(population: PyTree) -> int:
    """Return the number of members `M`.

    Example:
        >>> size({"w": jnp.zeros((4, 3))})
        4
    """
    # every leaf has the axis, so the first one tells
    return int(jax.tree.leaves(population)[0].shape[0])
