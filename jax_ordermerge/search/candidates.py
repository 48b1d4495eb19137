"""Candidates: models made of a population in device memory, one at a time, nothing written."""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from jax_ordermerge import arch, tree
from jax_ordermerge.arch import ModelConfig, TensorSpec
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge import population
from jax_ordermerge.merge.methods import registry

BASE, MEMBER = "base", "member"  # candidates that are no merges
KINDS = ("embedding", "attention", "mlp", "norm", "head")
_LAYERS = re.compile(r"layers:(\d+)-(\d+)")
# (summed losses, what they are divided by), float64[n] each, of one model on examples
Measure = Callable[[tree.Tree, Examples], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A model that can be made of a population.

    Attributes:
        method: of the table of merge methods, or `base` or `member`.
        parameters: of the method; of `member`, its `number`.
        weights: one a member, None for the default.
        seed: of the methods that draw.
        scale: lambda: the merged task vector times that.
        groups: lambda of some tensors, times `scale`; see `check_group`.
    """

    method: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    weights: tuple[float, ...] | None = None
    seed: int = 0
    scale: float = 1.0
    groups: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def kind(self) -> str:
        """`base`, `member` or `merge`."""
        return self.method if self.method in (BASE, MEMBER) else "merge"

    @property
    def name(self) -> str:
        """What tables call it.

        Example:
            >>> (
            ...     Candidate("member", {"number": 2}).name,
            ...     Candidate("ties", {"density": 0.5}, scale=1.2, groups={"mlp": 0.9}).name,
            ... )
            ('member_2', 'ties density=0.5 lambda=1.2 lambda(mlp)=0.9')
        """
        if self.method == MEMBER:
            return f"member_{self.parameters['number']}"
        said = [f"{key}={_short(value)}" for key, value in self.parameters.items()]
        said += (
            [] if self.weights is None else ["weights=" + "/".join(_short(w) for w in self.weights)]
        )
        said += (
            [f"seed={self.seed}"]
            if self.method in registry.METHODS and registry.METHODS[self.method].draws
            else []
        )
        said += [] if self.scale == 1 else [f"lambda={_short(self.scale)}"]
        said += [
            f"lambda({group})={_short(value)}" for group, value in self.groups.items() if value != 1
        ]
        return " ".join([self.method, *said])

    @property
    def key(self) -> str:
        """Text that no other candidate has, the same in every process.

        Example:
            >>> Candidate("average").key == Candidate("average", scale=1.0).key
            True
        """
        return json.dumps(self.to_dict(), sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data.

        Example:
            >>> Candidate("average", scale=1.2).to_dict()["scale"]
            1.2
        """
        weights = None if self.weights is None else list(self.weights)
        plain = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in self.parameters.items()
        }
        return {
            "method": self.method,
            "parameters": plain,
            "weights": weights,
            "seed": self.seed,
            "scale": self.scale,
            "groups": dict(self.groups),
        }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Population:
    """A population in device memory, with its base.

    Attributes:
        model: the architecture.
        members: parameter dict with a leading `M`, in the dtype that is merged and served.
        base: parameter dict.
        dtype: of both, and of what is made of them.
    """

    model: ModelConfig
    members: tree.Tree
    base: tree.Tree
    dtype: DTypeLike

    @property
    def count(self) -> int:
        """Number of members M."""
        return tree.size(self.members)

    def build(self, candidate: Candidate) -> tree.Tree:
        """Return the parameters of a candidate, in `dtype`: with the bits that the same merge of files has.

        Hyperparameters that a method takes as numbers are traced, so that others of them compile nothing anew.

        Raises:
            UserError: as `check`.
        """
        if candidate.method == BASE:
            return self.base
        if candidate.method == MEMBER:
            return _member(self.members, candidate.parameters["number"])
        check(candidate, self.count, self.model)
        return population.merge(
            self.members,
            self.base,
            self.model,
            method=candidate.method,
            seed=candidate.seed,
            weights=candidate.weights,
            parameters=candidate.parameters,
            scales=self._scales(candidate),
            dtype=self.dtype,
        )

    def _scales(self, candidate: Candidate) -> dict[str, float] | None:
        if candidate.scale == 1 and all(value == 1 for value in candidate.groups.values()):
            return None
        found = {}
        for spec in arch.tensor_table(self.model):
            for layer, name in enumerate(spec.hf_names()):
                factors = [
                    value for group, value in candidate.groups.items() if _holds(group, spec, layer)
                ]
                found[name] = float(np.prod([candidate.scale, *factors]))
        return found


@jax.jit
def _member(members: tree.Tree, number: int) -> tree.Tree:
    # the number is traced: one program for all members
    return jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, number, keepdims=False), members
    )


def check(candidate: Candidate, members: int, model: ModelConfig) -> None:
    """Refuse a candidate that cannot be made of a population.

    Raises:
        UserError: method, parameter, weights or group are wrong.
    """
    if candidate.kind != "merge":
        return
    if candidate.method in ("fisher", "greedy_soup"):
        raise UserError(
            f"a search does not offer {candidate.method}, which looks at data itself; add it to merge.methods"
        )
    checked = registry.check(candidate.method, candidate.parameters)
    registry.check_weights(candidate.method, candidate.weights, members, checked)
    for group in candidate.groups:
        check_group(group, model)


def check_group(group: str, model: ModelConfig) -> None:
    """Refuse a name that stands for no tensors of a model: a kind of the tensor table, or `layers:FIRST-LAST`, counted from 0.

    Raises:
        UserError: the name is unknown, or there are not so many layers.

    Example:
        >>> check_group(
        ...     "layers:0-1",
        ...     ModelConfig(
        ...         vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=2, num_heads=1
        ...     ),
        ... )
        >>> check_group(
        ...     "atention",
        ...     ModelConfig(
        ...         vocab_size=2, hidden_size=2, intermediate_size=2, num_layers=2, num_heads=1
        ...     ),
        ... )
        Traceback (most recent call last):
        ...
        jax_ordermerge.errors.UserError: unknown group of tensors atention (did you mean 'attention'?)
    """
    match = _LAYERS.fullmatch(group)
    if match is None:
        if group not in KINDS:
            raise UserError(
                f"unknown group of tensors {group}{did_you_mean(group, (*KINDS, 'layers:0-1'))}"
            )
    elif not int(match[1]) <= int(match[2]) < model.num_layers:
        raise UserError(
            f"group of tensors {group}: expected layers:FIRST-LAST within 0 to {model.num_layers - 1}"
        )


def _holds(group: str, spec: TensorSpec, layer: int) -> bool:
    match = _LAYERS.fullmatch(group)
    if match is None:
        return spec.kind == group
    return spec.stacked and int(match[1]) <= layer <= int(match[2])


def anchors(members: int, seed: int) -> list[Candidate]:
    """Return what is always among the candidates, whatever else is: average, members and base.

    Example:
        >>> [one.name for one in anchors(2, seed=0)]
        ['average', 'member_0', 'member_1', 'base']
    """
    alone = [Candidate(MEMBER, {"number": number}) for number in range(members)]
    return [Candidate("average", seed=seed), *alone, Candidate(BASE)]


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return each candidate once, in the order of their first places.

    Example:
        >>> len(unique([Candidate("average"), Candidate("average")]))
        1
    """
    return list({one.key: one for one in candidates}.values())
