"""Chat templates that print today's date print that of the first start of a run."""

import datetime as dt

import pytest
from transformers.utils import chat_template_utils

from jax_ordermerge import processes
from jax_ordermerge.config import Data
from jax_ordermerge.data import dates
from jax_ordermerge.data.dates import pin_date, prints_date
from jax_ordermerge.errors import UserError
from tests.data.rows import load_train, write

DAY = dt.date(2024, 7, 6)
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The forms in which published templates ask for the date: Llama 3.2, SmolLM3 and gpt-oss, Mistral,
# Granite; and what Jinja allows besides.
TEMPLATES = {
    "default": "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- else %}"
    "{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}"
    '{{- "Today Date: " + date_string + "\\n\\n" }}',
    "direct": "{{ 'Current date: ' + strftime_now(\"%Y-%m-%d\") + '\n' }}",
    "variable": "{%- set today = strftime_now('%Y-%m-%d') %}{{ today }} {{ today[:4] }}\n",
    "words": "{{ strftime_now('%B %d, %Y') }}; {{ strftime_now('%A') }}\n",
    "macro": "{%- macro head() %}{{ strftime_now(format='%d/%m/%y') }}{% endmacro %}{{ head() }}\n",
    "loop": "{% for n in range(2) %}{{ strftime_now('%-d%%d %j') }}{% endfor %}\n",
    "composed": "{% set day = '%d' %}{{ strftime_now(day ~ '.%m.') }}\n",
    "time": "{{ strftime_now('%H:%M %p') }}\n",
    "indented": "\n  {% if true %}\n    {{ strftime_now('%x %X') }}\n  {% endif %}\n",
    "escape": "  {{- strftime_now('%d\\u2026%m') }} \n",
}


@pytest.fixture
def clock(monkeypatch):
    """Let transformers take a moment for now."""

    def set_to(moment):
        class Clock(dt.datetime):
            @classmethod
            def now(cls, tz=None):
                return moment

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)

    return set_to


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pinned_template_prints_what_transformers_prints_on_that_day(name, byte_tokenizer, clock):
    tokenizer = byte_tokenizer(chat_template=TEMPLATES[name] + TURNS)
    messages = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Jo"}]
    clock(dt.datetime.combine(DAY, dt.time()))
    expected = tokenizer.apply_chat_template(messages, tokenize=False)
    assert pin_date(tokenizer, recorded=DAY) == DAY
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    clock(dt.datetime(2031, 12, 25, 17, 30))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == expected
    # a second pin, as in a second run of one process, has no effect on text that names no clock
    assert expected != byte_tokenizer(chat_template=TEMPLATES[name] + TURNS).apply_chat_template(
        messages, tokenize=False
    )


def test_llama_3_2_is_pinned(shared_data, byte_tokenizer, clock):
    template = (shared_data / "templates" / "llama3_2.jinja").read_text()
    tokenizer = byte_tokenizer(chat_template=template)
    pin_date(tokenizer, DAY)
    messages = [{"role": "user", "content": "Who?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "Today Date: 06 Jul 2024\n" in text
    # a date of the row goes first, as in transformers
    own = tokenizer.apply_chat_template(messages, tokenize=False, date_string="1 May 2020")
    assert own == text.replace("06 Jul 2024", "1 May 2020")


def test_templates_without_a_date_are_left_alone(byte_tokenizer, chatml):
    for template in (None, chatml, "{# strftime_now is not used here #}" + chatml):
        tokenizer = byte_tokenizer(chat_template=template)
        assert not prints_date(tokenizer)
        assert pin_date(tokenizer, recorded=DAY) is None
        assert tokenizer.chat_template == template
        with pytest.raises(UserError, match=r"data.date = 2024-07-06: the chat template does not"):
            pin_date(tokenizer, DAY)


def test_each_of_several_templates_is_pinned(byte_tokenizer):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": TURNS, "tool_use": TEMPLATES["direct"] + TURNS}
    assert pin_date(tokenizer, DAY) == DAY
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], chat_template="tool_use", tokenize=False
    )
    assert text.startswith("Current date: 2024-07-06\n")


def test_a_configured_date_goes_before_a_recorded_one_and_that_before_today(
    byte_tokenizer, monkeypatch
):
    def pinned(*days):
        return pin_date(byte_tokenizer(chat_template=TEMPLATES["direct"] + TURNS), *days)

    later = DAY + dt.timedelta(1)
    assert pinned(DAY, later) == DAY
    assert pinned(None, later) == later
    monkeypatch.setattr(dates, "today", lambda: later)
    assert pinned() == later
    # the clocks of other processes do not count
    monkeypatch.setattr(processes, "broadcast", lambda value: DAY.toordinal())
    assert pinned() == DAY


def test_rows_have_the_same_tokens_on_another_day(tmp_path, byte_tokenizer, clock):
    path = write(tmp_path / "a.jsonl", [{"question": "Who?", "answer": "Jo"}])
    digests = []
    for day in (1, 2):
        clock(dt.datetime(2030, 1, day))
        tokenizer = byte_tokenizer(chat_template=TEMPLATES["direct"] + TURNS)
        pin_date(tokenizer, recorded=DAY)
        examples = load_train(Data(train=path, template="chat"), tokenizer)
        assert "2024-07-06" in tokenizer.decode(examples.prompt(0))
        digests.append(examples.digest)
    assert digests[0] == digests[1]
