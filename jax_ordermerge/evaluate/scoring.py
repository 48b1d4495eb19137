"""Losses of a model or a population on examples, and scores of given continuations.

Axis letters: `M` member, `n` example, `B` example of a batch, `T` position.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ordermerge import mesh as meshes
from jax_ordermerge.arch import ModelConfig, tensor_table
from jax_ordermerge.checkpoint import convert
from jax_ordermerge.data import pack
from jax_ordermerge.data.examples import Examples, Ragged
from jax_ordermerge.errors import UserError
from jax_ordermerge.evaluate.eval_model import NotFiniteError
from jax_ordermerge.model import layers, llama, loss
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.tree import Tree, flatten

# A jitted function (params, batch) -> two float32[M, B], or [order, B / order] of one model. JAX
# has no static type for it with `lower`.
_Program: TypeAlias = Any


def losses(
    config: ModelConfig,
    params: Tree,
    examples: Examples,
    *,
    batch: int,
    lengths: Sequence[int],
    dtype: str,
    mesh: Mesh,
    kernel: Kernel = "xla",
    members: Literal["each", "ensemble"] = "each",
    on_progress: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed response loss of every example, and its number of response tokens.

    Examples are batched by length, so padding is small; one program is compiled per length and
    kept for the next call. The groups of the mesh axis `order` share the members of a population,
    or the examples where there is one model.

    Args:
        config: the model.
        params: of one model, or of a population with a leading axis `M`.
        examples: tokenized examples.
        batch: examples per forward pass, rounded up so that the device groups share it.
        lengths: padded lengths, ascending; see `pack.bucket_lengths`.
        dtype: of the products, `"float32"` or `"bfloat16"`.
        mesh: where the parameters are.
        kernel: of attention, from `kernels.choose`.
        members: the losses of each member, or of the one model whose logits are their mean.
        on_progress: receives now and then the number of examples that are done.

    Returns:
        `(sums, tokens)`: float32[M, n] in nats (M = 1 for one model and for an ensemble) and
        int32[n].
    """
    population = _is_population(config, params)
    program = (
        _ensemble(config, dtype)
        if members == "ensemble"
        else _program(config, dtype, mesh, population, kernel)
    )
    sums, counts = _run_batches(
        program,
        params,
        examples,
        population,
        batch=batch,
        lengths=lengths,
        mesh=mesh,
        on_progress=on_progress,
    )
    # Sums of ones in float32, which are the same for every member.
    return sums, counts[0].round().astype(np.int32)


class Scores(NamedTuple):
    """Scores of given continuations.

    Attributes:
        logps: float64[M, n], log-probability of all tokens of a continuation, in nats.
        greedy: bool[M, n], whether greedy decoding would write the continuation.
    """

    logps: np.ndarray
    greedy: np.ndarray


def score(
    config: ModelConfig,
    params: Tree,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    batch: int,
    dtype: str,
    mesh: Mesh,
    kernel: Kernel = "xla",
) -> Scores:
    """Return how likely one model (M = 1), or each member of a population, finds continuations.

    Args:
        config, params, dtype, mesh, kernel: see `losses`.
        pairs: n times the tokens of a context and of its continuation, at least one each.
        batch: pairs per forward pass.

    Raises:
        UserError: a context or a continuation without tokens, or an id outside the vocabulary.
        NotFiniteError: a log-probability is NaN or infinite.

    Example:
        >>> config = ModelConfig(
        ...     vocab_size=4, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2
        ... )
        >>> uniform = jax.tree.map(jnp.zeros_like, llama.init_params(config, 0))
        >>> pairs = [([1], [2, 3]), ([1, 2], [3])]
        >>> mesh = meshes.make_mesh()
        >>> scores = score(config, uniform, pairs, batch=2, dtype="float32", mesh=mesh)
        >>> (scores.logps / np.log(4)).round(4).tolist(), scores.greedy.tolist()
        ([[-2.0, -1.0]], [[True, True]])
    """
    population = _is_population(config, params)
    # No batch can be made of nothing.
    if not pairs:
        members = jax.tree.leaves(params)[0].shape[0] if population else 1
        return Scores(np.empty((members, 0)), np.empty((members, 0), bool))
    for number, (context, continuation) in enumerate(pairs):
        if not (len(context) and len(continuation)):
            part = "continuation" if len(context) else "context"
            raise UserError(f"pair {number} has no tokens in its {part}; give at least one")
        if min(*context, *continuation) < 0 or max(*context, *continuation) >= config.vocab_size:
            raise UserError(
                f"pair {number} holds an id outside the vocabulary of {config.vocab_size}; check "
                "the tokenizer"
            )
    rows = [[*context, *continuation] for context, continuation in pairs]
    # Only continuations are scored: the mask is that of the response in training.
    masks = [
        np.arange(len(row)) >= len(context) for row, (context, _) in zip(rows, pairs, strict=True)
    ]
    examples = Examples(Ragged.of(rows, np.int32), Ragged.of(masks, np.bool_), np.arange(len(rows)))
    # Powers of two: a task has continuations of any length, and each length is a compilation.
    lengths = pack.bucket_lengths(
        examples.longest, [16 << power for power in range(examples.longest.bit_length())]
    )
    program = _program(config, dtype, mesh, population, kernel, scores=True)
    sums, missed = _run_batches(
        program, params, examples, population, batch=batch, lengths=lengths, mesh=mesh
    )
    # Comparisons with NaN are all false: it would choose the first answer, and miss no token.
    broken = np.flatnonzero(~np.isfinite(sums).all(0))
    if broken.size:
        values = -sums[:, broken[0]]
        raise NotFiniteError(
            f"log-probability {values[~np.isfinite(values)][0]}, as of {broken.size} of "
            f"{len(pairs)} texts",
            int(broken[0]),
        )
    # Greedy decoding writes a continuation exactly if it misses none of its tokens.
    return Scores(-sums.astype(np.float64), missed == 0)


def _run_batches(
    program: _Program,
    params: Tree,
    examples: Examples,
    population: bool,
    *,
    batch: int,
    lengths: Sequence[int],
    mesh: Mesh,
    on_progress: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Return both results of a program for every example, float32[M, n] each."""
    groups = mesh.shape["order"]
    rows, pending = [], []
    # By row and not by the ids of the file: those may have gaps, and results are put back by row.
    numbered = dataclasses.replace(examples, ids=np.arange(len(examples)))
    # A multiple of the device groups, which divide a batch of one model.
    for batch_arrays in pack.length_batches(numbered, -(-batch // groups) * groups, lengths):
        rows.append(batch_arrays["ids"])
        # Results stay on the devices until all batches are dispatched: fetching one would wait
        # for it and leave the devices idle.
        pending.append(program(params, _place(batch_arrays, mesh, population)))
        if on_progress is not None and len(pending) > 1:
            jax.block_until_ready(pending[-2])  # one batch behind, so the devices never wait
            on_progress(sum(ids.size for ids in rows[:-1]))
    fetched = [
        [part if population else part.reshape(1, -1) for part in parts] for parts in _fetch(pending)
    ]
    # Batches are ordered by length and padded with rows of id -1: back to the order of examples.
    order = np.concatenate(rows)
    real, results = order >= 0, []
    for parts in zip(*fetched, strict=True):
        batched = np.concatenate(parts, axis=-1)
        result = np.empty((batched.shape[0], len(examples)), np.float32)
        result[:, order[real]] = batched[:, real]
        results.append(result)
    return results


def compile_losses(
    config: ModelConfig,
    mesh: Mesh,
    *,
    batch: int,
    length: int,
    params_dtype: str,
    dtype: str,
    kernel: Kernel = "xla",
) -> jax.stages.Compiled:
    """Compile the program of `losses` for one model. The devices may be absent.

    Args:
        config: the model.
        mesh: as in `losses`.
        batch, dtype, kernel: as in `losses`.
        length: padded length of the rows.
        params_dtype: of the parameters.
    """
    groups = mesh.shape["order"]
    shape = groups, -(-batch // groups), length
    sharding = _row_sharding(mesh, shape)
    arrays = {name: np.float32 if name == "weights" else np.int32 for name in pack.SEQUENCES}
    rows = {
        name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in arrays.items()
    }
    params = convert.abstract_params(config, mesh, dtype=params_dtype)
    program = _program(config, dtype, mesh, population=False, kernel=kernel)
    compiled: jax.stages.Compiled = program.lower(params, rows).compile()
    return compiled


def _is_population(config: ModelConfig, params: Tree) -> bool:
    # Any tensor tells; the first one of the table is there in every architecture.
    spec = tensor_table(config)[0]
    rank = flatten(params)[spec.path].ndim
    if rank not in (len(spec.shape), len(spec.shape) + 1):
        raise ValueError(
            f"{spec.path} has {rank} dimensions, expected {len(spec.shape)}, or one more for a "
            "population"
        )
    return rank > len(spec.shape)


@functools.lru_cache(maxsize=16)
def _program(
    config: ModelConfig,
    dtype: str,
    mesh: Mesh,
    population: bool,
    kernel: Kernel,
    scores: bool = False,
) -> _Program:
    """Return the jitted `(params, batch) -> (sums, counts)`, or that of `loss.linear_scores`.

    It is cached because jit compiles anew for another function object, even of the same code.
    """

    form = layers.choose_form(mesh)

    def sums(params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        where = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = llama.hidden(config, params, *where, dtype=dtype, kernel=kernel, form=form)
        inputs = x, llama.head(config, params), batch["targets"], batch["weights"]
        if scores:
            return loss.linear_scores(*inputs, softcap=config.logit_softcap)
        _, losses = loss.linear_losses(*inputs, softcap=config.logit_softcap, form=form)
        return losses, batch["weights"].sum(-1)

    # Of a population the members are mapped over the groups and share the batch; one model is
    # shared by the groups and the batch is mapped.
    if population:
        return jax.jit(meshes.map_members(sums, mesh))
    groups = meshes.map_members(lambda batch, params: sums(params, batch), mesh)
    return jax.jit(lambda params, batch: groups(batch, params))


@functools.lru_cache(maxsize=16)
def _ensemble(config: ModelConfig, dtype: str) -> _Program:
    """Return `(population, batch) -> (sums, counts)` under the mean of the members' logits."""

    def program(params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        where = batch["tokens"], batch["positions"], batch["segments"]

        def add(total: jax.Array, member: Tree) -> tuple[jax.Array, None]:
            logits_BTV, _ = llama.forward(config, member, *where, dtype=dtype)
            return total + logits_BTV, None

        # One member after another: all logits at once would not fit.
        zeros_BTV = jnp.zeros((*where[0].shape, config.vocab_size), jnp.float32)
        total_BTV, _ = jax.lax.scan(add, zeros_BTV, params)
        log_p_BTV = jax.nn.log_softmax(total_BTV / jax.tree.leaves(params)[0].shape[0])
        losses_BT = -jnp.take_along_axis(log_p_BTV, batch["targets"][..., None], axis=-1)[..., 0]
        weights_BT = batch["weights"]
        # The shape [1, B] of a population of one.
        return (losses_BT * weights_BT).sum(-1)[None], weights_BT.sum(-1)[None]

    return jax.jit(program)


def _place(batch: pack.Batch, mesh: Mesh, population: bool) -> dict[str, jax.Array]:
    """Put a batch on the mesh: [B, T] for a population, [order, B / order, T] for one model."""
    arrays = {name: batch[name] for name in pack.SEQUENCES}
    if not population:
        groups = mesh.shape["order"]
        arrays = {name: x.reshape(groups, -1, *x.shape[1:]) for name, x in arrays.items()}
    shape = arrays["tokens"].shape
    sharding = (
        meshes.sharding(("batch", None), shape, mesh) if population else _row_sharding(mesh, shape)
    )
    if jax.process_count() == 1:  # one call, since each takes longer than the copy
        return jax.device_put(arrays, sharding)
    # Every process has the whole batch and places its shards of it.
    return {
        name: jax.make_array_from_callback(x.shape, sharding, x.__getitem__)
        for name, x in arrays.items()
    }


def _row_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, P("order", *meshes.partition(("batch", None), shape[1:], mesh)))


def _fetch(pending: list[tuple[jax.Array, jax.Array]]) -> list[tuple[np.ndarray, np.ndarray]]:
    # Shards on devices of other processes cannot be read here without an exchange.
    if jax.process_count() == 1:
        return jax.device_get(pending)
    return [multihost_utils.process_allgather(parts, tiled=True) for parts in pending]
