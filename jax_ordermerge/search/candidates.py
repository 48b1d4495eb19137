"""Candidates: models that are built from a population in device memory, one at a time.

Nothing is written to disk. A candidate has the same bits as the merge of the same files.
"""

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig, TensorSpec
from jax_ordermerge.config.merge import CheckpointWeights
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.layout import member_name
from jax_ordermerge.merge import (
    blocks,
    diagnostics,
    population,
    population_diagnostics,
    rescale,
)
from jax_ordermerge.merge.methods import table

BASE, MEMBER = "base", "member"  # candidates that are no merges
# A member whose task vector is longer or shorter. Not "member": it is no model of the training, and
# the best member, the mean member and the spread between members are about those.
SCALED_MEMBER = "scaled member"
# Groups of tensors; the kinds of the tensor table.
KINDS = ("embedding", "attention", "mlp", "norm", "head")
_LAYERS = re.compile(r"layers:(\d+)-(\d+)")
# Of one model on examples: (summed losses, their token counts), float64[n] each.
LossFn = Callable[[tree.Tree, Examples], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that can be built from a population.

    Attributes:
        method: name of a merge method, or `base` or `member`.
        parameters: hyperparameters of the method; of `member`, its `number`.
        weights: one per member, None for the method's default.
        seed: of the methods that draw random numbers.
        scale: lambda, a factor on the task vector of the merge or the member.
        groups: lambda of some tensors, on top of `scale`; see `check_group`.
        checkpoints: which checkpoints of each member are averaged before, as `config.Trajectory`
            has it; None merges the last ones.
    """

    method: str
    parameters: JsonRow = dataclasses.field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    seed: int = 0
    scale: float = 1.0
    groups: Mapping[str, float] = dataclasses.field(default_factory=dict)
    checkpoints: Json | None = None

    @property
    def kind(self) -> str:
        """`base`, `member`, `scaled member` or `merge`."""
        if self.method == MEMBER and self.is_scaled:
            return SCALED_MEMBER
        return self.method if self.method in (BASE, MEMBER) else "merge"

    @property
    def is_scaled(self) -> bool:
        """Whether a lambda on top of the method is not 1."""
        return self.scale != 1 or any(value != 1 for value in self.groups.values())

    @property
    def length(self) -> float:
        """Lambda of all tensors: `scale` times the parameter `scale` of the method.

        Example:
            >>> Candidate("task_arithmetic", {"scale": 1.2}).length
            1.2
        """
        scale = self.parameters.get("scale", 1.0)
        return self.scale * (float(scale) if isinstance(scale, (int, float)) else 1.0)

    def at_one(self) -> "Candidate":
        """Return the candidate with every lambda at 1: what its method does without length.

        Example:
            >>> Candidate("ties", {"density": 0.5, "scale": 2.0}, groups={"mlp": 0.7}).at_one().name
            'ties density=0.5 scale=1'
        """
        # the same model up to rounding, which must not pass for a difference
        if self.method == "task_arithmetic" and self.weights is None:
            return Candidate("average", seed=self.seed, checkpoints=self.checkpoints)
        length = {"scale": 1.0} if "scale" in self.parameters else {}
        parameters = {**self.parameters, **length}
        return dataclasses.replace(self, parameters=parameters, scale=1.0, groups={})

    @property
    def name(self) -> str:
        """Name in tables.

        Example:
            >>> Candidate("member", {"number": 2}).name
            'member_2'
            >>> Candidate("member", {"number": 2}, scale=1.1).name
            'member_2 lambda=1.1'
            >>> Candidate("ties", {"density": 0.5}, scale=1.2, groups={"mlp": 0.9}).name
            'ties density=0.5 lambda=1.2 lambda(mlp)=0.9'
        """
        if self.method == MEMBER:
            parts = [member_name(self.parameters["number"])]
        else:
            parts = [self.method]
            parts += [f"{key}={_short(value)}" for key, value in self.parameters.items()]
        if self.checkpoints is not None:
            parts.append("checkpoints={last}/{weights}".format(**self.checkpoints))
        if self.weights is not None:
            parts.append("weights=" + "/".join(map(_short, self.weights)))
        if self.method in table.METHODS and table.METHODS[self.method].draws:
            parts.append(f"seed={self.seed}")
        if self.scale != 1:
            parts.append(f"lambda={_short(self.scale)}")
        parts += [f"lambda({group})={_short(x)}" for group, x in self.groups.items() if x != 1]
        return " ".join(parts)

    @property
    def key(self) -> str:
        """Text that identifies the candidate, the same in every process.

        Example:
            >>> Candidate("average").key == Candidate("average", scale=1.0).key
            True
        """
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> Json:
        """Return the candidate as JSON.

        Example:
            >>> Candidate("average", scale=1.2).to_dict()["scale"]
            1.2
        """
        plain = dataclasses.asdict(self)
        # the key that a candidate had before there was this setting
        return {key: value for key, value in plain.items() if (key, value) != ("checkpoints", None)}


def _short(value: object) -> str:
    # enough to read; candidates are told apart by `key`, which has all digits
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Population:
    """A population in device memory, with its base.

    Attributes:
        model: the architecture.
        members: parameter dict with a leading axis `M`, in the dtype of the merges.
        base: parameter dict.
        dtype: of both, and of the candidates.
        averaged: loads the population of averages of checkpoints, by their number and the kind of
            their weights; None where there is no training to read them from.
    """

    model: ModelConfig
    members: tree.Tree
    base: tree.Tree
    dtype: DTypeLike
    averaged: Callable[[int, CheckpointWeights], "Population"] | None = None

    @property
    def count(self) -> int:
        """Number of members M."""
        return tree.size(self.members)

    @functools.cached_property
    def blocks(self) -> blocks.Blocks | None:
        """The population as runs of elements, None where it is too large for that."""
        if not blocks.fits(self.members):
            return None
        return blocks.Blocks(self.members, self.base, self.model, self.dtype)

    def of_checkpoints(self, settings: Json | None) -> "Population":
        """Return the population of averages of checkpoints; itself for None.

        Args:
            settings: `last` and `weights`, see `config.Trajectory`.

        Raises:
            UserError: the training did not keep them.
        """
        if settings is None:
            return self
        if self.averaged is None:
            raise UserError("averages of checkpoints need the training of the members")
        return self.averaged(settings["last"], settings["weights"])

    def build(self, candidate: Candidate) -> tree.Tree:
        """Return the parameters of a candidate, in `dtype`.

        The bits equal those of the same merge of files. Numeric hyperparameters are traced, so
        another value of one does not compile again. Of a small model, `blocks` has one program for
        all shapes.

        Raises:
            UserError: see `check`.
        """
        if candidate.checkpoints is not None:
            # the averages are members like others: the rest of the candidate is built from them
            last = dataclasses.replace(candidate, checkpoints=None)
            return self.of_checkpoints(candidate.checkpoints).build(last)
        if candidate.method == BASE:
            return self.base
        scales = self._scales(candidate)
        if candidate.method == MEMBER:
            number = candidate.parameters["number"]
            if scales is None:
                return rescale.take_member(self.members, number)
            if self.blocks is not None:
                return self.blocks.rescale_member(number, scales)
            return rescale.rescale_member(
                self.members, self.base, self.model, number, scales=scales, dtype=self.dtype
            )
        check(candidate, self.count, self.model)
        return self.merge(
            method=candidate.method,
            seed=candidate.seed,
            weights=candidate.weights,
            parameters=candidate.parameters,
            scales=scales,
        )

    def merge(
        self,
        *,
        method: str,
        seed: int,
        weights: Sequence[float] | None,
        parameters: table.Parameters,
        scales: Mapping[str, float] | None = None,
    ) -> tree.Tree:
        """Return a merge of the members in `dtype`; arguments and errors of `population.merge`."""
        if self.blocks is not None:
            merged = self.blocks.merge(
                method=method, seed=seed, weights=weights, parameters=parameters, scales=scales
            )
            # None: a method without a program over runs of elements
            if merged is not None:
                return merged
        return population.merge(
            self.members,
            self.base,
            self.model,
            method=method,
            seed=seed,
            weights=weights,
            parameters=parameters,
            scales=scales,
            dtype=self.dtype,
        )

    def measure_diagnostics(
        self,
        merged: tree.Tree,
        *,
        method: str,
        seed: int,
        weights: Sequence[float] | None = None,
        parameters: table.Parameters | None = None,
    ) -> diagnostics.Report:
        """Describe a merge of the members by its task vectors, see `merge.diagnostics`.

        Args:
            merged: the merge, in `dtype`.
            method, seed, weights, parameters: how it was made. A selection with resampling draws
                again, to count how many elements each round redrew. A method that is not in the
                table, as of a chosen merge, counts nothing.
        """
        redrawn: dict[str, np.ndarray] = {}
        if method in table.METHODS:
            if self.blocks is not None:
                count = self.blocks.count_redrawn
            else:
                count = functools.partial(
                    population_diagnostics.count_redrawn,
                    self.members,
                    self.base,
                    self.model,
                    dtype=self.dtype,
                )
            redrawn = count(method=method, seed=seed, weights=weights, parameters=parameters or {})
        return population_diagnostics.measure_diagnostics(
            self.members, self.base, merged, self.model, redrawn
        )

    @contextlib.contextmanager
    def build_temporarily(self, candidate: Candidate) -> Iterator[tree.Tree]:
        """Build a candidate and free its memory when the block ends."""
        params = self.build(candidate)
        yield params
        # Waiting for garbage collection would at times keep two candidates in device memory. The
        # base is no copy: it belongs to the population.
        if candidate.kind != "base":
            jax.tree.map(lambda leaf: leaf.delete(), params)

    def _scales(self, candidate: Candidate) -> dict[str, float] | None:
        # None and not factors of 1: in float32 theta_0 + 1 (theta - theta_0) may differ from theta.
        if not candidate.is_scaled:
            return None
        # One factor per tensor, so that groups may overlap: their factors are multiplied.
        scales = {}
        for spec in arch.tensor_table(self.model):
            for layer, name in enumerate(spec.hf_names()):
                factors = [x for group, x in candidate.groups.items() if _is_in(group, spec, layer)]
                scales[name] = float(np.prod([candidate.scale, *factors]))
        return scales


def check(candidate: Candidate, members: int, model: ModelConfig) -> None:
    """Refuse a candidate that cannot be built from a population.

    Raises:
        UserError: a method, parameter, number of weights or group of tensors is wrong.
    """
    for group in candidate.groups:
        check_group(group, model)
    # a float passes for an int in `range`, and a bool is one
    number = candidate.parameters.get("number")
    if candidate.method == MEMBER and not (
        len(candidate.parameters) == 1 and type(number) is int and 0 <= number < members
    ):
        raise UserError(
            f"candidate member with parameters {dict(candidate.parameters)}: expected number, 0 to"
            f" {members - 1}"
        )
    if candidate.kind != "merge":
        return
    if table.METHODS[candidate.method].needs is not None:
        raise UserError(
            f"a search does not offer {candidate.method}, which looks at data itself; "
            "add it to merge.methods"
        )
    checked = table.check_parameters(candidate.method, candidate.parameters)
    table.check_weights(candidate.method, candidate.weights, members, checked)


def check_group(group: str, model: ModelConfig) -> None:
    """Refuse a name that selects no tensors of a model.

    Args:
        group: a kind of the tensor table, or `layers:FIRST-LAST`, counted from 0.
        model: the architecture.

    Raises:
        UserError: the name is unknown, or the model has fewer layers.

    Example:
        >>> model = ModelConfig(
        ...     vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=2, num_heads=1
        ... )
        >>> check_group("layers:0-1", model)
        >>> check_group("hed", model)
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: unknown group of tensors hed (did you mean 'head'?)
    """
    match = _LAYERS.fullmatch(group)
    if match is None:
        if group not in KINDS:
            hint = did_you_mean(group, (*KINDS, "layers:0-1"))
            raise UserError(f"unknown group of tensors {group}{hint}")
    elif not int(match[1]) <= int(match[2]) < model.num_layers:
        raise UserError(
            f"group of tensors {group}: expected layers:FIRST-LAST within 0 to "
            f"{model.num_layers - 1}"
        )


def _is_in(group: str, spec: TensorSpec, layer: int) -> bool:
    match = _LAYERS.fullmatch(group)
    if match is None:
        return spec.kind == group
    # Embedding, head and the last norm are not stacked: they belong to no layer.
    return spec.stacked and int(match[1]) <= layer <= int(match[2])


def baselines(members: int, seed: int) -> list[Candidate]:
    """Return the candidates of every search: the average, the members and the base.

    Example:
        >>> [candidate.name for candidate in baselines(2, seed=0)]
        ['average', 'member_0', 'member_1', 'base']
    """
    # The average first: of equal losses the first wins, and it is the simplest merge.
    return [Candidate("average", seed=seed), *members_at(members, 1.0), Candidate(BASE)]


def members_at(
    members: int, scale: float, groups: Mapping[str, float] | None = None
) -> list[Candidate]:
    """Return every member with its task vector times lambda.

    Example:
        >>> [candidate.name for candidate in members_at(2, 1.1)]
        ['member_0 lambda=1.1', 'member_1 lambda=1.1']
    """
    return [
        Candidate(MEMBER, {"number": number}, scale=scale, groups=groups or {})
        for number in range(members)
    ]
