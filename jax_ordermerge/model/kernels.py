"""Attention kernels of accelerators, and which one is right where.

`xla` (in `attention.py`) is right everywhere. The kernels here need queries and keys of the same tokens (no cache), tokens of a segment
side by side in the order of their positions.

- `splash`, TPU: causal by index inside a segment, which then is causal by position; packed documents do not see each other.
- `cudnn`, NVIDIA: what jax offers in public takes one length a row and no segments, so only rows of one right-padded document.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError

Kernel = Literal["xla", "splash", "splash_interpreted", "cudnn"]
MIXED = "mixed"  # what attention gives, for policies of rematerialization: kept, or its scores would be computed a third time
_LANES = 128  # splash takes sequences in multiples of the lanes of a TPU's vector unit


def choose(
    asked: str, config: ModelConfig, mesh: Mesh, *, dtype: str, packed: bool = False
) -> Kernel:
    """Return the kernel for the devices of a mesh, which need not be the devices of this process.

    Args:
        asked: `auto`, or the kernel it must be.
        config: the model.
        mesh: whose devices compute.
        dtype: of the products.
        packed: rows may hold several documents.

    Raises:
        UserError: the kernel asked for would be wrong or is not there; the line says why.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> choose("auto", config, meshes.make_mesh(), dtype="float32")
        'xla'
        >>> choose("splash", config, meshes.make_mesh(), dtype="float32")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: model.attention = splash runs on TPU, the devices are cpu; give auto or xla
    """
    platform = mesh.devices.flat[0].platform
    obstacles: dict[Kernel, str] = {}
    if platform != "tpu":
        obstacles["splash"] = f"runs on TPU, the devices are {platform}"
    if platform not in ("gpu", "cuda"):
        obstacles["cudnn"] = f"runs on NVIDIA GPU, the devices are {platform}"
    elif packed:
        obstacles["cudnn"] = "does not keep packed documents apart (data.packing)"
    elif dtype != "bfloat16":
        obstacles["cudnn"] = f"computes in bfloat16, model.compute_dtype is {dtype}"
    elif config.head_dim % 8 or config.head_dim > 128:
        obstacles["cudnn"] = (
            f"takes heads of a multiple of 8 up to 128, this model has {config.head_dim}"
        )
    elif mesh.shape.get("sequence", 1) > 1:
        obstacles["cudnn"] = "takes whole sequences, mesh.sequence divides them"
    if asked == "auto":
        return (
            "splash"
            if "splash" not in obstacles
            else "cudnn"
            if "cudnn" not in obstacles
            else "xla"
        )
    kernel: Kernel = {"splash": "splash", "cudnn": "cudnn"}.get(asked, "xla")  # type: ignore[assignment]
    if kernel in obstacles:
        raise UserError(f"model.attention = {asked} {obstacles[kernel]}; give auto or xla")
    return kernel


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """Return attention by the Pallas kernel of jax for TPU, which leaves out blocks that the causal mask or the window hides.

    A Mosaic kernel needs every mesh axis manual: examples, queries and heads are divided by hand, as `mesh.py` says.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values; any T and H.
        segments_BT: int32 document numbers, 0 on padding.
        window: how many keys back a query sees, itself included; None is all.
        interpret: run it without a TPU, slowly.

    Returns:
        [B, T, N, H] in the dtype of the queries.

    Example:
        >>> v = jnp.array([2.0, 4.0, 9.0]).reshape(1, 3, 1, 1)
        >>> out = splash(0 * v, v, v, jnp.array([[1, 1, 2]]), window=None, interpret=True)
        >>> out.ravel().tolist()
        [2.0, 3.0, 9.0]
    """
    T, N, H = q_BTNH.shape[1:]
    mesh = jax.sharding.get_abstract_mesh()
    size = -(-T // (_LANES * meshes.extent("length"))) * _LANES * meshes.extent("length")
    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(
        q_BTNH.dtype
    )  # the kernel does not scale
    k_BTKH, v_BTKH = (_repeated(x, N) for x in (k_BTKH, v_BTKH))
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, size - T), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    segments = jnp.pad(segments_BT, [(0, 0), (0, size - T)])  # padding sees padding
    at_q = (
        meshes.partition(("batch", "heads", "length", None), q.shape, mesh)
        if not mesh.empty
        else P(*[None] * 4)
    )
    at_k = P(at_q[0], at_q[1], None, None)
    kernel = _splash_kernel(
        N,
        size,
        window,
        meshes.extent("length"),
        meshes.extent("heads") if at_q[1] else 1,
        interpret,
    )

    def local(kernel, q_BNTH, k_BKSH, v_BKSH, segments_BT, segments_BS):  # type: ignore[no-untyped-def]
        return jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=_segment_ids(*ids)))(
            q_BNTH, k_BKSH, v_BKSH, segments_BT, segments_BS
        )

    if not mesh.empty:
        flat = AbstractMesh(
            mesh.axis_sizes, mesh.axis_names
        )  # only to compute sizes: of manual axes it cannot
        at_kernel = kernel.manual_sharding_spec(NamedSharding(flat, P(at_q[1], at_q[2])))
        at_segments = P(at_q[0], at_q[2]), P(at_q[0], None)
        local = meshes.by_hand(local, (at_kernel, at_q, at_k, at_k, *at_segments), at_q)
    return local(kernel, q, k, v, segments, segments).transpose(0, 2, 1, 3)[:, :T]


def _repeated(x_BTKH: jax.Array, heads: int) -> jax.Array:
    """Return kv heads repeated until the mesh divides them where it divides the query heads."""
    parts, K = meshes.extent("heads"), x_BTKH.shape[2]
    return x_BTKH if heads % parts else jnp.repeat(x_BTKH, math.lcm(K, parts) // K, axis=2)


def _splash_kernel(
    heads: int, size: int, window: int | None, parts: int, head_parts: int, interpret: bool
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    mask = (
        kernels.CausalMask((size, size))
        if window is None
        else kernels.LocalMask((size, size), (window - 1, 0), 0)
    )
    q, kv = (
        next(block for block in (512, 256, _LANES) if extent % block == 0)
        for extent in (size // parts, size)
    )
    blocks = kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=kv,
        block_q_dq=q,
        block_kv_dq=kv,
    )
    return kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=head_parts,
        q_seq_shards=parts,
        residual_checkpoint_name=MIXED,
        interpret=interpret,
    )


def _segment_ids(queries_T: jax.Array, keys_S: jax.Array):  # type: ignore[no-untyped-def]
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    return kernels.SegmentIds(queries_T, keys_S)


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    """Return attention by the fused kernels of cuDNN, for rows of one right-padded document each.

    Any other row becomes NaN: better a training that stops than documents that see each other.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values, bfloat16.
        segments_BT: int32, 1 on tokens and 0 on padding.
        window: how many keys back a query sees, itself included; None is all.

    Returns:
        [B, T, N, H]; 0 on padding.
    """
    T, N = q_BTNH.shape[1:3]
    k_BTKH, v_BTKH = (_repeated(x, N) for x in (k_BTKH, v_BTKH))
    inside_BT = segments_BT > 0
    lengths_B = inside_BT.sum(-1, dtype=jnp.int32)
    fits_B = (segments_BT == (jnp.arange(T)[None] < lengths_B[:, None])).all(-1)
    local: Callable[..., jax.Array] = functools.partial(_cudnn, window=window)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        at_q = meshes.partition(("batch", None, "heads", None), q_BTNH.shape, mesh)
        local = meshes.by_hand(local, (at_q, at_q, at_q, P(at_q[0])), at_q)
    out_BTNH = local(
        q_BTNH, k_BTKH, v_BTKH, jnp.maximum(lengths_B, 1)
    )  # a row of padding sees one token
    kept_BTNH = jnp.where(inside_BT[:, :, None, None], out_BTNH, 0)
    return jnp.where(fits_B[:, None, None, None], kept_BTNH, jnp.nan)


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    lengths_B: jax.Array,
    *,
    window: int | None,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
