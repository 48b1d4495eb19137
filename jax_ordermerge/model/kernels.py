"""Attention kernels of accelerators, and the choice among them.

`xla` (in `attention.py`) is correct everywhere. The kernels here need queries and keys of the same
tokens (no cache), and the tokens of a segment side by side, ordered by position.

- `splash`, TPU: causal by index inside a segment, which then equals causal by position. Packed
  documents do not see each other.
- `cudnn`, NVIDIA: the public function of jax takes one length per row. So it is correct only for
  rows of one right-padded document, and the fastest for them.
- `cudnn_packed`, NVIDIA: the same with a mask of the documents of a row, [B, T, T] in bfloat16 that
  is added to the scores: 128 MiB for 4 rows of 4,096, where `xla` takes 26 times as much.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import fusion
from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.errors import UserError
from jax_ordermerge.tree import PyTree

Kernel = Literal["xla", "splash", "splash_interpreted", "cudnn", "cudnn_packed"]
# Name of the output of attention for rematerialization policies. Without it the scores would be
# computed a third time.
MIXED = "mixed"
_LANES = 128  # splash takes sequences in multiples of the lanes of a TPU's vector unit


def choose(
    requested: str, config: ModelConfig, mesh: Mesh, *, dtype: str, packed: bool = False
) -> Kernel:
    """Return the kernel for the devices of a mesh, which need not be the devices of this process.

    Args:
        requested: `auto`, or the kernel it must be.
        config: the model.
        mesh: the mesh whose devices compute.
        dtype: dtype of the products.
        packed: whether rows may hold several documents.

    Raises:
        UserError: the requested kernel is wrong here or does not exist on these devices.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> choose("auto", config, meshes.make_mesh(), dtype="float32")
        'xla'
        >>> choose("splash", config, meshes.make_mesh(), dtype="float32")
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: model.attention = splash runs on TPU, the devices are ...
    """
    # Each entry completes the sentence "model.attention = KERNEL ...", for the error message.
    platform = meshes.platform(mesh)
    obstacles: dict[Kernel, str] = {}
    if platform != "tpu":
        obstacles["splash"] = f"runs on TPU, the devices are {platform}"
    if platform not in ("gpu", "cuda"):
        obstacles["cudnn"] = f"runs on NVIDIA GPU, the devices are {platform}"
    elif dtype != "bfloat16":
        obstacles["cudnn"] = f"computes in bfloat16, model.compute_dtype is {dtype}"
    elif config.head_dim % 8 or config.head_dim > 128:
        obstacles["cudnn"] = (
            f"takes heads of a multiple of 8 up to 128, this model has {config.head_dim}"
        )
    elif config.attention_softcap is not None:
        obstacles["cudnn"] = "has no soft cap of the scores, which this model has"
    elif mesh.shape.get("sequence", 1) > 1:
        obstacles["cudnn"] = "takes whole sequences, mesh.sequence divides them"
    # in the order of preference; `xla` has no obstacles
    kernels: tuple[Kernel, ...] = ("splash", "cudnn", "xla")
    for kernel in kernels:
        if requested == kernel and kernel in obstacles:
            raise UserError(f"model.attention = {kernel} {obstacles[kernel]}; give auto or xla")
        if requested in ("auto", kernel) and kernel not in obstacles:
            # one kernel for the user: which form it takes follows from the data
            return "cudnn_packed" if kernel == "cudnn" and packed else kernel
    return "xla"


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    scale: float | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Return attention by the Pallas kernel of jax for TPU.

    It skips blocks that the causal mask or the window hides. A Mosaic kernel needs every mesh axis
    manual, so examples, queries and heads are divided by hand with the rules of `mesh.py`.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values; any T and H.
        segments_BT: int32 document numbers, 0 on padding.
        window: how many keys back a query sees, itself included; None is all.
        scale: factor of the scores; None is 1 / sqrt(H).
        softcap: bound of the scores, see `layers.capped`; None is none.
        interpret: run without a TPU, slowly.

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
    # blocks are of whole lanes, on each device that has a part of the sequence
    parts = meshes.extent("length")
    size = -(-T // (_LANES * parts)) * _LANES * parts
    # the kernel does not scale the scores
    scale = H**-0.5 if scale is None else scale
    q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
    k_BTKH, v_BTKH = (_repeat_kv_heads(x, N) for x in (k_BTKH, v_BTKH))
    q, k, v = (
        jnp.pad(x, [(0, 0), (0, size - T), (0, 0), (0, 0)]).transpose(0, 2, 1, 3)
        for x in (q_BTNH, k_BTKH, v_BTKH)
    )
    # the added positions are padding, a segment that sees only itself
    segments = jnp.pad(segments_BT, [(0, 0), (0, size - T)])
    spec_q = P(*[None] * 4)
    if not mesh.empty:
        spec_q = meshes.partition(("batch", "heads", "length", None), q.shape, mesh)
    head_parts = meshes.extent("heads") if spec_q[1] else 1
    head_bytes = H * q.dtype.itemsize
    kernel = _splash_kernel(
        *(N, size, window, softcap, parts, head_parts), head_bytes=head_bytes, interpret=interpret
    )

    def attention(kernel: PyTree, *operands: jax.Array) -> jax.Array:
        return jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=_segment_ids(*ids)))(
            *operands
        )

    if not mesh.empty:
        # the kernel computes the sizes of its shards, which it cannot do where axes are manual
        automatic = AbstractMesh(mesh.axis_sizes, mesh.axis_names)
        spec_kernel = kernel.manual_sharding_spec(NamedSharding(automatic, P(*spec_q[1:3])))
        spec_k = P(*spec_q[:2], None, None)
        spec_segments = P(spec_q[0], spec_q[2]), P(spec_q[0], None)
        specs = spec_kernel, spec_q, spec_k, spec_k, *spec_segments
        attention = meshes.per_device(attention, specs, spec_q)
    return attention(kernel, q, k, v, segments, segments).transpose(0, 2, 1, 3)[:, :T]


def _repeat_kv_heads(x_BTKH: jax.Array, heads: int) -> jax.Array:
    """Return kv heads repeated until the mesh divides them where it divides the query heads."""
    # The mesh may have more parts than the model kv heads. The kernel then needs copies of a head;
    # the least common multiple makes as few as possible.
    parts, K = meshes.extent("heads"), x_BTKH.shape[2]
    return x_BTKH if heads % parts else jnp.repeat(x_BTKH, math.lcm(K, parts) // K, axis=2)


def splash_block(extent: int, head_bytes: int) -> int:
    """Return how many queries, or keys, splash attention loads at a time.

    Args:
        extent: positions, a multiple of 128.
        head_bytes: bytes of one head of one query.

    Example:
        >>> splash_block(2048, 256), splash_block(640, 256)
        (1024, 128)
    """
    # Large blocks amortize the loads of keys and values, and the recipes of MaxText for v5p and v6e
    # have 1024. They must divide the positions, and fit the vector memory of 16 MiB beside the
    # scores: in bfloat16 with heads of 128 they do.
    largest = 1024 if head_bytes <= 256 else 512
    sizes = (1024, 512, 256, _LANES)
    return next(size for size in sizes if size <= largest and extent % size == 0)


def _splash_kernel(
    heads: int,
    size: int,
    window: int | None,
    softcap: float | None,
    parts: int,
    head_parts: int,
    *,
    head_bytes: int,
    interpret: bool,
) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    # Masks are by index. Inside a segment this equals causal by position, see the module docstring.
    mask = (
        kernels.CausalMask((size, size))
        if window is None
        else kernels.LocalMask((size, size), (window - 1, 0), 0)
    )
    q, kv = (splash_block(extent, head_bytes) for extent in (size // parts, size))
    # float32 scores of a block are 2 MiB: the gradient holds four such arrays
    compute = min(kv, 512)
    blocks = kernels.BlockSizes(
        block_q=q,
        block_kv=kv,
        block_kv_compute=compute,
        block_q_dkv=q,
        block_kv_dkv=kv,
        block_kv_dkv_compute=compute,
        block_q_dq=q,
        block_kv_dq=compute,
    )
    return kernels.make_splash_mha(
        mask=kernels.MultiHeadMask([mask] * heads),
        block_sizes=blocks,
        head_shards=head_parts,
        q_seq_shards=parts,
        residual_checkpoint_name=MIXED,
        # of scores that are scaled already, by the queries
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )


def _segment_ids(queries_T: jax.Array, keys_S: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    return kernels.SegmentIds(queries_T, keys_S)


def cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    scale: float | None = None,
) -> jax.Array:
    """Return attention by the fused kernels of cuDNN, for rows of one right-padded document.

    Any other row becomes NaN: a training that stops is better than documents that see each other.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values, bfloat16.
        segments_BT: int32, 1 on tokens and 0 on padding.
        window: how many keys back a query sees, itself included; None is all.
        scale: factor of the scores; None is 1 / sqrt(H).

    Returns:
        [B, T, N, H]; 0 on padding.
    """
    T = q_BTNH.shape[1]
    # cuDNN takes the number of valid tokens per row instead of segments.
    is_token_BT = segments_BT > 0
    lengths_B = is_token_BT.sum(-1, dtype=jnp.int32)
    is_single_B = (segments_BT == (jnp.arange(T)[None] < lengths_B[:, None])).all(-1)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, lengths_B: jax.Array) -> jax.Array:
        return _cudnn(q, k, v, window=window, scale=scale, lengths_B=lengths_B)

    # a row of padding alone sees one token, so that its softmax is not empty
    out_BTNH = _per_device(attention, q_BTNH, k_BTKH, v_BTKH, jnp.maximum(lengths_B, 1))
    out_BTNH = jnp.where(is_token_BT[:, :, None, None], out_BTNH, 0)
    return jnp.where(is_single_B[:, None, None, None], out_BTNH, jnp.nan)


def cudnn_packed(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segments_BT: jax.Array,
    *,
    window: int | None,
    scale: float | None = None,
) -> jax.Array:
    """Return attention by the fused kernels of cuDNN, for rows of any documents.

    Args:
        q_BTNH, k_BTKH, v_BTKH: queries, keys and values, bfloat16.
        segments_BT: int32 document numbers, 0 on padding.
        window: how many keys back a query sees, itself included; None is all.
        scale: factor of the scores; None is 1 / sqrt(H).

    Returns:
        [B, T, N, H].
    """

    def attention(q: jax.Array, k: jax.Array, v: jax.Array, segments_BT: jax.Array) -> jax.Array:
        # Causality and window stay arguments of cuDNN, which skips the blocks that they hide. jax
        # adds -0.7 of the largest number where the mask is False: the exponential of it is 0.
        mask_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
        return _cudnn(q, k, v, window=window, scale=scale, mask_BTS=mask_BTS)

    return _per_device(attention, q_BTNH, k_BTKH, v_BTKH, segments_BT)


def _per_device(
    attention: Callable[..., jax.Array],
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    rows: jax.Array,
) -> jax.Array:
    """Call a kernel on the examples and heads of each device; `rows` is [B, ...]."""
    # cuDNN takes grouped heads, but heads of keys may be fewer than the devices that divide heads
    N, mesh = q_BTNH.shape[2], jax.sharding.get_abstract_mesh()
    k_BTKH, v_BTKH = (_repeat_kv_heads(x, N) for x in (k_BTKH, v_BTKH))
    if fusion.fused_members() > 1:
        # jax's rule for `vmap` takes a mask for one of all heads, and fails
        attention = fusion.merge_rows(attention)
    if not mesh.empty:
        spec = meshes.partition(("batch", None, "heads", None), q_BTNH.shape, mesh)
        attention = meshes.per_device(attention, (spec, spec, spec, P(spec[0])), spec)
    return attention(q_BTNH, k_BTKH, v_BTKH, rows)


def _cudnn(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    *,
    window: int | None,
    scale: float | None,
    lengths_B: jax.Array | None = None,
    mask_BTS: jax.Array | None = None,
) -> jax.Array:
    return jax.nn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        mask=None if mask_BTS is None else mask_BTS[:, None],
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )
