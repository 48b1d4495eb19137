"""Models of one architecture side by side, so that one program takes them all."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.plan import analytic
from jax_ordermerge.tree import Tree

_SHARE = 0.5  # of a device's memory that models side by side may take: the rest is for caches of keys and values


def fitting(members: int, config: ModelConfig, mesh: Mesh, dtype: str) -> int:
    """Return how many models stand side by side: as many as there are members, fewer where devices are known to be too small.

    Args:
        members: a multiple of the device groups.
        config: their architecture.
        mesh: where they are.
        dtype: of their parameters.
    """
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if limit is None:
        return members
    groups, one = (
        mesh.shape["order"],
        analytic.held(convert.abstract_params(config, mesh, dtype=dtype)),
    )
    return groups * max(1, min(members // groups, int(_SHARE * limit / one)))


def stack(models: Iterable[Tree], count: int, config: ModelConfig, mesh: Mesh, dtype: str) -> Tree:
    """Return models [M, ...] over the mesh axis `order`; no more than one of them is in memory twice.

    Args:
        models: parameters of `dtype`, read one after another.
        count: how many. M is the next multiple of the device groups: the last model stands there several times.
        config: their architecture.
        mesh: where they are, and will be.
        dtype: of the parameters.
    """
    places = -(-count // mesh.shape["order"]) * mesh.shape["order"]
    like = convert.abstract_params(config, mesh, members=places, dtype=dtype)
    shardings = jax.tree.map(lambda x: x.sharding, like)
    population = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like), out_shardings=shardings
    )()

    def put(population: Tree, one: Tree, at: Any) -> Tree:
        return jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, at, 0), population, one
        )

    write = jax.jit(put, donate_argnums=0, out_shardings=shardings)
    at = 0
    for at, one in enumerate(models):
        population = write(population, one, at)
    for spare in range(at + 1, places):
        population = write(population, one, spare)
    return population


def take(population: Tree, at: int, config: ModelConfig, mesh: Mesh, dtype: str) -> Tree:
    """Return one of the models of `stack`, placed as a model alone is."""
    like = convert.abstract_params(config, mesh, dtype=dtype)

    def pick(population: Tree, at: Any) -> Tree:
        return jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, at, 0, keepdims=False), population
        )

    found: Tree = jax.jit(pick, out_shardings=jax.tree.map(lambda x: x.sharding, like))(
        population, at
    )
    return found
