"""What a comparison that found no difference may say: equivalence, and what it could have found."""

from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

from jax_ordermerge.analysis.result import CONFIDENCE
from jax_ordermerge.errors import UserError

POWER = 0.8  # at which a difference counts as detectable


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of a difference against a margin on either side."""

    margin: float
    p: float  # the larger of the two

    @property
    def holds(self) -> bool:
        """Whether the difference is shown to lie within the margin."""
        return self.p < 1 - CONFIDENCE


def equivalence(estimate: float, se: float, freedom: float, *, margin: float) -> Equivalence:
    """Test whether a difference lies within `margin` of zero on both sides (TOST).

    The null hypothesis is that it lies outside. A difference that is merely not distinguishable
    from zero is no evidence for equivalence; this test is.

    Args:
        estimate, se: of the difference.
        freedom: degrees of freedom of Student's t; infinity for a normal estimate.
        margin: the largest difference that does not matter, above 0. State it before looking.

    Raises:
        UserError: a margin or an error that is not above 0 and finite.

    Example:
        >>> equivalence(0.001, 0.001, 99, margin=0.005).holds
        True
        >>> equivalence(0.001, 0.003, 99, margin=0.005).holds
        False

    Source: Schuirmann, "A comparison of the two one-sided tests procedure and the power approach
        for assessing the equivalence of average bioavailability", 1987.
    """
    if not (0 < margin < np.inf and 0 < se < np.inf):
        raise UserError(
            f"equivalence: expected a margin and an error above 0, given {margin} and {se}"
        )
    below = stats.t.sf((estimate + margin) / se, freedom)
    above = stats.t.cdf((estimate - margin) / se, freedom)
    return Equivalence(margin, float(max(below, above)))


def detectable(se: float, freedom: float) -> float:
    """Return the smallest true difference that a two-sided 5 % t-test finds four times in five.

    Example:
        >>> round(detectable(1.0, 1e6), 3)
        2.802
    """
    if not se > 0:
        return 0.0
    critical = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))

    def lacking(shift: float) -> float:
        # The test in the wrong direction has next to no power and is left out.
        return float(stats.nct.sf(critical, freedom, shift)) - POWER

    # Quantiles of Student's t bracket the noncentrality: it exceeds that of a normal estimate.
    # Above some 1e4 degrees of freedom t is normal to five digits, and nct loses its precision.
    if freedom > 1e4:
        return se * float(critical + stats.norm.ppf(POWER))
    return se * float(optimize.brentq(lacking, critical, 2 * critical + 10))
