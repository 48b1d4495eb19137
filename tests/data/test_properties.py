"""No key of a row can be changed or added without a change of the tokens, unless it is named."""

import copy

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jax_ordermerge.config import Data
from jax_ordermerge.data import source
from jax_ordermerge.errors import UserError
from tests.data.conftest import FULL
from tests.data.rows import write

TEXTS = st.text('abc XYZ\n{}"é7', min_size=1, max_size=6).filter(str.strip)
NAMES = st.sampled_from(["city", "zone", "description", "type", "name", "value"])
SCALARS = st.one_of(TEXTS, st.integers(0, 9), st.booleans(), st.sampled_from([0.5, 2.0]))
ARGUMENTS = st.dictionaries(
    NAMES,
    st.one_of(SCALARS, st.dictionaries(NAMES, SCALARS, min_size=1, max_size=2)),
    max_size=2,
)
CALLS = st.builds(
    lambda name, arguments, number: {
        "id": number,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    },
    TEXTS,
    ARGUMENTS,
    TEXTS,
)
TOOLS = st.builds(
    lambda name, description, names, strict: {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {
                "type": "object",
                "properties": {key: {"type": "string", "description": key} for key in names},
                "required": names,
            },
            "strict": strict,
        },
    },
    TEXTS,
    TEXTS,
    st.lists(NAMES, max_size=2, unique=True),
    st.booleans(),
)
CONTENTS = st.one_of(
    TEXTS, st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
)


@st.composite
def turns(draw):
    """A question and its answer, perhaps by way of a call."""
    messages = [{"role": "user", "content": draw(CONTENTS)}]
    if draw(st.booleans()):
        messages += [
            {"role": "assistant", "content": "", "tool_calls": [draw(CALLS)]},
            {"role": "tool", "content": draw(TEXTS), "tool_call_id": draw(TEXTS)},
        ]
    answer = {"role": "assistant", "content": draw(CONTENTS)}
    extra = draw(st.sampled_from([{}, {}, {"weight": 1}, {"train": True}]))
    return [*messages, answer | extra]


@st.composite
def conversations(draw):
    parts = draw(st.lists(turns(), min_size=1, max_size=2))
    return [message for part in parts for message in part]


SHARED = st.fixed_dictionaries(
    {},
    optional={
        "system": TEXTS,
        "tools": st.lists(TOOLS, min_size=1, max_size=2),
        "chat_template_kwargs": st.just({"brief": True}) | st.just({"brief": False}),
        "url": TEXTS,
        "metadata": st.dictionaries(NAMES, SCALARS, min_size=1, max_size=2),
    },
)
MESSAGES = st.builds(lambda talk, shared: {"messages": talk} | shared, conversations(), SHARED)
SHARE_KEYS = {"role": "from", "content": "value"}
SHAREGPT = MESSAGES.map(
    lambda row: (
        {name: value for name, value in row.items() if name != "messages"}
        | {
            "conversations": [
                {SHARE_KEYS.get(key, key): value for key, value in message.items()}
                for message in row["messages"]
            ]
        }
    )
)
COMPLETIONS = st.builds(
    lambda talk, shared: {"prompt": talk[:-1], "completion": talk[-1:]} | shared,
    conversations(),
    SHARED,
)
PAIRS = st.builds(
    lambda talk, text, shared: (
        {
            "chosen": talk,
            "rejected": [*talk[:-1], {"role": "assistant", "content": text + "!"}],
        }
        | shared
    ),
    conversations(),
    TEXTS,
    SHARED,
)
ALPACA = st.builds(
    lambda instruction, extra, output, history, shared: (
        {
            "instruction": instruction,
            "input": extra,
            "output": output,
            "history": history,
        }
        | shared
    ),
    TEXTS,
    st.one_of(st.just(""), TEXTS),
    TEXTS,
    st.lists(st.lists(TEXTS, min_size=2, max_size=2), max_size=2),
    SHARED,
)
ANSWERS = st.builds(
    lambda question, answer, shared: {"question": question, "answer": answer} | shared,
    TEXTS,
    st.one_of(TEXTS, st.integers(0, 9)),
    SHARED,
)
FORMATS = {
    "messages": MESSAGES,
    "sharegpt": SHAREGPT,
    "prompt_completion": COMPLETIONS,
    "preference": PAIRS,
    "alpaca": ALPACA,
    "question_answer": ANSWERS,
}
COLUMNS_OF_MESSAGES = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")


def nodes(value, path=()):
    """Paths of all values in a row."""
    if not isinstance(value, (dict, list)):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *(node for key, part in items for node in nodes(part, (*path, key)))]


def value_at(row, path):
    for key in path:
        row = row[key]
    return row


def changed(value):
    if isinstance(value, bool):
        return not value
    return value + "s" if isinstance(value, str) else value + 1


def is_reported(path, ignored):
    """Whether the report names a value, or something that holds it."""
    names = [str(key) for key in path if not isinstance(key, int)]
    names[0] = "messages" if names[0] in COLUMNS_OF_MESSAGES else names[0]
    # the keys of properties are the names of arguments
    reported = {name.partition(" (")[0] for name in ignored}
    return any(".".join(names[:end]) in reported for end in range(1, len(names) + 1))


@pytest.fixture(scope="module")
def templates(shared_data):
    folder = shared_data / "templates"
    published = {path.stem: path.read_text() for path in folder.glob("qwen*.jinja")}
    return {"full": FULL} | published


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
@pytest.mark.parametrize("form", FORMATS)
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[*HealthCheck],
)
@given(data=st.data())
def test_no_key_can_change_unseen(tmp_path, byte_tokenizer, templates, form, kind, data):
    row = data.draw(FORMATS[form])
    name = data.draw(st.sampled_from(sorted(templates)))
    tokenizer = byte_tokenizer(chat_template=templates[name], bos=False, eos="<|im_end|>")

    def load(row):
        import pyarrow as pa

        try:
            path = write(tmp_path / f"rows.{kind}", [row])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
            assume(False)  # Arrow has no such rows
        settings = Data(template="chat", max_length=9000, ignore_columns=("strict", "content.x"))
        return source.tokenize(path, settings, tokenizer)

    try:
        digest = load(row).digest
    except UserError:
        assume(False)
    path = data.draw(st.sampled_from([node for node in nodes(row) if node]))
    other = copy.deepcopy(row)
    value = value_at(other, path)
    if isinstance(value, dict):
        value["further"] = data.draw(SCALARS)
        path = (*path, "further")
    elif isinstance(value, list):
        assume(value)
        value.append(copy.deepcopy(value[-1]))
    else:
        value_at(other, path[:-1])[path[-1]] = changed(value)
    try:
        examples = load(other)
    except UserError:
        return  # refused by name
    assert examples.digest != digest or is_reported(path, examples.sources[0].ignored), (
        row,
        path,
        examples.sources[0].ignored,
    )
