"""What the proxy did in a request, and how the answer says so.

The worker counts per engine request; the server asks for the counts once the request has finished.
A streamed answer carries them in its last chunk.
"""

import asyncio
import json
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Protocol

COUNTS = ("proposed", "accepted", "rejected", "forced")

Counts = dict[str, Any]
"""What a proxy did: its version and the counts above."""

# An answer's id becomes "<id>-<8 hex>" in the engine, and "<i>_<id>-<8 hex>" for choice i of n.
_ENGINE_ID = re.compile(r"(?:\d+_)?(chatcmpl-.*)-[0-9a-f]{8}", re.DOTALL)


class WorkerCalls(Protocol):
    """The one call of vLLM's engine client that is needed here."""

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...]) -> list[Any]: ...


class CountsReader:
    """Takes finished requests' counts from the worker.

    Requests that finish while a call is under way share the next one.
    """

    def __init__(self, engine: WorkerCalls) -> None:
        self.engine = engine
        self.waiting: dict[str, list[asyncio.Future[Counts]]] = {}
        self.reader: asyncio.Task[None] | None = None

    async def take(self, request_id: str) -> Counts:
        """The counts of a request by the id in its answer; empty if no proxy touched it."""
        future = asyncio.get_running_loop().create_future()
        self.waiting.setdefault(request_id, []).append(future)
        if self.reader is None or self.reader.done():
            self.reader = asyncio.create_task(self._read_all())
        return await future

    async def _read_all(self) -> None:
        while self.waiting:
            batch, self.waiting = self.waiting, {}
            counts: dict[str, Counts] = {}
            failure: Exception | None = None
            try:
                per_worker = await self.engine.collective_rpc(
                    "take_alignment_counts", args=(list(batch),)
                )
                counts = sum_by_request(per_worker[0])  # all draw the same; the first one counts
            except Exception as error:  # whatever it is, those who wait must learn of it
                failure = error
            for request_id, futures in batch.items():
                for future in futures:
                    if future.done():  # its client has gone
                        continue
                    if failure is not None:
                        future.set_exception(failure)
                    else:
                        future.set_result(counts.get(request_id, {}))


def sum_by_request(by_choice: Mapping[str, Counts]) -> dict[str, Counts]:
    """The worker's counts, one entry per choice under the engine's id, by the id in the answer."""
    summed: dict[str, Counts] = {}
    for engine_id, counts in by_choice.items():
        match = _ENGINE_ID.fullmatch(engine_id)
        total = summed.setdefault(match[1] if match else engine_id, dict.fromkeys(COUNTS, 0))
        total["version"] = counts["version"]
        for key in COUNTS:
            total[key] += counts[key]
    return summed


async def attach_to_stream(
    chunks: AsyncGenerator[str, None],
    *,
    served_model: str,
    asked_model: str,
    make_receipt: Callable[[], Awaitable[dict[str, Any] | None]],
) -> AsyncGenerator[str, None]:
    """vLLM's server-sent events, with the receipt in the last, and the model's name as asked for.

    Only a chunk that ends a choice, or reports usage, can be the last: these are held back until
    the next one comes, and all others go out at once.
    """
    old_name = f'"model":{json.dumps(served_model, ensure_ascii=False)}'
    new_name = f'"model":{json.dumps(asked_model, ensure_ascii=False)}'
    held: str | None = None
    async for chunk in chunks:
        if chunk.startswith("data: [DONE]"):
            if held is not None:
                yield with_field(held, "alignment", await make_receipt())
            held = None
        elif held is not None:
            yield held
            held = None
        # Within JSON text a quote would be escaped, so this finds keys only.
        chunk = chunk.replace(old_name, new_name, 1)
        if '"finish_reason":"' in chunk or '"choices":[]' in chunk:
            held = chunk
        else:
            yield chunk
    if held is not None:
        yield held


def with_field(event: str, key: str, value: Any) -> str:
    """A server-sent event with one more field in its JSON; unchanged where the value is None."""
    if value is None:
        return event
    data = json.loads(event.removeprefix("data: "))
    data[key] = value
    return as_event(data)


def as_event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"
