"""The section `merge` of the config: what is merged, what it is seen beside, and how the best of many merges is looked for."""

import math
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveInt

from jax_ordermerge.config.section import Section, parse

AUTO = "auto"  # the name of the merge that a search chose
Dtype = Literal["float32", "bfloat16", "float16"]
Sampler = Literal["grid", "random", "tpe", "cma-es"]
Control = Literal[
    "lambda_line",
    "norm_matched",
    "lambda_matched",
    "seeds",
    "children",
    "barrier",
    "plane",
    "ensemble",
    "single",
]
DEFAULT_CONTROLS: tuple[Control, ...] = (
    "lambda_line",
    "norm_matched",
    "lambda_matched",
    "seeds",
    "children",
    "barrier",
)


class Range(Section):
    """A range of numbers: all of it for samplers that draw, `steps` evenly spaced values of it for a grid."""

    low: float
    high: float
    steps: Annotated[int, Field(ge=2)] = 5
    log: bool = Field(False, description="evenly spaced in the logarithm")

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> "Range":
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"a range from low = {self.low} to high = {self.high}: give finite numbers, low below high"
            )
        if self.log and self.low <= 0:
            raise ValueError(f"a range from low = {self.low} with log: true; give low above 0")
        return self

    def values(self) -> list[float]:
        """Return the values that a grid tries.

        Example:
            >>> Range(low=0.5, high=1.5, steps=3).values()
            [0.5, 1.0, 1.5]
        """
        return [self.at(step / (self.steps - 1)) for step in range(self.steps)]

    def at(self, share: float) -> float:
        """Return the value at a share of the way, 0 to 1, to nine digits.

        Example:
            >>> Range(low=1, high=100, log=True).at(0.5)
            10.0
        """
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        return float(f"{math.exp(value) if self.log else value:.9g}")


def _knob(given: Any) -> Any:
    """A mapping is a range, a list holds choices, anything else is constant."""
    if isinstance(given, dict):
        return parse(Range, given, "a range")
    return tuple(given) if isinstance(given, list) else given


Knob = Annotated[Any, pydantic.BeforeValidator(_knob)]


class Entry(Section):
    """A family of candidates: a method of merging, with a value, a list of choices, or a range for whatever may vary."""

    method: str
    parameters: dict[str, Knob] = Field(default_factory=dict)
    scale: Knob = Field(1.0, description="lambda: the merged task vector times that")
    groups: dict[str, Knob] = Field(
        default_factory=dict,
        description="lambda of some tensors, times `scale`: embedding, attention, mlp, norm, head, or layers:FIRST-LAST (from 0)",
    )
    weights: Literal["equal", "simplex"] | tuple[tuple[NonNegativeFloat, ...], ...] = Field(
        "equal",
        description="of the members: a list of choices, or simplex: any that sum to 1 (not of a grid)",
    )
    seed: Knob = Field(None, description="of methods that draw; by default the seed of the run")


def _default_entries() -> tuple[Entry, ...]:
    lengths = {"low": 0.7, "high": 1.6, "steps": 4}
    return (
        Entry(
            method="task_arithmetic", parameters={"scale": {"low": 0.5, "high": 2.0, "steps": 31}}
        ),
        Entry(method="norm_matched"),
        Entry(method="selection", parameters={"resample": [0, "exhaustive"]}, scale=lengths),
        Entry(method="ties", parameters={"density": [0.5, 0.8]}, scale=lengths),
        Entry(method="model_stock", scale=lengths),
        *(
            Entry(
                method="average",
                scale={"low": 0.8, "high": 1.4, "steps": 4},
                groups={group: [0.7, 1.3]},
            )
            for group in ("attention", "mlp", "embedding")
        ),
    )


class Search(Section):
    """How a merge is chosen on validation examples, and among which: base, members and their average are always there."""

    methods: tuple[Entry, ...] = Field(default_factory=_default_entries)
    budget: PositiveInt = Field(
        200, description="candidates at most, beside base, members and average"
    )
    sampler: Sampler = Field("grid", description="grid, random; tpe, cma-es (extra: search)")
    smallest: PositiveInt = Field(
        16,
        description="validation examples of the first round, in which all candidates are measured",
    )
    seed: int | None = Field(
        None, description="of the draws and of the subsets; by default the seed of the run"
    )


class MergeSpec(Section):
    """One merge: a method of the table and its parameters."""

    name: str | None = Field(None, description="directory name, by default method and seed")
    method: str = Field(description="a merge method; greedy_soup needs data.validation_examples")
    seed: int | None = Field(None, description="by default the seed of the run")
    seeds: tuple[int, ...] = Field(
        (),
        description="several seeds: one merge each, named NAME-seedS, which the report sums up together",
        exclude=True,
    )
    weights: tuple[NonNegativeFloat, ...] | None = Field(
        None, description="one a member, by default equal"
    )
    parameters: dict[str, Any] = Field(default_factory=dict)

    @pydantic.model_validator(mode="after")
    def _one_way(self) -> "MergeSpec":
        if self.seeds and self.seed is not None:
            raise ValueError(
                f"merge.methods: {self.method} has both seed = {self.seed} and seeds = {list(self.seeds)}; give one"
            )
        return self

    def each(self) -> "tuple[MergeSpec, ...]":
        """Return the merges that this entry asks for: itself, or one for each of its seeds."""
        if not self.seeds:
            return (self,)
        named = self.name or self.method
        return tuple(
            self.model_copy(update={"name": f"{named}-seed{seed}", "seed": seed, "seeds": ()})
            for seed in self.seeds
        )


class Merge(Section):
    """What is merged, and in which dtype members are exported, merged and served."""

    dtype: Dtype = "bfloat16"
    fisher_examples: PositiveInt = Field(
        256, description="training examples from which method fisher estimates the information"
    )
    methods: tuple[MergeSpec, ...] = Field(
        (MergeSpec(method="average"), MergeSpec(method="selection")),
        description="none by default where auto is given",
    )
    auto: Search | None = Field(
        None,
        description="the best of many merges on validation data, exported as merge `auto`; `merge: auto` is short for it",
    )
    controls: tuple[Control, ...] = Field(
        DEFAULT_CONTROLS,
        description="what the report sets the merges beside, as losses, nothing is written: default, none, or a list",
    )

    @pydantic.field_validator("methods", mode="after")
    @classmethod
    def _each_seed(cls, given: tuple[MergeSpec, ...]) -> tuple[MergeSpec, ...]:
        return tuple(one for spec in given for one in spec.each())

    @pydantic.model_validator(mode="before")
    @classmethod
    def _short_forms(cls, given: Any) -> Any:
        """Take `auto` for the whole section, and `default` and `none` for the controls."""
        if isinstance(given, str):
            if given != AUTO:
                raise ValueError(f"merge = {given!r}: expected a section, or auto")
            given = {"auto": {}}
        if not isinstance(given, dict):
            return given
        filled: dict[str, Any] = (
            {"methods": ()} | given if given.get("auto") is not None else dict(given)
        )
        asked = filled.get("controls", ())
        if asked is None or isinstance(asked, str):
            named: dict[str | None, tuple[Control, ...]] = {
                "default": DEFAULT_CONTROLS,
                "none": (),
                None: (),
            }
            if asked not in named:
                raise ValueError(
                    f"merge.controls = {asked!r}: expected default, none, or a list such as [lambda_line, seeds]"
                )
            filled["controls"] = named[asked]
        return filled


def merge_name(spec: MergeSpec) -> str:
    """Return the directory name of a merge: its `name`, else `METHOD` or `METHOD-seedS`.

    A merge that takes the seed of the run is named by its method alone, so that a run with
    another seed has the same names.

    Example:
        >>> merge_name(MergeSpec(method="average"))
        'average'
        >>> merge_name(MergeSpec(method="selection", seed=3))
        'selection-seed3'
    """
    if spec.name:
        return spec.name
    return spec.method if spec.seed is None else f"{spec.method}-seed{spec.seed}"
