"""Task vectors of another length, of merges and of single members."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.merge.methods import parts, reductions


@functools.partial(jax.jit, static_argnames=("stacked", "dtype"))
def rescale(
    merged: jax.Array, base: jax.Array, scales: jax.Array, *, stacked: bool, dtype: DTypeLike
) -> jax.Array:
    """Return theta_0 + lambda (theta - theta_0) in `dtype`.

    These are the bits of method task_arithmetic with theta as its only member.
    """
    merged, base = merged.astype(jnp.float32), parts.round_to(base, dtype).astype(jnp.float32)
    # `rounded` keeps XLA from contracting products with the additions, as in the method
    lambdas = scales.reshape(-1, *(1,) * (merged.ndim - 1)) if stacked else scales[0]
    task_vector = reductions.rounded(merged - base)
    return parts.round_to(base + reductions.rounded(lambdas * task_vector), dtype)


def rescale_member(
    members: tree.Tree,
    base: tree.Tree,
    config: ModelConfig,
    number: int,
    *,
    scales: Mapping[str, float],
    dtype: DTypeLike = jnp.bfloat16,
) -> tree.Tree:
    """Return theta_0 + lambda (theta_i - theta_0) of one member: a longer or shorter task vector.

    The bits are those of method task_arithmetic with the member as its only model.

    Args:
        members: parameter dict with a leading axis `M`, on any mesh.
        base: parameter dict.
        config: the model.
        number: i. It is traced: other members compile nothing again.
        scales: lambda of every Hugging Face tensor.
        dtype: of the result; members and base are rounded to it first.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=1, num_heads=1
        ... )
        >>> shapes = {spec.path: spec.shape for spec in arch.tensor_table(config)}
        >>> base = {path: jnp.ones(shape) for path, shape in shapes.items()}
        >>> members = {path: jnp.full((2, *shape), 3.0) for path, shape in shapes.items()}
        >>> longer = rescale_member(
        ...     tree.unflatten(members),
        ...     tree.unflatten(base),
        ...     config,
        ...     1,
        ...     scales={name: 1.5 for name, _, _ in arch.hf_tensors(config)},
        ... )
        >>> longer["norm"]["weight"].tolist()
        [4.0, 4.0]
    """
    flat, flat_base = tree.flatten(members), tree.flatten(base)
    rescaled: dict[str, jax.Array] = {}
    for spec in arch.tensor_table(config):
        member = parts.round_to(take_member(flat[spec.path], number), dtype)
        lambdas = np.asarray([scales[name] for name in spec.hf_names()], np.float32)
        rescaled[spec.path] = rescale(
            member, flat_base[spec.path], lambdas, stacked=spec.stacked, dtype=jnp.dtype(dtype)
        )
    return tree.unflatten(rescaled)


@jax.jit
def take_member(members: tree.Tree, number: int) -> tree.Tree:
    """Return one member of a population or of one of its leaves, on the same devices."""
    # The number is traced, so one program serves all members.
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), members
    )
