"""A best-of-N request as a stream: progress while samples are drawn and judged, then the best in one piece."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from time import time
from typing import Any

from fastapi import Request

from server.admission import AdmittedRequest
from server.answers import Answer, add_alignment_stats, proxy_and_version
from server.app_state import AppState
from server.best_of import best_of
from server.engine import ChatCompletionResponse, ErrorResponse, create_error_response, random_uuid
from server.schemas.generation import ChatRequest
from server.streams import DONE, as_event

Progress = dict[str, Any]


async def stream_best_of(
    request: ChatRequest,
    admitted: AdmittedRequest,
    state: AppState,
    raw_request: Request,
    *,
    include_usage: bool,
) -> Answer:
    """Server-sent events: progress as soon as a sample is finished, then the winner.

    A failure before that is a response or an exception, as without streaming.
    """
    queue: asyncio.Queue[Progress | None] = asyncio.Queue()

    async def work() -> Answer:
        answer = await best_of(request, admitted.admission, state, raw_request, queue.put_nowait)
        return await add_alignment_stats(answer, admitted, state)

    task = asyncio.create_task(work())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        first = await queue.get()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if first is None:
        return await task
    opening = proxy_and_version(admitted.admission) | {"best_of": admitted.admission.best_of}
    request_id = raw_request.headers.get("X-Request-Id") or random_uuid()  # as vLLM's
    head = {
        "id": f"chatcmpl-{request_id}",
        "created": int(time()),
        "model": admitted.admission.requested_model or state.models.model_name(),
        "object": "chat.completion.chunk",
    }
    return _events(task, queue, first, head, opening, include_usage)


async def _events(
    task: asyncio.Task[Answer],
    queue: asyncio.Queue[Progress | None],
    first: Progress,
    head: dict[str, Any],
    opening: dict[str, Any],
    include_usage: bool,
) -> AsyncGenerator[str, None]:
    def chunk(delta: dict[str, Any], alignment: dict[str, Any]) -> str:
        # Each event has a choice, even an empty one: many clients read the first choice without a check.
        choice = {"index": 0, "delta": delta, "finish_reason": None}
        return as_event(head | {"choices": [choice], "alignment": alignment})

    yield chunk({"role": "assistant", "content": ""}, opening)
    progress: Progress | None = first
    try:
        while progress is not None:
            yield chunk({}, {"progress": progress})
            progress = await queue.get()
        answer = await task
        if isinstance(answer, ErrorResponse):
            yield as_event(answer.model_dump())
        else:
            assert isinstance(answer, ChatCompletionResponse)
            for event in winners(answer, head, include_usage):
                yield event
    except Exception as error:  # as in vLLM's streams: the status has been sent
        yield as_event(create_error_response(error).model_dump())
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task
    yield DONE


def winners(answer: ChatCompletionResponse, head: dict[str, Any], include_usage: bool) -> list[str]:
    """The finished response as events: each choice in one piece, then usage where the client wants it.

    The first message has `alignment` too: clients that add deltas up, such as openai's `.stream()`, keep a message's
    unknown fields, but of the chunks' own only the first.
    """
    data = answer.model_dump(exclude_none=True)
    chunks: list[dict[str, Any]] = []
    for choice in data["choices"]:
        message = choice.pop("message")
        for index, call in enumerate(message.get("tool_calls", ())):
            call["index"] = index
        if choice["index"] == 0:
            del message["role"]  # the first chunk said it, and deltas are added up
            message["alignment"] = data["alignment"]
        chunks.append(head | {"choices": [choice | {"delta": message}]})
    if include_usage:
        chunks.append(head | {"choices": [], "usage": data["usage"]})
    chunks[-1]["alignment"] = data["alignment"]
    return [as_event(chunk) for chunk in chunks]
