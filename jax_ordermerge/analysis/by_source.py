"""The position effect and the losses within each source of the training samples.

Axis letters here: `M` member, `E` epoch, `n` sample.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jax_ordermerge.analysis import clusters, position_effects
from jax_ordermerge.analysis.position_effects import JointEffect, Level
from jax_ordermerge.analysis.result import Missing, or_missing


@dataclass(frozen=True)
class SourceEffect:
    """One source: the levels of its samples, and the fixed-effects estimate on them alone."""

    name: str
    samples: int
    members: Level  # of the mean over the members
    base: Level | None
    merged: dict[str, Level]
    fixed_effects: JointEffect | Missing


def effects_by_source(
    losses: np.ndarray,
    positions: np.ndarray,
    merged: Mapping[str, np.ndarray],
    base: np.ndarray | None,
    sources: Mapping[str, np.ndarray],
    units: np.ndarray | None = None,
) -> list[SourceEffect]:
    """Return the statistics of each source; none where all samples are of one.

    Positions are those in the whole epoch: samples of all sources share its learning rate.

    Args:
        losses: [M, n], of the members.
        positions: [M, E, n].
        merged: for each merge, [n].
        base: [n], of the base, or None.
        sources: for each source, the numbers of its samples.
        units: int[n], the batches or packs that were put in order; None: the samples.

    Example:
        >>> losses = np.array([[3.0, 2.0, 1.0, 4.0], [2.0, 3.0, 2.0, 3.5]])
        >>> positions = np.array([[[0.0, 0.5, 1.0, 0.2]], [[1.0, 0.0, 0.5, 0.7]]])
        >>> sources = {"a": np.arange(3), "b": np.array([3])}
        >>> first, second = effects_by_source(losses, positions, {}, None, sources)
        >>> first.members.mean_loss, first.fixed_effects.coefficients[0].estimate < 0
        (2.1666666666666665, True)
        >>> second.samples, type(second.fixed_effects).__name__
        (1, 'Missing')
    """
    if len(sources) < 2:
        return []
    return [
        SourceEffect(
            name=name,
            samples=len(rows),
            members=Level.of(losses[:, rows].mean(axis=0)),
            base=None if base is None else Level.of(base[rows]),
            merged={merge: Level.of(values[rows]) for merge, values in merged.items()},
            # of a source with too few samples there is no estimate, and the reason stands in its
            # place
            fixed_effects=or_missing(
                position_effects.joint_effect,
                losses[:, rows],
                positions[:, :, rows],
                units=clusters.renumber(units, rows),
            ),
        )
        for name, rows in sources.items()
    ]
