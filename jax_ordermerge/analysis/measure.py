"""Losses of a model, or of all members of a population, over all examples: forward passes only.

Axis letters: `M` member, `n` example, `B` example of a batch, `T` position.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

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
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.model import llama, loss
from jax_ordermerge.model.kernels import Kernel
from jax_ordermerge.tree import Tree, flatten


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
    tell: Callable[[int], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the summed response loss of every example under every member, and its number of response tokens.

    Examples are batched by length, so padding is small; one program is compiled a length and kept for the next call. The groups of
    the mesh axis `order` share the members of a population, or the examples when there is one model only.

    Args:
        config: the model.
        params: of one model, or of a population with a leading `M`.
        examples: tokenized examples.
        batch: examples a forward pass, rounded up so that the device groups share it.
        lengths: padded lengths, ascending (`pack.bucket_lengths`).
        dtype: of the products, `"float32"` or `"bfloat16"`.
        mesh: where the parameters are.
        kernel: of attention, from `kernels.choose`.
        members: of a population, the losses of each, or those of the one model whose logits are the mean of theirs.
        tell: is told now and then how many examples are done.

    Returns:
        `(sums, tokens)`: float32[M, n] in nats (M = 1 for one model, and for an ensemble) and int32[n].
    """
    population = _is_population(config, params)
    groups = mesh.shape["order"]
    together = members == "ensemble"
    program = _ensemble(config, dtype) if together else _program(config, dtype, mesh, population, kernel)
    rows, pending = [], []
    numbered = dataclasses.replace(examples, ids=np.arange(len(examples)))
    for one in pack.length_batches(numbered, -(-batch // groups) * groups, lengths):
        rows.append(one["ids"])
        pending.append(program(params, _place(one, mesh, population)))
        if tell is not None and len(pending) > 1:
            jax.block_until_ready(pending[-2])  # one batch behind, so that the devices never wait
            tell(sum(ids.size for ids in rows[:-1]))
    fetched = [
        (sums if population and not together else sums.reshape(1, -1), counts.reshape(-1)) for sums, counts in _fetch(pending)
    ]
    order = np.concatenate(rows)
    real = order >= 0
    sums, counts = (np.concatenate(parts, axis=-1) for parts in zip(*fetched, strict=True))
    out, tokens = np.empty((sums.shape[0], len(examples)), np.float32), np.empty(len(examples), np.int32)
    out[:, order[real]], tokens[order[real]] = sums[:, real], counts[real].round()
    return out, tokens


def compile_losses(
    config: ModelConfig, mesh: Mesh, *, batch: int, length: int, held: str, dtype: str, kernel: Kernel = "xla"
) -> Any:
    """Return the compiled program with which `losses` measures one model, `jax.stages.Compiled`; the devices need not be here.

    Args:
        config: the model.
        mesh: as in `losses`.
        batch, dtype, kernel: as in `losses`.
        length: that rows are padded to.
        held: dtype of the parameters.
    """
    groups = mesh.shape["order"]
    shape = groups, -(-batch // groups), length
    place = _rows_over(mesh, shape)
    arrays = {name: np.float32 if name == "weights" else np.int32 for name in pack.SEQUENCES}
    rows = {name: jax.ShapeDtypeStruct(shape, kind, sharding=place) for name, kind in arrays.items()}
    params = convert.abstract_params(config, mesh, dtype=held)
    return _program(config, dtype, mesh, population=False, kernel=kernel).lower(params, rows).compile()


def _is_population(config: ModelConfig, params: Tree) -> bool:
    spec = tensor_table(config)[0]
    given = flatten(params)[spec.path].ndim
    if given not in (len(spec.shape), len(spec.shape) + 1):
        raise ValueError(f"{spec.path} has {given} dimensions, expected {len(spec.shape)}, or one more for a population")
    return given > len(spec.shape)


@functools.lru_cache(maxsize=16)
def _program(config: ModelConfig, dtype: str, mesh: Mesh, population: bool, kernel: Kernel) -> Any:
    """Return `(params, batch) -> (sums, counts)`, jitted and kept: jit keeps a program for each length."""

    def sums(params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        where = batch["tokens"], batch["positions"], batch["segments"]
        x, _ = llama.hidden(config, params, *where, dtype=dtype, kernel=kernel)
        _, losses = loss.linear_losses(x, llama.head(config, params), batch["targets"], batch["weights"])
        return losses, batch["weights"].sum(-1)

    if population:
        members = meshes.map_members(sums, mesh)

        def program(params: Tree, batch: Any) -> tuple[jax.Array, jax.Array]:
            losses_MB, counts_MB = members(params, batch)
            return losses_MB, counts_MB[0]
    else:
        groups = meshes.map_members(lambda batch, params: sums(params, batch), mesh)

        def program(params: Tree, batch: Any) -> tuple[jax.Array, jax.Array]:
            return groups(batch, params)

    return jax.jit(program)


@functools.lru_cache(maxsize=16)
def _ensemble(config: ModelConfig, dtype: str) -> Any:
    """Return `(population, batch) -> (sums, counts)` of the mean of the members' logits, one member after another."""

    def program(params: Tree, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        where = batch["tokens"], batch["positions"], batch["segments"]

        def add(total: jax.Array, member: Tree) -> tuple[jax.Array, None]:
            logits_BTV, _ = llama.forward(config, member, *where, dtype=dtype)
            return total + logits_BTV, None

        nothing = jnp.zeros((*where[0].shape, config.vocab_size), jnp.float32)
        total_BTV, _ = jax.lax.scan(add, nothing, params)
        log_p_BTV = jax.nn.log_softmax(total_BTV / jax.tree.leaves(params)[0].shape[0])
        losses_BT = -jnp.take_along_axis(log_p_BTV, batch["targets"][..., None], axis=-1)[..., 0]
        return (losses_BT * batch["weights"]).sum(-1), batch["weights"].sum(-1)

    return jax.jit(program)


def _place(batch: pack.Batch, mesh: Mesh, population: bool) -> dict[str, jax.Array]:
    """Put a batch on the mesh: [B, T] for a population, [order, B / order, T] for one model."""

    def put(array: np.ndarray) -> jax.Array:
        if population:
            place = meshes.sharding(("batch", None), array.shape, mesh)
        else:
            array = array.reshape(mesh.shape["order"], -1, *array.shape[1:])
            place = _rows_over(mesh, array.shape)
        return jax.make_array_from_callback(array.shape, place, lambda index: array[index])

    return {name: put(batch[name]) for name in pack.SEQUENCES}


def _rows_over(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    return NamedSharding(mesh, P("order", *meshes.partition(("batch", None), shape[1:], mesh)))


def _fetch(pending: list[tuple[jax.Array, jax.Array]]) -> list[tuple[np.ndarray, np.ndarray]]:
    if jax.process_count() == 1:
        return jax.device_get(pending)
    return [multihost_utils.process_allgather(one, tiled=True) for one in pending]
