"""Models of one architecture stacked on a leading axis, so that one program takes them all."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.plan import analytic
from jax_ordermerge.tree import Tree

# of a device's memory that stacked models may take; caches of keys and values need the rest
_MEMORY_FRACTION = 0.5


def fitting(members: int, config: ModelConfig, mesh: Mesh, dtype: str) -> int:
    """Return how many models to stack: `members`, or fewer where the device memory is smaller.

    Args:
        members: a multiple of the device groups.
        config: the architecture.
        mesh: where the models are.
        dtype: of their parameters.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:  # CPU devices do not report their memory
        return members
    # a device group holds its models side by side, and at least one of them
    groups = mesh.shape["order"]
    model_bytes = analytic.bytes_per_device(convert.abstract_params(config, mesh, dtype=dtype))
    return groups * max(1, min(members // groups, int(_MEMORY_FRACTION * limit / model_bytes)))


def stack(models: Iterable[Tree], count: int, config: ModelConfig, mesh: Mesh, dtype: str) -> Tree:
    """Return models [M, ...] over the mesh axis `order`.

    Args:
        models: parameters of `dtype`. They are read one after another, so only one of them is in
            memory twice.
        count: of models. M is the next multiple of the device groups; the last model fills it up.
        config: the architecture.
        mesh: where the models are, and will be.
        dtype: of the parameters.
    """
    groups = mesh.shape["order"]
    size = -(-count // groups) * groups
    abstract = convert.abstract_params(config, mesh, members=size, dtype=dtype)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def zeros() -> Tree:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), abstract)

    def put(stacked: Tree, model: Tree, index: int) -> Tree:
        return jax.tree.map(
            lambda leaves, leaf: jax.lax.dynamic_update_index_in_dim(leaves, leaf, index, 0),
            stacked,
            model,
        )

    # Written slot by slot into zeros on the devices. Stacking a list of models would need all of
    # them and the stack at the same time.
    stacked = jax.jit(zeros, out_shardings=shardings)()
    # donated, else the stack itself would be in memory twice
    write = jax.jit(put, donate_argnums=0, out_shardings=shardings)
    index = 0
    for index, model in enumerate(models):
        stacked = write(stacked, model, index)
    # every group takes part in the collectives of generation, so a spare slot needs a valid model
    for spare in range(index + 1, size):
        stacked = write(stacked, model, spare)
    return stacked


def take(stacked: Tree, index: int, config: ModelConfig, mesh: Mesh, dtype: str) -> Tree:
    """Return one of the models of `stack`, sharded as a single model is."""
    abstract = convert.abstract_params(config, mesh, dtype=dtype)

    def pick(stacked: Tree, index: int) -> Tree:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stacked
        )

    # the index is traced: one program for all models
    params: Tree = jax.jit(pick, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))(
        stacked, index
    )
    return params
