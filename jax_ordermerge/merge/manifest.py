"""What stands beside merged tensors, so that a person can see what was done: merge.json, manifest.json, the model card."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import yaml

import jax_ordermerge
from jax_ordermerge.checkpoint import atomic, sidecar_files
from jax_ordermerge.merge import diagnostics
from jax_ordermerge.merge.methods import table
from jax_ordermerge.merge.plan import Plan


class Done(NamedTuple):
    """What is noted of a finished tensor.

    Attributes:
        name: of the tensor.
        crc32: of its bytes, hexadecimal.
        checksums: of the members and the base as they were merged; None of one that was not read whole.
        moments: of the task vectors, see `geometry.Moments`; None without a base.
        elements: how many elements the moments are of.
    """

    name: str
    crc32: str
    checksums: list[int | None]
    moments: diagnostics.Moments | None
    elements: int


def report(plan: Plan, done: Sequence[Done]) -> dict[str, Any]:
    """Return what `merge.json` holds of a merge whose tensors are all done."""
    moments = [(one.name, one.moments, one.elements) for one in done if one.moments is not None]
    return {
        "recipe": _recipe(plan),
        "models": [
            {"label": source.label, "digest": _digest(plan, done, i)}
            for i, source in enumerate(plan.sources)
        ],
        "seed": plan.seed,
        "versions": {
            "jax_ordermerge": jax_ordermerge.__version__,
            "jax": jax.__version__,
            "numpy": np.__version__,
        },
        "notes": list(plan.notes),
        "diagnostics": diagnostics.report(moments) if moments else None,
    }


def write(directory: Path, plan: Plan, done: Sequence[Done]) -> None:
    """Write every file but the tensors into the directory of a merge."""
    found = report(plan, done)
    manifest = {
        "algorithm": "crc32",
        "dtype": plan.out_dtype.name,
        "tensors": {one.name: one.crc32 for one in done},
    }
    sidecar_files.write(
        directory,
        plan.config,
        plan.out_dtype.name,
        tokenizer_from=plan.tokenizer_from,
        card=card(plan, found["diagnostics"]),
        recipe=yaml.safe_dump(_recipe(plan), sort_keys=False),
    )
    for name, text in plan.tokenizer_files.items():
        atomic.write_text(directory / name, text)
    if plan.chat_template is not None:
        sidecar_files.write_chat_template(directory, plan.chat_template)
    atomic.write_text(directory / "merge.json", json.dumps(found, indent=1) + "\n")
    atomic.write_text(directory / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _recipe(plan: Plan) -> dict[str, Any]:
    return {**plan.recipe, "jax_ordermerge": jax_ordermerge.__version__}


def _digest(plan: Plan, done: Sequence[Done], source: int) -> str | None:
    """Return one digest of what was read of a model (see `geometry.checksums`), or None if it was read in part only."""
    found = hashlib.blake2b(digest_size=16)
    for output, one in zip(plan.outputs, done, strict=True):
        views = [*output.members, *([] if output.base is None else [output.base])]
        for view, checksum in zip(views, one.checksums, strict=True):
            if view.source != source:
                continue
            if checksum is None:
                return None
            found.update(
                json.dumps([view.name, list(output.shape), plan.dtype.name, checksum]).encode()
            )
    return found.hexdigest()


def card(plan: Plan, measured: Mapping[str, Any] | None) -> str:
    """Return the text of the model card of a merge."""
    recipe, notes = _recipe(plan), plan.notes
    models = len({view.source for output in plan.outputs for view in output.members})
    used = dict.fromkeys(output.method for output in plan.outputs)
    sources = ", ".join(f"{name}: {table.METHODS[name].reference}" for name in used)
    text = (
        f"{models} models of one architecture were merged by `{recipe['merge_method']}` ({sources}).\n\n"
        f"```yaml\n{yaml.safe_dump(recipe, sort_keys=False)}```"
    )
    if notes:
        text += "\n\n" + "\n".join(f"- {note}" for note in notes)
    if measured is not None and measured["total"] is not None:
        text += "\n\n" + _table(measured["total"])
    return sidecar_files.model_card(
        f"Merge of {models} models by {recipe['merge_method']}",
        text,
        relation="merge",
        tags=["merge"],
    )


def _table(total: Mapping[str, Any]) -> str:
    rows = [
        (f"elements that member {i} left at the base", f"{100 * fraction:.2f} %")
        for i, fraction in enumerate(total["unchanged"])
    ]
    rows.append(
        ("elements that every member left at the base", f"{100 * total['unchanged_by_all']:.2f} %")
    )
    if "redrawn" in total:
        rows.append(
            (
                "elements drawn again, by round",
                ", ".join(f"{100 * fraction:.2f} %" for fraction in total["redrawn"]),
            )
        )
    between = [c for i, row in enumerate(total["cosines"]) for c in row[i + 1 :] if c is not None]
    if between:
        rows.append(
            (
                "cosines between the members' task vectors",
                f"{min(between):.4f} to {max(between):.4f}",
            )
        )
    for label, name in (
        ("norm of the merged task vector / mean norm", "norm_ratio"),
        ("lambda_eff", "lambda_eff"),
    ):
        if total[name] is not None:
            rows.append((label, f"{total[name]:.4f}"))
    return "\n".join(["| | |", "|---|---|", *(f"| {label} | {value} |" for label, value in rows)])
