"""Server-sent events: vLLM's own chunks with `alignment` added."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, NamedTuple

from pydantic_core import from_json

Trace = list[dict[str, Any]]
DONE = "data: [DONE]\n\n"


class Event(NamedTuple):
    """One of vLLM's server-sent events."""

    text: str
    """As it was sent, with the empty line at its end."""
    data: dict[str, Any] | None
    """The chunk; None for anything that is no JSON object, such as `[DONE]`."""

    @classmethod
    def parse(cls, text: str) -> "Event":
        """Never fails: whatever is no JSON object has no data."""
        content = text.removeprefix("data: ")
        try:
            data = from_json(content) if content.startswith("{") else None  # twice as fast as json
        except ValueError:
            data = None
        return cls(text, data)

    @property
    def is_done(self) -> bool:
        """The last event of a stream."""
        return self.text.startswith("data: [DONE]")

    @property
    def choices(self) -> list[dict[str, Any]] | None:
        """None where the chunk is no part of a response, such as an error."""
        return None if self.data is None else self.data.get("choices")

    @property
    def may_be_last(self) -> bool:
        """Only a chunk that ends a choice, or reports usage alone, can be the last of a response."""
        if self.choices is None:
            return False
        return not self.choices or any(c.get("finish_reason") is not None for c in self.choices)

    def with_alignment(self, fields: dict[str, Any]) -> "Event":
        """With more fields in the chunk's `alignment`; a trace is appended to the chunk's own."""
        data = self.data or {}
        before = data.get("alignment", {})
        alignment = before | fields
        if "trace" in fields:
            alignment["trace"] = before.get("trace", []) + fields["trace"]
        data = data | {"alignment": alignment}
        return Event(as_event(data), data)


async def attach_to_stream(
    chunks: AsyncGenerator[str, None],
    *,
    opening: dict[str, Any],
    make_stats: Callable[[], Awaitable[dict[str, Any]]],
    trace: Callable[[], Awaitable[Trace]] | None = None,
) -> AsyncGenerator[str, None]:
    """vLLM's events, with the alignment statistics in the last chunk, and trace entries with their tokens.

    A chunk that may be the last is held back until the next one comes; all others go out at once.

    Args:
        opening: what the first chunk's `alignment` says. Clients that put a stream together into one response, such as
            openai's `.stream()`, keep only the first chunk's unknown fields.
        make_stats: of the whole response.
        trace: the entries since the last call.
    """
    held: Event | None = None
    is_open = False
    async for chunk in chunks:
        event = Event.parse(chunk)
        if not is_open and event.choices is not None:
            event, is_open = event.with_alignment(opening), True
        if event.is_done:
            if held is not None:
                rest = {"trace": await trace()} if trace is not None else {}
                yield held.with_alignment(rest | await make_stats()).text
            held = None
        elif held is not None:
            yield held.text
            held = None
        if trace is not None and event.choices is not None and (entries := await trace()):
            event = event.with_alignment({"trace": entries})
        if event.may_be_last:
            held = event
        else:
            yield event.text
    if held is not None:
        yield held.text


WHOLE_RESPONSES = {
    **dict.fromkeys(("response.created", "response.in_progress"), ("response", False)),
    **dict.fromkeys(("response.completed", "response.incomplete"), ("response", True)),
    "message_start": ("message", False),
    "message_delta": (None, True),
}
"""Events of /v1/responses and /v1/messages that tell of the whole response: the field that it is in, if any, and
whether it is complete."""


async def attach_to_typed_stream(
    chunks: AsyncGenerator[str, None],
    *,
    opening: dict[str, Any],
    make_stats: Callable[[], Awaitable[dict[str, Any]]],
) -> AsyncGenerator[str, None]:
    """vLLM's events of other protocols than chat's, with `alignment` in WHOLE_RESPONSES; arguments as above."""
    async for chunk in chunks:
        kind, _, content = chunk.removeprefix("event: ").partition("\ndata: ")
        if kind not in WHOLE_RESPONSES:
            yield chunk
            continue
        data = from_json(content)
        field, is_complete = WHOLE_RESPONSES[kind]
        response = data[field] if field is not None else data
        response["alignment"] = await make_stats() if is_complete else opening
        yield f"event: {kind}\n{as_event(data)}"


def as_event(data: dict[str, Any]) -> str:
    """A server-sent event with JSON as vLLM writes it."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
