"""Parameters of a recipe for one tensor: scopes, filters and gradients become numbers."""

import dataclasses
import difflib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import JsonRow, JsonValue
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.plan import Output, View
from jax_ordermerge.merge.recipe import rules
from jax_ordermerge.merge.recipe.rules import Parameter, Rule, Values
from jax_ordermerge.merge.recipe.settings import Scalar, Setting, Settings


class Input(NamedTuple):
    """Consecutive layers of one model.

    Attributes:
        source: index of the model.
        start: the first layer.
        settings: parameters that the recipe gives for this model.
        listed: False of a base that is in no list of models.
    """

    source: int
    start: int
    settings: Settings
    listed: bool = True


class LayerRange(NamedTuple):
    """Consecutive layers of the merged model.

    Attributes:
        inputs: the layers that they are merged from.
        base: index of the base among the inputs.
        length: number of layers.
        scopes: settings of slice, module and recipe; the nearest first.
    """

    inputs: tuple[Input, ...]
    base: int | None
    length: int
    scopes: tuple[Settings, ...]


class MergedTensor(NamedTuple):
    """A tensor of the merged model.

    Attributes:
        name, shape, layer: of the tensor; `layer` is None outside the layers.
        layers: where it is.
        input_names: its name in each input.
        position: of its layer among `layers`, from 0 to 1, for gradients.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    layers: LayerRange
    input_names: Sequence[str]
    position: float


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """Evaluates the parameters of one method.

    Attributes:
        method: its name in the recipe.
        rule: how it is called here.
    """

    method: str
    rule: Rule

    def check_names(self, layers: LayerRange, labels: Sequence[str]) -> list[str]:
        """Return notes on parameters without an effect.

        Args:
            layers: what is merged.
            labels: what the user called each model.

        Raises:
            UserError: the method has no such parameter, or not in that place.
        """
        rule, notes = self.rule, []
        # an error below a model, where mergekit ignores it without a word
        shared = [*rule.shared, *rules.extra_parameters(rule)]
        for index, entry in enumerate(layers.inputs):
            label = labels[entry.source]
            for name in entry.settings:
                if name in shared:
                    raise UserError(
                        f"{name} below {label}: it is a parameter of the whole merge;"
                        " write it below parameters: of the recipe or of the slice"
                    )
                self._check_name(name, rule.per_member)
                if index == layers.base and rule.base in ("start", "first"):
                    notes.append(f"{name} of {label} is not used: it is the base")
        for name in (name for scope in layers.scopes for name in scope):
            # A parameter of each model may stand in an outer scope: it then is the same for all.
            self._check_name(name, [*rule.per_member, *shared])
        present = set().union(*layers.scopes, *(entry.settings for entry in layers.inputs))
        for name, parameter in {**rule.per_member, **rule.shared}.items():
            # int8_mask only saves memory in mergekit: a note on it would alarm without a reason
            if parameter.ignored and name in present and name != "int8_mask":
                notes.append(f"{name} has no effect on {self.method}")
        return notes

    def _check_name(self, name: str, valid: Iterable[str]) -> None:
        names = list(valid)
        if name not in names:
            hint = did_you_mean(name, names) if names else "; it takes none"
            raise UserError(f"merge_method {self.method} has no parameter '{name}'{hint}")

    def check_values(self, layers: LayerRange) -> None:
        """Check each value of the recipe, for whatever tensors it is, without knowing the tensors.

        Raises:
            UserError: a value is of the wrong type or out of range, or the number of models is; or
                a parameter that must be given is nowhere.
        """
        rule, members = self.rule, self.members(layers)
        table.check_weights(rule.method, None, len(members))
        scopes_of = [(layers.inputs[i].settings, *layers.scopes) for i in members]
        for name, parameter in {**rule.per_member, **rule.shared}.items():
            is_own = name in rule.per_member
            places = scopes_of if is_own else [layers.scopes]
            if parameter.required and not all(_values(name, scopes) for scopes in places):
                whose = " of every model" if is_own else ""
                raise UserError(
                    f"merge_method {self.method} needs the parameter {name}{whose}; "
                    "it is given nowhere"
                )
        scopes = [*(entry.settings for entry in layers.inputs), *layers.scopes]
        values = {name: _values(name, scopes) for scope in scopes for name in scope}
        # each value beside the first of every other parameter
        first = {name: options[0] for name, options in values.items() if options}
        for name, options in values.items():
            for value in options:
                beside = {**first, name: value}
                self._check_call(beside, [beside.get("weight")] * len(members))
        # Together only where every tensor has the same values: by filters, values that do not go
        # together may be of different tensors.
        weights = [_constant("weight", scopes) for scopes in scopes_of]
        are_constant = all(
            weight is not None or not _values("weight", scopes)
            for weight, scopes in zip(weights, scopes_of, strict=True)
        ) and all(len({*options}) == 1 for name, options in values.items() if name != "weight")
        if are_constant:
            self._check_call(first, weights, jointly=True)

    def _check_call(
        self,
        values: dict[str, Scalar],
        weights: Sequence[Scalar | None],
        *,
        jointly: bool = False,
    ) -> None:
        """Check the parameters of a merge of members that differ in their weights alone."""
        rule, count = self.rule, len(weights)

        def convert(name: str, parameter: Parameter, value: Scalar | None) -> object:
            if value is None:
                return parameter.default
            try:
                return rules.convert(parameter, value)
            except ValueError as error:
                raise UserError(f"{name} = {value!r}: {error}") from error

        per_member = {
            name: [convert(name, parameter, values.get(name))] * count
            for name, parameter in rule.per_member.items()
        }
        if "weight" in rule.per_member:
            parameter = rule.per_member["weight"]
            per_member["weight"] = [convert("weight", parameter, weight) for weight in weights]
        shared = {name: convert(name, x, values.get(name)) for name, x in rule.shared.items()}
        call = rule.translate(Values(per_member, shared, has_base=rule.needs_base))
        extra = {name: values[name] for name in rules.extra_parameters(rule) if name in values}
        parameters = table.check_parameters(rule.method, {**call.parameters, **extra})
        if jointly:
            table.check_weights(rule.method, call.weights, count, parameters)

    def output(self, tensor: MergedTensor) -> Output:
        """Return the plan of one tensor.

        Raises:
            UserError: a parameter is missing, of the wrong type or out of range; the message names
                the tensor.
        """
        rule, layers = self.rule, tensor.layers
        members = self.members(layers)
        # a base among the members is merged as one of them, so no task vectors start from it
        base = None if layers.base in members else layers.base
        try:
            call = rule.translate(
                Values(
                    {
                        name: [self._value(name, parameter, tensor, i) for i in members]
                        for name, parameter in rule.per_member.items()
                    },
                    {
                        name: self._value(name, parameter, tensor)
                        for name, parameter in rule.shared.items()
                    },
                    has_base=base is not None,
                )
            )
            # what only our method has is taken under its own name, and overrides the translation
            parameters = dict(call.parameters)
            for name in rules.extra_parameters(rule):
                value = _first_value(name, layers.scopes, tensor.name, tensor.position)
                if value is not None:
                    parameters[name] = value
            table.refuse_data_dependent(rule.method)
            parameters = table.check_parameters(rule.method, parameters)
            weights = table.check_weights(rule.method, call.weights, len(members), parameters)
        except UserError as error:
            # most errors hold for every tensor; the first is named, since filters may have chosen
            # its value
            raise UserError(f"{error} (first for {tensor.name})") from error
        if base is None and table.METHODS[rule.method].needs_base(parameters):
            raise UserError(f"merge_method {self.method} needs base_model here")
        views = [
            View(entry.source, name)
            for entry, name in zip(layers.inputs, tensor.input_names, strict=True)
        ]
        return Output(
            tensor.name,
            tensor.shape,
            tensor.layer,
            tuple(views[i] for i in members),
            None if base is None else views[base],
            rule.method,
            parameters,
            weights,
        )

    def members(self, layers: LayerRange) -> list[int]:
        """Return the indices of the inputs that are merged, in order."""
        base, role = layers.base, self.rule.base
        without_base = [i for i in range(len(layers.inputs)) if i != base]
        if base is None or role == "start":
            return without_base
        if role == "first":  # mergekit interpolates from the base, wherever it is listed
            return [base, *without_base]
        # an unlisted base counts only where a weight of the slice or the recipe reaches it
        if role == "weighted" and not (
            layers.inputs[base].listed or any("weight" in scope for scope in layers.scopes)
        ):
            return without_base
        return list(range(len(layers.inputs)))

    def _value(
        self, key: str, parameter: Parameter, tensor: MergedTensor, index: int | None = None
    ) -> JsonValue:
        """Return the value of a parameter: of one input, or shared if `index` is None."""
        scopes, name = tensor.layers.scopes, tensor.name
        if index is not None:
            # The value of the model goes before those of slice, module and recipe, as in mergekit.
            scopes = (tensor.layers.inputs[index].settings, *scopes)
            # in stacked slices a filter on layer numbers means those of the input model
            name = tensor.input_names[index]
        value = _first_value(key, scopes, name, tensor.position)
        if value is None:
            if parameter.required:
                whose = "" if index is None else " of every model"
                raise UserError(
                    f"merge_method {self.method} needs the parameter {key}{whose}; {name} has none"
                )
            # no place has a value: those whose filters match nothing were passed over
            return parameter.default
        try:
            return rules.convert(parameter, value)
        except ValueError as error:
            raise UserError(f"{key} = {value!r}: {error}") from error


def filter_notes(tensors: Sequence[MergedTensor], labels: Sequence[str]) -> list[str]:
    """Return notes on filters that no tensor has a value from; mergekit passes over them.

    Notes and no errors: a recipe may be written for several architectures.

    Args:
        tensors: all tensors of the merged model.
        labels: what the user called each model.
    """
    # A recipe's setting is seen by all slices, and that of a model by all its layers. Those of a
    # model see its names, the others these and the names of the result.
    names_of: dict[tuple[str, str, Setting], set[str]] = {}
    for tensor in tensors:
        places = [("", scope, (tensor.name, *tensor.input_names)) for scope in tensor.layers.scopes]
        for entry, name in zip(tensor.layers.inputs, tensor.input_names, strict=True):
            places.append((f" of {labels[entry.source]}", entry.settings, (name,)))
        for whose, settings, seen in places:
            for parameter, setting in settings.items():
                names_of.setdefault((whose, parameter, setting), set()).update(seen)
    notes = []
    for (whose, parameter, setting), names in names_of.items():
        for pattern in setting.unused_filters(names):
            reason = "an earlier filter fits all of its tensors"
            if not any(pattern in name for name in names):
                reason = f"it is part of no tensor's name{_near_parts(pattern, names)}"
            notes.append(f"filter '{pattern}' of {parameter}{whose} is not used: {reason}")
    return notes


def _near_parts(pattern: str, names: Iterable[str]) -> str:
    """Return the hint of `did_you_mean` among parts of names that are as long as a filter."""
    split = [name.split(".") for name in names]
    length = len(pattern.strip(".").split("."))
    runs = {".".join(parts[i : i + length]) for parts in split for i in range(len(parts))}
    near = difflib.get_close_matches(pattern, sorted(runs), n=1)
    # not all runs, of which there are as many as layers
    words = sorted({part for parts in split for part in parts if not part.isdigit()})
    return did_you_mean(pattern, near or words)


def _first_value(key: str, scopes: Sequence[JsonRow], name: str, position: float) -> Scalar | None:
    """Return the value of the nearest scope that has one for a tensor."""
    values = (scope[key].at(name, position) for scope in scopes if key in scope)
    return next((value for value in values if value is not None), None)


def _values(name: str, scopes: Sequence[Settings]) -> list[Scalar]:
    """Return every value that some scopes have of a parameter, whatever its filter."""
    return [value for scope in scopes if name in scope for value in scope[name].values()]


def _constant(name: str, scopes: Sequence[Settings]) -> Scalar | None:
    """Return the value of the nearest scope if all tensors have it."""
    setting = next((scope[name] for scope in scopes if name in scope), None)
    return None if setting is None else setting.constant
