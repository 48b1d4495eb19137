"""Generation with a key-value cache: token ids in, token ids out.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. Prompt length
and batch are rounded up to buckets. Each bucket is one compilation, which holds prefill and the
whole decoding loop: the host is not asked between tokens.

Axis letters: `M` member, `B` row of a batch, `T` position of a prompt or of new tokens, `V`
vocabulary, `D` embedding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_ordermerge import mesh as meshes
from jax_ordermerge import tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import NotFiniteError
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling, next_token, row_key_bits
from jax_ordermerge.model import layers, llama

_MIN_PROMPT = 16  # shorter prompts share this bucket
# The cache grows for at least so many new tokens at a time. Each stretch between two sizes is a
# loop of its own and adds to the time of compilation.
_MIN_STRETCH = 64


def generate(
    config: ModelConfig,
    params: tree.Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] | None = None,
    dtype: DTypeLike = "bfloat16",
    batch: int = 64,
    sampling: Sampling = GREEDY,
    names: Sequence[str | int] | None = None,
) -> list[list[int]]:
    """Return a continuation of each prompt, without the prompt and without the end token.

    A continuation of `max_new_tokens` ids was cut. A row depends neither on the other rows nor on
    the padding, up to the rounding of `dtype`; its draws depend on the seed, its name and the step
    alone. Under `jax.set_mesh` rows are sharded over the batch axis; every process gets all
    results.

    Args:
        config: the model.
        params: the dict of `tensor_table(config)`, on any sharding.
        prompts: token ids in [0, V), at least one each, of any length.
        max_new_tokens: largest number of new ids per prompt.
        eos_ids: ids that end a continuation; None takes `config.eos_token_ids`.
        dtype: of the products and of the cache.
        batch: rows decoded together.
        sampling: how tokens are chosen.
        names: one per prompt, by default their numbers; rows of one name draw the same noise.

    Raises:
        UserError: a prompt is empty, has an id outside the vocabulary, or is too long.
        NotFiniteError: a logit is NaN or infinite.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> params = llama.init_params(config, 0)
        >>> rows = generate(config, params, [[1, 2, 3], [4]], max_new_tokens=5, eos_ids=())
        >>> [len(ids) for ids in rows]
        [5, 5]
    """
    options = _Options(
        config, max_new_tokens, jnp.dtype(dtype), sampling, jax.default_backend() == "cpu"
    )
    rows = _generate(options, params, prompts, 0, eos_ids, batch, names)[0]
    return require_finite(rows)


def require_finite(rows: Sequence[list[int] | None]) -> list[list[int]]:
    """Return the continuations, of which none is None.

    Raises:
        NotFiniteError: one is None: a logit on the way was NaN or infinite.
    """
    broken = [number for number, row in enumerate(rows) if row is None]
    if broken:
        raise NotFiniteError(
            f"a logit is NaN or infinite, as after {len(broken)} of {len(rows)} prompts", broken[0]
        )
    return [row for row in rows if row is not None]


def generate_members(
    config: ModelConfig,
    population: tree.Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] | None = None,
    dtype: DTypeLike = "bfloat16",
    batch: int = 64,
    sampling: Sampling = GREEDY,
    names: Sequence[str | int] | None = None,
) -> list[list[list[int] | None]]:
    """Return the continuations of `generate` for each of several models, from one program.

    Models on different groups of the mesh axis `order` generate at the same time, those of one
    group one after another. Models that generate at the same time stop when the rows of all of
    them have ended. Rows with the same name draw the same noise in all models. A row with a logit
    that is NaN or infinite is None and no error, which would stop the other models, too; see
    `require_finite`.

    Args:
        population: parameters with a leading member axis; the mesh axis `order` divides it.
        config, prompts, max_new_tokens, eos_ids, dtype, batch, sampling, names: see `generate`.

    Raises:
        UserError: as `generate`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> population = tree.stack([llama.init_params(config, seed) for seed in (0, 1)])
        >>> options = {"max_new_tokens": 5, "eos_ids": ()}
        >>> rows = generate_members(config, population, [[1, 2, 3], [4]], **options)
        >>> rows[1] == generate(config, tree.member(population, 1), [[1, 2, 3], [4]], **options)
        True
    """
    options = _Options(
        config, max_new_tokens, jnp.dtype(dtype), sampling, jax.default_backend() == "cpu"
    )
    return _generate(options, population, prompts, tree.size(population), eos_ids, batch, names)


def compile_generation(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    prompt: int,
    max_new_tokens: int,
    params_dtype: str,
    dtype: DTypeLike,
) -> jax.stages.Compiled:
    """Compile the program of `generate`. The devices of the mesh may be absent.

    Args:
        config: the model.
        mesh: where the parameters are.
        batch, max_new_tokens, dtype: as in `generate`.
        prompt: tokens of the longest prompt.
        params_dtype: of the parameters.
    """
    prompts = _Prompts(
        tokens_BT=jax.ShapeDtypeStruct((batch, bucket(prompt, _MIN_PROMPT)), jnp.int32),
        lengths_B=jax.ShapeDtypeStruct((batch,), jnp.int32),
        key_bits_B2=jax.ShapeDtypeStruct((batch, 2), jnp.uint32),
        eos_ids=jax.ShapeDtypeStruct((len(config.eos_token_ids) or 1,), jnp.int32),
    )
    options = _Options(
        config, max_new_tokens, jnp.dtype(dtype), GREEDY, meshes.platform(mesh) == "cpu"
    )
    params = convert.abstract_params(config, mesh, dtype=params_dtype)
    return _decode.lower(options, params, prompts, members=0).compile()


def bucket(size: int, smallest: int = 1) -> int:
    """Return the smallest of 1, 2, 4, 6, 8, 12, 16, 24, ... that is at least `size` and `smallest`.

    There are two buckets per power of two; at most a third of one is padding.

    Example:
        >>> [bucket(n) for n in (1, 3, 5, 9, 13, 100)], bucket(3, 16)
        ([1, 4, 6, 12, 16, 128], 16)
    """
    # Powers of two alone would waste up to half of a bucket. A step between them makes it a third,
    # at twice the number of compilations.
    size = max(size, smallest)
    power = 1 << (size - 1).bit_length()
    return power // 4 * 3 if power >= 8 and power // 4 * 3 >= size else power


class _Options(NamedTuple):
    """Static options of a program. On CPUs it stores weights and cache in another way."""

    config: ModelConfig
    max_new_tokens: int
    dtype: np.dtype
    sampling: Sampling
    cpu: bool


def _generate(
    options: _Options,
    params: tree.Tree,
    prompts: Sequence[Sequence[int]],
    members: int,
    eos_ids: Sequence[int] | None,
    batch: int,
    names: Sequence[str | int] | None,
) -> list[list[list[int] | None]]:
    """Return the continuations of each member; `members` is 0 for parameters without that axis."""
    config = options.config
    if batch < 1:
        raise UserError(f"batch = {batch} must be at least 1")
    check_prompts(config, prompts, options.max_new_tokens)
    if names is not None and len(names) != len(prompts):
        raise UserError(f"{len(names)} names for {len(prompts)} prompts; give each prompt one")
    results: list[list[list[int] | None]] = [[[] for _ in prompts] for _ in range(members or 1)]
    if not prompts:
        return results
    key_bits = row_key_bits(options.sampling.seed, range(len(prompts)) if names is None else names)
    # The seed is in the key bits. Without it in the static options one program serves all seeds.
    options = options._replace(sampling=dataclasses.replace(options.sampling, seed=0))
    # An argument of the program and not static: other ends need no compilation.
    ends = np.asarray(config.eos_token_ids if eos_ids is None else eos_ids, np.int32)
    # Longest first: rows of similar length share a bucket, and a batch that does not fit the memory
    # fails at once.
    queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    # Equal batches: a smaller last one would be a bucket, hence a compilation, of its own.
    size = -(-len(prompts) // -(-len(prompts) // batch))
    for first in range(0, len(queue), size):
        rows = queue[first : first + size]
        tokens_BT, lengths_B = _left_pad([prompts[i] for i in rows], batch)
        # Keys go with the rows, wherever the sorting has put them.
        key_bits_B2 = np.zeros((len(lengths_B), 2), np.uint32)
        key_bits_B2[: len(rows)] = key_bits[rows]
        arrays = _Prompts(tokens_BT, lengths_B, key_bits_B2, ends)
        decoded = _decode(options, params, arrays, members=members)
        by_member = (np.asarray(x) if members else np.asarray(x)[None] for x in decoded)
        for continuations, new_BT, counts_B, finite_B in zip(results, *by_member, strict=True):
            for row, i in enumerate(rows):
                new = new_BT[row, : counts_B[row]].tolist()
                continuations[i] = new if finite_B[row] else None
    return results


def check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    """Check that a model can continue prompts.

    Raises:
        UserError: a prompt is empty, has an id outside the vocabulary, or is too long.
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} must be at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {number} has no tokens; start it with a beginning-of-sequence id or drop "
                "it"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"prompt {number} holds an id outside the vocabulary of {config.vocab_size}; check "
                "the tokenizer"
            )
        if len(prompt) + max_new_tokens > config.context_length:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the "
                f"context of {config.context_length}; shorten the prompt or lower "
                "max_new_tokens"
            )
        # Where a text crosses the original length, LongRoPE turns all of its tokens otherwise.
        # transformers then reads the text anew; a cache of fixed shape cannot.
        original = config.rope.original_max_position_embeddings
        crosses = len(prompt) <= original < len(prompt) + max_new_tokens - 1
        if config.rope.kind == "longrope" and crosses:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens and {max_new_tokens} new ones cross the"
                f" length of {original}, at which the LongRoPE of this model takes other factors;"
                f" lower max_new_tokens to {original - len(prompt) + 1}"
            )


def _left_pad(prompts: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32[B, T] tokens, padded with 0 on the left, and int32[B] lengths.

    Rows that only fill the bucket have length 0.
    """
    # The last batch is smaller than the others; it gets a bucket instead of a batch of padding.
    rows = min(bucket(len(prompts)), batch)
    tokens_BT = np.zeros((rows, bucket(max(map(len, prompts)), _MIN_PROMPT)), np.int32)
    lengths_B = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, -len(prompt) :] = prompt
        lengths_B[row] = len(prompt)
    return tokens_BT, lengths_B


_Array: TypeAlias = np.ndarray | jax.Array | jax.ShapeDtypeStruct


class _Prompts(NamedTuple):
    """Left-padded tokens, their lengths, key bits of the rows, ids that end a continuation."""

    tokens_BT: _Array
    lengths_B: _Array
    key_bits_B2: _Array
    eos_ids: _Array


class _State(NamedTuple):
    """State of the decoding loop.

    Attributes:
        cache: keys and values of all tokens but the last.
        step: number of new tokens.
        last_B: the last token of each row.
        new_BT: new tokens.
        counts_B: number of new tokens of each row before its end token.
        done_B: whether the row has ended.
        finite_B: whether all logits of the row were finite until it ended.
        running: whether a row of any member that generates at the same time has not ended.
    """

    cache: llama.Cache
    step: jax.Array
    last_B: jax.Array
    new_BT: jax.Array
    counts_B: jax.Array
    done_B: jax.Array
    finite_B: jax.Array
    running: jax.Array


@functools.partial(jax.jit, static_argnames=("options", "members"))
def _decode(
    options: _Options, params: tree.Tree, prompts: _Prompts, *, members: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the new tokens, how many of them each continuation has, and if its logits are finite.

    They are int32[B, max_new_tokens], int32[B] and bool[B], with a leading `M` for members.
    """
    decode: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] = functools.partial(
        _decode_member, options
    )
    if members:
        # Without `jax.set_mesh` the members are on one device, one after another.
        current = jax.sharding.get_abstract_mesh()
        decode = meshes.map_members(decode, meshes.make_mesh() if current.empty else current)
    # Replicated, so that every process can read all results.
    return jax.tree.map(lambda x: meshes.constrain(x, *[None] * x.ndim), decode(params, prompts))


def _decode_member(
    options: _Options, params: tree.Tree, prompts: _Prompts
) -> tuple[jax.Array, jax.Array, jax.Array]:
    config, max_new_tokens, dtype, sampling, cpu = options
    params = _cast(config, params, dtype)
    tokens_BT = meshes.constrain(jnp.asarray(prompts.tokens_BT), "batch", None)
    lengths_B = jnp.asarray(prompts.lengths_B)
    B, T = tokens_BT.shape
    real_B = lengths_B > 0
    # Padding has segment 0, which no token attends to.
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
    cache = llama.init_cache(config, B, T, dtype)
    x_B1D, filled = llama.hidden(
        config,
        params,
        tokens_BT,
        jnp.maximum(positions_BT, 0),
        (positions_BT >= 0).astype(jnp.int32),
        cache,
        dtype=dtype,
        last_only=True,
    )
    assert filled is not None  # for mypy: there is a cache, since one was given

    def append_token(state: _State, x_B1D: jax.Array, table_VD: jax.Array) -> _State:
        # The table stays on the left and is not transposed: CPUs multiply it faster by few rows so.
        logits_VB = jnp.einsum(
            "VD,BD->VB", table_VD, x_B1D[:, 0], preferred_element_type=jnp.float32
        )
        logits_VB = layers.capped(logits_VB, config.logit_softcap)
        logits_BV = meshes.constrain(logits_VB, "vocab", "batch").T
        # top_p sorts the vocabulary, and XLA's partitioner crashes on sorting a sharded axis.
        if not sampling.is_greedy:
            logits_BV = meshes.constrain(logits_BV, "batch", None)
        key_bits_B2, eos_ids = jnp.asarray(prompts.key_bits_B2), jnp.asarray(prompts.eos_ids)
        token_B = next_token(logits_BV, key_bits_B2, state.step, sampling)
        # NaN would be taken for the largest logit, and its token, the first, often ends a text.
        finite_B = state.finite_B & (state.done_B | jnp.isfinite(logits_BV).all(-1))
        done_B = state.done_B | (token_B[:, None] == eos_ids[None]).any(-1)
        # All rows write the same column, thanks to the padding on the left.
        new_BT = jax.lax.dynamic_update_slice(state.new_BT, token_B[:, None], (0, state.step))
        # The groups of `order` run one program: were one to leave the loop before the others, its
        # devices would miss the collectives inside of it. So all groups end the loop together.
        running = meshes.any_member(~done_B.all())
        counts_B = state.counts_B + ~done_B
        return _State(
            state.cache, state.step + 1, token_B, new_BT, counts_B, done_B, finite_B, running
        )

    def advance(state: _State) -> _State:
        # A row that has ended is computed on beside the others; its tokens are not counted.
        position_B1 = (lengths_B + state.step - 1)[:, None]
        loop_params = params if transposed is None else _transpose_matrices(transposed)
        x_B1D, cache = llama.hidden(
            config,
            loop_params,
            state.last_B[:, None],
            position_B1,
            real_B[:, None].astype(jnp.int32),
            state.cache,
            dtype=dtype,
        )
        assert cache is not None
        return append_token(state._replace(cache=cache), x_B1D, llama.head(config, loop_params))

    transposed = None
    if cpu and max_new_tokens > 1:
        # XLA on CPUs would cut each weight out of its stack at every step, and multiplies few rows
        # faster by [in, out]. So layers are unstacked and transposed once, before the loop. The
        # barrier keeps the copies: without it the two transpositions would cancel.
        params["layers"] = llama.unstack(config, params["layers"])
        transposed = jax.lax.optimization_barrier(_transpose_matrices(params))

    start = _start(filled, real_B, max_new_tokens)
    state = append_token(start, x_B1D, llama.head(config, params))
    # One loop per size of the cache, because the shapes in a loop are fixed.
    for stop in _cache_growth(T, max_new_tokens, cpu):
        state = state._replace(cache=_grow(state.cache, T + stop - 1))
        state = jax.lax.while_loop(functools.partial(_unfinished, stop), advance, state)
    return state.new_BT, state.counts_B, state.finite_B


def _start(cache: llama.Cache, real_B: jax.Array, max_new_tokens: int) -> _State:
    B = len(real_B)
    zeros_B, new_BT = jnp.zeros(B, jnp.int32), jnp.zeros((B, max_new_tokens), jnp.int32)
    finite_B, running = jnp.ones(B, bool), jnp.bool_(True)
    # Rows of padding have ended before they start, so they do not keep the loop running.
    return _State(cache, jnp.int32(0), zeros_B, new_BT, zeros_B, ~real_B, finite_B, running)


def _unfinished(stop: int, state: _State) -> jax.Array:
    return (state.step < stop) & state.running


def _cache_growth(prompt: int, new: int, cpu: bool) -> list[int]:
    """Return the counts of new tokens at which the cache grows, ending with `new`.

    Every step reads all slots of the cache. On CPUs that is about half of its time, so the cache
    starts small and at most a third of it (or 96 slots) is free after it grew. Elsewhere it has all
    slots from the start and is never copied. The first token needs no slot.
    """
    stops = [1]
    while stops[-1] < new:
        stretch = max(_MIN_STRETCH, (prompt + stops[-1]) // 3)
        stop = stops[-1] + stretch
        # A last stretch of less than half the size is not worth a loop of its own.
        stops.append(stop if cpu and stop + stretch // 2 < new else new)
    return stops[1:]


def _cast(config: ModelConfig, params: tree.Tree, dtype: np.dtype) -> tree.Tree:
    # Once here instead of at every step. Norms are applied in float32, so they keep their bits.
    kinds = {spec.path: spec.kind for spec in tensor_table(config)}
    flat = tree.flatten(params)
    return tree.unflatten(
        {path: x if kinds[path] == "norm" else x.astype(dtype) for path, x in flat.items()}
    )


def _transpose_matrices(params: tree.Tree) -> tree.Tree:
    """Transpose the matrices of the unstacked layers."""
    return {**params, "layers": jax.tree.map(lambda x: x.T if x.ndim == 2 else x, params["layers"])}


def _grow(cache: llama.Cache, slots: int) -> llama.Cache:
    """Return the cache with `slots` slots, the new ones empty."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    k, v = (tuple(pad(layer, 2) for layer in layers) for layers in (cache.k, cache.v))
    return llama.Cache(k, v, pad(cache.positions, 1), pad(cache.segments, 1), cache.length)
