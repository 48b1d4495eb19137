"""Messages of conversations in one form, whatever file they come from. Pure functions."""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Final

from jax_ordermerge.data import values
from jax_ordermerge.errors import UserError, did_you_mean
from jax_ordermerge.json_types import Json, JsonRow, JsonValue

Message = JsonRow
Tool = Json
# Roles and ShareGPT's speakers in small letters, and their roles in chat templates.
ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "function_call": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# Lists and objects in one another, of tools and calls. Python gives up at some 400.
MAX_DEPTH: Final = 64


def without_nulls(value: object, depth: int = 0) -> JsonValue:
    """Remove keys whose value is null from mappings, however deep they lie.

    Arrow gives every struct all keys that any row has and fills them with null. Only without them
    do Parquet and JSON Lines have the same tokens. Null elements of lists stay: Arrow adds none.

    Raises:
        UserError: a value that JSON does not have, such as a date, or more than `MAX_DEPTH` lists
            and objects in one another.

    Example:
        >>> without_nulls({"city": "Oslo", "zone": None, "days": [1, None]})
        {'city': 'Oslo', 'days': [1, None]}
    """
    if depth > MAX_DEPTH:
        raise UserError(f"more than {MAX_DEPTH} lists and objects stand in one another")
    if isinstance(value, Mapping):
        return {
            name: without_nulls(part, depth + 1) for name, part in value.items() if part is not None
        }
    if isinstance(value, (list, tuple)):
        return [without_nulls(part, depth + 1) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"the number {value} is not finite, and JSON has no word for it")
    # Parquet has dates, bytes and decimals. Templates print them each in another way, or not.
    if not isinstance(value, (str, int, float, type(None))):
        raise UserError(f"{str(value)[:60]!r} is a {type(value).__name__}; write it as a string")
    return value


def read_messages(value: object, column: str) -> list[Message]:
    """Return messages with the keys `role` and `content`; further keys stay.

    Messages may have the keys `from` and `value` instead, as ShareGPT's have, whose speakers
    become roles. Null keys are removed, text parts become one string, calls without content have
    the content "", and arguments that are JSON strings become objects. The content of a speaker
    `function_call` is a JSON object with `name` and `arguments`, or a list of these.

    Args:
        value: the messages of a row, or a JSON string of them, as CSV has it.
        column: its name, for error messages.

    Raises:
        UserError: the value is no list of messages.

    Example:
        >>> read_messages([{"from": "human", "value": [{"type": "text", "text": "Hi"}]}], "m")
        [{'role': 'user', 'content': 'Hi'}]
    """
    value = parse_messages(value)
    if not isinstance(value, (list, tuple)):
        raise UserError(
            f"column '{column}' holds {type(value).__name__}, expected a list of messages"
            + (" or its JSON" if isinstance(value, str) else "")
        )
    return [_read_message(item, column) for item in value]


def parse_messages(value: object) -> JsonValue:
    """Return the messages in a JSON string, or the value itself if it is none.

    A text that only looks like it stays a text: a prompt may ask about JSON.

    Example:
        >>> parse_messages('[{"role": "user", "content": "Hi"}]')
        [{'role': 'user', 'content': 'Hi'}]
        >>> parse_messages("[1, 2]")
        '[1, 2]'
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        parsed = values.parse_json(value)
    except ValueError:
        return value
    items = parsed if isinstance(parsed, list) else [parsed]
    keys = ({"role", "content"}, {"from", "value"})
    is_message = (
        isinstance(item, dict) and any(pair <= set(item) for pair in keys) for item in items
    )
    return parsed if all(is_message) else value


def take_weight(
    message: Message, column: str, *, is_context: bool = False
) -> tuple[Message, bool | None]:
    """Return a message without `weight` (OpenAI) and `train` (axolotl), and what they say.

    Args:
        message: with the keys `role` and `content`.
        column: where it stands, for error messages.
        is_context: whether it stands in a prompt.

    Returns:
        The message, and whether it is learned; None where it does not say.

    Raises:
        UserError: a weight between 0 and 1, or one that would let a prompt or another role than the
            assistant be learned.

    Example:
        >>> take_weight({"role": "assistant", "content": "Hi", "weight": 0}, "messages")
        ({'role': 'assistant', 'content': 'Hi'}, False)
    """
    weights = {name: message[name] for name in ("weight", "train") if name in message}
    for name, weight in weights.items():
        # A fraction that counts as 1 would be a silent error.
        if isinstance(weight, bool) != (name == "train") or weight not in (0, 1):
            expected = "true or false" if name == "train" else "0 or 1"
            raise UserError(
                f"column '{column}': {name} {weight!r} of a message, expected {expected}"
            )
        if weight and (is_context or message["role"] != "assistant"):
            owner = "in a prompt" if is_context else f"of {message['role']}"
            raise UserError(
                f"column '{column}': {name} {weight!r} of a message {owner}:"
                " only what assistants answer is learned"
            )
    bare = {name: value for name, value in message.items() if name not in weights}
    return bare, all(weights.values()) if weights else None


def read_tools(value: object) -> tuple[Tool, ...]:
    """Return the tools of a row as `{"type": "function", "function": {...}}`.

    Args:
        value: a list of tools, or a JSON string of one, as LLaMA-Factory has it. Tools without
            `function` around them are functions.

    Raises:
        UserError: it is something else.

    Example:
        >>> read_tools('[{"name": "time"}]')
        ({'type': 'function', 'function': {'name': 'time'}},)
    """
    tools = parse_json(value, "tools") if isinstance(value, str) else value
    if not isinstance(tools, list):
        raise UserError(f"column 'tools' holds {type(tools).__name__}, expected a list of tools")
    functions = []
    for tool in tools:
        function = without_nulls(parse_json(tool, "tools") if isinstance(tool, str) else tool)
        if not isinstance(function, dict):
            raise UserError(f"column 'tools': a tool that is no object: {str(tool)[:60]}")
        wrapped = "function" in function or "name" not in function
        functions.append(function if wrapped else _wrapped(function))
    return tuple(functions)


def parse_json(text: str, column: str) -> JsonValue:
    """Return the value of a JSON string in a column.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return values.parse_json(text)
    except ValueError as error:
        raise UserError(f"column '{column}': not JSON ({error}): {text[:60]}") from error


def _read_message(item: object, column: str) -> Message:
    message = without_nulls(item) if isinstance(item, Mapping) else {}
    is_sharegpt = "role" not in message and "from" in message
    speaker = message.pop("from" if is_sharegpt else "role", None)
    text = message.pop("value" if "content" not in message else "content", None)
    if not isinstance(speaker, str):
        raise UserError(f"column '{column}': a message without 'role' or 'from': {str(item)[:60]}")
    role = _read_role(speaker, column, is_sharegpt)
    if isinstance(text, list):
        text = _join_parts(text, message, column)
    # the second is OpenAI's old key for the only call of a message
    keys = ("tool_calls", "function_call")
    calls = [call for key in keys for call in _call_list(message.pop(key, []), column)]
    if speaker.lower() == "function_call" and isinstance(text, str):
        calls, text = calls + _call_list(parse_json(text, column), column), ""
    # A call of a tool has no content. An empty string and not null: templates that print contents
    # without a look at them would print the word None.
    if text is None and calls:
        text = ""
    if not isinstance(text, str):
        raise UserError(
            f"column '{column}': a message without the string 'content' or 'value':"
            f" {str(item)[:60]}"
        )
    normal = {"role": role, "content": text} | message
    return normal | {"tool_calls": calls} if calls else normal


def _read_role(speaker: str, column: str, is_sharegpt: bool) -> str:
    name = speaker.strip().lower()
    # OpenAI's old name of a tool that answers. As a speaker it has been a call and an answer.
    if name == "function" and not is_sharegpt:
        return "tool"
    if name in ROLES:
        return ROLES[name]
    # A turn under a wrong role would be learned, or not, without notice. Templates have roles of
    # their own, such as ipython, so only what looks like a slip is refused there.
    if is_sharegpt or difflib.get_close_matches(name, ROLES, n=1, cutoff=0.75):
        kind = "speaker" if is_sharegpt else "role"
        raise UserError(f"column '{column}': unknown {kind} '{speaker}'{did_you_mean(name, ROLES)}")
    return speaker


def _join_parts(parts: Sequence[object], message: Json, column: str) -> str:
    """Join the text parts of a content; their further keys become keys of the message."""
    texts = []
    for part in parts:
        part = {"text": part} if isinstance(part, str) else part
        # An image that is passed over would leave an answer about nothing.
        if (
            not isinstance(part, dict)
            or not isinstance(part.get("text"), str)
            or part.get("type", "text") not in ("text", "input_text", "output_text")
        ):
            raise UserError(
                f"column '{column}': a part of a message is no text: {str(part)[:60]};"
                " only text is trained"
            )
        texts.append(part["text"])
        # They stay visible to `unused`, under a name that says where they stood.
        further = {name: value for name, value in part.items() if name not in ("type", "text")}
        message |= {f"content.{name}": value for name, value in further.items()}
    return "".join(texts)


def _call_list(calls: JsonValue, column: str) -> list[Json]:
    # Arrow has one type per column, so files on the hub often hold calls as JSON strings.
    calls = parse_json(calls, column) if isinstance(calls, str) and calls else calls
    if calls in ("", [], {}):
        return []
    return [_read_call(call, column) for call in (calls if isinstance(calls, list) else [calls])]


def _read_call(call: object, column: str) -> Json:
    """Return a tool call whose arguments are an object, not the JSON string of one.

    Templates print arguments as JSON. A string would be encoded twice.
    """
    if not isinstance(call, dict):
        raise UserError(f"column '{column}': a tool call that is no object: {str(call)[:60]}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"column '{column}': a tool call without a name: {str(call)[:60]}")
    # Arrow makes null of an object without keys.
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            value = values.parse_json(arguments)
        except ValueError:
            value = None
        # A string that is no object stays one: what it is must not be guessed.
        arguments = value if isinstance(value, dict) else arguments
    function = function | {"arguments": arguments}
    # `id` and `type`, which templates of Mistral print
    outer = {name: part for name, part in call.items() if name != "function"}
    return outer | {"function": function} if "function" in call else _wrapped(function)


def _wrapped(function: Json) -> Json:
    return {"type": "function", "function": function}
