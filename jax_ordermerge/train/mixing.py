"""Members that act on each other while they train: WASH swaps a few of their parameters, PAPA draws them to their mean.

With either a member is no longer what it would be alone: it has learned from the others' orders too. Only what is trained is mixed; the
optimizer's state stays with its member. What is done after a step depends on the seed and the number of the step, so that a training that
continues does the same, and every mesh gives the same bits.

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
from jax_ordermerge.tree import Tree

_WIDEST = 32  # columns of a tile: few, so that tiles lie within the shares of a divided axis


def compile_mixing(
    settings: Mixing, table: Sequence[TensorSpec], seed: int, mesh: Mesh, params: Tree
) -> Callable[[steps.TrainState, int], steps.TrainState]:
    """Compile what mixes a population after a step; where none is due the state comes back as it is.

    Args:
        settings: see `Mixing`.
        table: declares what is trained.
        seed: of the run.
        mesh: the mesh.
        params: of the population, abstract, with shardings.

    Returns:
        `(state, steps done) -> state`; the state's parameters are donated.
    """
    flat = tree.flatten(params)

    def mix(params: Tree, done: jax.Array) -> Tree:
        own = tree.flatten(params)
        if isinstance(settings, Papa):
            return tree.unflatten(
                {path: _papa(own[path], flat[path], settings.rate) for path in own}
            )
        chances = _chances(table, settings)
        return tree.unflatten(
            {s.path: _wash_leaf(own[s.path], s, seed, done, chances[s.path], mesh) for s in table}
        )

    counter_place = NamedSharding(mesh, P())
    place = steps.shardings(params)
    step = jax.ShapeDtypeStruct((), jnp.uint32, sharding=counter_place)
    program = jax.jit(
        mix, in_shardings=(place, counter_place), out_shardings=place, donate_argnums=0
    )
    compiled = program.lower(params, step).compile(steps.EXACT)

    def mixed(state: steps.TrainState, done: int) -> steps.TrainState:
        if done % settings.every:
            return state
        return state._replace(
            params=compiled(state.params, jax.device_put(np.uint32(done), counter_place))
        )

    return mixed


def papa(members: Sequence[jax.Array], rate: float) -> jax.Array:
    """Return (1 - rate) theta_m + rate mean(theta) of every member, [M, *s], members added in their order.

    Args:
        members: M arrays [*s], float32.
        rate: 1 - alpha of the paper.

    Example:
        >>> papa([jnp.array([0.0]), jnp.array([4.0])], 0.5).tolist()
        [[1.0], [3.0]]

    Source: Jolicoeur-Martineau et al. 2023, https://arxiv.org/abs/2304.03094 (the variant that it calls PAPA; with rate 1 PAPA-all). The
    rate does not follow the learning rate.
    """
    mean = combine(members, jnp.ones(len(members))) / len(members)
    return jnp.stack([rounded((1 - rate) * one) + rounded(rate * mean) for one in members])


def _papa(x: jax.Array, abstract: jax.ShapeDtypeStruct, rate: float) -> jax.Array:
    # as in merging: one exchange puts the axis order over elements, so that every device adds whole sets of members
    spread, _ = population.member_shardings(abstract) or (None, None)
    if spread is not None:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(spread.mesh, P(None, *spread.spec)))
    return papa(tuple(x), rate)


def tile(shape: Sequence[int], fraction: float) -> tuple[int, int]:
    """Return rows and columns of the tiles that a matrix is cut into: divisors of its sides, at most 1 / fraction elements in all.

    Example:
        >>> tile((4096, 4096), 0.001), tile((1, 512), 0.1), tile((6, 6), 1.0)
        ((16, 32), (1, 8), (1, 1))
    """
    most = math.floor(1 / fraction)
    columns = _divisor(shape[-1], min(most, _WIDEST))
    return _divisor(shape[-2], most // columns), columns


def _divisor(size: int, most: int) -> int:
    return next(one for one in range(min(size, most), 0, -1) if size % one == 0)


def wash(
    x: jax.Array,
    words: jax.Array,
    done: jax.Array,
    fraction: jax.Array,
    *,
    cut: tuple[int, int],
    mesh: Mesh | None = None,
) -> jax.Array:
    """Let a random few elements of the members change places.

    One element is drawn in every tile, and with the chance `fraction` times the size of a tile its values are dealt out again among the
    members, by a random permutation of its own. So an element takes part with the probability `fraction`, no two of one tile do, and
    only a value a tile crosses the mesh. Values are moved as bits.

    Args:
        x: [M, rows, columns], float32.
        words: uint32[2], the key of the tensor.
        done: uint32 scalar, steps done.
        fraction: float32 scalar.
        cut: rows and columns of a tile, divisors of those of `x`.
        mesh: over whose axis `order` the values that take part are gathered; None leaves that to the compiler.

    Example:
        >>> x = jnp.arange(8.0).reshape(2, 2, 2)
        >>> wash(
        ...     x, jnp.array([1, 2], jnp.uint32), jnp.uint32(1), jnp.float32(1), cut=(1, 2)
        ... ).tolist()
        [[[4.0, 1.0], [2.0, 3.0]], [[0.0, 5.0], [6.0, 7.0]]]

    Source: Fournier et al. 2024, https://arxiv.org/abs/2405.17517; the tiles are ours.
    """
    M, rows, columns = x.shape
    height, width = cut
    R, C = rows // height, columns // width
    index = hash_rng.Index(*(word[None] for word in hash_rng.element_index((R, C))))
    rounds = done * jnp.uint32(M + 2) + jnp.arange(M + 2, dtype=jnp.uint32)
    drawn = hash_rng.random_bits(words, index, rounds[:, None, None])
    place_RC = drawn[0] % jnp.uint32(height * width)
    taken_RC = (drawn[1] >> 8).astype(jnp.float32) * 2.0**-24 < fraction * (height * width)
    inside = jnp.arange(height * width, dtype=jnp.uint32).reshape(1, height, 1, width)
    chosen = (inside == place_RC[:, None, :, None]) & taken_RC[:, None, :, None]
    bits = selection.to_bits(x).reshape(M, R, height, C, width)
    picked_MRC = jnp.where(chosen[None], bits, 0).max((2, 4))
    if mesh is not None:
        picked_MRC = jax.lax.with_sharding_constraint(
            picked_MRC, NamedSharding(mesh, P(None, P.UNCONSTRAINED, P.UNCONSTRAINED))
        )
    dealt_MRC = jnp.take_along_axis(picked_MRC, jnp.argsort(drawn[2:], axis=0, stable=True), axis=0)
    out = jnp.where(chosen[None], dealt_MRC[:, :, None, :, None], bits)
    return jax.lax.bitcast_convert_type(out.reshape(x.shape), x.dtype)


def _wash_leaf(
    x: jax.Array, spec: TensorSpec, seed: int, done: jax.Array, chances: np.ndarray, mesh: Mesh
) -> jax.Array:
    if not chances.any():
        return x
    words = jnp.asarray(
        np.stack([rng.stream_key_bits(seed, "wash", name) for name in spec.hf_names()])
    )
    layers = x.reshape(len(x), len(words), -1, spec.hf_shape[-1])
    one = functools.partial(wash, cut=tile(layers.shape[2:], chances.max()), mesh=mesh)
    return jax.vmap(one, (1, 0, None, 0), 1)(layers, words, done, jnp.float32(chances)).reshape(
        x.shape
    )


def _chances(table: Sequence[TensorSpec], settings: Wash) -> dict[str, np.ndarray]:
    """Return for every tensor the fraction of each of its layers, float64[L] (or [1])."""
    layers = max((s.shape[0] for s in table if s.stacked), default=0)

    def depths(spec: TensorSpec) -> np.ndarray:
        if spec.stacked:
            return np.arange(1, layers + 1)
        return np.array([0 if spec.kind == "embedding" else layers + 1])

    falls = settings.depth == "decreasing"
    return {
        spec.path: settings.fraction * (1 - depths(spec) / (layers + 1) * falls) for spec in table
    }
