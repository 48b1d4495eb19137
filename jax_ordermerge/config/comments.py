"""Comments for a YAML config: what each of its keys means, from the schema."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import yaml

from jax_ordermerge.config.evaluation import TASK_KINDS
from jax_ordermerge.config.experiment import Config
from jax_ordermerge.config.section import HasSettings, Section, sections_in
from jax_ordermerge.config.training import OPTIMIZERS

_WIDTH = 100  # characters of a line


class _Key(NamedTuple):
    """A key of a YAML file: its line and column from 0, and what it means."""

    line: int
    column: int
    name: str
    meaning: str


def annotate(text: str) -> str:
    """Return a YAML config with the meaning of each key as a comment above its line.

    Args:
        text: the config. Its own comments stay.

    Example:
        >>> print(annotate("data:\\n  max_length: 64\\n"), end="")
        data:
          # tokens per example
          max_length: 64
    """
    root = yaml.compose(text, yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return text
    by_line: dict[int, list[_Key]] = {}
    for key in _keys(root, [Config]):
        by_line.setdefault(key.line, []).append(key)
    lines: list[str] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines()):
        for key in by_line.get(number, []):
            # in a list of tasks every entry has the same keys: once is enough
            if key.meaning in seen:
                continue
            seen.add(key.meaning)
            # of `{a: 1, b: 2}` on one line each comment says which key it is of
            is_only = len(by_line[number]) == 1
            indent = " " * min(by_line[number][0].column, len(line) - len(line.lstrip()))
            meaning = key.meaning if is_only else f"{key.name}: {key.meaning}"
            lines += textwrap.wrap(
                meaning,
                _WIDTH,
                initial_indent=f"{indent}# ",
                subsequent_indent=f"{indent}#   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
        lines.append(line)
    return "\n".join(lines) + "\n"


def _keys(node: yaml.Node, sections: Sequence[type[Section]]) -> Iterator[_Key]:
    """Yield the keys below a node that have a description in the schema, in their order.

    Args:
        node: of the YAML file.
        sections: the alternatives that the node may be.
    """
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _keys(item, sections)
    if not isinstance(node, yaml.MappingNode) or not sections:
        return
    section = _choose(node, sections)
    for key, value in node.value:
        field = section.model_fields.get(key.value)
        if field is None:
            continue
        if field.description:
            mark = key.start_mark
            yield _Key(mark.line, mark.column, key.value, field.description)
        yield from _keys(value, sections_in(field.annotation))


def _choose(node: yaml.MappingNode, sections: Sequence[type[Section]]) -> type[Section]:
    """Return the section of the `kind` that a mapping names, the first one if it names none."""
    kind = next((value.value for key, value in node.value if key.value == "kind"), None)
    registries: tuple[Mapping[str, HasSettings], ...] = (TASK_KINDS, OPTIMIZERS)
    for registry in registries:
        if kind in registry and issubclass(registry[str(kind)].settings, sections[0]):
            return registry[str(kind)].settings
    for section in sections:
        if "kind" in section.model_fields and section.model_fields["kind"].default == kind:
            return section
    return sections[0]
