"""Chat templates that a recipe may name, as in mergekit: `chat_template: chatml`."""

import json
import re
from typing import Final, NamedTuple


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


CHAT_TEMPLATES: Final = {
    "chatml": _turns("<|im_start|>ROLE\n", "<|im_end|>\n", content="message['content']"),
    "llama3": _turns(
        "<|start_header_id|>ROLE<|end_header_id|>\n\n",
        "<|eot_id|>",
        content="(message['content'] | trim)",
        start="{{ bos_token }}",
    ),
}
