"""What may be claimed of the winner of a search, on examples that had no part in the choice."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jax_ordermerge.analysis import paired
from jax_ordermerge.analysis.paired import Claim

WINNER = "winner"
WINNER_AT_ONE = "winner_at_one"  # with every lambda at 1
BEST_MEMBER, MEAN_MEMBER, AVERAGE = "best_member", "mean_member", "average"
# At the lambda that was best on validation. A member that is only stretched can gain as much as a
# merge that is; what the merge has gained by merging is the difference between the two.
SCALED_MEMBER, SCALED_AVERAGE = "scaled_member", "scaled_average"


@dataclass(frozen=True)
class SearchClaim:
    """Comparisons of a search, with p values corrected for the number of all of them.

    A comparison of two models with the same losses is left out.

    Attributes:
        loss: mean of each model, by its part.
        against: winner less rival, by rival.
        at_one: the same with every lambda at 1; empty where the winner has no other.
        length: the best member at its own lambda less the best member, None where it is 1.
        merging_helps: the winner is a merge, and better than the best member at its own lambda.
        length_helps: the best member at its own lambda is better than at 1.
    """

    loss: dict[str, float]
    against: dict[str, Claim]
    at_one: dict[str, Claim]
    length: Claim | None
    merging_helps: bool
    length_helps: bool


def make_claim(
    losses: Mapping[str, np.ndarray],
    weights: np.ndarray,
    *,
    is_merge: bool,
    resamples: int = 1000,
    seed: int = 0,
) -> SearchClaim:
    """Compare the winner of a search with its rivals, at its lambda and at 1.

    Args:
        losses: [n] by part, on test items: the constants of this module, all of them.
        weights: [n], tokens of each item.
        is_merge: whether the winner is a merge.
        resamples, seed: of the bootstrap.

    Example:
        >>> losses = {
        ...     part: np.array([1.0, 2.0, 3.0, 4.0]) + shift * np.array([1.0, 1.1, 0.9, 1.0])
        ...     for part, shift in {
        ...         WINNER: -0.5,
        ...         WINNER_AT_ONE: -0.3,
        ...         SCALED_MEMBER: -0.2,
        ...         SCALED_AVERAGE: -0.5,
        ...         BEST_MEMBER: 0.0,
        ...         MEAN_MEMBER: 0.0,
        ...         AVERAGE: -0.3,
        ...     }.items()
        ... }
        >>> claim = make_claim(losses, np.ones(4), is_merge=True)
        >>> list(claim.against), list(claim.at_one), claim.merging_helps, claim.length_helps
        (['best_member', 'scaled_member', 'mean_member', 'average'], ['best_member', 'mean_member'],
         True, True)
    """
    rivals = (BEST_MEMBER, SCALED_MEMBER, MEAN_MEMBER, AVERAGE, SCALED_AVERAGE)
    pairs = [(WINNER, rival) for rival in rivals]
    # of a winner at 1 these are the comparisons above
    if not np.array_equal(losses[WINNER], losses[WINNER_AT_ONE]):
        pairs += [(WINNER_AT_ONE, rival) for rival in (BEST_MEMBER, MEAN_MEMBER, AVERAGE)]
    length = (SCALED_MEMBER, BEST_MEMBER)
    # one family: whoever reads them looks for any that is clear
    claims = paired.claims(
        {(model, rival): (losses[model], losses[rival]) for model, rival in (*pairs, length)},
        weights,
        resamples=resamples,
        seed=seed,
    )
    # a winner that is its own best scaled member has nothing that merging could explain
    merging = claims.get((WINNER, SCALED_MEMBER))
    return SearchClaim(
        loss={
            part: float((values * weights).sum() / weights.sum()) for part, values in losses.items()
        },
        against={rival: claims[WINNER, rival] for rival in rivals if (WINNER, rival) in claims},
        at_one={
            rival: claims[WINNER_AT_ONE, rival]
            for rival in rivals
            if (WINNER_AT_ONE, rival) in claims
        },
        length=claims.get(length),
        merging_helps=is_merge and merging is not None and merging.is_better,
        length_helps=length in claims and claims[length].is_better,
    )
