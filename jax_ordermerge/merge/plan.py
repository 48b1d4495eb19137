"""The plan of a merge, tensor by tensor: every input is checked before anything is written."""

import dataclasses
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np

from jax_ordermerge import arch
from jax_ordermerge.arch import ModelConfig, Rope, UnlistedConfig
from jax_ordermerge.config.merge import Dtype
from jax_ordermerge.data.prompt_format import PromptFormat
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.sources.public_names import short_names
from jax_ordermerge.merge.sources.storage import AnySource, Source

DTYPES: tuple[str, ...] = get_args(Dtype)
# fields that a fine-tune may change; the merged model has those of the first model
# None of these enters a forward pass: special tokens end generation, the initializer is of a
# training that is over.
_MAY_DIFFER = {"bos_token_id", "eos_token_ids", "pad_token_id", "initializer_range"}
# How the tensors are computed with: the merged model has those of the base, with a note. Versions
# of one model differ in them (a longer context, another window), and their weights still belong
# together.
_OF_BASE = (
    "rope",
    "sliding_rope",
    "max_position_embeddings",
    "rms_norm_eps",
    "sliding_window",
    "full_attention_layers",
)


class View(NamedTuple):
    """A tensor of a model.

    Attributes:
        source: index of the model in the plan.
        name: Hugging Face name of the tensor in that model.
    """

    source: int
    name: str


@dataclasses.dataclass(frozen=True)
class Output:
    """The plan of one tensor.

    Attributes:
        name, shape, layer: in the merged model; `layer` is None outside the layers.
        members: in the order that weights and random choices refer to.
        base: None if there is none and the method does not need it.
        method: name of the method.
        parameters: from `table.check_parameters`.
        weights: from `table.check_weights`.
        dtype, out_dtype: of this tensor, where they differ from those of the plan.
        copied: whether the bytes of the first member are the result, which all models share: of
            integers and truth values, and of tensors without elements.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | None
    members: tuple[View, ...]
    base: View | None
    method: str
    parameters: JsonRow
    weights: np.ndarray | None
    dtype: np.dtype | None = None
    out_dtype: np.dtype | None = None
    copied: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def views(self) -> tuple[View, ...]:
        """The members, and the base if there is one."""
        return self.members if self.base is None else (*self.members, self.base)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A merge with all inputs checked and all settings resolved.

    Attributes:
        config: of the merged model.
        sources: the models, each once.
        outputs: every tensor of `config`, in file order.
        seed: of the methods that draw random numbers.
        dtype: models are rounded to it before merging; see also `Output.dtype`.
        out_dtype: of the tensors written; see also `Output.out_dtype`.
        recipe: is written beside the output; it has no paths of this machine.
        stochastic: round to bfloat16 at random instead of to nearest even.
        tokenizer_from: directory of the tokenizer files, if any.
        notes: what the user should know, e.g. a rule that was applied.
        chat_template: text that replaces that of the tokenizer.
        prompt_format: how the models were asked, for the model card; its chat template replaces
            that of the tokenizer, too.
        added_tokens: entries as in `tokenizer.json`, added to the tokenizer of `tokenizer_from`.
        files_from: directory of all files but the weights, of a model that is not in the table.
    """

    config: ModelConfig | UnlistedConfig
    sources: tuple[AnySource, ...]
    outputs: tuple[Output, ...]
    seed: int
    dtype: np.dtype
    out_dtype: np.dtype
    recipe: JsonRow
    stochastic: bool = False
    tokenizer_from: Path | None = None
    notes: tuple[str, ...] = ()
    chat_template: str | None = None
    prompt_format: PromptFormat = dataclasses.field(default_factory=PromptFormat)
    added_tokens: tuple[Json, ...] = ()
    files_from: Path | None = None

    def dtype_of(self, output: Output) -> np.dtype:
        """Return the dtype that the models are rounded to in one tensor."""
        return self.dtype if output.dtype is None else output.dtype

    def out_dtype_of(self, output: Output) -> np.dtype:
        """Return the dtype in which one tensor is written."""
        return self.out_dtype if output.out_dtype is None else output.out_dtype

    @property
    def input_bytes(self) -> int:
        """Bytes that are read at least once."""
        # a set: stacked slices may take one layer several times
        views = {view for output in self.outputs for view in output.views}
        infos = [self.sources[view.source].info(view.name) for view in views]
        return sum(math.prod(info.shape) * info.dtype.itemsize for info in infos)

    @property
    def output_bytes(self) -> int:
        """Bytes of the tensors that are written."""
        return sum(output.size * self.out_dtype_of(output).itemsize for output in self.outputs)


def uniform(
    members: Sequence[Source],
    base: Source | None,
    *,
    method: str,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    parameters: JsonRow | None = None,
    dtype: str | None = None,
    tokenizer_from: Path | None = None,
) -> Plan:
    """Plan a merge of all tensors of some models by one method with the same parameters.

    Args:
        members: in the order that weights and random choices refer to. The merged model has config
            and tokenizer of the first, but positions, norms and windows of the base. It has the
            end-of-sequence tokens of all.
        base: may be None for methods that do not need it; there are no diagnostics then.
        method: name of the method.
        seed: of the methods that draw random numbers.
        weights: one per member.
        parameters: of the method.
        dtype: models are rounded to it before merging, and the output is stored in it; None is the
            dtype of the members.
        tokenizer_from: directory of the tokenizer files, by default that of the first member.

    Raises:
        UserError: bad input, or the architectures differ (the message names the difference).
    """
    checked, checked_weights = check_settings(
        method, parameters, weights, len(members), has_base=base is not None
    )
    _check_sources(members, base)
    # The base is also there for methods that do not need it: diagnostics measure from it.
    sources = (*members, *([] if base is None else [base]))
    lead = members[0] if base is None else base
    resolved_dtype = resolve_dtype(dtype, members)
    config = dataclasses.replace(
        members[0].config, **{name: getattr(lead.config, name) for name in _OF_BASE}
    )
    outputs = tuple(
        Output(
            name,
            spec.hf_shape,
            layer,
            tuple(View(member, name) for member in range(len(members))),
            # the base follows the members in `sources`
            None if base is None else View(len(members), name),
            method,
            checked,
            checked_weights,
        )
        for name, spec, layer in arch.hf_tensors(config)
    )
    # not the paths of this machine: the recipe is published
    names = short_names(source.label for source in sources)
    recipe = {
        "merge_method": method,
        "models": [names[member.label] for member in members],
        "base_model": None if base is None else names[base.label],
        # plain floats: `yaml.safe_dump` refuses those of numpy
        "weights": None if weights is None else [float(weight) for weight in weights],
        "parameters": checked,
        "seed": seed,
        "dtype": resolved_dtype.name,
    }
    return Plan(
        with_stops_of(config, members),
        sources,
        outputs,
        seed,
        resolved_dtype,
        resolved_dtype,
        recipe,
        tokenizer_from=tokenizer_from or members[0].directory,
        notes=config_notes(lead, sources) + member_dtype_notes(dtype, resolved_dtype, members),
        prompt_format=members[0].prompt_format,
    )


def check_settings(
    method: str,
    parameters: JsonRow | None,
    weights: Sequence[float] | None,
    members: int,
    *,
    has_base: bool,
) -> tuple[Json, np.ndarray | None]:
    """Check the settings of a merge of models alone, before the models are opened.

    Args:
        method, parameters, weights: see `uniform`.
        members: number of models without the base.
        has_base: whether there is a base.

    Returns:
        Parameters and weights; see `table.check_parameters` and `table.check_weights`.

    Raises:
        UserError: method, parameters, weights, or the number of models are not right.
    """
    checked = table.check_parameters(method, parameters)
    table.refuse_data_dependent(method)
    if not members:
        raise UserError("nothing to merge: give the directories of the members")
    # With its parameters: `selection` needs a base for some ways to resample only.
    if table.METHODS[method].needs_base(checked) and not has_base:
        condition = "with resample " if method == "selection" else ""
        raise UserError(
            f"merge method {method} {condition}needs the base model; give it with --base"
        )
    return checked, table.check_weights(method, weights, members, checked)


def _check_sources(members: Sequence[Source], base: Source | None) -> None:
    for source in (*members[1:], *([] if base is None else [base])):
        check_same(members[0], source)
    check_distinct(members, base)


def check_distinct(members: Sequence[AnySource], base: AnySource | None) -> None:
    """Refuse a model that is given twice, or a member that is the base.

    Raises:
        UserError: with both names.
    """
    # also under another spelling: a model would count twice, or the base as a member
    identities = [member.identity() for member in members]
    for index, member in enumerate(members):
        if identities[index] in identities[:index]:
            first = members[identities.index(identities[index])].label
            raise UserError(
                f"model {member.label} is given twice (also as {first});"
                " give each once, with the sum of the weights"
            )
        if base is not None and identities[index] == base.identity():
            raise UserError(
                f"model {member.label} is the base ({base.label}); leave it out of the models"
            )


def with_stops_of(config: ModelConfig, members: Iterable[Source]) -> ModelConfig:
    """Return a config that also has the end-of-sequence tokens of models that are merged.

    The merged model may end a response as any of them does. A base need not know these tokens.
    """
    stops = dict.fromkeys(token for member in members for token in member.config.eos_token_ids)
    return config.with_ends(token for token in stops if token not in config.eos_token_ids)


def check_same(first: Source, second: Source, may_differ: Collection[str] = ()) -> None:
    """Require equal architectures.

    Args:
        first, second: the models.
        may_differ: fields of `ModelConfig` in which they may differ.

    Raises:
        UserError: the architectures differ; the message names the first difference.
    """
    # All fields but those that are listed: a field that is new in `ModelConfig` must be equal until
    # somebody decides otherwise.
    for field in dataclasses.fields(ModelConfig):
        a, b = getattr(first.config, field.name), getattr(second.config, field.name)
        if a != b and field.name not in {*_MAY_DIFFER, *_OF_BASE, *may_differ}:
            raise UserError(
                f"{first.label} and {second.label} are of different architectures: {field.name} is "
                f"{a!r} and {b!r}; only equal ones can be merged"
            )


def config_notes(
    lead: Source, sources: Sequence[Source], skip: Collection[str] = ()
) -> tuple[str, ...]:
    """Return a note on each value that the merged model has from one model and not from another.

    Args:
        lead: the model whose values are taken.
        sources: all models.
        skip: fields of `ModelConfig` that are taken otherwise.
    """
    notes = []
    for source in sources:
        for name in _OF_BASE:
            value, merged = getattr(source.config, name), getattr(lead.config, name)
            if value != merged and name not in skip:
                pairs = [(name, value, merged)]
                if isinstance(value, Rope) and isinstance(merged, Rope):
                    of = "" if name == "rope" else f"{name} "
                    pairs = [(of + key, a, b) for key, a, b in _rope_differences(value, merged)]
                listed = ", ".join(f"{key} {_short(a)} and {_short(b)}" for key, a, b in pairs)
                notes.append(
                    f"{source.label} and {lead.label} differ: {listed}; the merged model has the"
                    f" value of {lead.label}"
                )
    return tuple(notes)


def _short(value: object) -> str:
    # LongRoPE has a factor per frequency
    if isinstance(value, list) and len(value) > 3:
        return f"[{value[0]!r}, ..., {value[-1]!r}]"
    return repr(value)


def _rope_differences(a: Rope, b: Rope) -> list[tuple[str, object, object]]:
    form_a, form_b = ({"rope_theta": rope.theta, **rope.to_hf()} for rope in (a, b))
    # By key of config.json: two whole rope sections on one line would hide what differs.
    pairs = [(key, form_a.get(key), form_b.get(key)) for key in {**form_a, **form_b}]
    return [(key, value_a, value_b) for key, value_a, value_b in pairs if value_a != value_b]


def member_dtype_notes(
    setting: str | None, dtype: np.dtype, members: Sequence[Source]
) -> tuple[str, ...]:
    """Return a note where members of a run are rounded although nobody chose a dtype.

    Args:
        setting: what the user chose, if anything.
        dtype: of the merge.
        members: the models.
    """
    rounded = [member.label for member in members if member.export_dtype not in (None, "float32")]
    if setting is not None or not rounded or dtype == np.float32:
        return ()
    return (
        f"{', '.join(rounded)}: kept in float32 and merged in {dtype.name}, in which the run"
        " exports them; dtype float32 merges them as they are",
    )


def resolve_dtype(dtype: str | None, members: Sequence[Source]) -> np.dtype:
    """Return the given dtype, or the one in which all members are stored.

    Members of a run are kept in float32. Here they count as what the run exports.

    Raises:
        UserError: the dtype is not offered, or the members differ.
    """
    if dtype is not None:
        if dtype not in DTYPES:
            raise UserError(f"dtype '{dtype}' is not offered{did_you_mean(dtype, DTYPES)}")
        return np.dtype(jax.numpy.dtype(dtype))
    # Of all tensors, since a file may store its norms in float32 and the rest in bfloat16.
    dtypes = {
        np.dtype(jax.numpy.dtype(member.export_dtype or member.info(name).dtype))
        for member in members
        for name, _, _ in arch.hf_tensors(member.config)
    }
    # No dtype is preferred: rounding float32 members down, or widening the others, changes the
    # merge, so the user decides.
    names = sorted(dtype.name for dtype in dtypes)
    if len(dtypes) > 1 or names[0] not in DTYPES:
        raise UserError(
            f"the members are stored in {' and '.join(names)}; "
            f"choose one of {', '.join(DTYPES)} with dtype"
        )
    return dtypes.pop()
