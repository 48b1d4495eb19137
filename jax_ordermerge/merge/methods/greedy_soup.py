"""Greedy soup: which members to average, found with a function that says how good a model is."""

from collections.abc import Callable, Sequence


def greedy(
    scores: Sequence[float], evaluate: Callable[[tuple[int, ...]], float]
) -> tuple[tuple[int, ...], list[float]]:
    """Add members to the average, best first, and keep each one that does not make it worse.

    Args:
        scores: of each member alone, lower is better; on validation data, never on test data.
        evaluate: returns the score of the average of these members.

    Returns:
        the members kept, in the order they came, and the score after each member that was tried.

    Example:
        >>> greedy([3.0, 1.0, 2.0], lambda members: {(1, 2): 0.5, (1, 2, 0): 0.9}[members])
        ((1, 2), [1.0, 0.5, 0.9])

    Source: Wortsman et al., "Model soups" (arXiv 2203.05482), recipe 1.
    """
    first, *others = sorted(range(len(scores)), key=lambda member: (scores[member], member))
    kept: tuple[int, ...] = (first,)
    best, seen = scores[first], [scores[first]]
    for member in others:
        found = evaluate((*kept, member))
        seen.append(found)
        if found <= best:
            kept, best = (*kept, member), found
    return kept, seen
