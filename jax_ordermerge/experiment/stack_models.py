"""Models of one architecture stacked on a leading axis, so that one program takes them all."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.plan import analytic
from jax_ordermerge.tree import Tree

# of a device's memory that stacked models may take; caches of keys and values need the rest
_MEMORY_FRACTION = 0.5
_SMALL_BYTES = 64 << 20  # of all models of a device


def fitting(count: int, members: int, config: ModelConfig, mesh: Mesh, dtype: str) -> int:
    """Return how many models to stack.

    Small models are all stacked: a stack of another size would be one more compilation. Of others
    there are `members` at a time, or fewer where the device memory is smaller.

    Args:
        count: of the models.
        members: a multiple of the device groups; training has as many in memory.
        config: the architecture.
        mesh: where the models are.
        dtype: of their parameters.
    """
    # a device group holds its models side by side, and at least one of them
    groups = mesh.shape["order"]
    model_bytes = analytic.bytes_per_device(convert.abstract_params(config, mesh, dtype=dtype))
    size = -(-count // groups)
    if size * model_bytes > _SMALL_BYTES:
        size = members // groups
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is not None:  # CPU devices do not report their memory
        size = max(1, min(size, int(_MEMORY_FRACTION * limit / model_bytes)))
    return groups * size


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
    zeros, write = _stack_programs(config, mesh, size, dtype)
    # Written slot by slot into zeros on the devices. Stacking a list of models would need all of
    # them and the stack at the same time.
    stacked = zeros()
    index = 0
    for index, model in enumerate(models):
        stacked = write(stacked, model, index)
    # every group takes part in the collectives of generation, so a spare slot needs a valid model
    for spare in range(index + 1, size):
        stacked = write(stacked, model, spare)
    return stacked


def take(stacked: Tree, index: int, config: ModelConfig, mesh: Mesh, dtype: str) -> Tree:
    """Return one of the models of `stack`, sharded as a single model is."""
    return _take_program(config, mesh, dtype)(stacked, index)


# The programs are cached because jit compiles anew for another function object, even of the same
# code. The index is traced in both: one program for all models.


@functools.lru_cache(maxsize=4)
def _stack_programs(
    config: ModelConfig, mesh: Mesh, size: int, dtype: str
) -> tuple[Callable[[], Tree], Callable[[Tree, Tree, int], Tree]]:
    """Return a program for zeros of `size` models, and one that writes a model into them."""
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

    # donated, else the stack itself would be in memory twice
    return (
        jax.jit(zeros, out_shardings=shardings),
        jax.jit(put, donate_argnums=0, out_shardings=shardings),
    )


@functools.lru_cache(maxsize=4)
def _take_program(config: ModelConfig, mesh: Mesh, dtype: str) -> Callable[[Tree, int], Tree]:
    abstract = convert.abstract_params(config, mesh, dtype=dtype)

    def pick(stacked: Tree, index: int) -> Tree:
        return jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, 0, keepdims=False), stacked
        )

    return jax.jit(pick, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))
