"""Other names of columns, and what to do about columns that nothing reads."""

from collections.abc import Collection, Mapping, Sequence
from typing import Final

# Names in published files of the columns that the formats read. They are suggested and not read:
# the same name means another thing elsewhere.
_SYNONYMS: Final = {
    "messages": ("conversation", "chat", "dialog", "dialogue", "dialogs", "turns", "conversations"),
    "prompt": ("input", "inputs", "source", "query", "question", "instruction", "problem"),
    "completion": ("output", "outputs", "target", "targets", "response", "answer", "label"),
    "instruction": ("prompt", "query", "task"),
    "output": ("response", "answer", "completion", "target"),
    "question": ("query", "problem", "prompt", "input"),
    "answer": ("response", "solution", "output", "final_answer"),
    "chosen": ("preferred", "accepted", "response_chosen"),
    "rejected": ("dispreferred", "response_rejected"),
    "text": ("content", "document", "story", "code", "article"),
    "input": ("context",),
    "system": ("system_prompt", "system_message"),
    "tools": ("functions",),
}
_UNPAIRED: Final = "unpaired preferences are not trained: make pairs, or use the good rows alone"
_MEDIA: Final = "only text is trained"
_TOKENS: Final = "files of tokens are not read: give the texts"
_REMARKS: Final = {
    "label": _UNPAIRED,
    "kto_tag": _UNPAIRED,
    "image": _MEDIA,
    "images": _MEDIA,
    "audio": _MEDIA,
    "audios": _MEDIA,
    "video": _MEDIA,
    "videos": _MEDIA,
    "input_ids": _TOKENS,
    "labels": _TOKENS,
    "segments": "segments are not read: give messages, or prompt and completion",
    "preferred_output": "OpenAI's pairs are not read: give prompt, chosen and rejected",
    "messages.train_detail": "a message is learned as a whole or not at all: weight: 0 or 1",
    "messages.training": "weight: 0 on a message keeps it from being learned",
    "messages.loss_mask": "weight: 0 on a message keeps it from being learned",
}


def suggest_columns(
    columns: Collection[str],
    required: Mapping[str, Sequence[str]],
    optional: Mapping[str, Sequence[str]],
) -> str:
    """Return what to write in `data.columns` where columns are those of a format by other names.

    Args:
        columns: of the rows.
        required: the columns of each format.
        optional: those that it reads where they are there.

    Example:
        >>> alpaca = {"alpaca": ["instruction", "output"]}, {"alpaca": ["input"]}
        >>> suggest_columns({"instruction", "context", "response"}, *alpaca)
        '; or set data.columns to {output: response, input: context}, for format alpaca'
    """
    candidates = []
    for form, names in required.items():
        renamed = {name: name if name in columns else _synonym(name, columns) for name in names}
        if all(renamed.values()) and len({*renamed.values()}) == len(names):
            candidates.append((form, {n: alias for n, alias in renamed.items() if n != alias}))
    remarks = "".join(f"; {remark}" for remark in _remarks(columns))
    if not candidates:
        return remarks or "; name them with data.columns"
    # The format that needs the fewest other names is the likeliest.
    form, aliases = min(candidates, key=lambda candidate: len(candidate[1]))
    # A column stands for one name; what a required one took is no longer free.
    free = set(columns) - {*aliases.values(), *required[form]}
    aliases |= {
        name: alias
        for name in optional[form]
        if name not in columns and (alias := _synonym(name, free))
    }
    return f"{remarks}; or set data.columns to {_shown(aliases)}, for format {form}"


def advise(unread: Sequence[str], readable: Collection[str]) -> str:
    """Return what to do about columns and keys that nothing reads.

    Args:
        unread: their names.
        readable: columns that the format would read, and that the rows do not have.

    Example:
        >>> advise(["hint", "system_prompt"], ["system"])
        'rename them with data.columns: {system: system_prompt}, or name them in
        data.ignore_columns to pass over them'
    """
    aliases = {name: alias for name in sorted(readable) if (alias := _synonym(name, unread))}
    rename = "rename them with data.columns" + (f": {_shown(aliases)}" if aliases else "")
    ignore = "or name them in data.ignore_columns to pass over them"
    return "; ".join([*_remarks(unread), f"{rename}, {ignore}"])


def _remarks(columns: Collection[str]) -> list[str]:
    # each remark once: a set of images may have two such columns
    return list(dict.fromkeys(remark for name, remark in _REMARKS.items() if name in columns))


def _synonym(name: str, columns: Collection[str]) -> str | None:
    return next((synonym for synonym in _SYNONYMS.get(name, ()) if synonym in columns), None)


def _shown(aliases: Mapping[str, str | None]) -> str:
    return "{" + ", ".join(f"{name}: {alias}" for name, alias in aliases.items()) + "}"
