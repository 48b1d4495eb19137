"""The Llama family in Flax Linen, over the plain nested dict that `arch.tensor_table` declares.

Axis letters: `B` batch, `T` query position, `S` key position (cache slot), `N` heads, `K` kv heads,
`H` head dim, `D` embed, `F` mlp, `L` layer, `V` vocab. Weights are `[out, in]`, as in Hugging Face
checkpoints. Layers are stacked on `L` and scanned.

All families (`arch.FAMILIES`) differ by flags of `ModelConfig` alone. Parameters are cast
to the compute dtype at each product. Norms, rotary positions, softmax and logits are float32.

Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288; Jiang et al. 2023 (sliding window),
https://arxiv.org/abs/2310.06825.
"""

from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, Rope, tensor_table
from jax_ordermerge.model import initial
from jax_ordermerge.model.attention import Tokens
from jax_ordermerge.model.block import LAYER_INPUT, Block, LayerInputs, PerLayer, last, norm
from jax_ordermerge.model.kernels import MIXED, Kernel
from jax_ordermerge.model.layers import (
    ADAPTED,
    Embedding,
    Form,
    Norm,
    capped,
    project,
    scaled,
)
from jax_ordermerge.model.rope import Rotation, rotation
from jax_ordermerge.tree import PyTree

Remat = Literal["none", "full", "dots", "offload"]
_REMAT_POLICIES = {
    "full": None,
    # A product is saved after its adapter's change was added: with the policy for products alone
    # both summands would be saved.
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(MIXED, ADAPTED),
    ),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst=meshes.HOST_MEMORY,
    ),
}


class Cache(NamedTuple):
    """Keys and values of earlier tokens. All rows of a batch are written at the same slot.

    Attributes:
        k, v: one array [B, K, S, H] per layer in the compute dtype. They are not stacked on `L`, so
            that XLA updates each one in place and attention reads it without a copy.
        positions, segments: int32[B, S]; an empty slot is padding (segment 0).
        length: int32 scalar, the number of slots written.
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    positions: jax.Array
    segments: jax.Array
    length: jax.Array


def _rotation_indices(config: ModelConfig) -> list[int]:
    """Return the index of each layer's rope among the different ones, in the order of layers."""
    # not a set: `_rotations` lists the ropes in this order, and the indices count there
    ropes = list(dict.fromkeys(config.layer_ropes))
    return [ropes.index(rope) for rope in config.layer_ropes]


class Llama(nn.Module):
    """The decoder up to its last norm, without a cache. Call it through `forward` or `hidden`."""

    config: ModelConfig
    dtype: DTypeLike
    remat: Remat = "none"
    kernel: Kernel = "xla"
    form: Form = "flat"

    @nn.compact
    def __call__(self, tokens_BT: jax.Array, shared: LayerInputs) -> jax.Array:
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.form, name="embed")
        block = Block
        if self.remat != "none":
            # inside a scan the compiler cannot merge the recomputation with the forward pass, so
            # no barrier against common subexpression elimination is needed
            block = nn.remat(Block, prevent_cse=False, policy=_REMAT_POLICIES[self.remat])
        window, has_window = c.sliding_window, None
        if window is not None and c.full_attention_layers:
            # layers differ where rows are longer than the window, and are equal elsewhere
            if tokens_BT.shape[1] > window:
                has_window = jnp.array([window is not None for window in c.windows])
            else:
                window = None
        # One traced layer, whatever their number: compile time does not grow with depth.
        indices = _rotation_indices(c)
        layer = PerLayer(has_window, jnp.array(indices) if any(indices) else None)
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, 0),
            length=c.num_layers,
        )(c, self.dtype, window, self.kernel, form=self.form, name="layers")
        x_BTD = scaled(embed(tokens_BT), _embedding_scale(c, self.dtype))
        x_BTD, _ = layers(x_BTD, None, shared, layer)
        return _last_norm(c, self.dtype, name="norm")(x_BTD)


def _embedding_scale(config: ModelConfig, dtype: DTypeLike) -> float:
    if config.embedding_scale is not None:
        return config.embedding_scale
    # Gemma was trained with this root in the dtype of the embeddings.
    return float(jnp.dtype(dtype).type(config.hidden_size**0.5))


def _last_norm(config: ModelConfig, dtype: DTypeLike, name: str | None = None) -> Norm:
    # Logits are divided here, once for all that compute them, and before the hidden states are
    # rounded: there the division costs no digit.
    return norm(config, dtype, name=name, divisor=config.logit_divisor)


def unstack(config: ModelConfig, layers: PyTree) -> tuple[tree.Tree, ...]:
    """Return the parameters of each layer from the stacked ones. A tuple is returned unchanged.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> layers = unstack(config, init_params(config, 0)["layers"])
        >>> [layer["mlp"]["up"]["weight"].shape for layer in layers]
        [(16, 8), (16, 8)]
    """
    if isinstance(layers, tuple):
        return layers
    return tuple(tree.member(layers, layer) for layer in range(config.num_layers))


def _with_cache(
    config: ModelConfig,
    params: tree.Tree,
    tokens_BT: jax.Array,
    cache: Cache,
    shared: LayerInputs,
    dtype: DTypeLike,
    last_only: bool,
) -> tuple[jax.Array, list[jax.Array], list[jax.Array]]:
    """Run the layers one after another and return hidden states, keys and values.

    Why not the scan of `Llama`? It would copy the keys and values of each layer at every token.
    """
    embed = Embedding(config.vocab_size, config.hidden_size, dtype, "flat")
    x_BTD = embed.apply({"params": params["embed"]}, tokens_BT)
    x_BTD = scaled(x_BTD, _embedding_scale(config, dtype))
    ks, vs = [], []
    indices = _rotation_indices(config)
    layers = zip(unstack(config, params["layers"]), cache.k, cache.v, strict=True)
    for number, (layer, *kv) in enumerate(layers):
        # below the last layer all tokens are needed for their keys and values
        is_last = number == config.num_layers - 1
        block = Block(config, dtype, config.windows[number], last_only=last_only and is_last)
        rotation = shared.rotations[indices[number]]
        inputs = shared._replace(rotations=(rotation,)), PerLayer()
        x_BTD, (k, v) = block.apply({"params": layer}, x_BTD, kv, *inputs)
        ks.append(k)
        vs.append(v)
    return _last_norm(config, dtype).apply({"params": params["norm"]}, x_BTD), ks, vs


def head(config: ModelConfig, params: tree.Tree) -> jax.Array:
    """Return the output table, float32[V, D]: the embedding where the model ties the two.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> head(config, init_params(config, 0)).shape
        (32, 8)
    """
    return params["embed" if config.tie_embeddings else "head"]["weight"]


def hidden(
    config: ModelConfig,
    params: tree.Tree,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache | None = None,
    *,
    dtype: DTypeLike,
    remat: Remat = "none",
    kernel: Kernel = "xla",
    form: Form = "flat",
    last_only: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Return the last hidden states, [B, T, D] in `dtype`, and the updated cache.

    They are those after the last norm, divided by `logit_divisor`: a product with `head` gives the
    logits, before their soft cap.

    Args:
        config: the model; static under `jax.jit`.
        params: the dict of `tensor_table(config)`. With a cache its layers may be unstacked, see
            `unstack`.
        tokens_BT: int32 in [0, V).
        positions_BT: int32 position inside the document, growing with T inside a segment.
        segments_BT: int32 document number, 0 on padding. A token sees the earlier positions of its
            own segment.
        cache: from `init_cache`, with at least T free slots; the tokens are written at
            `cache.length`. A cache of exactly T slots must be empty.
        dtype: dtype of the products, float32 or bfloat16.
        remat: what the backward pass recomputes: nothing (`none`), whole layers (`full`; with
            `offload` their inputs wait in the memory of the host), or all but products with weights
            and the output of attention (`dots`; also faster than `none` where memory is slow).
        kernel: attention kernel without a cache, from `kernels.choose`.
        form: of the program without a cache, from `layers.choose_form`.
        last_only: return the last token alone, [B, 1, D]. With a cache the last layer then computes
            no other.

    Raises:
        ValueError: more tokens than the cache has slots.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> params, tokens = init_params(config, 0), jnp.array([[3, 1, 2]])
        >>> positions, segments = jnp.arange(3)[None], jnp.ones((1, 3), int)
        >>> x, _ = hidden(config, params, tokens, positions, segments, dtype="float32")
        >>> x.shape
        (1, 3, 8)
    """
    T, queries = tokens_BT.shape[1], Tokens(positions_BT, segments_BT)
    if cache is None:
        rotations = _rotations(config, queries, queries)
        shared = LayerInputs(queries, queries, rotations, jnp.zeros((), jnp.int32))
        if form == "by_head":
            params = {**params, "layers": _cast_matrices(params["layers"], dtype)}
        x_BTD = Llama(config, dtype, remat, kernel, form).apply(
            {"params": params}, tokens_BT, shared
        )
        return last(x_BTD) if last_only else x_BTD, None
    slots = cache.positions.shape[1]
    if slots < T:
        raise ValueError(f"the cache is too short: given {T} tokens, it has {slots} slots")
    # dynamic_update_slice clamps a start that is too large instead of failing. The caller counts
    # the slots, because `cache.length` is traced.
    keys = Tokens(
        *(
            jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, cache.length))
            for old, new in zip((cache.positions, cache.segments), queries, strict=True)
        )
    )
    shared = LayerInputs(queries, keys, _rotations(config, queries, keys), cache.length)
    x_BTD, k, v = _with_cache(config, params, tokens_BT, cache, shared, dtype, last_only)
    return x_BTD, Cache(tuple(k), tuple(v), *keys, cache.length + T)


def _cast_matrices(layers: tree.Tree, dtype: DTypeLike) -> tree.Tree:
    """Return the stacked matrices of all layers in `dtype`, and the rest as it is."""
    # Each layer casts its own matrices, so this changes no value. But the backward pass of the scan
    # stacks a gradient per layer, in the dtype in which the scan reads the matrix: in float32 that
    # was twice the memory and twice the copies. On CPU the scan casts, as a layer fits a cache.
    return tree.unflatten(
        {
            path: x.astype(dtype) if path.endswith("weight") and x.ndim == 3 else x
            for path, x in tree.flatten(layers).items()
        }
    )


def _rotations(config: ModelConfig, queries: Tokens, keys: Tokens) -> tuple[Rotation, ...]:
    """Return the rotations of the queries by each rope of the model."""
    # Angles are computed once per call and not per layer; float32 is exact for positions to 2^24.
    positions = queries.positions.astype(jnp.float32)
    return tuple(
        rotation(rope, config.head_dim, positions, _is_long(rope, queries, keys))
        for rope in dict.fromkeys(config.layer_ropes)
    )


def _is_long(rope: Rope | None, queries: Tokens, keys: Tokens) -> jax.Array | None:
    """Return bool[B, T]: whether the document of a query is long for longrope.

    None where the rope is of another kind, or no row has room for a long document.
    """
    # Why per document? transformers decides for a batch by its longest row; a row would then depend
    # on those beside it. Of a document alone this is its choice.
    if rope is None or rope.kind != "longrope":
        return None
    original = rope.original_max_position_embeddings
    if keys.positions.shape[1] <= original:
        return None
    beyond_BS = keys.positions >= original
    own_BTS = queries.segments[:, :, None] == keys.segments[:, None, :]
    return (own_BTS & beyond_BS[:, None, :]).any(-1)


def forward(
    config: ModelConfig,
    params: tree.Tree,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array,
    cache: Cache | None = None,
    *,
    dtype: DTypeLike,
    last_only: bool = False,
) -> tuple[jax.Array, Cache | None]:
    """Return the logits of the next token, float32[B, T, V], and the updated cache.

    Training and evaluation of losses use `hidden` and `loss.linear_losses` instead, which never
    hold the logits of all tokens.

    Args:
        config: the model; static under `jax.jit`.
        params: the dict of `tensor_table(config)`.
        tokens_BT: int32 in [0, V).
        positions_BT: int32 position inside the document, growing with T inside a segment.
        segments_BT: int32 document number, 0 on padding. A token sees the earlier positions of its
            own segment.
        cache: from `init_cache`, with at least T free slots.
        dtype: dtype of the products, float32 or bfloat16.
        last_only: return the logits of the last position alone, [B, 1, V].

    Returns:
        The logits, and the cache with the tokens written at `cache.length`; None without one.

    Raises:
        ValueError: more tokens than the cache has slots.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> params, tokens = init_params(config, 0), jnp.array([[3, 1, 2]])
        >>> positions, segments = jnp.arange(3)[None], jnp.ones((1, 3), int)
        >>> logits, _ = forward(config, params, tokens, positions, segments, dtype="float32")
        >>> logits.shape, logits.dtype.name
        ((1, 3, 32), 'float32')
    """
    inputs = tokens_BT, positions_BT, segments_BT, cache
    x_BTD, cache = hidden(config, params, *inputs, dtype=dtype, last_only=last_only)
    # float32 logits from products in `dtype`: bfloat16 logits would make ties of close tokens
    logits = project(x_BTD, head(config, params).astype(dtype), jnp.float32)
    logits = capped(logits, config.logit_softcap)
    return meshes.constrain(logits, "batch", "length", "vocab"), cache


def init_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike) -> Cache:
    """Return an empty cache of `length` slots for `batch` rows.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> [k.shape for k in init_cache(config, 3, 5, "float32").k]
        [(3, 2, 5, 4), (3, 2, 5, 4)]
    """
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def empty() -> tuple[jax.Array, ...]:
        return tuple(
            meshes.constrain(jnp.zeros(shape, dtype), "batch", "kv_heads", None, None)
            for _ in range(config.num_layers)
        )

    k, v = empty(), empty()
    padding = jnp.zeros((batch, length), jnp.int32)
    return Cache(k, v, padding, padding, jnp.zeros((), jnp.int32))


def init_params(config: ModelConfig, seed: int, mesh: jax.sharding.Mesh | None = None) -> tree.Tree:
    """Return random float32 parameters.

    Weights are normal(0, `initializer_range`), norms one, biases zero. Each Hugging Face tensor is
    drawn whole from `rng.stream(seed, "init", hf_name)`, so the values do not depend on the mesh.

    Args:
        config: the model.
        seed: seed of the run.
        mesh: where the arrays live, sharded by their logical axes; None is the default device.

    Returns:
        The dict of `tensor_table(config)`, layers stacked on a leading axis `L`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> init_params(config, 0)["layers"]["attention"]["q"]["weight"].shape
        (2, 8, 8)
    """
    return initial.draw(tensor_table(config), seed, "init", mesh, std=config.initializer_range)
