"""Averages of the last checkpoints of one training: which they are, and how each is weighted.

Averaging the checkpoints of a constant learning rate does what decaying it would have done. With
checkpoints 0 to n, of weight c_j, the updates between checkpoint i - 1 and i count with
w_i = c_i + ... + c_n, which falls from below 1 to above 0 as a decaying learning rate does.

Source: Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging for LLM
pre-training", arXiv 2507.17634; Li et al., "Model merging in pre-training of large language
models", arXiv 2505.12082.
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jax_ordermerge.config.merge import CheckpointWeights
from jax_ordermerge.errors import UserError
from jax_ordermerge.tree import Tree


def weights(kind: CheckpointWeights, count: int) -> np.ndarray:
    """Return the weights c of checkpoints, the oldest first: float64[count] that sum to 1.

    Args:
        kind: `equal`, which a learning rate has that falls linearly to 0; `linear`, which rise by
            equal steps; `wsm`, of a rate that falls by 1 - sqrt(x): the oldest weighs most.
        count: of checkpoints.

    Example:
        >>> weights("linear", 4).tolist(), weights("wsm", 4).round(3).tolist()
        ([0.1, 0.2, 0.3, 0.4], [0.5, 0.207, 0.159, 0.134])
    """
    if kind == "equal":
        return np.full(count, 1 / count)
    if kind == "linear":
        return np.arange(1, count + 1) / (count * (count + 1) / 2)
    # How much each update counts: from w_0 = 1, of what was there before, to w_count = 0. Within
    # the steps between two checkpoints all updates count alike.
    shares = 1 - np.sqrt(np.arange(count + 1) / count)
    # c_j = w_j - w_(j + 1), which undoes the sum in the docstring of the module
    return shares[:-1] - shares[1:]


def planned_steps(steps: int, every: int, last: int) -> list[int]:
    """Return the steps of the last checkpoints that a training saves by plan, the oldest first.

    Checkpoints that are saved for other reasons, such as a signal, are none of them: a training
    that was interrupted gives the same average as one that was not.

    Args:
        steps: of the whole training.
        every: steps between checkpoints.
        last: how many of them.

    Raises:
        UserError: the training saves fewer.

    Example:
        >>> planned_steps(steps=50, every=20, last=3)
        [20, 40, 50]
    """
    # the last step is saved whatever `every` is, and stands in no place twice
    planned = [*range(every, steps, every), steps]
    if len(planned) < last:
        raise UserError(
            f"checkpoints.last = {last}: a training of {steps} steps that saves every {every} has"
            f" {len(planned)} checkpoints; lower training.checkpoint_every, or last"
        )
    return planned[-last:]


def average(models: Iterable[Tree], shares: np.ndarray, dtype: str) -> Tree:
    """Return the weighted mean of models, summed in float32 in their order and rounded once.

    Args:
        models: trees of arrays, float32, taken one at a time; each is given up to it.
        shares: float64, the weight of each.
        dtype: of the result.

    Example:
        >>> two = ({"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, 6.0])})
        >>> average(iter(two), np.array([0.5, 0.5]), "float32")["w"].tolist()
        [2.0, 4.0]
    """
    total: Tree | None = None
    for model, share in zip(models, shares, strict=True):
        # two programs: in one, a compiler may round product and sum once, which gives other bits
        scaled = _scale(model, share)
        total = scaled if total is None else _add(total, scaled)
    assert total is not None
    # once, at the end: in bfloat16 each sum would lose what one checkpoint has moved
    return _cast(total, dtype=dtype)


# Both give up their first argument: a sum of large models never stands beside a copy of itself.
@partial(jax.jit, donate_argnums=0)
def _scale(model: Tree, share: jax.Array) -> Tree:
    return jax.tree.map(lambda x: x * share.astype(x.dtype), model)


@partial(jax.jit, donate_argnums=0)
def _add(total: Tree, scaled: Tree) -> Tree:
    return jax.tree.map(jnp.add, total, scaled)


@partial(jax.jit, static_argnames="dtype")
def _cast(total: Tree, *, dtype: str) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype), total)
