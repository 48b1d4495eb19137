"""The parameters of a recipe for one tensor: scopes, filters and gradients become the numbers that our method is called with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge.methods import registry
from jax_ordermerge.merge.plan import Output, View
from jax_ordermerge.merge.recipe import methods
from jax_ordermerge.merge.recipe.methods import Given, Parameter, Rule
from jax_ordermerge.merge.recipe.schema import Setting, Settings
from jax_ordermerge.merge.sources.storage import Source


class Input(NamedTuple):
    """Layers of one model, from number `start` on, and what the recipe says of them; `listed` is False of a base that is in no list."""

    source: int
    start: int
    settings: Settings
    listed: bool = True


class Slice(NamedTuple):
    """Consecutive layers of the merged model: from which models, which of these is the base, and the settings from near to far."""

    inputs: tuple[Input, ...]
    base: int | None
    length: int
    scopes: tuple[Settings, ...]


class Place(NamedTuple):
    """A tensor of the merged model: its slice, its names in the inputs of that, and where its layer stands between 0 and 1."""

    name: str
    shape: tuple[int, ...]
    layer: int | None
    part: Slice
    inputs: Sequence[str]
    position: float


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates the parameters of one method, by the name that the recipe has for it."""

    method: str
    rule: Rule

    def check(self, part: Slice, sources: Sequence[Source]) -> list[str]:
        """Refuse parameters that the method has not, or has elsewhere; return notes on those that do nothing."""
        extras = methods.extras(self.rule)
        shared, notes = [*self.rule.shared, *extras], []
        for place, one in enumerate(part.inputs):
            aside = place == part.base and self.rule.base in ("aside", "first")
            for name in one.settings:
                if name in shared:
                    raise UserError(
                        f"{name} below {sources[one.source].label}: it is a parameter of the whole merge;"
                        " write it below parameters: of the recipe or of the slice"
                    )
                self._known(name, self.rule.own)
                if aside:
                    notes.append(
                        f"{name} of {sources[one.source].label} is not used: it is the base"
                    )
        for scope in part.scopes:
            for name in scope:
                self._known(name, [*self.rule.own, *shared])
        given = {
            name
            for settings in (*part.scopes, *(one.settings for one in part.inputs))
            for name in settings
        }
        idle = [
            name
            for name, one in {**self.rule.own, **self.rule.shared}.items()
            if one.idle and name != "int8_mask"
        ]
        return notes + [f"{name} has no effect on {self.method}" for name in idle if name in given]

    def _known(self, name: str, known: Sequence[str] | Mapping[str, Any]) -> None:
        if name not in known:
            hint = did_you_mean(name, known) if known else "; it takes none"
            raise UserError(f"merge_method {self.method} has no parameter '{name}'{hint}")

    def output(self, place: Place) -> Output:
        """Return what is to be done for one tensor.

        Raises:
            UserError: a parameter is missing, of the wrong type or out of range; the tensor is named.
        """
        members = self._members(place)
        part = place.part
        base = None if part.base is None or part.base in members else part.base
        try:
            own = {
                key: [self._value(key, one, place, i) for i in members]
                for key, one in self.rule.own.items()
            }
            given = Given(
                own,
                {key: self._value(key, one, place) for key, one in self.rule.shared.items()},
                base is not None,
            )
            call = self.rule.call(given)
            more = {
                key: self._find(key, part.scopes, place.name, place.position)
                for key in methods.extras(self.rule)
            }
            parameters = registry.check(
                self.rule.method,
                {**call.parameters, **{k: v for k, v in more.items() if v is not None}},
            )
            weights = registry.check_weights(
                self.rule.method, call.weights, len(members), parameters
            )
        except UserError as error:
            raise UserError(f"{error} (first for {place.name})") from error
        if base is None and registry.METHODS[self.rule.method].needs_base(parameters):
            raise UserError(f"merge_method {self.method} needs base_model here")
        views = [
            View(one.source, inner) for one, inner in zip(part.inputs, place.inputs, strict=True)
        ]
        return Output(
            place.name,
            place.shape,
            place.layer,
            tuple(views[i] for i in members),
            None if base is None else views[base],
            self.rule.method,
            parameters,
            weights,
        )

    def _members(self, place: Place) -> list[int]:
        """Return the numbers of the inputs that are merged, in order."""
        part, numbers = place.part, list(range(len(place.part.inputs)))
        if part.base is None or self.rule.base == "model":
            return numbers
        others = [i for i in numbers if i != part.base]
        if self.rule.base == "first":
            return [part.base, *others]
        if self.rule.base == "aside":
            return others
        weighted = part.inputs[part.base].listed or any("weight" in scope for scope in part.scopes)
        return numbers if weighted else others

    def _value(
        self, key: str, parameter: Parameter, place: Place, number: int | None = None
    ) -> Any:
        """Return the value of a parameter of one input, or of a shared one."""
        part = place.part
        scopes, name = part.scopes, place.name
        if number is not None:
            scopes, name = (part.inputs[number].settings, *scopes), place.inputs[number]
        found = self._find(key, scopes, name, place.position)
        if found is None:
            if parameter.required:
                whose = "" if number is None else " of every model"
                raise UserError(
                    f"merge_method {self.method} needs the parameter {key}{whose}; {name} has none"
                )
            return parameter.default
        try:
            return methods.convert(parameter, found)
        except ValueError as error:
            raise UserError(f"{key} = {found!r}: {error}") from error

    @staticmethod
    def _find(key: str, scopes: Sequence[Mapping[str, Setting]], name: str, position: float) -> Any:
        for scope in scopes:
            found = scope[key].at(name, position) if key in scope else None
            if found is not None:
                return found
        return None
