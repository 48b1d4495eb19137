"""Sections on what is trained: the members and their orders, and the objective."""

from typing import Annotated, Literal

import pydantic
from pydantic import Field, PositiveFloat, PositiveInt

from jax_ordermerge.config.section import Section, one_of
from jax_ordermerge.errors import UserError


class Population(Section):
    """The members and the orders in which they see the data."""

    members: PositiveInt = Field(
        4,
        description="members of a population: how many times the base is fine-tuned",
        json_schema_extra={"unit": "members"},
    )
    # A difference between two merges of one population is an accident of its orders in part. Only
    # further populations say how large a part.
    replicates: PositiveInt = Field(
        1,
        description="independent populations of so many members; each has orders of its own and is"
        " merged by itself, and differences get an error over populations",
        json_schema_extra={
            "unit": "populations",
            "with": "not training.mixing, not data.packing = bins",
        },
    )
    wave: PositiveInt | None = Field(
        None,
        description="members trained at the same time; by default as many as fit in memory",
        examples=[2],
        json_schema_extra={"unit": "members", "with": "not training.mixing"},
    )
    # `batch` keeps the composition of batches (is it position or diversity?), `same` gives all
    # members one order as a control, `balanced` and `reverse` spread the positions of each sample
    # by design.
    level: Literal["sample", "batch", "balanced", "same", "reverse"] = Field(
        "sample", description="what the orders permute"
    )
    reshuffle: Literal["each_epoch", "never"] = Field(
        "each_epoch",
        description="each_epoch: every epoch has an order of its own; never: all have that of the"
        " first",
    )
    # Without dropout, because there is none in training: a member's batch decides its update.
    vary: Literal["order", "init", "all"] = Field(
        "order",
        description="what differs between members: their order; with lora the initialization of"
        " their adapters (init), all in the order of the first member; or all of these",
        json_schema_extra={"with": "init and all: lora"},
    )

    # "before": the type would only list what is allowed
    @pydantic.field_validator("vary", mode="before")
    @classmethod
    def _no_dropout(cls, value: object) -> object:
        if value == "dropout":
            raise ValueError(
                "population.vary = dropout: there is no dropout in training, so it cannot differ;"
                " give order, init or all"
            )
        return value

    @property
    def total(self) -> int:
        """Members of all populations. They are numbered on, and trained as one population."""
        return self.members * self.replicates

    # A method and no validator: `mesh.order` may be -1, which only the devices resolve.
    def check_groups(self, groups: int) -> None:
        """Check that the device groups of a mesh share the members evenly.

        Args:
            groups: size of the mesh axis `order`.

        Raises:
            UserError: they do not.

        Example:
            >>> Population(members=4).check_groups(2)
        """
        # Each group trains the same number of members: a group that waits is paid for as well.
        total = "members x replicates" if self.replicates > 1 else "members"
        for key, members in ((total, self.total), ("wave", self.wave or groups)):
            if members % groups:
                raise UserError(
                    f"population.{key} = {members} is not a multiple of the order axis"
                    f" ({groups} device groups); change one"
                )


# -------------------------------------------------------------------------------------- objective


class Sft(Section):
    """Supervised fine-tuning: the loss of the responses."""

    kind: Literal["sft"] = "sft"


class Dpo(Section):
    """Direct preference optimization: the loss of preference pairs, with the base as reference."""

    kind: Literal["dpo"] = "dpo"
    # the default of TRL
    beta: PositiveFloat = Field(
        0.1,
        description="strength of the pull towards the base; tau in the paper on ipo",
        json_schema_extra={"unit": "per nat"},
    )
    loss: Literal["sigmoid", "ipo"] = Field(
        "sigmoid", description="-log sigmoid of the margin, or its squared distance to a target"
    )
    # below 0.5, where a preference would say nothing
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0,
        description="sigmoid: share of pairs whose preference is assumed to be flipped",
        json_schema_extra={"unit": "share", "with": "objective.loss = sigmoid"},
    )

    @pydantic.model_validator(mode="after")
    def _smoothing_goes_with_sigmoid(self) -> "Dpo":
        # the loss ipo has no term for it, so it would be ignored silently
        if self.loss == "ipo" and self.label_smoothing:
            raise ValueError(
                "label_smoothing goes with loss = sigmoid; set it to 0, or the loss to sigmoid"
            )
        return self


Objective = Annotated[
    Sft | Dpo, Field(discriminator="kind"), one_of(Sft, Dpo, noun="objective", default="sft")
]
