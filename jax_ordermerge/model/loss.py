"""Cross entropy of tokens and its sums by example, in float32."""

import jax
import jax.numpy as jnp

from jax_ordermerge import mesh as meshes


@jax.custom_vjp
def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return -log softmax(logits)[target], float32[B, T].

    Args:
        logits_BTV: any float dtype, computed in float32.
        targets_BT: int32 in [0, V).

    Example:
        >>> round(token_losses(jnp.zeros((1, 1, 4)), jnp.array([[2]])).item(), 4)  # log 4
        1.3863
    """
    return _forward(logits_BTV, targets_BT)[0]


# The gradient is written out, softmax less target, because the logits are the largest array of training: differentiated by the
# compiler, their exponentials are stored, and the array is read and written twice as often.


def _forward(logits_BTV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    logits = logits_BTV.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    if _is_sharded("vocab"):
        # no gather: XLA's partitioner dies of it where order, fsdp and tensor all divide the logits
        chosen = jnp.where(_is_target(logits, targets_BT), logits, 0).sum(-1)
    else:
        chosen = jnp.take_along_axis(logits, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return total - chosen, (logits_BTV, targets_BT, total)


def _backward(kept: tuple[jax.Array, jax.Array, jax.Array], slope_BT: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, total = kept
    softmax = jnp.exp(logits.astype(jnp.float32) - total[:, :, None])
    return ((softmax - _is_target(logits, targets)) * slope_BT[:, :, None]).astype(logits.dtype), None


token_losses.defvjp(_forward, _backward)


def _is_target(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BT.dtype, logits_BTV.shape, 2) == targets_BT[:, :, None]


def _is_sharded(axis: str) -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.shape[meshes.RULES[axis]] > 1


def example_losses(logits_BTV: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of token losses of each example and its sum of weights.

    The loss of a global batch is `sums.sum() / counts.sum()` over all its examples; that of one example is `sums[i] / counts[i]`.

    Args:
        logits_BTV: any float dtype.
        targets_BT: int32 in [0, V).
        weights_BT: float32, 1 where the target is learned and 0 elsewhere.

    Returns:
        `(sums, counts)`, float32[B] each.

    Example:
        >>> sums, counts = example_losses(jnp.zeros((1, 3, 4)), jnp.zeros((1, 3), int), jnp.array([[0.0, 1.0, 1.0]]))
        >>> round(sums.item(), 4), counts.tolist()
        (2.7726, [2.0])
    """
    return (token_losses(logits_BTV, targets_BT) * weights_BT).sum(-1), weights_BT.sum(-1)
