"""Cross entropy of a batch from the last hidden states, in float32. The logits of all tokens never exist at once."""

import jax
import jax.numpy as jnp

from jax_ordermerge import mesh as meshes

# Rows of logits at a time on each device: enough that a product with the head is bound by arithmetic on an accelerator, few enough
# that they stay small beside the model. 256 to 1024 took the same time on CPU.
_ROWS = 512


def linear_losses(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of -log softmax(x head^T)[target], in all and by example.

    The loss of a global batch is `total / weights.sum()`; that of one example is `sums[i] / weights[i].sum()`. Gradients flow through
    `total` alone. They are made together with the losses, some hundred rows of logits at a time, so nothing is computed twice and
    the largest array of plain cross entropy, [B, T, V], is never stored.

    Args:
        x_BTD: last hidden states, after the norm, in the dtype of the products.
        head_VD: float32 head.
        targets_BT: int32 in [0, V).
        weights_BT: float32, 1 where the target is learned and 0 elsewhere.

    Returns:
        `(total, sums)`, float32 scalar and float32[B].

    Example:
        >>> total, sums = linear_losses(
        ...     jnp.ones((1, 3, 2)), jnp.zeros((4, 2)), jnp.zeros((1, 3), int), jnp.array([[0.0, 1.0, 1.0]])
        ... )
        >>> round(total.item(), 4), sums.shape  # 2 log 4
        (2.7726, (1,))
    """
    sums_B = _sums(x_BTD, head_VD, targets_BT, weights_BT)
    return sums_B[0], jax.lax.stop_gradient(sums_B[1])


@jax.custom_vjp
def _sums(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    head = head_VD.astype(x_BTD.dtype)

    def body(sums_B: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        _, _, losses_BC = _chunk_losses(head, chunk)
        return sums_B + losses_BC.sum(-1), None

    sums_B, _ = jax.lax.scan(body, jnp.zeros(x_BTD.shape[0], jnp.float32), _chunks(x_BTD, targets_BT, weights_BT))
    return sums_B.sum(), sums_B


def _with_gradients(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (B, T, D), V = x_BTD.shape, head_VD.shape[0]
    head = head_VD.astype(x_BTD.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums_B, slope_VD = carry
        x_BCD, targets_BC, weights_BC = chunk
        logits_BCV, total_BC, losses_BC = _chunk_losses(head, chunk)
        softmax = jnp.exp(logits_BCV - total_BC[:, :, None])
        slope_BCV = ((softmax - _is_target(logits_BCV, targets_BC)) * weights_BC[:, :, None]).astype(head.dtype)
        slope_RV = slope_BCV.reshape(-1, V)
        slope_BCD = jnp.einsum("RV,VD->RD", slope_RV, head, preferred_element_type=head.dtype).reshape(x_BCD.shape)
        own_VD = jnp.einsum("RV,RD->VD", slope_RV, x_BCD.reshape(-1, D), preferred_element_type=jnp.float32)
        slope_VD = meshes.constrain(slope_VD + own_VD, "vocab", "embed")
        return (sums_B + losses_BC.sum(-1), slope_VD), meshes.constrain(slope_BCD, "batch", "length", None)

    start = jnp.zeros(B, jnp.float32), meshes.constrain(jnp.zeros((V, D), jnp.float32), "vocab", "embed")
    (sums_B, slope_VD), slope_NBCD = jax.lax.scan(body, start, _chunks(x_BTD, targets_BT, weights_BT))
    return (sums_B.sum(), sums_B), (_joined(slope_NBCD, T), slope_VD)


def _scaled(
    slopes: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None, None]:
    slope_BTD, slope_VD = slopes
    scale, _ = cotangents
    return slope_BTD * scale.astype(slope_BTD.dtype), slope_VD * scale, None, None


_sums.defvjp(_with_gradients, _scaled)


def _chunks(x_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cut into [N, B, C, ...] with about `_ROWS` rows on every device; the last chunk is filled up with rows of weight 0.

    Where devices divide the positions, each chunk takes its share from every device.
    """
    B, T, _ = x_BTD.shape
    parts = _parts(T)
    size = min(T // parts, max(1, _ROWS * meshes.extent("batch") // B))
    chunks = -(-T // parts // size)
    size = -(-T // parts // chunks)

    def cut(array: jax.Array) -> jax.Array:
        rest = array.shape[2:]
        divided = array.reshape(B, parts, T // parts, *rest)
        padded = jnp.pad(divided, [(0, 0), (0, 0), (0, chunks * size - T // parts), *[(0, 0)] * len(rest)])
        own = jnp.moveaxis(padded.reshape(B, parts, chunks, size, *rest), 2, 0)
        return meshes.constrain(own.reshape(chunks, B, parts * size, *rest), None, "batch", "length", *[None] * len(rest))

    return cut(x_BTD), cut(targets_BT), cut(weights_BT)


def _joined(array_NBCD: jax.Array, T: int) -> jax.Array:
    """Return [B, T, D]: the inverse of the cutting."""
    N, B, C, D = array_NBCD.shape
    parts = _parts(T)
    own = jnp.moveaxis(array_NBCD.reshape(N, B, parts, C // parts, D), 0, 2)
    return own.reshape(B, parts, -1, D)[:, :, : T // parts].reshape(B, T, D)


def _parts(T: int) -> int:
    return meshes.extent("length") if T % meshes.extent("length") == 0 else 1


def _chunk_losses(head_VD: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits float32[B, C, V], log of the sum of their exponentials [B, C] and weighted losses [B, C]."""
    x_BCD, targets_BC, weights_BC = chunk
    B, C, D = x_BCD.shape
    flat = jnp.einsum("RD,VD->RV", x_BCD.reshape(-1, D), head_VD, preferred_element_type=jnp.float32)
    logits_BCV = meshes.constrain(flat.reshape(B, C, -1), "batch", "length", "vocab")
    total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    if meshes.extent("vocab") > 1:
        # no gather: XLA's partitioner dies of it where order, fsdp and tensor all divide the logits
        chosen_BC = jnp.where(_is_target(logits_BCV, targets_BC), logits_BCV, 0).sum(-1)
    else:
        chosen_BC = jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]
    return logits_BCV, total_BC, (total_BC - chosen_BC) * weights_BC


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2) == targets_BC[:, :, None]
