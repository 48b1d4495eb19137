"""Generation with a key-value cache: token ids in, token ids out, of one model or of several in one program.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. Prompt length and batch are rounded up to
buckets; each bucket is one compilation, which holds prefill and the whole decoding loop.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jax_ordermerge import mesh, tree
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.sampling import GREEDY, Sampling, choose, row_words
from jax_ordermerge.model import llama

_SHORTEST = 16  # prompts below it share one bucket
_STRETCH = 64  # new tokens, at least, for which the cache grows; each stretch is compiled by itself


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
    """Return a continuation of each prompt, in the order of the prompts, without prompt and without end token.

    A continuation of `max_new_tokens` ids was cut. What a row gets depends neither on the other rows nor on the padding, up to the
    rounding of `dtype`; what it draws depends on the seed, its name and the step alone. Under `jax.set_mesh` rows are spread over the
    batch axis; every process gets all results.

    Args:
        config: the model.
        params: the dict of `tensor_table(config)`, on any sharding.
        prompts: token ids in [0, V), at least one each, of any length.
        max_new_tokens: at most so many new ids a prompt.
        eos_ids: ids that end a continuation; None takes `config.eos_token_ids`.
        dtype: of the products and of the cache.
        batch: rows decoded together.
        sampling: how tokens are chosen.
        names: of the rows, one a prompt, by default their numbers; rows of one name draw the same.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room in the context of the model.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> params = llama.init_params(config, 0)
        >>> [
        ...     len(ids)
        ...     for ids in generate(config, params, [[1, 2, 3], [4]], max_new_tokens=5, eos_ids=())
        ... ]
        [5, 5]
    """
    options = _Options(
        config, max_new_tokens, jnp.dtype(dtype), sampling, jax.default_backend() == "cpu"
    )
    return _generate(options, params, prompts, 0, eos_ids, batch, names)[0]


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
) -> list[list[list[int]]]:
    """Return for each of several models what `generate` returns, from one program.

    Models on different groups of the mesh axis `order` write at the same time, those of one group one after another; what writes at
    the same time stops when all of its rows have ended. Rows of one name draw the same noise in all models.

    Args:
        population: parameters with a leading member axis; the mesh axis `order` divides it.
        config, prompts, max_new_tokens, eos_ids, dtype, batch, sampling, names: see `generate`.

    Raises:
        UserError: as `generate`.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> two = tree.stack([llama.init_params(config, seed) for seed in (0, 1)])
        >>> found = generate_members(config, two, [[1, 2, 3], [4]], max_new_tokens=5, eos_ids=())
        >>> found[1] == generate(
        ...     config, tree.member(two, 1), [[1, 2, 3], [4]], max_new_tokens=5, eos_ids=()
        ... )
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
    held: str,
    dtype: DTypeLike,
) -> Any:
    """Return the compiled program of `generate`, `jax.stages.Compiled`; the devices of the mesh need not be here.

    Args:
        config: the model.
        mesh: where the parameters are.
        batch, max_new_tokens, dtype: as in `generate`.
        prompt: tokens of the longest prompt.
        held: dtype of the parameters.
    """
    tokens_BT = jax.ShapeDtypeStruct((batch, bucket(prompt, _SHORTEST)), jnp.int32)
    lengths_B, ends = (
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((len(config.eos_token_ids) or 1,), jnp.int32),
    )
    prompts = _Prompts(tokens_BT, lengths_B, jax.ShapeDtypeStruct((batch, 2), jnp.uint32), ends)
    options = _Options(
        config, max_new_tokens, jnp.dtype(dtype), GREEDY, mesh.devices.flat[0].platform == "cpu"
    )
    return _decode.lower(
        options, convert.abstract_params(config, mesh, dtype=held), prompts, members=0
    ).compile()


def bucket(size: int, smallest: int = 1) -> int:
    """Return the smallest of 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, ... that is at least `size` and `smallest`: at most half is padding.

    Example:
        >>> [bucket(n) for n in (1, 3, 5, 9, 13, 100)], bucket(3, 16)
        ([1, 4, 6, 12, 16, 128], 16)
    """
    size = max(size, smallest)
    power = 1 << (size - 1).bit_length()
    return power // 4 * 3 if power >= 8 and power // 4 * 3 >= size else power


class _Options(NamedTuple):
    """What selects a program; one for CPUs holds the weights otherwise."""

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
) -> list[list[list[int]]]:
    """Return the continuations of each member; `members` is 0 for parameters without a member axis, which are one."""
    config = options.config
    _check(config, prompts, options.max_new_tokens, batch)
    if names is not None and len(names) != len(prompts):
        raise UserError(f"{len(names)} names for {len(prompts)} prompts; give each prompt one")
    words = (
        row_words(options.sampling.seed, range(len(prompts)) if names is None else names)
        if prompts
        else np.zeros((0, 2), np.uint32)
    )
    options = options._replace(
        sampling=dataclasses.replace(options.sampling, seed=0)
    )  # it is in the words: one program for all seeds
    ends = np.asarray(config.eos_token_ids if eos_ids is None else eos_ids, np.int32)
    results: list[list[list[int]]] = [[[] for _ in prompts] for _ in range(max(members, 1))]
    # longest first: rows of like length share a bucket, and what does not fit the memory fails at once
    queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(queue), batch):
        rows = queue[first : first + batch]
        tokens_BT, lengths_B = _left_pad([prompts[i] for i in rows], batch)
        words_B2 = np.zeros((len(lengths_B), 2), np.uint32)
        words_B2[: len(rows)] = words[rows]
        found = _decode(
            options, params, _Prompts(tokens_BT, lengths_B, words_B2, ends), members=members
        )
        new_MBT, counts_MB = (np.asarray(x) if members else np.asarray(x)[None] for x in found)
        for own, new_BT, counts_B in zip(results, new_MBT, counts_MB, strict=True):
            for row, i in enumerate(rows):
                own[i] = new_BT[row, : counts_B[row]].tolist()
    return results


def _check(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int
) -> None:
    if max_new_tokens < 1 or batch < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} and batch = {batch} must be at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(
                f"prompt {number} has no tokens; start it with a beginning-of-sequence id or drop it"
            )
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(
                f"prompt {number} holds an id outside the vocabulary of {config.vocab_size}; check the tokenizer"
            )
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens and {max_new_tokens} new ones exceed the context of"
                f" {config.max_position_embeddings}; shorten the prompt or lower max_new_tokens"
            )


def _left_pad(prompts: Sequence[Sequence[int]], batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Return int32[B, T] tokens, padding (0) on the left, and int32[B] lengths (0 on rows that only fill the bucket)."""
    rows = min(bucket(len(prompts)), batch)
    tokens_BT = np.zeros((rows, bucket(max(map(len, prompts)), _SHORTEST)), np.int32)
    lengths_B = np.zeros(rows, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, -len(prompt) :] = prompt
        lengths_B[row] = len(prompt)
    return tokens_BT, lengths_B


class _Prompts(NamedTuple):
    """Left-padded tokens, their lengths, key bits of the rows and the ids that end a continuation."""

    tokens_BT: Any
    lengths_B: Any
    words_B2: Any
    ends: Any


class _State(NamedTuple):
    """The decoding loop: tokens chosen so far, the last one of each row, how many each row has, which rows have ended, and whether
    any is left."""

    cache: llama.Cache
    step: jax.Array
    last_B: jax.Array
    new_BT: jax.Array
    counts_B: jax.Array
    done_B: jax.Array
    going: jax.Array


@functools.partial(jax.jit, static_argnames=("options", "members"))
def _decode(
    options: _Options, params: tree.Tree, prompts: _Prompts, *, members: int
) -> tuple[jax.Array, jax.Array]:
    """Return int32[(M,) B, max_new_tokens] and how many of them are the continuation, int32[(M,) B]."""
    one = functools.partial(_decode_one, options)
    if not members:
        found = one(params, prompts)
    else:
        known = jax.sharding.get_abstract_mesh()
        found = mesh.map_members(one, mesh.make_mesh() if known.empty else known)(params, prompts)
    return jax.tree.map(lambda x: mesh.constrain(x, *[None] * x.ndim), found)


def _decode_one(
    options: _Options, params: tree.Tree, prompts: _Prompts
) -> tuple[jax.Array, jax.Array]:
    config, max_new_tokens, dtype, sampling, cpu = options
    params = _cast(config, params, dtype)
    tokens_BT, lengths_B = (
        mesh.constrain(jnp.asarray(prompts.tokens_BT), "batch", None),
        jnp.asarray(prompts.lengths_B),
    )
    B, T = tokens_BT.shape
    live_B = lengths_B > 0
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
    assert filled is not None

    def take(state: _State, x_B1D: jax.Array, table_VD: jax.Array) -> _State:
        # the table as it is and on the left: CPUs multiply few rows faster by it so
        logits_VB = jnp.einsum(
            "VD,BD->VB", table_VD, x_B1D[:, 0], preferred_element_type=jnp.float32
        )
        logits_BV = mesh.constrain(logits_VB, "vocab", "batch").T
        if sampling.temperature:  # tokens are sorted by all of the vocabulary; XLA's partitioner dies of sorting it in parts
            logits_BV = mesh.constrain(logits_BV, "batch", None)
        token_B = choose(logits_BV, jnp.asarray(prompts.words_B2), state.step, sampling)
        done_B = state.done_B | (token_B[:, None] == jnp.asarray(prompts.ends)[None]).any(-1)
        new_BT = jax.lax.dynamic_update_slice(state.new_BT, token_B[:, None], (0, state.step))
        going = mesh.any_member(~done_B.all())
        return _State(
            state.cache, state.step + 1, token_B, new_BT, state.counts_B + ~done_B, done_B, going
        )

    def advance(state: _State) -> _State:
        # an ended row goes on beside the others; its tokens are not counted
        position_B1 = (lengths_B + state.step - 1)[:, None]
        known = weights()
        x_B1D, cache = llama.hidden(
            config,
            known,
            state.last_B[:, None],
            position_B1,
            live_B[:, None].astype(jnp.int32),
            state.cache,
            dtype=dtype,
        )
        assert cache is not None
        return take(state._replace(cache=cache), x_B1D, llama.head(config, known))

    turned = None
    if cpu and max_new_tokens > 1:
        # it would cut each weight out of its stack at every step, and multiplies few rows faster by [in, out]
        params["layers"] = llama.unstack(config, params["layers"])
        turned = jax.lax.optimization_barrier(_turned(params))

    def weights() -> tree.Tree:
        return params if turned is None else _turned(turned)

    zeros_B = jnp.zeros(B, jnp.int32)
    new_BT = jnp.zeros((B, max_new_tokens), jnp.int32)
    start = _State(filled, jnp.int32(0), zeros_B, new_BT, zeros_B, ~live_B, jnp.bool_(True))
    state = take(start, x_B1D, llama.head(config, params))
    for stop in _stops(T, max_new_tokens, cpu):
        state = state._replace(cache=_grow(state.cache, T + stop - 1))
        state = jax.lax.while_loop(functools.partial(_unfinished, stop), advance, state)
    return state.new_BT, state.counts_B


def _unfinished(stop: int, state: _State) -> jax.Array:
    return (state.step < stop) & state.going


def _stops(prompt: int, new: int, cpu: bool) -> list[int]:
    """Return the counts of new tokens at which the cache grows, ending with `new`; the first token needs no room.

    Every step reads all slots of the cache. On CPU that is about half of its time, so the cache is at most half as large again as what
    is in it (or has 96 free slots); elsewhere it has all slots from the start and is never copied.
    """
    stops = [1]
    while stops[-1] < new:
        stretch = max(_STRETCH, (prompt + stops[-1]) // 3)
        stop = stops[-1] + stretch
        stops.append(stop if cpu and stop + stretch // 2 < new else new)
    return stops[1:]


def _cast(config: ModelConfig, params: tree.Tree, dtype: np.dtype) -> tree.Tree:
    # once here instead of at every step; norms are applied in float32 and keep their bits
    kinds = {spec.path: spec.kind for spec in tensor_table(config)}
    flat = tree.flatten(params)
    return tree.unflatten(
        {path: x if kinds[path] == "norm" else x.astype(dtype) for path, x in flat.items()}
    )


def _turned(params: tree.Tree) -> tree.Tree:
    """Return the parameters with the matrices of the layers transposed."""
    return {**params, "layers": jax.tree.map(lambda x: x.T if x.ndim == 2 else x, params["layers"])}


def _grow(cache: llama.Cache, slots: int) -> llama.Cache:
    """Return the cache with so many slots."""

    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

    k, v = (tuple(pad(layer, 2) for layer in layers) for layers in (cache.k, cache.v))
    return llama.Cache(k, v, pad(cache.positions, 1), pad(cache.segments, 1), cache.length)
