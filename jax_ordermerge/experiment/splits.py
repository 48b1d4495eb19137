"""The splits of a run: what data.json records of them, and whether they are still the same."""

from collections.abc import Mapping

from jax_ordermerge.data.examples import Examples
from jax_ordermerge.errors import UserError
from jax_ordermerge.layout import Json, RunLayout, read_json


def describe(examples: Examples) -> Json:
    """Return what data.json records of one split."""
    return {
        "source": examples.sources.get("data", ""),
        "sources": dict(examples.sources),
        "digest": examples.digest,
        "examples": len(examples),
        "tokens": sum(int(part.lengths.sum()) for part in examples.parts),
        "counts": dict(examples.counts),
    }


def check_same_data(run: RunLayout, splits: Mapping[str, Examples]) -> None:
    """Refuse data that differ from those that the training of a run directory has read.

    Every stage draws the orders again and finds samples by their row. Other rows in the same file
    would be taken for the samples that the members learned, without any sign of it.

    Args:
        run: layout of the run directory; one without data.json has no training yet.
        splits: the examples of this start.

    Raises:
        UserError: one line that names each split that differs, its file and what changed.
    """
    recorded: Json = read_json(run.data) or {}
    if not recorded:
        return
    changes = []
    for name in dict.fromkeys([*recorded, *splits]):
        before = recorded.get(name)
        examples = splits.get(name)
        if before is None or examples is None:
            changes.append(f"{name} {'was absent' if before is None else 'is absent'}")
        elif before["digest"] != examples.digest:
            changes.append(f"{name} ({_change(before, examples)})")
    if changes:
        raise UserError(
            f"the data of {run.root} changed since its training began: {', '.join(changes)};"
            " restore them, or train in another directory with --set output=DIRECTORY"
        )


def _change(before: Json, examples: Examples) -> str:
    """Return the file of a split, and how it differs from its record."""
    source = examples.sources.get("data", "")
    if before["examples"] != len(examples):
        return f"{source}: {before['examples']} examples -> {len(examples)}"
    # The examples are of tokens, so they may differ while the bytes of their file are the same.
    digest = examples.sources.get("sha256")
    if digest is not None and digest == before["sources"].get("sha256"):
        return f"{source}: same content, other tokens; the template or the tokenizer changed"
    return f"{source}: other content, {len(examples)} examples as before"
