"""Merging a population in device memory: the kernels over stacked, sharded parameter dicts. Pure."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge import geometry, methods


def merge(
    members: Mapping[str, Any],
    base: Mapping[str, Any] | None,
    config: ModelConfig,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> tree.Tree:
    """Merge the members of a population, Hugging Face tensor by Hugging Face tensor.

    Members and base are rounded to `dtype` first, as if they had been exported; the arithmetic is float32 with one rounding at the
    end. So the result is that of merging the exported files (`engine.merge`): selection has the same bits, on any mesh.

    Args:
        members: parameter dict with a leading axis `M`, on any mesh.
        base: parameter dict; may be None for methods that do not need it.
        config: the model.
        method: a name of `methods.METHODS`.
        seed: of the methods that draw.
        weights: one a member.
        parameters: of the method.
        dtype: what is merged and returned.

    Returns:
        The parameter dict in `dtype`, sharded as the members are without their leading axis.

    Raises:
        UserError: the method, a parameter or the weights are wrong, or the base is missing.

    Example:
        >>> config = ModelConfig(vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1)
        >>> flat = {spec.path: jnp.stack([jnp.zeros(spec.shape), jnp.ones(spec.shape)]) for spec in arch.tensor_table(config)}
        >>> merged = merge(tree.unflatten(flat), None, config, method="average", seed=0, weights=(1, 3))
        >>> merged["norm"]["weight"].tolist()
        [0.75, 0.75]
    """
    checked = methods.check(method, parameters)
    if methods.METHODS[method].needs_base(checked) and base is None:
        raise UserError(f"merge method {method} with {checked} needs the base; give it")
    flat, flat_base = tree.flatten(members), tree.flatten(base or {})
    prepared = methods.check_weights(method, weights, tree.size(members))
    run = functools.partial(_merge_leaf, method=method, parameters=tuple(checked.items()), dtype=jnp.dtype(dtype))
    merged = {}
    for spec in arch.tensor_table(config):
        names = spec.hf_names()
        layers = range(len(names)) if spec.stacked else (None,)
        words = np.stack([methods.key_words(method, checked, seed, name, layer) for name, layer in zip(names, layers, strict=True)])
        leaf = flat[spec.path]
        merged[spec.path] = run(leaf, flat_base.get(spec.path), prepared, words, stacked=spec.stacked, out=_sharding_of_one(leaf))
    return tree.unflatten(merged)


@functools.partial(jax.jit, static_argnames=("method", "parameters", "dtype", "stacked", "out"))
def _merge_leaf(
    members: jax.Array,
    base: jax.Array | None,
    weights: jax.Array | None,
    words: jax.Array,
    *,
    method: str,
    parameters: tuple[tuple[str, Any], ...],
    dtype: DTypeLike,
    stacked: bool,
    out: NamedSharding | None,
) -> jax.Array:
    members, base = methods.as_stored(members, dtype), None if base is None else methods.as_stored(base, dtype)

    def one(members: jax.Array, base: jax.Array | None, words: jax.Array) -> jax.Array:
        return methods.apply(members, base, weights, words, method=method, parameters=parameters, dtype=dtype)

    if stacked:
        merged = jax.vmap(one, in_axes=(1, 0, 0))(members, base, words)
    else:
        merged = one(members, base, words[0])
    return merged if out is None else jax.lax.with_sharding_constraint(merged, out)


def _sharding_of_one(leaf: jax.Array) -> NamedSharding | None:
    """Return the sharding of one member of a population's leaf; under an outer jit leave it to the compiler."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return NamedSharding(sharding.mesh, P(*sharding.spec[1:])) if isinstance(sharding, NamedSharding) else None


def diagnostics(
    members: Mapping[str, Any], base: Mapping[str, Any], merged: Mapping[str, Any], config: ModelConfig
) -> dict[str, Any]:
    """Describe a merge by its task vectors, per Hugging Face tensor and in total.

    Args:
        members: parameter dict with a leading axis `M`.
        base: parameter dict.
        merged: parameter dict; members and base are rounded to its dtype first.
        config: the model.

    Returns:
        `{"total": numbers, "tensors": {hf_name: numbers}}`, plain Python (see `geometry.summarize`).
    """
    flat, flat_base, flat_merged = tree.flatten(members), tree.flatten(base), tree.flatten(merged)
    found: dict[str, tuple[geometry.Moments, int]] = {}
    for spec in arch.tensor_table(config):
        moments = jax.device_get(_moments(flat[spec.path], flat_base[spec.path], flat_merged[spec.path]))
        for layer, name in enumerate(spec.hf_names()):
            one = geometry.Moments(*(x[:, layer] for x in moments)) if spec.stacked else moments
            found[name] = geometry.total(one), math.prod(spec.hf_shape)
    return geometry.report((name, *found[name]) for name, _, _ in arch.hf_tensors(config))


@jax.jit
def _moments(members: jax.Array, base: jax.Array, merged: jax.Array) -> geometry.Moments:
    return geometry.moments(methods.as_stored(members, merged.dtype), methods.as_stored(base, merged.dtype), merged)
