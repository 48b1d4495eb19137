"""The chat template of a merge: of its tokenizer, its models, or by name (`chatml`)."""

import collections
import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import jinja2

from jax_ordermerge.checkpoint import sidecar_files
from jax_ordermerge.errors import UserError
from jax_ordermerge.merge.sources import vocabulary
from jax_ordermerge.merge.sources.storage import AnySource


class NamedTemplate(NamedTuple):
    """A chat template and the special tokens that it writes besides BOS.

    Attributes:
        text: the Jinja template.
        tokens: the special tokens.
    """

    text: str
    tokens: tuple[str, ...]


def _turns(head: str, foot: str, *, content: str, start: str = "") -> NamedTemplate:
    """Return a template of turns `head(role) content foot`."""
    before, after = head.split("ROLE")
    # JSON strings are Jinja strings, with their line feeds spelled out
    opening = f"{json.dumps(before)} + message['role'] + {json.dumps(after)}"
    text = (
        f"{start}{{% for message in messages %}}"
        f"{{{{ {opening} + {content} + {json.dumps(foot)} }}}}{{% endfor %}}"
        "{% if add_generation_prompt %}"
        f"{{{{ {json.dumps(head.replace('ROLE', 'assistant'))} }}}}{{% endif %}}"
    )
    return NamedTemplate(text, tuple(dict.fromkeys(re.findall(r"<\|[^|]+\|>", head + foot))))


AUTO = "auto"  # the most frequent template of the models
# As in mergekit.
CHAT_TEMPLATES: Final = {
    "chatml": _turns("<|im_start|>ROLE\n", "<|im_end|>\n", content="message['content']"),
    "llama3": _turns(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
        content="(message['content'] | trim)",
        start="{{ bos_token }}",
    ),
}


def check(setting: str | None) -> None:
    """Refuse a `chat_template` that is neither auto, nor a name, nor the text of a template.

    Raises:
        UserError: it is none of them, or the template is not valid.
    """
    if setting is None or setting in (AUTO, *CHAT_TEMPLATES):
        return
    if "{" in setting:
        # as transformers reads it; filters and functions are looked up where it is rendered
        environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            environment.parse(sidecar_files.inference_template(setting))
        except jinja2.TemplateSyntaxError as error:
            raise UserError(
                f"chat_template is no valid Jinja template: line {error.lineno}: {error.message}"
            ) from error
        return
    raise UserError(
        f"chat_template '{setting}' is not offered; give {AUTO}, {', '.join(CHAT_TEMPLATES)}, or"
        " the text of a Jinja template"
    )


def choose(
    setting: str | None,
    sources: Sequence[AnySource],
    members: Sequence[AnySource],
    donor: AnySource,
    added_tokens: Collection[str],
    notes: list[str],
) -> str | None:
    """Return the text of the chat template of a merge, None for that of the tokenizer.

    Without a setting it is that of the tokenizer. But models that were all trained with one
    template are asked by it where the tokenizer has none, or where they are members of a run.

    Args:
        setting: `chat_template` of the recipe, see `check`.
        sources: all models of the recipe.
        members: those that are merged, without the base.
        donor: the model that the tokenizer is from.
        added_tokens: which the tokenizer of the donor lacks.
        notes: may get a note for the user.
    """
    if setting is None:
        return _trained_template(members, donor, notes)
    # no name has a brace, and no template is without one
    if "{" in setting:
        return setting
    if setting in CHAT_TEMPLATES:
        tokens = vocabulary.tokens_of(donor.directory) | set(added_tokens)
        template = CHAT_TEMPLATES[setting]
        if missing := [token for token in template.tokens if token not in tokens]:
            notes.append(
                f"chat_template {setting} writes {', '.join(missing)}, which the tokenizer has not"
            )
        return template.text
    counts = collections.Counter(filter(None, map(_template_of, sources)))
    if not counts:
        notes.append("no model has a chat template")
        return None
    # `max` returns the first of the most common, so the order of the models decides a tie
    return max(counts, key=counts.__getitem__)


def _trained_template(
    members: Sequence[AnySource], donor: AnySource, notes: list[str]
) -> str | None:
    """Return the template that all members were trained with, where the tokenizer has it not."""
    # None counts as a template: where one member has none, they do not agree.
    templates = {_template_of(member) for member in members}
    common = templates.pop() if len(templates) == 1 else None
    of_tokenizer = _template_in(donor.directory)
    if common is None or common == of_tokenizer:
        return None
    # A run says how it asked. Of other models only the files are known, which may be those of their
    # base.
    is_run = any(member.prompt_format.chat_template for member in members)
    if of_tokenizer is not None and not is_run:
        notes.append(
            f"the chat template is that of {donor.label}, all models that are merged have another;"
            " chat_template: auto takes the most frequent"
        )
        return None
    notes.append(f"the chat template is that of {members[0].label}")
    return common


def _template_of(source: AnySource) -> str | None:
    """Return the chat template by which a model is asked."""
    return source.prompt_format.chat_template or _template_in(source.directory)


def _template_in(directory: Path | None) -> str | None:
    if directory is None:
        return None
    return sidecar_files.read_chat_templates(directory).get("default")
