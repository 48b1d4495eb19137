"""Files beside merged tensors that say what was done: merge.json, manifest.json, the model card."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import jax
import numpy as np
import yaml

import jax_ordermerge
from jax_ordermerge.arch import UnlistedConfig
from jax_ordermerge.checkpoint import atomic, json_files, other_files, sidecar_files
from jax_ordermerge.checkpoint.shards import STEMS
from jax_ordermerge.data.prompt_card import prompt_section
from jax_ordermerge.json_types import Json
from jax_ordermerge.merge import diagnostics
from jax_ordermerge.merge.journal import TensorRecord
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.plan import Plan
from jax_ordermerge.merge.sources.public_names import public_name, short_names, split_label

REPORT, MANIFEST = "merge.json", "manifest.json"
# How the names of weight files begin -> the library that reads them.
_LIBRARIES = dict(zip(STEMS, ("transformers", "diffusers", "peft"), strict=True))


class ModelDigest(TypedDict):
    """A model, and a digest of what was read; None if a tensor was not read as a whole."""

    label: str
    digest: str | None


class Report(TypedDict):
    """The content of `merge.json`.

    Attributes:
        recipe: of the plan, with the version of this package.
        models: with digests of what was read.
        seed: of the methods that draw random numbers.
        versions: of the libraries.
        notes: of the plan.
        diagnostics: of the task vectors; None without a base.
    """

    recipe: Json
    models: list[ModelDigest]
    seed: int
    versions: dict[str, str]
    notes: list[str]
    diagnostics: diagnostics.Report | None


def report(plan: Plan, records: Sequence[TensorRecord]) -> Report:
    """Describe a merge from the records of its tensors, in the order of `plan.outputs`."""
    moments = [
        (record.name, record.moments, record.elements)
        for record in records
        if record.moments is not None
    ]
    # as the recipe has them: these files are published with the tensors
    names = short_names(source.label for source in plan.sources)
    return {
        # the version is a key of the schema, so that the recipe beside a merge can be run again
        "recipe": {**plan.recipe, "jax_ordermerge": jax_ordermerge.__version__},
        "models": [
            {"label": names[source.label], "digest": _digest(plan, records, i)}
            for i, source in enumerate(plan.sources)
        ],
        "seed": plan.seed,
        "versions": {
            "jax_ordermerge": jax_ordermerge.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
        "notes": [
            _with_names(note, names) for note in (*plan.notes, *_not_finite_notes(plan, records))
        ],
        "diagnostics": diagnostics.report(moments) if moments else None,
    }


def _with_names(note: str, names: Mapping[str, str]) -> str:
    """Return a note with the public names of models in place of what the user called them."""
    # the longest first: one label may begin another
    labels = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.sub(rf"(?<![\w/.-])(?:{labels})(?![\w/-])", lambda match: names[match[0]], note)


def _not_finite_notes(plan: Plan, records: Sequence[TensorRecord]) -> list[str]:
    """Say of each model how many of the elements that were read are NaN or infinite."""
    tensors_of: dict[int, list[tuple[int, str]]] = {}
    for output, record in zip(plan.outputs, records, strict=True):
        for view, count in zip(output.views, record.not_finite, strict=False):
            if count:
                tensors_of.setdefault(view.source, []).append((count, view.name))
    return [
        f"{plan.sources[source].label} has {sum(count for count, _ in tensors)} elements that are"
        f" NaN or infinite, in {len(tensors)} tensors"
        f" ({', '.join(name for _, name in tensors[:3])})"
        for source, tensors in sorted(tensors_of.items())
    ]


def write(directory: Path, plan: Plan, records: Sequence[TensorRecord]) -> None:
    """Write every file but the tensors into the directory of a merge."""
    content = report(plan, records)
    card, recipe = _card(plan, content), yaml.safe_dump(content["recipe"], sort_keys=False)
    if isinstance(plan.config, UnlistedConfig):
        _write_unlisted(directory, plan, plan.config, card, recipe)
    else:
        sidecar_files.write(
            directory,
            plan.config,
            plan.out_dtype.name,
            tokenizer_from=plan.tokenizer_from,
            card=card,
            recipe=recipe,
        )
    # after the tokenizer was copied, since these change its files
    if plan.added_tokens:
        sidecar_files.add_tokens(directory, plan.added_tokens)
    template = plan.chat_template or plan.prompt_format.chat_template
    if template is not None:
        sidecar_files.write_chat_template(directory, template)
    # CRC-32 finds damaged bytes and costs little: it was computed while the slabs were written
    manifest = {
        "algorithm": "crc32",
        "dtype": " and ".join(sorted({plan.out_dtype_of(x).name for x in plan.outputs})),
        "tensors": {record.name: record.crc32 for record in records},
    }
    for name, document in ((REPORT, content), (MANIFEST, manifest)):
        atomic.write_text(directory / name, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _write_unlisted(
    directory: Path, plan: Plan, config: UnlistedConfig, card: str, recipe: str
) -> None:
    """Copy what lies beside the weights of the base, with the config that belongs to the merge."""
    if plan.files_from is not None:
        other_files.copy(
            plan.files_from,
            directory,
            tokenizer_from=plan.tokenizer_from,
            without=[config.file],
        )
    # a single file has no config, and an empty one would be read as that of a model
    if config.content:
        json_files.write_json(directory / config.file, dict(config.content))
    atomic.write_text(directory / sidecar_files.CARD, card)
    atomic.write_text(directory / sidecar_files.RECIPE, recipe)


def _digest(plan: Plan, records: Sequence[TensorRecord], source: int) -> str | None:
    """Return a digest of the checksums of all tensors of a model, None if one is missing."""
    # Of the numbers that were merged, not of files: a member of a run and its export are equal. The
    # order of the outputs is that of the plan, so it does not matter which thread ended first.
    digest = hashlib.blake2b(digest_size=16)
    for output, record in zip(plan.outputs, records, strict=True):
        for view, checksum in zip(output.views, record.checksums, strict=True):
            if view.source != source:
                continue
            if checksum is None:
                return None
            entry = [view.name, list(output.shape), plan.dtype_of(output).name, checksum]
            digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _card(plan: Plan, content: Report) -> str:
    """Return the text of the model card."""
    recipe, measured = content["recipe"], content["diagnostics"]
    # a base that only task vectors start from is not counted
    models = len({view.source for output in plan.outputs for view in output.members})
    methods = dict.fromkeys(output.method for output in plan.outputs)
    references = ", ".join(f"{name}: {table.METHODS[name].reference}" for name in methods)
    text = (
        f"{models} models of one architecture were merged by `{recipe['merge_method']}` "
        f"({references}).\n\n```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
    )
    if content["notes"]:
        text += "\n\n" + "\n".join(f"- {note}" for note in content["notes"])
    if measured is not None and measured["total"] is not None:
        text += "\n\n" + _diagnostics_table(measured["total"])
    if section := prompt_section(plan.prompt_format):
        text += f"\n\n{section}"
    title = f"Merge of {models} models by {recipe['merge_method']}"
    config = plan.config
    # what an unlisted model does is not known; a hub shows it by the config
    kind: Json = {}
    if isinstance(config, UnlistedConfig):
        kind = {"library": _LIBRARIES[config.stem], "task": None}
    return sidecar_files.model_card(
        title,
        text,
        base_model=_parents(plan),
        relation="merge",
        tags=["merge"],
        **kind,
    )


def _parents(plan: Plan) -> list[str]:
    """Return the names of the models that a hub shows as those that were merged."""
    parents = dict[str, None]()
    for source in plan.sources:
        model, adapter = split_label(source.label)
        name = public_name(model)
        # Of a member that a run keeps, the directory is that of its base. An earlier recipe of the
        # same file has a name that only looks like one on a hub.
        is_here = Path(model).exists() or adapter is not None or source.directory is None
        if name.kind in ("run", "hub") and not is_here:
            name = public_name(str(source.directory))
        parents[name.card_id] = None
    return [name for name in parents if name]


def _diagnostics_table(total: diagnostics.Summary) -> str:
    """Return a Markdown table without a heading."""
    rows = {
        f"elements that member {i} left at the base": _percent(fraction)
        for i, fraction in enumerate(total["unchanged"])
    }
    rows["elements that every member left at the base"] = _percent(total["unchanged_by_all"])
    if "redrawn" in total:
        rows["elements drawn again, by round"] = ", ".join(map(_percent, total["redrawn"]))
    # above the diagonal: the matrix is symmetric; None is of a member that equals the base
    cosines = [x for i, row in enumerate(total["cosines"]) for x in row[i + 1 :] if x is not None]
    if cosines:
        value = f"{min(cosines):.4f} to {max(cosines):.4f}"
        rows["cosines between the members' task vectors"] = value
    if total["norm_ratio"] is not None:
        rows["norm of the merged task vector / mean norm"] = f"{total['norm_ratio']:.4f}"
    if total["lambda_eff"] is not None:
        rows["lambda_eff"] = f"{total['lambda_eff']:.4f}"
    lines = [f"| {label} | {value} |" for label, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"
