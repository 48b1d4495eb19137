"""The section `merge`: methods, controls, and the search for the best of many merges."""

import math
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, NonNegativeFloat, PositiveInt

from jax_ordermerge.config.section import FREE_TO_CHANGE, Section, parse
from jax_ordermerge.json_types import Json

AUTO = "auto"  # name of the merge that a search selects
LOSS = "loss"  # the measure that is no task
Dtype = Literal["float32", "bfloat16", "float16"]
Sampler = Literal["grid", "random", "tpe", "cma-es"]
CheckpointWeights = Literal["equal", "linear", "wsm"]
# Why controls: in expectation selection is the average plus noise of mean zero, and resampling
# lengthens the task vector; the average shortens it. A gain counts only beside models that have the
# same length, or the same noise, and beside members that may choose their length, too.
Control = Literal[
    "lambda_line",
    "lambda_members",
    "lambda_selections",
    "norm_matched",
    "lambda_matched",
    "seeds",
    "children",
    "barrier",
    "subsets",
    "subset_scores",
    "plane",
    "ensemble",
    "single",
]
# Without `single`, which trains for as long as the whole population, and without the plane, the
# ensemble and the subsets' answers to tasks, which cost further forward passes.
DEFAULT_CONTROLS: tuple[Control, ...] = (
    "lambda_line",
    "lambda_members",
    "lambda_selections",
    "norm_matched",
    "lambda_matched",
    "seeds",
    "children",
    "barrier",
    "subsets",
)


def unmerged_controls(members: int) -> dict[str, str]:
    """Return the names in tables of the controls that are no merges, by their names in configs.

    Example:
        >>> unmerged_controls(4)["single"]
        'one run of 4 times the epochs'
    """
    return {
        "ensemble": "logit ensemble of the members",
        "single": f"one run of {members} times the epochs",
    }


# Names of mergekit for methods that have another name here.
METHOD_ALIASES = {"linear": "average", "parameter_selection": "selection"}


def canonical_method(name: str) -> str:
    """Return the name of a merge method by its name or that of mergekit.

    Example:
        >>> canonical_method("linear"), canonical_method("ties")
        ('average', 'ties')
    """
    return METHOD_ALIASES.get(name, name)


MethodName = Annotated[str, pydantic.AfterValidator(canonical_method)]


class Range(Section):
    """A range of numbers. Samplers draw from all of it, a grid takes `steps` spaced values."""

    low: float = Field(
        description="least value", examples=[0.5], json_schema_extra={"unit": "value of the key"}
    )
    high: float = Field(
        description="largest value", examples=[2.0], json_schema_extra={"unit": "value of the key"}
    )
    # at least both ends: `values` divides by steps - 1
    steps: Annotated[int, Field(ge=2)] = Field(
        5,
        description="values of a grid, both ends among them",
        json_schema_extra={"unit": "values", "with": "merge.auto.sampler = grid"},
    )
    log: bool = Field(False, description="evenly spaced in the logarithm")

    @pydantic.model_validator(mode="after")
    def _ascending(self) -> "Range":
        # YAML reads .inf and .nan as numbers, which pass as floats.
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(
                f"a range from low = {self.low} to high = {self.high}: give finite numbers, low"
                " below high"
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

    def at(self, fraction: float) -> float:
        """Return the value at a fraction of the way, rounded to nine digits.

        Example:
            >>> Range(low=1, high=100, log=True).at(0.5)
            10.0
        """
        # nine digits: a grid from 0.5 to 1.5 has 0.7, not 0.7000000000000001, in names and reports
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + fraction * (high - low)
        return float(f"{math.exp(value) if self.log else value:.9g}")


def _search_value(value: object) -> object:
    if isinstance(value, dict):
        return parse(Range, value, "a range")
    # a tuple, as all sequences of a frozen section: a list in it could still be changed
    return tuple(value) if isinstance(value, list) else value


# What a search varies: a mapping is a range, a list holds choices, anything else is constant.
SearchValue = Annotated[Any, pydantic.BeforeValidator(_search_value)]


class Trajectory(Section):
    """Which checkpoints of a member are averaged before the members are merged."""

    last: Annotated[int, Field(ge=2)] = Field(
        description="how many of the last checkpoints that training.checkpoint_every saves",
        examples=[4],
        json_schema_extra={
            "unit": "checkpoints",
            "with": "training.checkpoint_every; not training.checkpoint = best",
        },
    )
    weights: CheckpointWeights = Field(
        "equal",
        description="equal; linear: in proportion to 1, 2, ... from the oldest; wsm: what a decay"
        " by 1 - sqrt of the learning rate would have done, most for the oldest",
    )


class Entry(Section):
    """A family of candidates: a merge method, and a value, choices or a range for each setting."""

    method: MethodName = Field(description="a merge method", examples=["ties"])
    parameters: dict[str, SearchValue] = Field(
        default_factory=dict,
        description="of the method: a value, a list of choices, or a range {low, high, steps, log}",
        examples=[{"density": [0.2, 0.5]}],
    )
    scale: SearchValue = Field(
        1.0,
        description="lambda, a factor of the merged task vector",
        json_schema_extra={"unit": "factor"},
    )
    groups: dict[str, SearchValue] = Field(
        default_factory=dict,
        description="lambda of groups of tensors, times `scale`: embedding, attention, mlp, norm,"
        " head, or layers:FIRST-LAST (from 0)",
        examples=[{"mlp": [0.8, 1.2], "layers:0-3": 1.1}],
        json_schema_extra={"unit": "factor"},
    )
    weights: Literal["equal", "simplex"] | tuple[tuple[NonNegativeFloat, ...], ...] = Field(
        "equal",
        description="weights of the members. A list holds choices; simplex: any weights that sum to"
        " 1 (not with a grid)",
        json_schema_extra={"unit": "share"},
    )
    seed: SearchValue = Field(
        None,
        description="seed of methods that draw; by default the seed of the run",
        examples=[[0, 1]],
        json_schema_extra={"with": "a method that draws"},
    )
    checkpoints: Trajectory | None = Field(
        None,
        description="merge averages of each member's last checkpoints; null merges the last",
        examples=[{"last": 4}],
        json_schema_extra={"with": "training.checkpoint_every"},
    )

    # A search that an earlier version began has losses of the same candidates, and goes on.
    @pydantic.model_serializer(mode="wrap")
    def _without_null_checkpoints(self, serialize: pydantic.SerializerFunctionWrapHandler) -> Json:
        plain: Json = serialize(self)
        return {key: value for key, value in plain.items() if (key, value) != ("checkpoints", None)}


def _default_entries() -> tuple[Entry, ...]:
    # 76 candidates in all; the 31 scales are steps of 0.05. They lie on both sides of 1, because an
    # average is shorter than its members, and resampling makes a task vector longer.
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
    """How a merge is selected on validation examples, and from which candidates.

    The base, the members and their average are always candidates, and the members and the average
    also at other lambdas: a merge has to beat the best member at that member's own best lambda.
    """

    # A factory: the entries are validated when they are needed, not at import.
    methods: tuple[Entry, ...] = Field(
        default_factory=_default_entries,
        description="families of candidates",
        examples=[[{"method": "ties", "parameters": {"density": [0.2, 0.5, 0.8]}}]],
        json_schema_extra={"with": "merge.auto.budget"},
    )
    lambdas: Range = Field(
        # A factory, as above. As wide as the line of the average among the methods, in steps of
        # 0.1.
        default_factory=lambda: Range(low=0.5, high=2.0, steps=16),
        description="lambdas at which every member and the average are candidates, besides 1",
    )
    measure: tuple[str, ...] = Field(
        (LOSS,),
        description="what is minimized: loss; a task of `evaluation` (its share of wrong answers);"
        " or a list: the mean of these, each divided by that of the mean member",
        json_schema_extra={"with": "evaluation.tasks, unless loss"},
    )
    loss_margin: NonNegativeFloat = Field(
        0.005,
        description="a winner whose validation loss is higher than that of the best member by more"
        " than this is not shipped",
        json_schema_extra={"unit": "nats per token"},
    )
    task_margin: NonNegativeFloat = Field(
        0.01,
        description="the same for the share of wrong answers of every task that can be measured on"
        " validation examples",
        json_schema_extra={"unit": "share"},
    )
    budget: PositiveInt = Field(
        200,
        description="largest number of candidates from `methods`",
        json_schema_extra={"unit": "candidates"},
    )
    # The grid needs no optional package, and its candidates do not depend on a seed.
    sampler: Sampler = Field("grid", description="grid, random; tpe, cma-es (extra: search)")
    smallest: PositiveInt = Field(
        16,
        description="validation examples of the first round, in which all candidates are measured",
        json_schema_extra={"unit": "examples", "with": "data.validation_examples"},
    )
    seed: int | None = Field(
        None, description="seed of draws and subsets; by default the seed of the run", examples=[0]
    )

    @pydantic.field_validator("measure", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @pydantic.field_validator("measure", mode="after")
    @classmethod
    def _distinct(cls, measure: tuple[str, ...]) -> tuple[str, ...]:
        if not measure or len({*measure}) < len(measure):
            raise ValueError(
                f"measure = {list(measure)}: give loss, a task, or several of them, each once"
            )
        return measure


class MergeSpec(Section):
    """One merge: a method of the table and its parameters."""

    name: str | None = Field(
        None,
        min_length=1,
        description="directory name, by default method and seed",
        examples=["average-lambda1.2"],
    )
    method: MethodName = Field(
        description="a merge method; greedy_soup needs data.validation_examples", examples=["ties"]
    )
    seed: int | None = Field(
        None,
        description="seed of a method that draws; by default the seed of the run",
        examples=[3],
        json_schema_extra={"with": "not merge.methods.seeds"},
    )
    # Excluded from dumps: a resolved config lists the single merges that this stands for.
    seeds: tuple[int, ...] = Field(
        (),
        description="one merge per seed, named NAME-seedS; the report summarizes them together",
        exclude=True,
        examples=[[0, 1, 2]],
        json_schema_extra={"with": "not merge.methods.seed"},
    )
    weights: tuple[NonNegativeFloat, ...] | None = Field(
        None,
        description="one weight per member; by default equal",
        examples=[[1, 2, 1, 1]],
        json_schema_extra={
            "unit": "share",
            "with": "population.members, of which there are as many",
        },
    )
    parameters: Json = Field(
        default_factory=dict,
        description="of the method",
        examples=[{"density": 0.5}],
        json_schema_extra={"with": "merge.methods.method"},
    )
    checkpoints: Trajectory | None = Field(
        None,
        description="merge averages of each member's last checkpoints; null merges the last",
        examples=[{"last": 4}],
        json_schema_extra={"with": "training.checkpoint_every"},
    )

    @pydantic.model_validator(mode="after")
    def _seed_or_seeds(self) -> "MergeSpec":
        if self.seeds and self.seed is not None:
            raise ValueError(
                f"merge.methods: {self.method} has both seed = {self.seed} and seeds ="
                f" {list(self.seeds)}; give one"
            )
        return self

    def by_seed(self) -> "tuple[MergeSpec, ...]":
        """Return one merge for each of `seeds`, or this one if there are none."""
        if not self.seeds:
            return (self,)
        prefix = self.name or merge_name(self)
        return tuple(
            self.model_copy(update={"name": f"{prefix}-seed{seed}", "seed": seed, "seeds": ()})
            for seed in self.seeds
        )


def _expand_controls(controls: Any) -> Any:
    """Replace `none`, `default` and a `default` in a list by the names that they stand for."""
    if controls in ("none", None):
        return ()
    listed = (controls,) if controls == "default" else controls
    if isinstance(listed, str):
        raise ValueError(
            f"merge.controls = {controls!r}: expected default, none, or a list such as"
            " [default, single] or [lambda_line, seeds]"
        )
    if not isinstance(listed, (list, tuple)):
        return controls  # pydantic says what is expected
    names = [x for name in listed for x in (DEFAULT_CONTROLS if name == "default" else (name,))]
    return tuple(name for i, name in enumerate(names) if name not in names[:i])


class Merge(Section):
    """Which merges are exported, and what the report compares them with."""

    # The dtype is part of the experiment: it decides how many elements of a member equal the base,
    # and so what resampling draws again.
    dtype: Dtype | None = Field(
        None,
        description="dtype of exported members and merges; null is that of the base",
        examples=["float32"],
    )
    fisher_examples: PositiveInt = Field(
        256,
        description="training examples on which method fisher estimates the information",
        json_schema_extra={"unit": "examples", "with": "method fisher"},
    )
    methods: tuple[MergeSpec, ...] = Field(
        (MergeSpec(method="average"), MergeSpec(method="selection")),
        description="merges of the members; none by default if auto is given",
        examples=[[{"method": "ties", "parameters": {"density": 0.5}}]],
    )
    auto: Search | None = Field(
        None,
        description="search for the best merge on validation data, exported as `auto`;"
        " `merge: auto` is short for it",
        examples=[{"budget": 100}],
        json_schema_extra={"with": "data.validation_examples"},
    )
    # The other populations are there for their differences, which need no files: all merges of six
    # populations of a 7B model are a terabyte.
    export: Annotated[Literal["first", "all"], FREE_TO_CHANGE] = Field(
        "first",
        description="with population.replicates: whose merges are written as models, those of the"
        " first population or of all; the others are merged in memory and evaluated",
        json_schema_extra={"with": "population.replicates"},
    )
    controls: tuple[Control, ...] = Field(
        DEFAULT_CONTROLS,
        description="models whose losses the report shows beside the merges; they are not"
        " exported: default, none, or a list, which may hold default",
    )

    # "after": the specs are parsed by then. Everything downstream sees one merge per seed.
    @pydantic.field_validator("methods", mode="after")
    @classmethod
    def _expand_seeds(cls, methods: tuple[MergeSpec, ...]) -> tuple[MergeSpec, ...]:
        return tuple(merge for spec in methods for merge in spec.by_seed())

    # "before", because the type of the field would refuse a name in place of a section.
    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand_names(cls, value: object) -> object:
        """Expand `auto` for the whole section, and `default` and `none` for the controls."""
        if isinstance(value, str):
            if value != AUTO:
                raise ValueError(f"merge = {value!r}: expected a section, or auto")
            value = {"auto": {}}
        if not isinstance(value, dict):
            return value
        section = dict(value)  # the caller's dict stays as it is
        if section.get("auto") is not None:
            # Who asks for a search gets its winner alone, unless methods are named, too.
            section.setdefault("methods", ())
        if "controls" in section:
            section["controls"] = _expand_controls(section["controls"])
        return section


def merge_name(spec: MergeSpec) -> str:
    """Return the directory name of a merge: its `name`, else `METHOD` and what it differs by.

    A merge that takes the seed of the run is named by its method alone, so that a run with
    another seed has the same names.

    Example:
        >>> merge_name(MergeSpec(method="average"))
        'average'
        >>> merge_name(MergeSpec(method="selection", seed=3))
        'selection-seed3'
        >>> merge_name(MergeSpec(method="average", checkpoints={"last": 4, "weights": "wsm"}))
        'average-last4-wsm'
    """
    if spec.name:
        return spec.name
    parts = [spec.method]
    if spec.checkpoints is not None:
        parts.append(f"last{spec.checkpoints.last}")
        parts += [spec.checkpoints.weights] if spec.checkpoints.weights != "equal" else []
    if spec.seed is not None:
        parts.append(f"seed{spec.seed}")
    return "-".join(parts)


def checkpoint_averages(merge: Merge) -> list[Trajectory]:
    """Return the averages of checkpoints that merges and search ask for."""
    averages = [spec.checkpoints for spec in merge.methods]
    averages += [entry.checkpoints for entry in merge.auto.methods] if merge.auto else []
    return [settings for settings in averages if settings is not None]


def checkpoints_merged(merge: Merge) -> int:
    """Return how many of the last checkpoints merges and search average, at most.

    Example:
        >>> checkpoints_merged(Merge(methods=({"method": "ties", "checkpoints": {"last": 3}},)))
        3
    """
    return max([1, *(settings.last for settings in checkpoint_averages(merge))])
