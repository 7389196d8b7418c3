"""Chat messages in one form, for the server, the judge and training.

A message has `role`, `content` (a text) and optionally `tool_calls`, `tool_call_id` and `name`, as chat templates take
them. All of OpenAI's forms are read: content that is null beside tool calls, or a list of text parts, and arguments as
JSON text or as an object. Other fields are dropped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

ROLES = ("system", "developer", "user", "assistant", "tool")
_MAX_DEPTH = 64  # levels of nesting; Python's own limit depends on the caller's stack


class Message(TypedDict):
    """One turn of a conversation, in the form above."""

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


class Unusable(ValueError):
    """A row, or a message of it, that cannot be used.

    Args:
        reason: the same for all rows of the kind, which are counted by it
        detail: of this row
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason, self.detail = reason, detail


def read_messages(messages: Any) -> list[Message]:
    """The messages in the form above.

    Raises:
        Unusable: not a list of chat messages, or one of them is not text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise Unusable("expected a list of chat messages")
    return [_read(message) for message in messages]


def _read(message: Any) -> Message:
    if not isinstance(message, Mapping):
        raise Unusable('a message is {"role": ..., "content": "text"}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise Unusable(f"role {role!r} is not one of {ROLES}")
    calls = _read_calls(message.get("tool_calls") or [])
    if content is None and not calls:
        raise Unusable('a message is {"role": ..., "content": "text"}', "content is null")
    read = Message(role=role, content="" if content is None else _text_of_parts(content))
    if calls:
        read["tool_calls"] = calls
    for field in ("tool_call_id", "name"):
        if isinstance(value := message.get(field), str):
            read[field] = value
    check_text(read if len(read) > 2 else read["content"])
    return read


def _text_of_parts(content: Any) -> str:
    """Parts are joined as vLLM joins them."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise Unusable("content is neither a text nor a list of parts", type(content).__name__)
    texts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise Unusable("a message has content that is not text")
    return "\n".join(texts)


def _read_calls(calls: Any) -> list[dict[str, Any]]:
    """Function calls with their arguments as an object, as chat templates expect them."""
    if not isinstance(calls, Sequence):
        raise Unusable("tool_calls is not a list")
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unusable("a tool call has no function with a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise Unusable("the arguments of a tool call are not JSON") from None
        if not isinstance(arguments, Mapping | None):
            raise Unusable("the arguments of a tool call are no object")
        named = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append({**identity, "type": "function", "function": named})
    return read


def text_of(message: Mapping[str, Any]) -> str:
    """A message as text: each tool call is a line of JSON."""
    calls = [json.dumps(call["function"]) for call in message.get("tool_calls", ())]
    return "\n".join([*([message["content"]] if message["content"] else []), *calls])


def as_texts(messages: Iterable[Message]) -> list[Message]:
    """The messages with role and text only."""
    return [Message(role=message["role"], content=text_of(message)) for message in messages]


def prompt_key(messages: Iterable[Message]) -> str:
    """The same for conversations that differ only in white space, the order of keys, or fields that no model sees.

    A developer's turn counts as a system message, as most models read it.
    """
    turns = []
    for message in messages:
        role = "system" if message["role"] == "developer" else message["role"]
        calls = [call["function"] for call in message.get("tool_calls", ())]
        turns.append([role, message["content"], calls])
    return json.dumps(_plain(turns), sort_keys=True)


def _plain(value: Any) -> Any:
    """Without nulls in objects, and with single spaces."""
    if isinstance(value, str):
        return " ".join(value.split())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_text(value: Any) -> None:
    """
    Raises:
        Unusable: it cannot be written as JSON, or has half of a surrogate pair, which no file can hold.
    """
    if _is_deep(value):
        raise Unusable("nested too deeply")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise Unusable("a number is not one of JSON's: NaN or Infinity") from None
    except TypeError as error:
        raise Unusable("a value is not one of JSON's", str(error)) from None
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Unusable("a text is not Unicode: it has half of a surrogate pair") from None


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_DEPTH):
        within = [list(x.values()) if isinstance(x, Mapping) else x for x in level]
        level = [x for items in within if isinstance(items, list | tuple) for x in items]
        if not level:
            return False
    return True
