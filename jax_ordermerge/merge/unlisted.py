"""Merges of models that no row of the tensor table describes, tensor by tensor, by name.

What the table knows of a listed model is taken from the files here, and compared: names, shapes,
and whether a tensor holds real numbers. What no file tells, a note says: which tensors a loader
ties, for one. The model whose config and other files the result has is called its *lead*: the base,
or the first member.
"""

import collections
import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jax_ordermerge.arch import unlisted as tensor_names
from jax_ordermerge.checkpoint import other_files
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow, JsonValue
from jax_ordermerge.merge import plan
from jax_ordermerge.merge.methods import spectral, table
from jax_ordermerge.merge.plan import Output, Plan, View
from jax_ordermerge.merge.sources import peft_files, references, storage
from jax_ordermerge.merge.sources.public_names import short_names
from jax_ordermerge.merge.sources.storage import AnySource
from jax_ordermerge.merge.sources.unlisted import Unlisted, bytes_differ, is_float

_LISTED = 3  # differences in a note
# Of batch normalization: how many batches a training has seen. No forward pass reads it.
_COUNTER = "num_batches_tracked"
# Keys of adapter_config.json that say how an adapter was trained, and not what it computes.
_OF_TRAINING = (
    "base_model_name_or_path",
    "auto_mapping",
    "inference_mode",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "revision",
    "runtime_config",
    "task_type",
    "eva_config",
)


def is_unlisted(source: AnySource) -> bool:
    """Return whether a model is of no architecture in the table, or an adapter by itself."""
    return isinstance(source, Unlisted)


def open_unlisted(sources: Sequence[AnySource], *, allow_bin: bool = False) -> list[Unlisted]:
    """Return models, of which one at least is not in the table, all as they are in their files.

    Raises:
        UserError: one of them has no files of its own, or only some are adapters.
    """
    first = next(source for source in sources if isinstance(source, Unlisted))
    opened = []
    for source in sources:
        if isinstance(source, storage.Directory):
            source = Unlisted(source.directory, source.label, allow_bin=allow_bin)
        if not isinstance(source, Unlisted):
            raise UserError(
                f"{first.label} ({first.config.kind}) is not in the table of architectures and is"
                f" merged by names of tensors; {source.label} has no files of its own: write them"
                f" with ordermerge convert {source.label} DIRECTORY"
            )
        opened.append(source)
    adapters = [source for source in opened if source.config.is_adapter]
    # an adapter has other tensors than a model, so no name of one would be found in the other
    if len(adapters) not in (0, len(opened)):
        raise references.lone_adapter(adapters[0].label)
    return opened


def check_same(
    first: Unlisted,
    second: Unlisted,
    stack: str | None = None,
    any_rows: Collection[str] = (),
) -> None:
    """Require models with tensors of the same names and shapes.

    Args:
        first, second: the models.
        stack: a stack of layers of which slices say what is merged; it is not compared.
        any_rows: tensors that may differ in their numbers of rows.

    Raises:
        UserError: they differ; the message names the first tensor that does.
    """
    labels = f"{first.label} and {second.label}"
    kinds = first.config.kind, second.config.kind
    # equal names and shapes are no proof: BERT and RoBERTa differ in how they number positions
    if kinds[0] != kinds[1] and "unknown" not in kinds:
        raise UserError(f"{labels} are of different architectures: {kinds[0]} and {kinds[1]}")
    if first.config.is_adapter:
        _check_adapters(first, second)
    # both ways: what only one of them has would be dropped, or could not be merged
    for model, partner in ((first, second), (second, first)):
        names = set(partner.names)
        lacking = [name for name in model.names if name not in names and not _is_in(name, stack)]
        if lacking:
            rest = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            # transformers stores a tied head once, under the name of the embedding
            tied = lacking[0] in model.config.vocabulary
            reason = "; one may tie it to another tensor: store both alike" if tied else ""
            raise UserError(
                f"{model.label} has {lacking[0]}{rest}, {partner.label} has not{reason}"
            )
    for name in first.names:
        if not _is_in(name, stack):
            check_pair(View(0, name), View(1, name), [first, second], any_rows=name in any_rows)


def check_pair(a: View, b: View, sources: Sequence[AnySource], *, any_rows: bool = False) -> None:
    """Require two tensors of one shape that both hold numbers, or both hold integers.

    Args:
        a, b: the tensors.
        sources: what they are of.
        any_rows: whether they may differ in their numbers of rows.

    Raises:
        UserError: they do not go together.
    """
    first, second = (sources[view.source].info(view.name) for view in (a, b))
    labels = sources[a.source].label, sources[b.source].label
    # vocabularies of other sizes are aligned later, so rows may differ before
    start = 1 if any_rows else 0
    if first.shape[start:] != second.shape[start:] or len(first.shape) != len(second.shape):
        hint = "only tensors of one shape are merged"
        if len(first.shape) > 1 and first.shape[1:] == second.shape[1:]:
            hint = "if its rows are those of tokens, name it in a recipe with embedding: NAME"
        raise UserError(
            f"{a.name} is {list(first.shape)} in {labels[0]} and {list(second.shape)} in"
            f" {labels[1]}; {hint}"
        )
    # floats of other dtypes are rounded to one; an integer has no dtype in between
    if is_float(first) != is_float(second) or not (is_float(first) or first.dtype == second.dtype):
        raise UserError(
            f"{a.name} is {first.dtype.name} in {labels[0]} and {second.dtype.name} in {labels[1]}"
        )


def _is_in(name: str, stack: str | None) -> bool:
    return stack is not None and tensor_names.find_place(name, [stack]) is not None


def _check_adapters(first: Unlisted, second: Unlisted) -> None:
    def read(model: Unlisted) -> Json:
        content = {
            # PEFT writes sets, in another order each time
            key: sorted(value, key=str) if isinstance(value, list) else value
            for key, value in model.config.content.items()
            if key not in _OF_TRAINING and value not in peft_files.ABSENT
        }
        # how A and B began, unless it changed the base, too
        if content.get("init_lora_weights") in peft_files.NEUTRAL_INITS:
            content.pop("init_lora_weights", None)
        return content

    # s = alpha / r is no tensor: with other settings the mean of A and B has no s
    for key, a, b in tensor_names.config_differences(read(first), read(second)):
        raise UserError(
            f"{first.label} and {second.label} are adapters that differ in {key}: {a!r} and {b!r};"
            " only equal ones are merged as adapters, others as models: BASE+ADAPTER"
        )


# ---------------------------------------------------------------------------------------- tensors


def finish_outputs(
    outputs: Iterable[Output],
    sources: Sequence[AnySource],
    *,
    dtype: str | None,
    out_dtype: str | None,
) -> tuple[Output, ...]:
    """Give each tensor its dtypes, and find those that are copied.

    Args:
        outputs: the plan of each tensor; `shape` is that of its first member.
        sources: the models.
        dtype, out_dtype: chosen by the user; by default each tensor keeps its own.

    Raises:
        UserError: the tensors of a plan have other shapes or dtypes, or differ and are integers.
    """
    # refuses a dtype that is not offered
    chosen = None if dtype is None else plan.resolve_dtype(dtype, [])
    written = None if out_dtype is None else plan.resolve_dtype(out_dtype, [])
    finished = []
    for output in outputs:
        lead = output.members[0]
        # again, and of all pairs: slices merge layers that had other numbers
        for view in output.views[1:]:
            check_pair(lead, view, sources)
        info = sources[lead.source].info(lead.name)
        if not is_float(info):
            _check_equal(output, sources)
            finished.append(dataclasses.replace(output, copied=True, out_dtype=info.dtype))
            continue
        merged = _stored_dtype(output, sources) if chosen is None else chosen
        dtypes: Json = {"dtype": merged, "out_dtype": merged if written is None else written}
        # without elements there is nothing to merge
        finished.append(dataclasses.replace(output, **dtypes, copied=not output.size))
    return tuple(finished)


def _check_equal(output: Output, sources: Sequence[AnySource]) -> None:
    lead = output.members[0]
    # it differs between any two trainings
    if output.name.endswith(_COUNTER):
        return
    for view in output.views[1:]:
        first, second = sources[lead.source], sources[view.source]
        if bytes_differ(first, second, lead.name, view.name):
            dtype = first.info(lead.name).dtype.name
            # slices merge layers of other numbers
            names = lead.name if lead.name == view.name else f"{lead.name} and {view.name}"
            raise UserError(
                f"{first.label} and {second.label} differ in {names}, which holds {dtype}: only"
                " real numbers are merged; store the same values in all models"
            )


def _stored_dtype(output: Output, sources: Sequence[AnySource]) -> np.dtype:
    stored: dict[str, str] = {}
    # not of the base: as for all models, it is rounded to what its members are
    for view in output.members:
        source = sources[view.source]
        stored.setdefault(source.info(view.name).dtype.name, source.label)
    # As for all models: neither is widened or rounded unless the user says so.
    if len(stored) > 1 or not stored.keys() <= set(plan.DTYPES):
        listed = " and ".join(f"{name} ({label})" for name, label in stored.items())
        raise UserError(
            f"{output.members[0].name} is stored in {listed}; choose one of"
            f" {', '.join(plan.DTYPES)} with dtype"
        )
    return np.dtype(jax.numpy.dtype(next(iter(stored))))


def _merged(outputs: Iterable[Output]) -> Iterator[tuple[Output, np.dtype, np.dtype]]:
    """Yield the tensors that are not copied, with their dtypes before and after merging."""
    for output in outputs:
        if output.dtype is not None and output.out_dtype is not None and not output.copied:
            yield output, output.dtype, output.out_dtype


def main_dtypes(outputs: Sequence[Output]) -> tuple[np.dtype, np.dtype, bool]:
    """Return the dtypes of most elements, before and after merging, and whether all have them.

    Raises:
        UserError: no tensor is merged.
    """
    # by elements: norms and routers in float32 are many tensors, and few numbers
    counts: collections.Counter[tuple[np.dtype, np.dtype]] = collections.Counter()
    for output, dtype, out_dtype in _merged(outputs):
        counts[dtype, out_dtype] += output.size
    if not counts:
        raise UserError("nothing to merge: the models have no tensors of real numbers")
    (dtype, out_dtype), _ = counts.most_common(1)[0]
    return dtype, out_dtype, len(counts) == 1


# ------------------------------------------------------------------------------------------- notes


def merge_notes(
    sources: Sequence[Unlisted], lead: Unlisted, outputs: Sequence[Output], dtype: str | None
) -> list[str]:
    """Return what the user should know of a merge by names.

    Args:
        sources: all models.
        lead: the model whose config and other files the result has.
        outputs: from `finish_outputs`.
        dtype: chosen by the user, if any.
    """
    stacks = ", ".join(f"{prefix} ({count})" for prefix, count in lead.stacks.items())
    notes = [
        f"{lead.config.kind} is not in the table of architectures: tensors are merged by name;"
        f" layers: {stacks or 'none'}. Tensors that a loader ties are merged as they are stored"
    ]
    if lead.config.is_adapter:
        notes[0] = (
            f"adapters are merged as adapters, A with A and B with B; layers: {stacks or 'none'}."
            " An average of A and of B is not the average of the products B A: BASE+ADAPTER merges"
            " these"
        )
    if fused := tensor_names.fused_modules(lead.names):
        notes.append(
            f"{', '.join(fused)}: several projections in one tensor, which are merged as one"
        )
    # each with the lead alone: of k models this is k - 1 comparisons, and the lead's values stay
    for source in sources:
        notes += source.file_notes()
        if source is not lead:
            notes += _config_notes(source, lead)
            files = []
            if source.directory is not None and lead.directory is not None:
                files = other_files.different_files(
                    source.directory, lead.directory, without=[lead.config.file]
                )
            if files:
                notes.append(
                    f"{source.label} and {lead.label} have not the same {_listed(files)}: the"
                    f" merge has those of {lead.label}, or the tokenizer that the recipe names"
                )
    if lead.directory is not None:
        notes += _file_notes(lead.directory)
    notes += _rounding_notes(outputs, sources, dtype)
    # the experts of one layer in one tensor, mostly: a large part of a model
    spectral_outputs = (x for x in outputs if table.METHODS[x.method].unit is spectral.unit)
    if averaged := [x.name for x in spectral_outputs if len(x.shape) > 2 and not x.copied]:
        notes.append(f"averaged, since they are no matrices: {_listed(averaged)}")
    if copied := [output.name for output in outputs if output.copied and output.size]:
        notes.append(f"copied, since they are no real numbers: {_listed(copied)}")
    return notes


def _config_notes(source: Unlisted, lead: Unlisted) -> list[str]:
    if lead.config.is_adapter:
        # a note and no error: one base has many names, on the hub and on disks
        keys = [source.config.content.get("base_model_name_or_path")]
        keys.append(lead.config.content.get("base_model_name_or_path"))
        if keys[0] == keys[1]:
            return []
        return [f"{source.label} is of the base {keys[0]}, {lead.label} of {keys[1]}"]
    pairs = tensor_names.config_differences(source.config.content, lead.config.content)
    if not pairs:
        return []
    text = _listed([f"{key} {_short(a)} and {_short(b)}" for key, a, b in pairs])
    return [
        f"{source.label} and {lead.label} differ: {text}; the merged model has the values of"
        f" {lead.label}"
    ]


def _short(value: JsonValue) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _listed(items: Sequence[str]) -> str:
    rest = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return ", ".join(items[:_LISTED]) + rest


def _file_notes(directory: Path) -> list[str]:
    notes = []
    if code := other_files.code_files(directory):
        notes.append(f"{_listed(code)}: code of the model is copied, and was not run")
    if left_out := other_files.list_files(directory)[1]:
        notes.append(
            f"{_listed(left_out)}: has weights of its own, which are neither merged nor copied"
        )
    return notes


def _rounding_notes(
    outputs: Sequence[Output], sources: Sequence[AnySource], dtype: str | None
) -> list[str]:
    notes = []
    merged = [*_merged(outputs)]
    if dtype is None:
        by_dtype = collections.Counter(out_dtype.name for _, _, out_dtype in merged)
        if len(by_dtype) > 1:
            counts = " and ".join(f"{count} in {name}" for name, count in by_dtype.items())
            notes.append(f"tensors keep the dtypes in which they are stored: {counts}")
    rounded: dict[str, list[str]] = {}
    for output, merge_dtype, _ in merged:
        for view in output.views:
            stored = sources[view.source].info(view.name).dtype
            if stored != merge_dtype:
                text = f"{sources[view.source].label} is stored in {stored.name} and"
                rounded.setdefault(f"{text} rounded to {merge_dtype.name}", []).append(view.name)
    return notes + [f"{text}: {_listed(tensors)}" for text, tensors in rounded.items()]


# -------------------------------------------------------------------------------------------- plan


def uniform(
    members: Sequence[AnySource],
    base: AnySource | None,
    *,
    method: str,
    seed: int = 0,
    weights: Sequence[float] | None = None,
    parameters: JsonRow | None = None,
    dtype: str | None = None,
    allow_bin: bool = False,
) -> Plan:
    """Plan a merge of all tensors of models by one method; see `plan.uniform`.

    Config and all other files are those of the base, or of the first member without one.

    Raises:
        UserError: bad input, or names or shapes differ (the message names the tensor).
    """
    # the settings first: opening the models again reads every header
    checked, checked_weights = plan.check_settings(
        method, parameters, weights, len(members), has_base=base is not None
    )
    plan.check_distinct(members, base)
    models = [*members, *([] if base is None else [base])]
    sources = open_unlisted(models, allow_bin=allow_bin)
    lead = sources[0 if base is None else -1]
    for source in sources:
        if source is not lead:
            check_same(lead, source)
    # methods may draw one random stream per layer, so a tensor needs the number of its layer
    places = {name: tensor_names.find_place(name, lead.stacks) for name in lead.names}
    outputs = finish_outputs(
        (
            Output(
                name,
                sources[0].info(name).shape,
                None if place is None else place.layer,
                tuple(View(member, name) for member in range(len(members))),
                None if base is None else View(len(members), name),
                method,
                checked,
                checked_weights,
            )
            for name, place in places.items()
        ),
        sources,
        dtype=dtype,
        out_dtype=None,
    )
    short = short_names(source.label for source in sources)
    recipe = {
        "merge_method": method,
        "models": [short[member.label] for member in members],
        "base_model": None if base is None else short[base.label],
        "weights": None if weights is None else [float(weight) for weight in weights],
        "parameters": checked,
        "seed": seed,
    }
    return make_plan(
        lead, sources, outputs, recipe, seed, merge_notes(sources, lead, outputs, dtype)
    )


def make_plan(
    lead: Unlisted,
    sources: Sequence[AnySource],
    outputs: tuple[Output, ...],
    recipe: JsonRow,
    seed: int,
    notes: Iterable[str],
) -> Plan:
    """Return the plan of a merge by names.

    Args:
        lead: the model whose config and other files the result has.
        sources, outputs, seed, notes: see `Plan`.
        recipe: without its dtypes, which are added where all tensors have the same.

    Raises:
        UserError: no tensor is merged.
    """
    dtype, out_dtype, is_one = main_dtypes(outputs)
    config = lead.config
    # of several dtypes the recipe names none: given back as `dtype`, it would round the others
    if is_one:
        recipe = {**recipe, "dtype": dtype.name}
        if out_dtype != dtype:
            recipe["out_dtype"] = out_dtype.name
        config = dataclasses.replace(config, content=_with_dtype(config.content, out_dtype.name))
    return Plan(
        config,
        tuple(sources),
        outputs,
        seed,
        dtype,
        out_dtype,
        recipe,
        tokenizer_from=lead.directory,
        notes=tuple(dict.fromkeys(notes)),
        files_from=lead.directory,
    )


def _with_dtype(config: JsonRow, dtype: str) -> Json:
    """Return a config whose keys that name a dtype, also in its sections, name this one."""
    return {
        key: _with_dtype(value, dtype)
        if isinstance(value, Mapping)
        # `auto`, or a dtype of a quantized form, is no dtype of the tensors
        else (dtype if key in ("dtype", "torch_dtype") and value in plan.DTYPES else value)
        for key, value in config.items()
    }
