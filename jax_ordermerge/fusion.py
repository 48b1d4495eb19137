"""One program for several members: `lora.fused`."""

from collections.abc import Callable, Sequence
from typing import Any, Final

import jax

# Name of the axis that `fuse_members` maps over.
_MEMBERS: Final = "fused members"


def fuse_members(fn: Callable[..., Any], mapped: Sequence[bool]) -> Callable[..., Any]:
    """Map `fn` of one member over a leading member axis, as one program of all members.

    A product of something mapped and something shared is one product over the rows of all members,
    and a product of two mapped things is one per member: the batching rules of `jax.vmap`.

    Args:
        fn: a function of one member.
        mapped: for each argument whether it has the member axis; the others are shared.

    Example:
        >>> import jax.numpy as jnp
        >>> double = fuse_members(lambda x, w: w * x * fused_members(), (True, False))
        >>> double(jnp.arange(2), 3).tolist(), fused_members()
        ([0, 6], 1)
    """
    # The empty tuple of mesh axes puts the member axis on every device. Without it every sharding
    # constraint in `fn` would leave that axis to the compiler.
    axes = tuple(0 if is_mapped else None for is_mapped in mapped)
    return jax.vmap(fn, in_axes=axes, axis_name=_MEMBERS, spmd_axis_name=())


def fused_members() -> int:
    """Return how many members the program at hand computes; 1 outside of `fuse_members`.

    Example:
        >>> fused_members()
        1
    """
    try:
        return int(jax.lax.axis_size(_MEMBERS))
    except NameError:  # how jax says that no axis of this name is mapped
        return 1


def merge_rows(kernel: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return a kernel that under `fuse_members` is called once, with the rows of all members.

    It is for kernels whose own rule for `jax.vmap` is missing or wrong. The backward pass computes
    the kernel again.

    Args:
        kernel: `(*arrays, labels) -> rows`, all with a leading axis of rows that it treats alike;
            it is differentiable by all but the labels.

    Example:
        >>> import jax.numpy as jnp
        >>> shapes = []
        >>> square = merge_rows(lambda x, labels: shapes.append(x.shape) or x * x * labels)
        >>> gradient = jax.grad(lambda x, labels: square(x, labels).sum())
        >>> fuse_members(gradient, (True, True))(jnp.ones((2, 3)), jnp.arange(6).reshape(2, 3))
        Array([[ 0.,  2.,  4.],
               [ 6.,  8., 10.]], dtype=float32)
        >>> shapes[-1]
        (6,)
    """

    def gradients(*operands: jax.Array) -> tuple[jax.Array, ...]:
        *arrays, labels, cotangent = operands
        _, transposed = jax.vjp(lambda *arrays: kernel(*arrays, labels), *arrays)
        return transposed(cotangent)

    forward, backward = _over_all_rows(kernel), _over_all_rows(gradients)
    merged = jax.custom_vjp(forward)
    merged.defvjp(
        lambda *operands: (forward(*operands), operands),
        lambda operands, cotangent: (*backward(*operands, cotangent), None),
    )
    return merged


def _over_all_rows(fn: Callable[..., Any]) -> Callable[..., Any]:
    mapped = jax.custom_batching.custom_vmap(fn)

    @mapped.def_vmap
    def rule(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[Any, Any]:
        members = (
            x if is_batched else jax.numpy.broadcast_to(x, (size, *x.shape))
            for x, is_batched in zip(operands, batched, strict=True)
        )
        results = fn(*(x.reshape(-1, *x.shape[2:]) for x in members))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return mapped
