"""What the statistics of this package share: they may be undetermined, and they become JSON."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np

from jax_ordermerge.json_types import Json, JsonValue

T = TypeVar("T")
P = ParamSpec("P")

CONFIDENCE = 0.95  # of every interval and band
TAILS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
# A field with this metadata is written into the JSON object of its parent, without a key.
INLINE = {"inline": True}


class Undetermined(ValueError):
    """The data do not determine a statistic; the message is the reason that a reader is shown."""


@dataclass(frozen=True)
class Missing:
    """Stands in place of a statistic that the data do not determine."""

    reason: str  # written into analysis.json, and shown in the report


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its standard error and the bounds of its 95 % interval."""

    estimate: float
    se: float
    low: float
    high: float

    def scaled(self, factor: float) -> "Estimate":
        """Return the estimate times a constant of at least 0."""
        return Estimate(
            *(factor * value for value in (self.estimate, self.se, self.low, self.high))
        )


def or_missing(statistic: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | Missing:
    """Return `statistic(*args)`, or `Missing` with the reason where it is undetermined.

    Example:
        >>> def fail():
        ...     raise Undetermined("one member only")
        >>> or_missing(fail)
        Missing(reason='one member only')
    """
    try:
        return statistic(*args, **kwargs)
    except Undetermined as error:
        return Missing(str(error))


def asdict(result: object) -> JsonValue:
    """Return results of this package as plain data for JSON. Fields that are None are left out.

    Example:
        >>> @dataclass(frozen=True)
        ... class Epoch:
        ...     epoch: int
        ...     gap: Estimate | Missing = dataclasses.field(metadata=INLINE)
        ...     note: str | None = None
        >>> asdict([Epoch(1, Missing("too few samples"))])
        [{'epoch': 1, 'reason': 'too few samples'}]
    """
    if dataclasses.is_dataclass(result):
        # by hand: `dataclasses.asdict` keeps None, nests everything and copies the arrays
        document: Json = {}
        for field in dataclasses.fields(result):
            value = asdict(getattr(result, field.name))
            if field.metadata.get("inline"):
                document |= value
            elif value is not None:
                document[field.name] = value
        return document
    if isinstance(result, dict):
        return {key: asdict(value) for key, value in result.items()}
    if isinstance(result, list | tuple):
        return [asdict(value) for value in result]
    return result.tolist() if isinstance(result, np.ndarray) else result
