"""Mixing of members while they train: WASH swaps a few of their parameters, PAPA pulls them
towards their mean.

A mixed member is no longer what it would be alone: it has learned from the other orders too. Only
what is trained is mixed; the state of the optimizer stays with its member.

Axis letters: `M` member, `L` layer, `R`, `C` rows and columns of tiles.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import hash_rng, rng, tree
from jax_ordermerge.arch import TensorSpec
from jax_ordermerge.config import Mixing, Papa, Wash
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods import selection
from jax_ordermerge.merge.methods.linear import combine
from jax_ordermerge.merge.methods.reductions import rounded
from jax_ordermerge.train import step as steps
from jax_ordermerge.train.compiler_options import EXACT
from jax_ordermerge.tree import Tree

_MAX_COLUMNS = 32  # of a tile: few, so that tiles lie within the shards of a divided axis


def compile_mixing(
    settings: Mixing, table: Sequence[TensorSpec], seed: int, mesh: Mesh, params: Tree
) -> Callable[[steps.TrainState, int], steps.TrainState]:
    """Compile the mixing of a population after a step.

    Args:
        settings: see `Mixing`.
        table: declares what is trained.
        seed: seed of the experiment.
        mesh: the mesh.
        params: parameters of the population, abstract, with shardings.

    Returns:
        `(state, steps done) -> state`, the same state where no mixing is due. Parameters are
        donated.
    """
    abstract = tree.flatten(params)

    # A function of parameters, seed and number of the step alone: a resumed training mixes as an
    # uninterrupted one does, and every mesh gives the same bits.
    def mix(params: Tree, done: jax.Array) -> Tree:
        flat = tree.flatten(params)
        if isinstance(settings, Papa):
            return tree.unflatten(
                {path: _papa(x, abstract[path], settings.rate) for path, x in flat.items()}
            )
        fractions = _layer_fractions(table, settings)
        return tree.unflatten(
            {
                spec.path: _wash_leaf(flat[spec.path], spec, seed, done, fractions[spec.path], mesh)
                for spec in table
            }
        )

    replicated = NamedSharding(mesh, P())
    shardings = steps.shardings(params)
    step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=replicated)
    program = jax.jit(
        mix, in_shardings=(shardings, replicated), out_shardings=shardings, donate_argnums=0
    )
    compiled = program.lower(params, step).compile(EXACT)

    def mix_state(state: steps.TrainState, done: int) -> steps.TrainState:
        if done % settings.every:
            return state
        step = jax.device_put(np.uint32(done), replicated)
        return state._replace(params=compiled(state.params, step))

    return mix_state


def papa(members: Sequence[jax.Array], rate: float) -> jax.Array:
    """Return (1 - rate) theta_m + rate mean(theta) of every member, [M, *s].

    Args:
        members: M arrays [*s], float32.
        rate: 1 - alpha of the paper.

    Example:
        >>> papa([jnp.array([0.0]), jnp.array([4.0])], 0.5).tolist()
        [[1.0], [3.0]]

    Source: Jolicoeur-Martineau et al. 2023, https://arxiv.org/abs/2304.03094: the variant that it
    calls PAPA; with rate 1 PAPA-all.
    """
    # Unlike the paper, the rate does not follow the learning rate. Members are added in their order
    # and each product is rounded on its own: a fused multiply-add on one mesh would give other
    # bits.
    mean = combine(members, jnp.ones(len(members))) / len(members)
    return jnp.stack([rounded((1 - rate) * x) + rounded(rate * mean) for x in members])


def _papa(x: jax.Array, abstract: jax.ShapeDtypeStruct, rate: float) -> jax.Array:
    # As in merging: one all-to-all moves the axis `order` from members onto elements, so that each
    # device adds all members of its elements.
    spread, _ = population.member_shardings(abstract) or (None, None)
    if spread is not None:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(spread.mesh, P(None, *spread.spec)))
    return papa(tuple(x), rate)


def tile(shape: Sequence[int], fraction: float) -> tuple[int, int]:
    """Return rows and columns of the tiles that a matrix is cut into.

    They divide its sides, and a tile has at most 1 / fraction elements.

    Example:
        >>> tile((4096, 4096), 0.001), tile((1, 512), 0.1), tile((6, 6), 1.0)
        ((16, 32), (1, 8), (1, 1))
    """
    limit = math.floor(1 / fraction)  # else a tile would have to swap more than one element
    columns = _divisor(shape[-1], min(limit, _MAX_COLUMNS))
    return _divisor(shape[-2], limit // columns), columns


def _divisor(size: int, limit: int) -> int:
    """Return the largest divisor of `size` up to a limit."""
    return next(n for n in range(min(size, limit), 0, -1) if size % n == 0)


def wash(
    x: jax.Array,
    key_bits: jax.Array,
    done: jax.Array,
    fraction: jax.Array,
    *,
    tile_shape: tuple[int, int],
    mesh: Mesh | None = None,
) -> jax.Array:
    """Shuffle the values of a few random elements among the members.

    One element is drawn in every tile. With probability `fraction` times the size of the tile its
    values are permuted among the members. So an element takes part with probability `fraction`, and
    no two elements of one tile do.

    Args:
        x: [M, rows, columns], float32.
        key_bits: uint32[2], the key of the tensor.
        done: uint32 scalar, steps done.
        fraction: float32 scalar.
        tile_shape: rows and columns of a tile, divisors of those of `x`.
        mesh: the values that take part are gathered over its axis `order`; None leaves that to the
            compiler.

    Example:
        >>> x = jnp.arange(8.0).reshape(2, 2, 2)
        >>> wash(
        ...     x, jnp.array([1, 2], jnp.uint32), jnp.uint32(1), jnp.float32(1), tile_shape=(1, 2)
        ... ).tolist()
        [[[4.0, 1.0], [2.0, 3.0]], [[0.0, 5.0], [6.0, 7.0]]]

    Source: Fournier et al. 2024, https://arxiv.org/abs/2405.17517.
    """
    # The paper draws every element on its own. Tiles are ours: of each only one value per member
    # crosses the mesh, and not the whole tensor.
    M, rows, columns = x.shape
    height, width = tile_shape
    R, C = rows // height, columns // width
    # per tile: a random number for the element, one for whether it takes part, and M to sort by
    index = hash_rng.Index(*(coordinate[None] for coordinate in hash_rng.element_index((R, C))))
    counters = done * jnp.uint32(M + 2) + jnp.arange(M + 2, dtype=jnp.uint32)
    random = hash_rng.random_bits(key_bits, index, counters[:, None, None])
    element_RC = random[0] % jnp.uint32(height * width)
    # the upper 24 bits are all that a float32 in [0, 1) can hold exactly
    active_RC = (random[1] >> 8).astype(jnp.float32) * 2.0**-24 < fraction * (height * width)
    elements = jnp.arange(height * width, dtype=jnp.uint32).reshape(1, height, 1, width)
    mask = (elements == element_RC[:, None, :, None]) & active_RC[:, None, :, None]
    # Values are moved as bits: a float might be changed on its way (-0, NaN, subnormals). At most
    # one element of a tile is in the mask, so the maximum picks it.
    bits = selection.to_bits(x).reshape(M, R, height, C, width)
    picked_MRC = jnp.where(mask[None], bits, 0).max((2, 4))
    if mesh is not None:
        picked_MRC = jax.lax.with_sharding_constraint(
            picked_MRC, NamedSharding(mesh, P(None, P.UNCONSTRAINED, P.UNCONSTRAINED))
        )
    permutation_MRC = jnp.argsort(random[2:], axis=0, stable=True)
    shuffled_MRC = jnp.take_along_axis(picked_MRC, permutation_MRC, axis=0)
    out = jnp.where(mask[None], shuffled_MRC[:, :, None, :, None], bits)
    return jax.lax.bitcast_convert_type(out.reshape(x.shape), x.dtype)


def _wash_leaf(
    x: jax.Array, spec: TensorSpec, seed: int, done: jax.Array, fractions: np.ndarray, mesh: Mesh
) -> jax.Array:
    if not fractions.any():
        return x
    # Keys by Hugging Face name: a layer draws the same, however layers are stacked. One tile for
    # all layers, that of the largest fraction, so that they are one `vmap`.
    names = spec.hf_names()
    key_bits = jnp.asarray(np.stack([rng.stream_key_bits(seed, "wash", name) for name in names]))
    layers = x.reshape(len(x), len(names), -1, spec.hf_shape[-1])
    tile_shape = tile(layers.shape[2:], fractions.max())
    wash_layer = functools.partial(wash, tile_shape=tile_shape, mesh=mesh)
    wash_layers = jax.vmap(wash_layer, (1, 0, None, 0), 1)
    return wash_layers(layers, key_bits, done, jnp.float32(fractions)).reshape(x.shape)


def _layer_fractions(table: Sequence[TensorSpec], settings: Wash) -> dict[str, np.ndarray]:
    """Return the fraction of each layer of every tensor, float64[L] (or [1])."""
    # "decreasing": from the embedding (depth 0, the whole fraction) to the head (L + 1, none)
    layers = max((s.shape[0] for s in table if s.stacked), default=0)
    falls = settings.depth == "decreasing"
    fractions = {}
    for spec in table:
        depths = np.array([0 if spec.kind == "embedding" else layers + 1])
        if spec.stacked:
            depths = np.arange(1, layers + 1)
        fractions[spec.path] = settings.fraction * (1 - depths / (layers + 1) * falls)
    return fractions
