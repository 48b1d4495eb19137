"""The methods that a recipe can name, each as a call of one of ours.

A method of mergekit becomes a call whose parameters make ours give mergekit's numbers. Our methods
are also valid by their own names. Where a name is both, mergekit's parameters and defaults apply;
parameters that only our method has may be given, too. docs/recipes.md lists the differences.

Source: mergekit 0.1.5, https://github.com/arcee-ai/mergekit.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from jax_ordermerge.config.merge import METHOD_ALIASES, canonical_method
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.merge.methods import table


class Parameter(NamedTuple):
    """A parameter of a method.

    Attributes:
        kind: how a value is read; "rescaling" is a switch, or a name of our method.
        default: of a parameter that is not required.
        required: whether it must be given.
        ignored: accepted without an effect.
    """

    kind: Literal["number", "integer", "switch", "rescaling"]
    default: JsonValue = None
    required: bool = False
    ignored: bool = False


class Values(NamedTuple):
    """The parameters of a recipe for one tensor.

    Attributes:
        per_member: name -> one value per member.
        shared: name -> value.
        has_base: whether there is a base.
    """

    per_member: Mapping[str, list[JsonValue]]
    shared: JsonRow
    has_base: bool

    @property
    def weights(self) -> list[float]:
        """One weight per member."""
        return self.per_member["weight"]


class Call(NamedTuple):
    """What our method is called with."""

    parameters: Json
    weights: list[float] | None = None


Translate = Callable[[Values], Call]


@dataclass(frozen=True)
class Rule:
    """A method as a recipe names it.

    Attributes:
        method: its name in our table.
        translate: from the values of a recipe to a call of our method.
        per_member: parameters of each model.
        shared: parameters of the merge.
        base: what the base model is. "start": task vectors start from it, if the method has any;
            "member": a model like the others; "weighted": the same, if it has a weight; "first":
            the first of the models.
        needs_base: whether mergekit requires one.
    """

    method: str
    translate: Translate
    per_member: Mapping[str, Parameter] = field(default_factory=dict)
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["start", "member", "weighted", "first"] = "start"
    needs_base: bool = False


def _number(default: float | None = None, **flags: bool) -> Parameter:
    return Parameter("number", default, **flags)


def _switch(default: bool, **flags: bool) -> Parameter:
    return Parameter("switch", default, **flags)


_WEIGHT = _number(required=True)
_INT8_MASK = _switch(False, ignored=True)  # memory of mergekit's masks; ours are never stored
_RIGHT_ANGLE = {"zero": "right_angle"}  # mergekit's angle of a vector without a direction


def _vectors(values: Values) -> dict[str, str]:
    return {"of": "task_vectors" if values.has_base else "members"}


def _linear(values: Values) -> Call:
    return Call({"normalize": values.shared["normalize"]}, values.weights)


def _slerp(values: Values) -> Call:
    # mergekit interpolates linearly above this cosine
    return Call({"t": values.shared["t"], "lerp_above": 0.9995, **_RIGHT_ANGLE})


def _nuslerp(values: Values) -> Call:
    # mergekit names the rows of the transposed matrix: its rows are our columns
    granularity = "column" if values.shared["nuslerp_row_wise"] else "row"
    if values.shared["nuslerp_flatten"]:
        granularity = "tensor"
    parameters = {**_vectors(values), **_RIGHT_ANGLE, "granularity": granularity}
    return Call(parameters, values.weights)


def _multislerp(values: Values) -> Call:
    normalize, eps = values.shared["normalize_weights"], values.shared["eps"]
    parameters = {**_vectors(values), "normalize": normalize, "eps": eps}
    return Call(parameters, values.weights)


def _normalizes(values: Values) -> bool:
    # mergekit divides by 1 if the weights sum to nothing
    return bool(values.shared["normalize"]) and abs(sum(values.weights)) >= 1e-8


def _task_arithmetic(values: Values) -> Call:
    parameters = {"scale": values.shared["lambda"], "normalize": _normalizes(values)}
    return Call(parameters, values.weights)


def _sparsify_rule(
    method: str,
    *,
    consensus: bool = False,
    normalize: bool = False,
    rescale: bool = False,
    per_member: Mapping[str, float] | None = None,
    **fixed: JsonValue,
) -> Rule:
    """Return the rule of a method that sparsifies task vectors, and elects signs if `consensus`.

    Args:
        method: name, the same in mergekit and here.
        consensus: mergekit then normalizes by the weights that agree, element by element.
        normalize: default of the parameter.
        rescale: default of the parameter.
        per_member: further parameters of each model with their defaults.
        fixed: parameters of our method that mergekit has not.
    """
    extra = per_member or {}

    def translate(values: Values) -> Call:
        rescale = values.shared["rescale"]
        parameters = {
            "density": values.per_member["density"],
            "scale": values.shared["lambda"],
            # with consensus every element has its own divisor; a zero sum of all weights is no
            # obstacle
            "normalize": bool(values.shared["normalize"]) if consensus else _normalizes(values),
            "rescale": rescale if isinstance(rescale, str) else "norm" if rescale else "none",
            **{name: values.per_member[name] for name in extra},
        }
        return Call({**parameters, **fixed}, values.weights)

    return Rule(
        method,
        translate,
        {
            "weight": _WEIGHT,
            "density": _number(1.0),
            **{name: _number(default) for name, default in extra.items()},
        },
        {
            "normalize": _switch(normalize),
            "rescale": Parameter("rescaling", rescale),
            "lambda": _number(1.0),
            "int8_mask": _INT8_MASK,
        },
        needs_base=True,
    )


def _model_stock(values: Values) -> Call:
    granularity = "row" if values.shared["filter_wise"] else "tensor"
    # mergekit does not bound t, and bounds norms from below
    return Call({"granularity": granularity, "norm_floor": 1e-6, "t_floor": None})


def _sce(values: Values) -> Call:
    # as mergekit: any number of elements may be selected, and energies have a floor of 1e-6
    return Call({"select_topk": values.shared["select_topk"], "at_least": 0, "floor": 1e-6})


def _same_parameters(values: Values) -> Call:
    return Call(dict(values.shared))


def _our_method(values: Values) -> Call:
    """Call a method of ours that is named by its own name: absent values leave its defaults."""
    lists = {}
    for name, per_member in values.per_member.items():
        # our methods take one number per member, or none at all
        present = [value for value in per_member if value is not None]
        if present and len(present) < len(per_member):
            raise UserError(
                f"{name} is given for some models and not for others; give it for all or for none"
            )
        if present:
            lists[name] = present
    weights = lists.pop("weight", None)
    return Call(lists, weights)


_EPSILON = _number(1e-5)
MERGEKIT: dict[str, Rule] = {
    "linear": Rule(
        "average", _linear, {"weight": _WEIGHT}, {"normalize": _switch(True)}, base="weighted"
    ),
    "slerp": Rule(
        "slerp", _slerp, shared={"t": _number(required=True)}, base="first", needs_base=True
    ),
    "nuslerp": Rule(
        "nuslerp",
        _nuslerp,
        {"weight": _WEIGHT},
        {"nuslerp_flatten": _switch(True), "nuslerp_row_wise": _switch(False)},
    ),
    "multislerp": Rule(
        "multislerp",
        _multislerp,
        {"weight": _WEIGHT},
        {"normalize_weights": _switch(True), "eps": _number(1e-8)},
    ),
    # mergekit has neither weights nor a base here: a base model is one more member
    "karcher": Rule(
        "karcher",
        lambda values: Call({"of": "members", **values.shared}),
        shared={"max_iter": Parameter("integer", 10), "tol": _number(1e-5)},
        base="member",
    ),
    "task_arithmetic": Rule(
        "task_arithmetic",
        _task_arithmetic,
        # mergekit reads these for the family as a whole; task arithmetic thins nothing
        {"weight": _WEIGHT, "density": _number(1.0, ignored=True)},
        {
            "lambda": _number(1.0),
            "normalize": _switch(False),
            "rescale": _switch(False, ignored=True),
            "int8_mask": _INT8_MASK,
        },
        needs_base=True,
    ),
    "ties": _sparsify_rule("ties", consensus=True, normalize=True),
    "dare_linear": _sparsify_rule("dare_linear", rescale=True),
    "dare_ties": _sparsify_rule("dare_ties", consensus=True, rescale=True),
    # at_least=0: mergekit lets a tensor of few elements lose all; ours keeps one by default
    "breadcrumbs": _sparsify_rule("breadcrumbs", per_member={"gamma": 0.01}, at_least=0),
    "breadcrumbs_ties": _sparsify_rule(
        "breadcrumbs_ties", consensus=True, per_member={"gamma": 0.01}, at_least=0
    ),
    "della": _sparsify_rule(
        "della", consensus=True, normalize=True, rescale=True, per_member={"epsilon": 0.15}
    ),
    "della_linear": _sparsify_rule("della_linear", rescale=True, per_member={"epsilon": 0.15}),
    "model_stock": Rule(
        "model_stock", _model_stock, shared={"filter_wise": _switch(False)}, needs_base=True
    ),
    "sce": Rule(
        "sce",
        _sce,
        shared={"select_topk": _number(1.0), "int8_mask": _INT8_MASK},
        needs_base=True,
    ),
    "ram": Rule("ram", _same_parameters, shared={"epsilon": _EPSILON}, needs_base=True),
    "ramplus_tl": Rule(
        "ramplus_tl",
        _same_parameters,
        shared={"r": _number(0.1), "alpha": _number(0.2), "epsilon": _EPSILON},
        needs_base=True,
    ),
    "arcee_fusion": Rule("arcee_fusion", _same_parameters, needs_base=True),
    "nearswap": Rule(
        "nearswap", _same_parameters, shared={"t": _number(required=True)}, needs_base=True
    ),
    "passthrough": Rule(
        "passthrough",
        # the first and only one: passthrough copies one model
        lambda values: Call({"scale": values.per_member["scale"][0]}),
        {"scale": _number()},
        base="member",
    ),
}
# parameters of our methods that each model may have its own value of, besides its weight
_PER_MEMBER = {"consensus": ("threshold",)}


def find_rule(name: str) -> Rule:
    """Return the rule of a method.

    Raises:
        UserError: there is no method of that name; the message names the nearest.

    Example:
        >>> find_rule("linear").method, find_rule("parameter_selection").method
        ('average', 'selection')
    """
    if name in MERGEKIT:
        return MERGEKIT[name]
    method = canonical_method(name)
    if method not in table.METHODS:
        hint = did_you_mean(name, [*MERGEKIT, *METHOD_ALIASES, *table.METHODS])
        raise UserError(f"unknown merge_method '{name}'{hint}")
    # not required: without a weight our method has its own default
    per_member = {name: _number() for name in ("weight", *_PER_MEMBER.get(method, ()))}
    return Rule(method, _our_method, per_member)


def extra_parameters(rule: Rule) -> list[str]:
    """Return the parameters that only our method has. A recipe may give them by our names."""
    return [
        name
        for name in table.parameter_names(rule.method)
        if name not in rule.per_member and name not in rule.shared
    ]


def parameter_names() -> list[str]:
    """Return the names of all parameters of all methods."""
    rules = [*MERGEKIT.values(), *map(find_rule, table.METHODS)]
    names = [[*rule.per_member, *rule.shared, *extra_parameters(rule)] for rule in rules]
    return sorted(set().union(*names))


# texts that mergekit takes as well; 1 and 0 are equal to true and false
_SWITCH_VALUES = {
    **dict.fromkeys((True, "true", "yes", "on"), True),
    **dict.fromkeys((False, "false", "no", "off"), False),
}


def convert(parameter: Parameter, value: bool | int | float | str) -> bool | int | float | str:
    """Convert a value to the kind of its parameter.

    Raises:
        ValueError: it is of another kind.

    Example:
        >>> convert(Parameter("switch"), "yes"), convert(Parameter("number"), 1)
        (True, 1.0)
    """
    if parameter.kind in ("switch", "rescaling"):
        key = value.lower() if isinstance(value, str) else value
        if key in _SWITCH_VALUES:
            return _SWITCH_VALUES[key]
        if parameter.kind == "rescaling" and isinstance(value, str):
            return value
        raise ValueError("expected true or false")
    # true is 1 in Python: a switch would pass for a number
    if isinstance(value, bool | str):
        raise ValueError("expected a number")
    if parameter.kind == "integer" and not float(value).is_integer():
        raise ValueError("expected a whole number")
    return int(value) if parameter.kind == "integer" else float(value)
