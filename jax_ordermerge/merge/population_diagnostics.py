"""Diagnostics of a merge in device memory: its task vectors, and what a selection drew again."""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig
from jax_ordermerge.merge import diagnostics
from jax_ordermerge.merge.methods import parts, table
from jax_ordermerge.merge.population import Leaf, MemberShardings, member_shardings, replicate

_SHARED_ELEMENTS = 1 << 22  # of the tensors of a model whose diagnostics share a program


def count_redrawn(
    members: tree.Tree,
    base: tree.Tree,
    config: ModelConfig,
    *,
    method: str,
    seed: int,
    weights: Sequence[float] | None = None,
    parameters: table.Parameters | None = None,
    dtype: DTypeLike = jnp.bfloat16,
) -> dict[str, np.ndarray]:
    """Count the elements that a selection with resampling draws again, by round.

    Args:
        members, base, config, method, seed, weights, parameters, dtype: as in `population.merge`.

    Returns:
        int64[rounds] by Hugging Face name; nothing where the method draws nothing again.
    """
    checked = table.check_parameters(method, parameters)
    function = table.METHODS[method].count_redrawn(checked)
    counts: dict[str, np.ndarray] = {}
    if function is None:
        return counts
    flat, flat_base = tree.flatten(members), tree.flatten(base)
    for spec in arch.tensor_table(config):
        path, names = spec.path, spec.hf_names()
        leaf = Leaf(
            flat[path], flat_base[path], names, spec.stacked, method, seed, weights, checked, dtype
        )
        for name, tensor in zip(names, leaf.tensors(), strict=True):
            arrays, static = tensor.prepare()
            counts[name] = tensor.total(function, arrays["weights"], **dict(static))
    return counts


def measure_diagnostics(
    members: tree.Tree,
    base: tree.Tree,
    merged: tree.Tree,
    config: ModelConfig,
    redrawn: Mapping[str, np.ndarray] | None = None,
) -> diagnostics.Report:
    """Describe a merge by its task vectors, per Hugging Face tensor and in total.

    Args:
        members: parameter dict with a leading axis `M`.
        base: parameter dict.
        merged: parameter dict; members and base are rounded to its dtype first.
        config: the model.
        redrawn: of the merge, from `count_redrawn`.
    """
    # a pass of its own: `merge` compiles to one program, with and without diagnostics
    flat, flat_base, flat_merged = tree.flatten(members), tree.flatten(base), tree.flatten(merged)
    results: dict[str, tuple[diagnostics.Moments, int]] = {}
    for specs in _share_programs(arch.tensor_table(config)):
        leaves = tuple(
            (flat[spec.path], flat_base[spec.path], flat_merged[spec.path]) for spec in specs
        )
        shardings = tuple(member_shardings(leaf[0]) for leaf in leaves)
        measured = jax.device_get(_moments(leaves, shardings))
        for spec, leaf_moments in zip(specs, measured, strict=True):
            for layer, name in enumerate(spec.hf_names()):
                moments = leaf_moments
                if spec.stacked:
                    products, unchanged = leaf_moments.products, leaf_moments.unchanged
                    moments = diagnostics.Moments(products[:, layer], unchanged[:, layer])
                if redrawn:
                    moments = moments._replace(redrawn=redrawn[name])
                results[name] = diagnostics.total(moments), math.prod(spec.hf_shape)
    return diagnostics.report((name, *results[name]) for name, _, _ in arch.hf_tensors(config))


def _share_programs(table: Sequence[arch.TensorSpec]) -> Iterator[list[arch.TensorSpec]]:
    """Yield entries of the table that are measured in one program each.

    Of small tensors a compilation takes longer than the sums. Large ones stay apart, so that no
    more than one of them is in memory in float32.
    """
    shared: list[arch.TensorSpec] = []
    for spec in table:
        size = sum(math.prod(tensor.shape) for tensor in (*shared, spec))
        if shared and size > _SHARED_ELEMENTS:
            yield shared
            shared = []
        shared.append(spec)
    yield shared


@functools.partial(jax.jit, static_argnames="shardings")
def _moments(
    leaves: tuple[tuple[jax.Array, jax.Array, jax.Array], ...],
    shardings: tuple[MemberShardings | None, ...],
) -> list[diagnostics.Moments]:
    """Return the moments of leaves, each given as members, base and merge."""
    moments = []
    for (members, base, merged), sharding in zip(leaves, shardings, strict=True):
        members, base = (parts.round_to(x, merged.dtype) for x in (members, base))
        moments.append(replicate(diagnostics.moments(members, base, merged), sharding))
    return moments
