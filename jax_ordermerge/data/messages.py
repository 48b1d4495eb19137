"""Messages of conversations in one form, whatever file they come from. Pure functions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from jax_ordermerge.errors import UserError, did_you_mean

Message = Mapping[str, Any]
Tool = dict[str, Any]
# Speakers of ShareGPT files and their roles in chat templates. An unknown speaker is an error: a
# turn under a wrong role would be learned, or not, without notice.
SHAREGPT_ROLES: Final = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def without_nulls(value: Any) -> Any:
    """Remove keys whose value is null from mappings, however deep they lie.

    Arrow gives every struct all keys that any row has and fills them with null. Only without them
    do Parquet and JSON Lines have the same tokens. Null elements of lists stay: Arrow adds none.

    Example:
        >>> without_nulls({"city": "Oslo", "zone": None, "days": [1, None]})
        {'city': 'Oslo', 'days': [1, None]}
    """
    if isinstance(value, Mapping):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [without_nulls(part) for part in value]
    return value


def read_messages(
    value: Any, column: str, role: str = "role", content: str = "content"
) -> list[Message]:
    """Return messages with the keys `role` and `content`; further keys stay.

    Null keys are removed, text parts become one string, arguments of tool calls that are JSON
    strings become objects, and calls without content have the content "".

    Args:
        value: the messages of a row.
        column: its name, for error messages.
        role: the key of roles in the file.
        content: the key of contents in the file.

    Raises:
        UserError: the value is no list of messages.

    Example:
        >>> read_messages([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], "m")
        [{'role': 'user', 'content': 'Hi'}]
    """
    # Parquet gives arrays where JSON gives lists, so any sequence but a string is accepted.
    if isinstance(value, (Mapping, str)) or not isinstance(value, Sequence):
        raise UserError(
            f"column '{column}' holds {type(value).__name__}, expected a list of messages"
        )
    messages: list[Message] = []
    for item in value:
        if not isinstance(item, Mapping) or item.get(role) is None:
            raise UserError(f"column '{column}': a message without '{role}': {str(item)[:60]}")
        message = without_nulls(item)
        text = message.pop(content, None)
        if isinstance(text, list):
            text = _join_parts(text, column)
        calls = message.get("tool_calls")
        # A call of a tool has no content. An empty string and not null: templates that print
        # contents without a look at them would print the word None.
        if text is None and calls:
            text = ""
        if not isinstance(text, str):
            raise UserError(
                f"column '{column}': a message without the string '{content}': {str(item)[:60]}"
            )
        normal = {"role": message.pop(role), "content": text} | message
        if calls:
            normal["tool_calls"] = [_read_call(call, column) for call in calls]
        elif calls is not None:
            del normal["tool_calls"]  # an empty list calls nothing
        messages.append(normal)
    return messages


def read_sharegpt(value: Any, column: str) -> list[Message]:
    """Return the messages of ShareGPT turns (`from`, `value`).

    The value of a `function_call` is a JSON object with `name` and `arguments`, or a list of these.

    Raises:
        UserError: the value is no list of turns, a speaker is unknown, or a call is not JSON.

    Example:
        >>> read_sharegpt([{"from": "human", "value": "Hi"}], "conversations")
        [{'role': 'user', 'content': 'Hi'}]
    """
    messages: list[Message] = []
    for message in read_messages(value, column, "from", "value"):
        speaker = str(message["role"])
        if speaker not in SHAREGPT_ROLES:
            raise UserError(
                f"column '{column}': unknown speaker '{speaker}'"
                f"{did_you_mean(speaker, SHAREGPT_ROLES)}"
            )
        normal = {**message, "role": SHAREGPT_ROLES[speaker]}
        if speaker == "function_call":
            calls = parse_json(message["content"], column)
            calls = calls if isinstance(calls, list) else [calls]
            normal |= {"content": "", "tool_calls": [_read_call(call, column) for call in calls]}
        messages.append(normal)
    return messages


def read_tools(value: Any) -> tuple[Tool, ...]:
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
    tools = parse_json(value, "tools") if isinstance(value, str) else without_nulls(value)
    if not isinstance(tools, list):
        raise UserError(f"column 'tools' holds {type(tools).__name__}, expected a list of tools")
    functions = []
    for tool in tools:
        function = parse_json(tool, "tools") if isinstance(tool, str) else tool
        if not isinstance(function, Mapping):
            raise UserError(f"column 'tools': a tool that is no object: {str(tool)[:60]}")
        wrapped = "function" in function or "name" not in function
        functions.append(dict(function) if wrapped else {"type": "function", "function": function})
    return tuple(functions)


def parse_json(text: str, column: str) -> Any:
    """Return the value of a JSON string in a column.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"column '{column}': not JSON ({error}): {text[:60]}") from error


def _join_parts(parts: Sequence[Any], column: str) -> str:
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        # An image that is passed over would leave an answer about nothing.
        if not isinstance(text, str):
            raise UserError(
                f"column '{column}': a part of a message is no text: {str(part)[:60]};"
                " only text is trained"
            )
        texts.append(text)
    return "".join(texts)


def _read_call(call: Any, column: str) -> dict[str, Any]:
    """Return a tool call whose arguments are an object, not the JSON string of one.

    Templates print arguments as JSON. A string would be encoded twice.
    """
    if not isinstance(call, Mapping):
        raise UserError(f"column '{column}': a tool call that is no object: {str(call)[:60]}")
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"column '{column}': a tool call without a name: {str(call)[:60]}")
    function = dict(function)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
        except ValueError:
            value = None
        if isinstance(value, dict):
            function["arguments"] = value
    outer = {name: part for name, part in call.items() if name != "function"}
    return outer | {"function": function} if "function" in call else _wrapped(function)


def _wrapped(function: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": function}
