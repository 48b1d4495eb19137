"""How a model was asked in training, as a server has to ask it: a chat template, and the ends."""

import dataclasses
import datetime as dt
import itertools
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from jax_ordermerge.data import chat, turns
from jax_ordermerge.data.examples import Examples
from jax_ordermerge.data.formats import Record
from jax_ordermerge.data.provenance import SourceInfo
from jax_ordermerge.errors import UserError
from jax_ordermerge.json_types import Json, JsonRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_QUESTION: Final = "How many legs do three horses have?"


@dataclasses.dataclass(frozen=True)
class PromptFormat:
    """How the prompts of a training were made, and how its responses end.

    Attributes:
        stops: tokens at which generation stops: the ends of the responses, and those of the base.
        chat_template: text of a Jinja template that renders the prompts of the training; None where
            the tokenizer's own does, or where there were no prompts.
        date: what the tokenizer's own template printed as today's, None where it prints none.
        example: one whole prompt; empty where there were none.
        notes: what a user should know, in sentences.
    """

    stops: tuple[int, ...] = ()
    chat_template: str | None = None
    date: dt.date | None = None
    example: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> Json:
        """Return the format as data.json has it.

        Example:
            >>> PromptFormat((2,), None, dt.date(2026, 12, 1)).to_json()["date"]
            '2026-12-01'
        """
        date = None if self.date is None else self.date.isoformat()
        return dataclasses.asdict(self) | {"date": date}

    @classmethod
    def from_json(cls, record: JsonRow) -> "PromptFormat":
        """Read what `to_json` returned; an empty record gives the defaults.

        Example:
            >>> PromptFormat.from_json(PromptFormat((2,), None, dt.date(2026, 12, 1)).to_json())
            PromptFormat(stops=(2,), chat_template=None, date=datetime.date(2026, 12, 1), \
example='', notes=())
        """
        # data.json has further keys beside these, of the split.
        names = {field.name for field in dataclasses.fields(cls)}
        fields = {name: value for name, value in record.items() if name in names}
        # JSON has neither tuples nor dates
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        if fields.get("date") is not None:
            fields["date"] = dt.date.fromisoformat(fields["date"])
        return cls(**fields)


def describe(
    examples: Examples,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    stops: Sequence[int] = (),
    date: dt.date | None = None,
) -> PromptFormat:
    """Return how a model that is trained on examples is to be asked.

    Args:
        examples: of the training.
        tokenizer: which made them.
        stops: see `PromptFormat`.
        date: which its chat template printed.
    """
    template = served_template(examples)
    if template is None:
        return PromptFormat(tuple(stops), date=date)
    base_template, notes = tokenizer.chat_template, []
    # A server has one template. Examples in another were learned, but cannot be asked for by it.
    other_templates = {source.template for source in examples.sources if _has_prompts(source)} - {
        template
    }
    if other_templates:
        notes.append(
            f"Prompts are those of template {template}; some examples were in template"
            f" {' and '.join(sorted(other_templates))}."
        )
    if template == "alpaca":
        notes.append(
            "The input of an instruction is the key `input` of its message, or `input` among the"
            " variables of the template (`chat_template_kwargs`)."
        )
    chat_template = None
    # The tokenizer's own template needs no replacement; neither do prompts that a user has rendered
    # with it before the training.
    if template != "chat" and not (template == "plain" and _are_rendered(examples, tokenizer)):
        chat_template = to_jinja(template, tokenizer)
        if chat_template is None:
            notes.append(
                f"No chat template renders the prompts of template {template} with this tokenizer,"
                f" so the exports have {'that of the base' if base_template else 'none'}."
            )
        elif base_template:
            notes.append(
                f"The chat template is that of the training (template {template}), in place of the"
                " one of the base."
            )
    if chat_template is None and date is not None:
        notes.append(
            f"In training the chat template printed {date} as today's date; a server prints that of"
            " its day."
        )
    text = _example(chat_template, tokenizer) if chat_template or base_template else ""
    return PromptFormat(tuple(stops), chat_template, date, text, tuple(notes))


def served_template(examples: Examples) -> str | None:
    """Return the template by which a model that is trained on examples is to be asked.

    It is `chat` where a source has it, since only that takes every conversation. Otherwise it is
    the template of most examples. None where all are texts, which ask nothing.
    """
    sizes: dict[str, int] = {}
    for number, source in enumerate(examples.sources):
        if _has_prompts(source):
            count = int((examples.source_numbers == number).sum())
            sizes[source.template] = sizes.get(source.template, 0) + count
    if "chat" in sizes:
        return "chat"
    # the first of the largest
    return max(sizes, key=sizes.__getitem__, default=None)


def _has_prompts(source: SourceInfo) -> bool:
    return source.format != "text"


def _are_rendered(examples: Examples, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether plain prompts have the form of the tokenizer's own chat template already."""
    if not tokenizer.chat_template:
        return False
    question = Record.single_turn(_QUESTION)
    try:
        text = turns.render_chat(tokenizer, question, -1)
        asked = turns.render_chat(tokenizer, question, -1, generation=True)
    except UserError:  # the template does not take a lone question
        return False
    # What a generation prompt adds, such as `<|im_start|>assistant`. A template without it marks no
    # answer, so nothing can be said about the prompts.
    header = asked.removeprefix(text).strip()
    plain = [source.template == "plain" and _has_prompts(source) for source in examples.sources]
    prompts = (
        prompt
        for prompt, source in zip(examples.prompts, examples.source_numbers, strict=True)
        if plain[source]
    )
    return bool(header) and all(prompt.rstrip().endswith(header) for prompt in prompts)


def _example(chat_template: str | None, tokenizer: "PreTrainedTokenizerBase") -> str:
    # A question of ours: one of the training might be confidential, and a card is published.
    messages = [{"role": "user", "content": _QUESTION}]
    try:
        text = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template may ask for more, e.g. a system message
        return ""
    return str(text)


# ------------------------------------------------------------------ templates of one prompt


class _Parts(NamedTuple):
    """A template of one prompt.

    Attributes:
        text: Jinja expression of the prompt but for its header, over `prompt` and `extra`.
        header: its end, which a generation prompt adds: what a response follows.
        separator: text between header and response.
        takes_input: whether `extra` is in the text.
    """

    text: str
    header: str = ""
    separator: str = ""
    takes_input: bool = False


def _expression(text: str) -> str:
    """Return a Jinja expression of a text with variables in braces.

    Example:
        >>> _expression("Question: {prompt}.")
        '"Question: " + prompt + "."'
    """
    parts = re.split(r"\{(\w+)\}", text)
    parts[::2] = [json.dumps(part) for part in parts[::2]]
    return " + ".join(part for part in parts if part != '""')


def _alpaca_parts() -> _Parts:
    header = "### Response:"
    # The texts of training themselves, so that the two cannot drift apart.
    with_input, without_input = (
        _expression(text.removesuffix(header).format(instruction="{prompt}", input="{extra}"))
        for text in (chat.ALPACA_WITH_INPUT, chat.ALPACA_WITHOUT_INPUT)
    )
    return _Parts(f"({with_input}) if extra else ({without_input})", header, takes_input=True)


_PARTS: Final = {
    "plain": _Parts("prompt"),
    "gsm8k": _Parts(_expression("Question: {prompt}\n"), "Answer:", " "),
    "alpaca": _alpaca_parts(),
}
# What stands between BOS and the text, so that the text has the tokens that it has alone: some
# tokenizers put a space before a text that has none, but not after a special token.
_GLUE: Final = ("", " + ' '", " + (' ' if text[:1] not in ['', ' ', '▁'] else '')")


def to_jinja(template: str, tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Return a chat template that renders the prompts of `plain`, `alpaca` or `gsm8k`.

    `apply_chat_template` gives the tokens of `chat.prompt_tokens`, with one BOS where the tokenizer
    adds one. A conversation of more than one prompt and its response is refused, as in training.
    The input of an Alpaca prompt is a key of the message, or a variable of the template.

    Args:
        template: a name of `chat.TEMPLATES` but `chat`.
        tokenizer: of the model.

    Returns:
        the text of the template; None where the tokenizer makes other tokens of a text after BOS
        than of the text alone, so that no template could render the prompts.
    """
    adds_bos = chat.special_tokens(tokenizer).bos is not None
    candidates = (_jinja(_PARTS[template], glue) for glue in (_GLUE if adds_bos else (None,)))
    # Tried out and not deduced: what a tokenizer does at the start of a text depends on its
    # normalizer, its pre-tokenizer and the flags of its special tokens.
    return next((text for text in candidates if _renders(text, template, tokenizer)), None)


def _jinja(parts: _Parts, glue: str | None) -> str:
    """Return the text of a template; `glue` None leaves out BOS."""
    # All text is in expressions, because Jinja changes the white space around its tags.
    lines = [
        "{%- if messages | map(attribute='role') | list not in"
        " [['user'], ['user', 'assistant']] -%}",
        "    {{- raise_exception('This model was trained on one user message and its response.')"
        " -}}",
        "{%- endif -%}",
        "{%- set prompt = messages[0]['content'] -%}",
    ]
    if parts.takes_input:
        # A server passes the input in one of two ways. At the end of the message, where
        # `Record.single_turn` puts it too, it is the same input.
        lines += [
            "{%- set extra = (messages[0]['input'] or input or '') | string -%}",
            "{%- if extra and prompt.endswith('\\n' + extra) -%}",
            "    {%- set prompt = prompt[:prompt | length - extra | length - 1] -%}",
            "{%- endif -%}",
        ]
    lines += [f"{{%- set text = {parts.text} -%}}"]
    if parts.header:
        lines += [
            "{%- if add_generation_prompt or messages[1:] -%}",
            f"    {{%- set text = text + {json.dumps(parts.header)} -%}}",
            "{%- endif -%}",
        ]
    separator = f"{json.dumps(parts.separator)} + " if parts.separator else ""
    lines += [
        "{%- if messages[1:] -%}",
        f"    {{%- set text = text + {separator}messages[1]['content'] -%}}",
        "    {%- if not text.endswith(eos_token) -%}"
        "{%- set text = text + eos_token -%}{%- endif -%}",
        "{%- endif -%}",
    ]
    if glue is not None:
        lines += [
            "{%- if not text.startswith(bos_token) -%}",
            f"    {{{{- bos_token{glue} -}}}}",
            "{%- endif -%}",
        ]
    return "\n".join([*lines, "{{- text -}}"]) + "\n"


def _renders(text: str, template: str, tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether a Jinja template gives the tokens of a template of ours."""
    # Starts and ends that tokenizers treat in different ways: a digit, a space, nothing, line
    # feeds, the mark of SentencePiece for a space, and BOS written by the user.
    probes = ("2 + 3?", " a", "", "A\n\n", "\né ", "▁x", f"{tokenizer.bos_token or ''}a")
    for probe, alpaca_input in itertools.product(probes, ("", "2\n")):
        record = Record.single_turn(probe, alpaca_input=alpaca_input)
        tokens = tokenizer.apply_chat_template(
            list(record.messages[:-1]),
            chat_template=text,
            add_generation_prompt=True,
            return_dict=False,
            input=alpaca_input,
        )
        if list(tokens) != chat.prompt_tokens(record, template, tokenizer).tolist():
            return False
    return True
