"""The methods a recipe can name: those of mergekit, said by parameters of ours that give its numbers, and ours by their own names.

Where a name is both, a recipe means mergekit's, with its parameters and defaults; a parameter that only our method has may be given
as well. docs/recipes.md says what the differences are.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.merge.methods import registry

Kind = Literal["number", "whole", "switch", "rescaling", "ours"]


class Parameter(NamedTuple):
    """One parameter of a method.

    Attributes:
        kind: how its value is read; "rescaling" is a switch or a name of ours, "ours" is left to `methods.check`.
        default: of one that is not required.
        required: whether it must be given.
        idle: whether it is accepted and changes nothing.
    """

    kind: Kind
    default: Any = None
    required: bool = False
    idle: bool = False


class Call(NamedTuple):
    """What our method is called with."""

    parameters: dict[str, Any]
    weights: list[float] | None = None


class Given(NamedTuple):
    """The values for one tensor.

    Attributes:
        own: name -> one value a member.
        shared: name -> value.
        base: whether there is a base.
    """

    own: Mapping[str, list[Any]]
    shared: Mapping[str, Any]
    base: bool


Translate = Callable[[Given], Call]


@dataclass(frozen=True)
class Rule:
    """A method as a recipe names it.

    Attributes:
        method: its name in our table.
        call: what our method is called with.
        own: parameters of each model.
        shared: parameters of the merge.
        base: "aside": task vectors start from it, if the method wants it; "model": it is a model like the others;
            "weighted": that too, if a weight applies to it; "first": it is the first of the models.
        needs_base: whether mergekit asks for one.
    """

    method: str
    call: Translate
    own: Mapping[str, Parameter] = field(default_factory=dict)
    shared: Mapping[str, Parameter] = field(default_factory=dict)
    base: Literal["aside", "model", "weighted", "first"] = "aside"
    needs_base: bool = False


# texts that mergekit takes as well; 1 and 0 are equal to true and false
_SWITCH = {
    True: True,
    False: False,
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
}
WEIGHT = Parameter("number", required=True)
ZERO = {"zero": "right_angle"}  # mergekit's angle of a vector that has no direction


def _of(given: Given) -> dict[str, str]:
    return {"of": "task_vectors" if given.base else "members"}


def _linear(given: Given) -> Call:
    return Call({"normalize": given.shared["normalize"]}, given.own["weight"])


def _slerp(given: Given) -> Call:
    return Call({"t": given.shared["t"], "lerp_above": 0.9995, **ZERO})


def _nuslerp(given: Given) -> Call:
    # mergekit's names are those of the transposed matrix
    apart = "column" if given.shared["nuslerp_row_wise"] else "row"
    return Call(
        {
            **_of(given),
            **ZERO,
            "granularity": "tensor" if given.shared["nuslerp_flatten"] else apart,
        },
        given.own["weight"],
    )


def _multislerp(given: Given) -> Call:
    return Call(
        {**_of(given), "normalize": given.shared["normalize_weights"], "eps": given.shared["eps"]},
        given.own["weight"],
    )


def _karcher(given: Given) -> Call:
    return Call({"of": "members", **given.shared})


def _normalize(given: Given) -> bool:
    # mergekit divides by 1 where the weights sum to nothing
    return bool(given.shared["normalize"]) and abs(sum(given.own["weight"])) >= 1e-8


def _task_arithmetic(given: Given) -> Call:
    return Call(
        {"scale": given.shared["lambda"], "normalize": _normalize(given)}, given.own["weight"]
    )


def _generalized(*own: str, consensus: bool, **fixed: Any) -> Translate:
    def call(given: Given) -> Call:
        if min(given.own["density"]) <= 0:
            raise UserError(
                f"density {min(given.own['density']):g} keeps nothing of a model; give a positive one, or weight: 0"
            )
        rescale = given.shared["rescale"]
        parameters = {
            "density": [min(one, 1.0) for one in given.own["density"]],
            "scale": given.shared["lambda"],
            "normalize": bool(given.shared["normalize"]) if consensus else _normalize(given),
            "rescale": rescale if isinstance(rescale, str) else "norm" if rescale else "none",
            **{name: given.own[name] for name in own},
        }
        return Call({**parameters, **fixed}, given.own["weight"])

    return call


def _generalized_rule(
    method: str,
    *,
    consensus: bool,
    normalize: bool,
    rescale: bool,
    own: Mapping[str, float] | None = None,
    **fixed: Any,
) -> Rule:
    more = own or {}
    return Rule(
        method,
        _generalized(*more, consensus=consensus, **fixed),
        {
            "weight": WEIGHT,
            "density": Parameter("number", 1.0),
            **{name: Parameter("number", one) for name, one in more.items()},
        },
        {
            "normalize": Parameter("switch", normalize),
            "rescale": Parameter("rescaling", rescale),
            "lambda": Parameter("number", 1.0),
            "int8_mask": Parameter("switch", False, idle=True),
        },
        needs_base=True,
    )


def _plain(given: Given) -> Call:
    return Call(dict(given.shared))


def _ours(given: Given) -> Call:
    lists = {}
    for name, values in given.own.items():
        found = [one for one in values if one is not None]
        if found and len(found) < len(values):
            raise UserError(
                f"{name} is given for some models and not for others; give it for all or for none"
            )
        if found:
            lists[name] = found
    weights = lists.pop("weight", None)
    return Call(lists, weights)


MERGEKIT: dict[str, Rule] = {
    "linear": Rule(
        "average",
        _linear,
        {"weight": WEIGHT},
        {"normalize": Parameter("switch", True)},
        base="weighted",
    ),
    "slerp": Rule(
        "slerp",
        _slerp,
        {},
        {"t": Parameter("number", required=True)},
        base="first",
        needs_base=True,
    ),
    "nuslerp": Rule(
        "nuslerp",
        _nuslerp,
        {"weight": WEIGHT},
        {
            "nuslerp_flatten": Parameter("switch", True),
            "nuslerp_row_wise": Parameter("switch", False),
        },
    ),
    "multislerp": Rule(
        "multislerp",
        _multislerp,
        {"weight": WEIGHT},
        {"normalize_weights": Parameter("switch", True), "eps": Parameter("number", 1e-8)},
    ),
    "karcher": Rule(
        "karcher",
        _karcher,
        {},
        {"max_iter": Parameter("whole", 10), "tol": Parameter("number", 1e-5)},
        base="model",
    ),
    "task_arithmetic": Rule(
        "task_arithmetic",
        _task_arithmetic,
        {"weight": WEIGHT, "density": Parameter("number", 1.0, idle=True)},
        {
            "lambda": Parameter("number", 1.0),
            "normalize": Parameter("switch", False),
            "rescale": Parameter("switch", False, idle=True),
            "int8_mask": Parameter("switch", False, idle=True),
        },
        needs_base=True,
    ),
    "ties": _generalized_rule("ties", consensus=True, normalize=True, rescale=False),
    "dare_linear": _generalized_rule("dare_linear", consensus=False, normalize=False, rescale=True),
    "dare_ties": _generalized_rule("dare_ties", consensus=True, normalize=False, rescale=True),
    "breadcrumbs": _generalized_rule(
        "breadcrumbs",
        consensus=False,
        normalize=False,
        rescale=False,
        own={"gamma": 0.01},
        at_least=0,
    ),
    "breadcrumbs_ties": _generalized_rule(
        "breadcrumbs_ties",
        consensus=True,
        normalize=False,
        rescale=False,
        own={"gamma": 0.01},
        at_least=0,
    ),
    "della": _generalized_rule(
        "della", consensus=True, normalize=True, rescale=True, own={"epsilon": 0.15}
    ),
    "della_linear": _generalized_rule(
        "della_linear", consensus=False, normalize=False, rescale=True, own={"epsilon": 0.15}
    ),
    "model_stock": Rule(
        "model_stock",
        lambda given: Call(
            {
                "granularity": "row" if given.shared["filter_wise"] else "tensor",
                "norm_floor": 1e-6,
                "t_floor": None,
            }
        ),
        {},
        {"filter_wise": Parameter("switch", False)},
        needs_base=True,
    ),
    "sce": Rule(
        "sce",
        lambda given: Call(
            {"select_topk": min(given.shared["select_topk"], 1.0), "at_least": 0, "floor": 1e-6}
        ),
        {},
        {
            "select_topk": Parameter("number", 1.0),
            "int8_mask": Parameter("switch", False, idle=True),
        },
        needs_base=True,
    ),
    "ram": Rule("ram", _plain, {}, {"epsilon": Parameter("number", 1e-5)}, needs_base=True),
    "ramplus_tl": Rule(
        "ramplus_tl",
        _plain,
        {},
        {
            "r": Parameter("number", 0.1),
            "alpha": Parameter("number", 0.2),
            "epsilon": Parameter("number", 1e-5),
        },
        needs_base=True,
    ),
    "arcee_fusion": Rule("arcee_fusion", _plain, needs_base=True),
    "nearswap": Rule(
        "nearswap", _plain, {}, {"t": Parameter("number", required=True)}, needs_base=True
    ),
    "passthrough": Rule(
        "passthrough",
        lambda given: Call({"scale": given.own["scale"][0]}),
        {"scale": Parameter("number")},
        base="model",
    ),
}
ALIASES = {"parameter_selection": "selection"}
OWN = {
    "consensus": ("threshold",)
}  # parameters of ours that each model may have for itself, besides its weight


def find(name: str) -> Rule:
    """Return the rule of a method.

    Raises:
        UserError: there is none of that name; the nearest is named.

    Example:
        >>> find("linear").method, find("parameter_selection").method
        ('average', 'selection')
    """
    if name in MERGEKIT:
        return MERGEKIT[name]
    ours = ALIASES.get(name, name)
    if ours not in registry.METHODS:
        raise UserError(
            f"unknown merge_method '{name}'{did_you_mean(name, [*MERGEKIT, *ALIASES, *registry.METHODS])}"
        )
    return Rule(ours, _ours, {name: Parameter("number") for name in ("weight", *OWN.get(ours, ()))})


def extras(rule: Rule) -> list[str]:
    """Return the parameters that only our method has, which may be given by its names."""
    signature = inspect.signature(registry.find(rule.method).known)
    names = [
        name
        for name, one in signature.parameters.items()
        if one.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return [name for name in names if name not in rule.own and name not in rule.shared]


def parameter_names() -> list[str]:
    """Return the names of all parameters of all methods."""
    rules = [*MERGEKIT.values(), *map(find, registry.METHODS)]
    return sorted(
        {name for rule in rules for name in (*rule.own, *rule.shared)}
        | set().union(*map(set, map(extras, rules)))
    )


def convert(parameter: Parameter, value: Any) -> Any:
    """Return a value as the kind of its parameter.

    Raises:
        ValueError: it is none.

    Example:
        >>> convert(Parameter("switch"), "yes"), convert(Parameter("number"), 1)
        (True, 1.0)
    """
    if parameter.kind in ("switch", "rescaling"):
        key = value.lower() if isinstance(value, str) else value
        if key in _SWITCH:
            return _SWITCH[key]
        if parameter.kind == "switch" or not isinstance(value, str):
            raise ValueError("expected true or false")
    if parameter.kind in ("ours", "rescaling"):
        return value
    if isinstance(value, str):
        raise ValueError("expected a number")
    if parameter.kind == "whole" and not float(value).is_integer():
        raise ValueError("expected a whole number")
    return int(value) if parameter.kind == "whole" else float(value)
