"""Greedy soup: the average of the members that help on validation data.

Source: Wortsman et al., "Model soups", https://arxiv.org/abs/2203.05482, recipe 1.
"""

from collections.abc import Callable, Sequence

from jax_ordermerge.merge.methods import average
from jax_ordermerge.merge.methods.parts import Prepared, Tensor
from jax_ordermerge.merge.methods.table import METHODS, Choice, Method


def choose(losses: Sequence[float], loss_of: Callable[[Sequence[int]], float]) -> Choice:
    """Add members to the average, best first, and keep each one that does not make it worse.

    Args:
        losses: of each member alone, on validation data and never on test data.
        loss_of: returns the loss of the average of these members.

    Example:
        >>> choose([3.0, 1.0, 2.0], lambda members: {(1, 2): 0.5, (1, 2, 0): 0.9}[tuple(members)])
        Choice(members=(1, 2), losses=[1.0, 0.5, 0.9])
    """
    # equal losses: the lower number first, so that every process chooses the same
    first, *candidates = sorted(range(len(losses)), key=lambda member: (losses[member], member))
    soup: tuple[int, ...] = (first,)
    best, history = losses[first], [losses[first]]
    for member in candidates:
        loss = loss_of((*soup, member))
        history.append(loss)
        # equality counts as no worse, as in recipe 1
        if loss <= best:
            soup, best = (*soup, member), loss
    return Choice(soup, history)


def prepare(tensor: Tensor) -> Prepared:
    """Average of the chosen members, with equal weights."""
    return average.prepare(tensor)


METHODS.register(
    "greedy_soup",
    Method(
        prepare,
        average.apply,
        "arXiv 2203.05482, recipe 1",
        needs_base=lambda parameters: False,
        weights="none",
        needs="validation",
        choose=choose,
    ),
)
