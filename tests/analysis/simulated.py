"""Losses by the designs of the experiments: levels of order, correlated steps, skewed losses."""

from typing import NamedTuple

import numpy as np

SLOPE = -0.05  # of epoch 1; the other epochs have none


class Design(NamedTuple):
    """Which order is drawn for how many members and epochs."""

    level: str
    members: int = 4
    epochs: int = 2


DESIGNS = {level: Design(level) for level in ("sample", "batch")}


def simulate(design, *, samples, batch, icc, seed, skewed=False, slope=SLOPE, noise=0.1):
    """Return losses [M, n], positions [M, E, n], and the batch of each sample where it is fixed.

    The errors of one step of the last epoch share the part `icc` of their variance.
    """
    rng = np.random.default_rng(seed)
    _, members, epochs = design
    steps = -(-samples // batch)
    numbers = np.empty((members, epochs, samples), int)
    composition = rng.permutation(samples) // batch
    full = samples // batch
    for m in range(members):
        for e in range(epochs):
            if design.level == "batch":
                places = np.concatenate([rng.permutation(full), np.arange(full, steps)])
                numbers[m, e] = places[composition]
            else:
                numbers[m, e] = rng.permutation(samples) // batch
    shape = (members, samples)
    error = (rng.gamma(0.5, 1, shape) - 0.5) / np.sqrt(0.5) if skewed else rng.normal(size=shape)
    of_step = np.take_along_axis(rng.normal(size=(members, steps)), numbers[:, -1], axis=1)
    difficulty = rng.gamma(2, 0.4, samples) if skewed else rng.normal(2, 0.5, samples)
    positions = numbers / (steps - 1)
    losses = difficulty + slope * positions[:, 0]
    losses = losses + noise * (np.sqrt(1 - icc) * error + np.sqrt(icc) * of_step)
    return losses, positions, composition if design.level == "batch" else None
