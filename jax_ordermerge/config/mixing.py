"""The section `training.mixing`: how members act on each other while they train."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, PositiveInt

from jax_ordermerge.config.section import Section

Share = Annotated[float, Field(gt=0, le=1)]
# settings of each kind and their defaults
_OWN: dict[str, dict[str, Any]] = {
    "wash": {"every": 1, "fraction": 0.001, "depth": "decreasing"},
    "papa": {"every": 10, "rate": 0.01},
}


class Mixing(Section):
    """Members that swap parameters (wash), or are drawn to their mean (papa); see `train/mixing.py`.

    Example:
        >>> Mixing(kind="papa").rate, Mixing(kind="wash", every=4).fraction
        (0.01, 0.001)
    """

    kind: Literal["wash", "papa"]
    every: PositiveInt | None = Field(
        None, description="steps from one mixing to the next: wash (1), papa (10)"
    )
    fraction: Share | None = Field(
        None, description="wash (0.001): share of the elements that change places at a mixing"
    )
    depth: Literal["constant", "decreasing"] | None = Field(
        None,
        description="wash (decreasing): the fraction is that of the embedding and falls to 0 at the head, or is the same everywhere",
    )
    rate: Share | None = Field(
        None,
        description="papa (0.01): how far members go to the mean at a mixing; 1 is all of the way",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _own_settings(cls, given: Any) -> Any:
        own = _OWN.get(str(given.get("kind"))) if isinstance(given, dict) else None
        if own is None:
            return given  # the type of `kind` says what is wrong
        for name in ("every", "fraction", "depth", "rate"):
            if name not in own and given.get(name) is not None:
                raise ValueError(
                    f"training.mixing.{name} = {given[name]!r} is not a setting of kind = {given['kind']} (it has: {', '.join(own)}); remove it"
                )
        return {
            **given,
            **{name: default for name, default in own.items() if given.get(name) is None},
        }
