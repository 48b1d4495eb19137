"""Random parameters, drawn by the name of each tensor: the same values on every mesh."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ordermerge import mesh as meshes
from jax_ordermerge import rng, tree
from jax_ordermerge.arch import TensorSpec


def draw(
    table: Iterable[TensorSpec],
    seed: int,
    purpose: str,
    mesh: Mesh | None = None,
    *,
    std: float = 1.0,
) -> tree.Tree:
    """Return the parameters that a table declares, float32, each Hugging Face tensor drawn whole.

    Args:
        table: the tensors. Their `init` is `normal` with standard deviation `std`, `uniform` in
            +-1/sqrt(last axis), `ones` or `zeros`.
        seed: seed of the run.
        purpose: names the stream, `rng.stream(seed, purpose, hf_name)`.
        mesh: where the arrays live, sharded by their logical axes; None is the default device.
        std: standard deviation of `normal`.

    Example:
        >>> table = [TensorSpec("a/weight", (4, 2), ("mlp", "embed"), "uniform", "a.weight", "mlp")]
        >>> weight = draw(table, 0, "example")["a"]["weight"]
        >>> weight.shape, bool((abs(weight) < 2**-0.5).all())
        ((4, 2), True)
    """
    specs = tuple(table)
    # one key per Hugging Face tensor: a layer draws the same values however many layers there are
    keys = {
        spec.path: jnp.stack([rng.stream(seed, purpose, name) for name in spec.hf_names()])
        for spec in specs
        if spec.init in ("normal", "uniform")
    }

    def draw_tensor(spec: TensorSpec, keys: jax.Array | None) -> jax.Array:
        shape, bound = spec.hf_shape, spec.hf_shape[-1] ** -0.5
        if keys is None:
            return jnp.full(spec.shape, 1.0 if spec.init == "ones" else 0.0, jnp.float32)
        if spec.init == "uniform":
            uniform = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
            values = jax.vmap(lambda key: uniform(key, shape, jnp.float32))(keys)
        else:
            values = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys) * std
        return values.reshape(spec.shape)

    def build(keys: dict[str, jax.Array]) -> tree.Tree:
        return tree.unflatten({spec.path: draw_tensor(spec, keys.get(spec.path)) for spec in specs})

    shardings = None
    if mesh is not None:
        shardings = tree.unflatten({s.path: meshes.sharding(s.axes, s.shape, mesh) for s in specs})
    return jax.jit(build, out_shardings=shardings)(keys)
