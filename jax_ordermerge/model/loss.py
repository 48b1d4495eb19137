"""Cross entropy of a batch from the last hidden states, in float32. The logits of all tokens never exist at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jax_ordermerge import mesh as meshes

# Rows of logits at a time on each device: enough that a product with the head is bound by arithmetic on an accelerator, few enough
# that they stay small beside the model. 256 to 1024 took the same time on CPU.
_ROWS = 512


def linear_losses(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    count: int = 0,
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
        segments_BT, count: int32 segments of packed rows and how many a row has at most; each segment then is an example.

    Returns:
        `(total, sums)`, float32 scalar and float32[B], or [B, count] of packed rows.

    Example:
        >>> total, sums = linear_losses(
        ...     jnp.ones((1, 3, 2)),
        ...     jnp.zeros((4, 2)),
        ...     jnp.zeros((1, 3), int),
        ...     jnp.array([[0.0, 1.0, 1.0]]),
        ... )
        >>> round(total.item(), 4), sums.shape  # 2 log 4
        (2.7726, (1,))
    """
    total, sums = _sums(count, x_BTD, head_VD, (targets_BT, weights_BT, segments_BT))
    return total, jax.lax.stop_gradient(sums)


def linear_scores(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of `linear_losses` by row, and how many weighted targets are not the likeliest token, float32[B] each.

    A target that ties with another token counts as the likeliest. There are no gradients.

    Args:
        x_BTD, head_VD, targets_BT, weights_BT: see `linear_losses`.

    Example:
        >>> head = jnp.array([[1.0, 0.0], [0.0, 1.0]])
        >>> x = jnp.array([[[2.0, 1.0], [2.0, 1.0], [0.0, 3.0]]])
        >>> sums, missed = linear_scores(
        ...     x, head, jnp.array([[0, 1, 1]]), jnp.array([[1.0, 1.0, 0.0]])
        ... )
        >>> round(sums.item(), 4), missed.item()  # log(1 + 1/e) + log(1 + e)
        (1.6265, 1.0)
    """
    head = head_VD.astype(x_BTD.dtype)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x_BCD, targets_BC, weights_BC = chunk
        logits_BCV, _, losses_BC = _chunk_losses(head, x_BCD, targets_BC, weights_BC)
        missed_BC = (logits_BCV.max(-1) > _chosen(logits_BCV, targets_BC)) * weights_BC
        return (carry[0] + losses_BC.sum(-1), carry[1] + missed_BC.sum(-1)), None

    zeros_B = jnp.zeros(x_BTD.shape[:1], jnp.float32)
    found, _ = jax.lax.scan(body, (zeros_B, zeros_B), _chunks(x_BTD, targets_BT, weights_BT))
    return found


def by_example(values_BT: jax.Array, segments_BT: jax.Array | None, count: int) -> jax.Array:
    """Return sums over the positions of each row, [B], or of each segment of packed rows, [B, count].

    Example:
        >>> by_example(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 1, 2]]), 3).tolist()
        [[3.0, 4.0, 0.0]]
    """
    if segments_BT is None:
        return values_BT.sum(-1)
    own_BTS = segments_BT[:, :, None] == jnp.arange(1, count + 1)[None, None]
    return jnp.where(own_BTS, values_BT[:, :, None], 0).sum(1)


_Given = tuple[jax.Array, jax.Array, jax.Array | None]  # targets, weights and segments


def _start(count: int, x_BTD: jax.Array, given: _Given) -> jax.Array:
    return jnp.zeros(x_BTD.shape[:1] if given[2] is None else (x_BTD.shape[0], count), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(
    count: int, x_BTD: jax.Array, head_VD: jax.Array, given: _Given
) -> tuple[jax.Array, jax.Array]:
    head = head_VD.astype(x_BTD.dtype)

    def body(sums: jax.Array, chunk: tuple[Any, ...]) -> tuple[jax.Array, None]:
        _, _, losses_BC = _chunk_losses(head, *chunk[:3])
        return sums + by_example(losses_BC, chunk[3], count), None

    sums, _ = jax.lax.scan(body, _start(count, x_BTD, given), _chunks(x_BTD, *given))
    return sums.sum(), sums


def _with_gradients(
    count: int, x_BTD: jax.Array, head_VD: jax.Array, given: _Given
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (_, T, D), V = x_BTD.shape, head_VD.shape[0]
    head = head_VD.astype(x_BTD.dtype)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[Any, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums, slope_VD = carry
        x_BCD, targets_BC, weights_BC, segments_BC = chunk
        logits_BCV, total_BC, losses_BC = _chunk_losses(head, x_BCD, targets_BC, weights_BC)
        softmax = jnp.exp(logits_BCV - total_BC[:, :, None])
        slope_BCV = (
            (softmax - _is_target(logits_BCV, targets_BC)) * weights_BC[:, :, None]
        ).astype(head.dtype)
        slope_RV = slope_BCV.reshape(-1, V)
        slope_BCD = jnp.einsum(
            "RV,VD->RD", slope_RV, head, preferred_element_type=head.dtype
        ).reshape(x_BCD.shape)
        own_VD = jnp.einsum(
            "RV,RD->VD", slope_RV, x_BCD.reshape(-1, D), preferred_element_type=jnp.float32
        )
        slope_VD = meshes.constrain(slope_VD + own_VD, "vocab", "embed")
        return (sums + by_example(losses_BC, segments_BC, count), slope_VD), meshes.constrain(
            slope_BCD, "batch", "length", None
        )

    start = (
        _start(count, x_BTD, given),
        meshes.constrain(jnp.zeros((V, D), jnp.float32), "vocab", "embed"),
    )
    (sums, slope_VD), slope_NBCD = jax.lax.scan(body, start, _chunks(x_BTD, *given))
    return (sums.sum(), sums), (_joined(slope_NBCD, T), slope_VD)


def _scaled(
    count: int, slopes: tuple[jax.Array, jax.Array], cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    slope_BTD, slope_VD = slopes
    scale, _ = cotangents
    return slope_BTD * scale.astype(slope_BTD.dtype), slope_VD * scale, None


_sums.defvjp(_with_gradients, _scaled)


def _chunks(x_BTD: jax.Array, *others: jax.Array | None) -> tuple[Any, ...]:
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
        padded = jnp.pad(
            divided, [(0, 0), (0, 0), (0, chunks * size - T // parts), *[(0, 0)] * len(rest)]
        )
        own = jnp.moveaxis(padded.reshape(B, parts, chunks, size, *rest), 2, 0)
        return meshes.constrain(
            own.reshape(chunks, B, parts * size, *rest),
            None,
            "batch",
            "length",
            *[None] * len(rest),
        )

    return tuple(None if array is None else cut(array) for array in (x_BTD, *others))


def _joined(array_NBCD: jax.Array, T: int) -> jax.Array:
    """Return [B, T, D]: the inverse of the cutting."""
    N, B, C, D = array_NBCD.shape
    parts = _parts(T)
    own = jnp.moveaxis(array_NBCD.reshape(N, B, parts, C // parts, D), 0, 2)
    return own.reshape(B, parts, -1, D)[:, :, : T // parts].reshape(B, T, D)


def _parts(T: int) -> int:
    return meshes.extent("length") if T % meshes.extent("length") == 0 else 1


def _chunk_losses(
    head_VD: jax.Array, x_BCD: jax.Array, targets_BC: jax.Array, weights_BC: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits float32[B, C, V], log of the sum of their exponentials [B, C] and weighted losses [B, C]."""
    B, C, D = x_BCD.shape
    flat = jnp.einsum(
        "RD,VD->RV", x_BCD.reshape(-1, D), head_VD, preferred_element_type=jnp.float32
    )
    logits_BCV = meshes.constrain(flat.reshape(B, C, -1), "batch", "length", "vocab")
    total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    return logits_BCV, total_BC, (total_BC - _chosen(logits_BCV, targets_BC)) * weights_BC


def _chosen(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    if meshes.extent("vocab") > 1:
        # no gather: XLA's partitioner dies of it where order, fsdp and tensor all divide the logits
        return jnp.where(_is_target(logits_BCV, targets_BC), logits_BCV, 0).sum(-1)
    return jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2) == targets_BC[:, :, None]
