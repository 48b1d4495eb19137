"""Greedy generation with a key-value cache: token ids in, token ids out.

Prompts are padded on the left, so that all rows of a batch write the same cache slot. Prompt length and batch are rounded up to
buckets; each bucket is one compilation, which holds prefill and the whole decoding loop.
"""

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
from jax_ordermerge.model import llama

_SHORTEST = 16  # prompts below it share one bucket


def generate(
    config: ModelConfig,
    params: tree.Tree,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int] | None = None,
    dtype: DTypeLike = "bfloat16",
    batch: int = 64,
) -> list[list[int]]:
    """Return the greedy continuation of each prompt, in the order of the prompts, without prompt and without end token.

    A continuation of `max_new_tokens` ids was cut. What a row gets depends neither on the other rows nor on the padding, up to the
    rounding of `dtype`. Under `jax.set_mesh` rows are spread over the batch axis; every process gets all results.

    Args:
        config: the model.
        params: the dict of `tensor_table(config)`, on any sharding.
        prompts: token ids in [0, V), at least one each, of any length.
        max_new_tokens: at most so many new ids a prompt.
        eos_ids: ids that end a continuation; None takes `config.eos_token_ids`.
        dtype: of the products and of the cache.
        batch: rows decoded together.

    Raises:
        UserError: an empty prompt, an id outside the vocabulary, or a prompt that leaves no room in the context of the model.

    Example:
        >>> config = ModelConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
        >>> params = llama.init_params(config, 0)
        >>> [len(ids) for ids in generate(config, params, [[1, 2, 3], [4]], max_new_tokens=5, eos_ids=())]
        [5, 5]
    """
    _check(config, prompts, max_new_tokens, batch)
    ends = np.asarray(config.eos_token_ids if eos_ids is None else eos_ids, np.int32)
    results: list[list[int]] = [[] for _ in prompts]
    # longest first: rows of like length share a bucket, and what does not fit the memory fails at once
    queue = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for first in range(0, len(queue), batch):
        rows = queue[first : first + batch]
        tokens_BT, lengths_B = _left_pad([prompts[i] for i in rows], batch)
        new_BT, counts_B = _decode(
            config, params, tokens_BT, lengths_B, ends, max_new_tokens=max_new_tokens, dtype=jnp.dtype(dtype)
        )
        new_BT, counts_B = np.asarray(new_BT), np.asarray(counts_B)
        for row, i in enumerate(rows):
            results[i] = new_BT[row, : counts_B[row]].tolist()
    return results


def compile_generation(
    config: ModelConfig, mesh: Mesh, *, batch: int, prompt: int, max_new_tokens: int, held: str, dtype: DTypeLike
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
    lengths_B, ends = jax.ShapeDtypeStruct((batch,), jnp.int32), jax.ShapeDtypeStruct((len(config.eos_token_ids) or 1,), jnp.int32)
    params = convert.abstract_params(config, mesh, dtype=held)
    settings = {"max_new_tokens": max_new_tokens, "dtype": jnp.dtype(dtype)}
    return _decode.lower(config, params, tokens_BT, lengths_B, ends, **settings).compile()


def bucket(size: int, smallest: int = 1) -> int:
    """Return the smallest of 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, ... that is at least `size` and `smallest`: at most half is padding.

    Example:
        >>> [bucket(n) for n in (1, 3, 5, 9, 13, 100)], bucket(3, 16)
        ([1, 4, 6, 12, 16, 128], 16)
    """
    size = max(size, smallest)
    power = 1 << (size - 1).bit_length()
    return power // 4 * 3 if power >= 8 and power // 4 * 3 >= size else power


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch: int) -> None:
    if max_new_tokens < 1 or batch < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} and batch = {batch} must be at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {number} has no tokens; start it with a beginning-of-sequence id or drop it")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise UserError(f"prompt {number} holds an id outside the vocabulary of {config.vocab_size}; check the tokenizer")
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


class _State(NamedTuple):
    """The decoding loop: tokens chosen so far, the last one of each row, how many each row has, which rows have ended."""

    cache: llama.Cache
    step: jax.Array
    last_B: jax.Array
    new_BT: jax.Array
    counts_B: jax.Array
    done_B: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "max_new_tokens", "dtype"))
def _decode(
    config: ModelConfig,
    params: tree.Tree,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    ends: jax.Array,
    *,
    max_new_tokens: int,
    dtype: np.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Return int32[B, max_new_tokens] and how many of them are the continuation, int32[B]."""
    params = _cast(config, params, dtype)
    tokens_BT = mesh.constrain(tokens_BT, "batch", None)
    B, T = tokens_BT.shape
    live_B = lengths_B > 0
    positions_BT = jnp.arange(T, dtype=jnp.int32)[None] - (T - lengths_B)[:, None]
    cache = llama.init_cache(config, B, T, dtype)
    logits, filled = llama.forward(
        config, params, tokens_BT, jnp.maximum(positions_BT, 0), (positions_BT >= 0).astype(jnp.int32), cache, dtype=dtype, last_only=True
    )  # fmt: skip
    assert filled is not None

    def choose(state: _State, logits_BV: jax.Array) -> _State:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        done_B = state.done_B | (token_B[:, None] == ends[None]).any(-1)
        new_BT = jax.lax.dynamic_update_slice(state.new_BT, token_B[:, None], (0, state.step))
        return _State(state.cache, state.step + 1, token_B, new_BT, state.counts_B + ~done_B, done_B)

    def advance(state: _State) -> _State:
        # an ended row goes on beside the others; its tokens are not counted
        position_B1 = (lengths_B + state.step - 1)[:, None]
        logits, cache = llama.forward(
            config, params, state.last_B[:, None], position_B1, live_B[:, None].astype(jnp.int32), state.cache, dtype=dtype
        )
        assert cache is not None
        return choose(state._replace(cache=cache), logits[:, 0])

    zeros_B = jnp.zeros(B, jnp.int32)
    new_BT = jnp.zeros((B, max_new_tokens), jnp.int32)
    start = _State(_grow(filled, max_new_tokens - 1), jnp.int32(0), zeros_B, new_BT, zeros_B, ~live_B)
    final = jax.lax.while_loop(lambda s: (s.step < max_new_tokens) & ~s.done_B.all(), advance, choose(start, logits[:, 0]))
    return mesh.constrain(final.new_BT, None, None), mesh.constrain(final.counts_B, None)


def _cast(config: ModelConfig, params: tree.Tree, dtype: np.dtype) -> tree.Tree:
    # once here instead of at every step; norms are applied in float32 and keep their bits
    kinds = {spec.path: spec.kind for spec in tensor_table(config)}
    flat = tree.flatten(params)
    return tree.unflatten({path: x if kinds[path] == "norm" else x.astype(dtype) for path, x in flat.items()})


def _grow(cache: llama.Cache, slots: int) -> llama.Cache:
    def pad(x: jax.Array, axis: int) -> jax.Array:
        return jnp.pad(x, [(0, slots if i == axis else 0) for i in range(x.ndim)])

    return llama.Cache(pad(cache.k, 2), pad(cache.v, 2), pad(cache.positions, 1), pad(cache.segments, 1), cache.length)
