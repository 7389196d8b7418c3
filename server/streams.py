"""Server-sent events: vLLM's own, with what we have to say in them."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

Trace = list[dict[str, Any]]


async def attach_to_stream(
    chunks: AsyncGenerator[str, None],
    *,
    make_receipt: Callable[[], Awaitable[dict[str, Any]]],
    trace: Callable[[], Awaitable[Trace]] | None = None,
) -> AsyncGenerator[str, None]:
    """vLLM's events, with the receipt in the last, and the trace in those that it goes with.

    Only a chunk that ends a choice, or reports usage, can be the last: these are held back until
    the next one comes, and all others go out at once.
    """
    held: str | None = None
    async for chunk in chunks:
        if chunk.startswith("data: [DONE]"):
            if held is not None:
                rest = {"trace": await trace()} if trace is not None else {}
                yield with_alignment(held, rest | await make_receipt())
            held = None
        elif held is not None:
            yield held
            held = None
        if trace is not None and '"choices":' in chunk:
            new = await trace()
            chunk = with_alignment(chunk, {"trace": new}) if new else chunk
        # Within JSON text a quote would be escaped, so this finds keys only.
        if '"finish_reason":"' in chunk or '"choices":[]' in chunk:
            held = chunk
        else:
            yield chunk
    if held is not None:
        yield held


def with_alignment(event: str, fields: dict[str, Any]) -> str:
    """An event with more fields in its `alignment`; a trace is added to the one that is there."""
    data = json.loads(event.removeprefix("data: "))
    before = data.get("alignment", {})
    data["alignment"] = before | fields
    if "trace" in fields:
        data["alignment"]["trace"] = before.get("trace", []) + fields["trace"]
    return as_event(data)


def as_event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
