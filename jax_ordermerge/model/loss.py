"""Cross entropy from the last hidden states, in float32, a chunk of tokens at a time.

Axis letters as in `llama.py`, and `N` chunk, `C` position inside a chunk, `R` a row of `[B, C]`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jax_ordermerge import fusion
from jax_ordermerge import mesh as meshes
from jax_ordermerge.model.layers import Form, capped
from jax_ordermerge.tree import PyTree

# Rows of logits at a time on each device: enough that a product with the head is bound by
# arithmetic on an accelerator, few enough that logits stay small beside the model. 256 to 1024 took
# the same time on CPU.
_ROWS = 512


def linear_losses(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    segments_BT: jax.Array | None = None,
    count: int = 0,
    softcap: float | None = None,
    form: Form = "flat",
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sum of -log softmax(x head^T)[target], in total and per example.

    The loss of a global batch is `total / weights.sum()`, that of one example
    `sums[i] / weights[i].sum()`. Gradients flow through `total` alone. The forward pass computes
    them together with the losses, chunk by chunk: nothing is computed twice, and the logits
    [B, T, V] are never stored.

    Args:
        x_BTD: last hidden states, after the norm, in the dtype of the products.
        head_VD: float32 output table.
        targets_BT: int32 in [0, V).
        weights_BT: float32, 1 where the target is learned and 0 elsewhere.
        segments_BT: int32 segments of packed rows. Each segment then is an example.
        count: largest number of segments per row, with `segments_BT`.
        softcap: bound of the logits, see `layers.capped`; None is none.
        form: of the program, from `layers.choose_form`. `by_head` gathers the head once and
            reduces its gradient once, in the dtype of the products as that of other weights.

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
    total, sums = _sums(count, softcap, form, x_BTD, head_VD, (targets_BT, weights_BT, segments_BT))
    # `_sums_backward` ignores the cotangent of the sums; without this a gradient would be wrong
    # instead of zero
    return total, jax.lax.stop_gradient(sums)


def linear_scores(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return summed losses per row and the number of weighted targets that greedy decoding misses.

    Both are float32[B]. A target that ties with another token is not missed. No gradients.

    Args:
        x_BTD, head_VD, targets_BT, weights_BT, softcap: see `linear_losses`.

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
        carry: tuple[jax.Array, jax.Array], chunk: tuple[PyTree, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x_BCD, targets_BC, weights_BC = chunk
        logits_BCV, _, losses_BC = _chunk_losses(softcap, head, x_BCD, targets_BC, weights_BC)
        # strictly greater: a tie with the target is no miss
        missed_BC = (logits_BCV.max(-1) > _target_logits(logits_BCV, targets_BC)) * weights_BC
        return (carry[0] + losses_BC.sum(-1), carry[1] + missed_BC.sum(-1)), None

    zeros_B = jnp.zeros(x_BTD.shape[:1], jnp.float32)
    sums, _ = jax.lax.scan(body, (zeros_B, zeros_B), _chunks(x_BTD, targets_BT, weights_BT))
    return sums


def by_example(values_BT: jax.Array, segments_BT: jax.Array | None, count: int) -> jax.Array:
    """Return sums over the positions of each row, [B], or of each segment, [B, count].

    Example:
        >>> by_example(jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[1, 1, 2]]), 3).tolist()
        [[3.0, 4.0, 0.0]]
    """
    if segments_BT is None:
        return values_BT.sum(-1)
    member_BTS = segments_BT[:, :, None] == jnp.arange(1, count + 1)[None, None]
    return jnp.where(member_BTS, values_BT[:, :, None], 0).sum(1)


_Labels = tuple[jax.Array, jax.Array, jax.Array | None]  # targets, weights and segments, [B, T]


def _zero_sums(count: int, x_BTD: jax.Array, labels: _Labels) -> jax.Array:
    return jnp.zeros(x_BTD.shape[:1] if labels[2] is None else (x_BTD.shape[0], count), jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(
    count: int,
    softcap: float | None,
    form: Form,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    labels: _Labels,
) -> tuple[jax.Array, jax.Array]:
    head = head_VD.astype(x_BTD.dtype)
    if form == "by_head":
        # before the loop, which would gather it for every chunk
        head = meshes.constrain(head, "vocab", None)

    def body(sums: jax.Array, chunk: tuple[PyTree, ...]) -> tuple[jax.Array, None]:
        _, _, losses_BC = _chunk_losses(softcap, head, *chunk[:3])
        return sums + by_example(losses_BC, chunk[3], count), None

    sums, _ = jax.lax.scan(body, _zero_sums(count, x_BTD, labels), _chunks(x_BTD, *labels))
    return sums.sum(), sums


# The functions below are the custom gradient of `_sums`. Why not let jax differentiate the
# scan? It would store the logits of every chunk, or compute them twice.


def _sums_forward(
    count: int,
    softcap: float | None,
    form: Form,
    x_BTD: jax.Array,
    head_VD: jax.Array,
    labels: _Labels,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    rows, columns = meshes.extent("batch"), meshes.extent("embed")
    if form == "flat" or rows == 1 or x_BTD.shape[0] % rows or x_BTD.shape[2] % columns:
        return _sums_and_gradients(count, softcap, x_BTD, head_VD, labels)

    # Each device has its own rows and all of the head: a loop over chunks of rows that several
    # devices share would gather the head, and reduce its gradient in float32, for every chunk.
    def local(
        x_BTD: jax.Array, head_VD: jax.Array, labels: _Labels
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        head_VD = jax.lax.all_gather(head_VD.astype(x_BTD.dtype), "fsdp", axis=1, tiled=True)
        (_, sums), grads = _sums_and_gradients(count, softcap, x_BTD, head_VD, labels)
        grad_BTD, grad_VD = grads
        grad_VD = grad_VD.astype(x_BTD.dtype)
        grad_VD = jax.lax.psum_scatter(grad_VD, "fsdp", scatter_dimension=1, tiled=True)
        grad_VD = jax.lax.psum(grad_VD, "data").astype(jnp.float32)
        return sums, (grad_BTD, grad_VD)

    row, column = P(meshes.RULES["batch"]), P(None, meshes.RULES["embed"])
    divided = meshes.divide_batch(local, (row, column, row), (row, (row, column)))
    sums, grads = divided(x_BTD, head_VD, labels)
    return (sums.sum(), sums), grads


def _sums_and_gradients(
    count: int, softcap: float | None, x_BTD: jax.Array, head_VD: jax.Array, labels: _Labels
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    (_, T, D), V = x_BTD.shape, head_VD.shape[0]
    head = head_VD.astype(x_BTD.dtype)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[PyTree, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        sums, grad_VD = carry
        x_BCD, targets_BC, weights_BC, segments_BC = chunk
        inputs = head, x_BCD, targets_BC, weights_BC
        logits_BCV, total_BC, losses_BC = _chunk_losses(softcap, *inputs)
        # d loss / d logits = weight (softmax - one_hot(target)), in the dtype of the products
        softmax = jnp.exp(logits_BCV - total_BC[:, :, None])
        grad_BCV = (softmax - _is_target(logits_BCV, targets_BC)) * weights_BC[:, :, None]
        if softcap is not None:
            grad_BCV = grad_BCV * (1 - jnp.square(logits_BCV / softcap))  # tanh' = 1 - tanh^2
        grad_RV = grad_BCV.astype(head.dtype).reshape(-1, V)
        grad_RD = jnp.einsum("RV,VD->RD", grad_RV, head, preferred_element_type=head.dtype)
        x_RD = x_BCD.reshape(-1, D)
        # the gradient of the head is summed over chunks in float32, whatever the dtype of products
        chunk_VD = jnp.einsum("RV,RD->VD", grad_RV, x_RD, preferred_element_type=jnp.float32)
        grad_VD = meshes.constrain(grad_VD + chunk_VD, "vocab", "embed")
        grad_BCD = meshes.constrain(grad_RD.reshape(x_BCD.shape), "batch", "length", None)
        return (sums + by_example(losses_BC, segments_BC, count), grad_VD), grad_BCD

    grad_VD = meshes.constrain(jnp.zeros((V, D), jnp.float32), "vocab", "embed")
    start = _zero_sums(count, x_BTD, labels), grad_VD
    (sums, grad_VD), grad_NBCD = jax.lax.scan(body, start, _chunks(x_BTD, *labels))
    return (sums.sum(), sums), (_join(grad_NBCD, T), grad_VD)


def _sums_backward(
    count: int,
    softcap: float | None,
    form: Form,
    grads: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
    grad_BTD, grad_VD = grads
    # The loss is divided by a number of tokens outside, so the cotangent is one scalar and the
    # gradients that the forward pass computed are multiplied by it.
    scale, _ = cotangents
    return grad_BTD * scale.astype(grad_BTD.dtype), grad_VD * scale, None


_sums.defvjp(_sums_forward, _sums_backward)


def _chunks(x_BTD: jax.Array, *labels: jax.Array | None) -> tuple[PyTree, ...]:
    """Cut arrays [B, T, ...] into [N, B, C, ...] with about `_ROWS` rows per device and chunk.

    The last chunk is padded with rows of weight 0. Where devices divide the positions, each chunk
    takes its share from every device, so that no position moves.
    """
    B, T, _ = x_BTD.shape
    parts = _length_parts(T)
    # rows of other members that are fused with this one are in memory too
    size = min(T // parts, max(1, _ROWS * meshes.extent("batch") // (B * fusion.fused_members())))
    chunks = -(-T // parts // size)
    # the same size for all chunks: a scan has one shape, and equal chunks pad least
    size = -(-T // parts // chunks)

    def cut(array: jax.Array) -> jax.Array:
        rest = array.shape[2:]
        divided = array.reshape(B, parts, T // parts, *rest)
        missing = chunks * size - T // parts
        padded = jnp.pad(divided, [(0, 0), (0, 0), (0, missing), *[(0, 0)] * len(rest)])
        first = jnp.moveaxis(padded.reshape(B, parts, chunks, size, *rest), 2, 0)
        chunked = first.reshape(chunks, B, parts * size, *rest)
        return meshes.constrain(chunked, None, "batch", "length", *[None] * len(rest))

    return tuple(None if array is None else cut(array) for array in (x_BTD, *labels))


def _join(array_NBCD: jax.Array, T: int) -> jax.Array:
    """Return [B, T, D]: the inverse of `_chunks`."""
    N, B, C, D = array_NBCD.shape
    parts = _length_parts(T)
    last = jnp.moveaxis(array_NBCD.reshape(N, B, parts, C // parts, D), 0, 2)
    return last.reshape(B, parts, -1, D)[:, :, : T // parts].reshape(B, T, D)


def _length_parts(T: int) -> int:
    """Return how many device groups divide the positions; 1 where they cannot."""
    return meshes.extent("length") if T % meshes.extent("length") == 0 else 1


def _chunk_losses(
    softcap: float | None,
    head_VD: jax.Array,
    x_BCD: jax.Array,
    targets_BC: jax.Array,
    weights_BC: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return logits float32[B, C, V], their logsumexp [B, C] and weighted losses [B, C]."""
    B, C, D = x_BCD.shape
    x_RD = x_BCD.reshape(-1, D)
    logits_RV = jnp.einsum("RD,VD->RV", x_RD, head_VD, preferred_element_type=jnp.float32)
    logits_RV = capped(logits_RV, softcap)
    logits_BCV = meshes.constrain(logits_RV.reshape(B, C, -1), "batch", "length", "vocab")
    total_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
    return logits_BCV, total_BC, (total_BC - _target_logits(logits_BCV, targets_BC)) * weights_BC


def _target_logits(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    if meshes.extent("vocab") > 1:
        # XLA's partitioner crashes on a gather where order, fsdp and tensor all divide the logits
        return jnp.where(_is_target(logits_BCV, targets_BC), logits_BCV, 0).sum(-1)
    return jnp.take_along_axis(logits_BCV, targets_BC[:, :, None], axis=-1)[:, :, 0]


def _is_target(logits_BCV: jax.Array, targets_BC: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets_BC.dtype, logits_BCV.shape, 2) == targets_BC[:, :, None]
