"""Adds alignment statistics and traces to vLLM's responses, whole or streamed, and sends them."""

import json
from collections.abc import AsyncGenerator
from typing import Any, TypeAlias, cast

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.admission import Admission, AdmittedRequest
from server.alignment_stats import COUNTS, AlignmentCounts
from server.app_state import AppState
from server.engine import (
    LOAD_FORMAT_HEADER,
    ChatCompletionResponse,
    CompletionResponse,
    ErrorResponse,
    metrics_header,
    with_sse_keep_alive,
)
from server.engine_wrapper import current_request
from server.streams import attach_to_stream, attach_to_typed_stream
from server.traces import Trace

Whole: TypeAlias = ChatCompletionResponse | CompletionResponse
Answer: TypeAlias = ErrorResponse | Whole | AsyncGenerator[str, None]


async def add_alignment_stats(answer: Answer, admitted: AdmittedRequest, state: AppState) -> Answer:
    """Report what the proxy did: `alignment` in the response, or in the first and last chunk of a stream."""
    admission, counts = admitted
    if isinstance(answer, ErrorResponse) or not admission.wants_stats:
        return answer
    is_traced = admission.alignment is not None and admission.alignment.trace
    trace = Trace(admission, counts, state) if is_traced else None

    async def make_stats() -> dict[str, Any]:
        truncated = {"trace_truncated": trace.is_truncated()} if trace is not None else {}
        return await alignment_stats(admission, counts) | truncated

    if not isinstance(answer, Whole):
        advance = trace.advance if trace is not None else None
        opening = proxy_and_version(admission)
        return attach_to_stream(answer, opening=opening, make_stats=make_stats, trace=advance)
    # The trace first: the worker forgets a request whose counts were taken.
    entries = await trace.advance() if trace is not None else []
    best_of = (answer.model_extra or {}).get("alignment", {})
    answer.alignment = await make_stats() | best_of
    if trace is not None:
        by_choice = {choice["index"]: choice["entries"] for choice in entries}
        answer.alignment["trace"] = [by_choice.get(i, []) for i in range(len(answer.choices))]
    return answer


async def add_to_response(response: Response | None) -> Response:
    """The same for the response of a route of vLLM's, to the request under way.

    Args:
        response: as the route made it; None = the client has disconnected.
    """
    admitted = current_request()
    assert admitted is not None, "a body that fits a request was admitted"
    admission, counts = admitted
    if response is None:
        return Response()
    if response.status_code >= 400 or not admission.wants_stats:
        return response

    async def make_stats() -> dict[str, Any]:
        return await alignment_stats(admission, counts)

    if isinstance(response, StreamingResponse):
        opening = proxy_and_version(admission)
        events = cast(AsyncGenerator[str, None], response.body_iterator)
        response.body_iterator = attach_to_typed_stream(
            events, opening=opening, make_stats=make_stats
        )
        return response
    data = json.loads(bytes(response.body))
    return JSONResponse(data | {"alignment": await make_stats()})


async def alignment_stats(admission: Admission, counts: AlignmentCounts) -> dict[str, Any]:
    """The proxy, the version that the request is pinned to, and its counts over all choices."""
    if not admission.pinned:
        return proxy_and_version(admission) | dict.fromkeys(COUNTS, 0)
    return proxy_and_version(admission) | (await counts.total() if counts.in_response else {})


def proxy_and_version(admission: Admission) -> dict[str, Any]:
    """What is known of a response before its first token."""
    pinned, alignment = admission.pinned, admission.alignment
    if alignment is None:
        return {"proxy": None, "version": None}
    fields: dict[str, Any] = {
        "proxy": "+".join(proxy.shown_name for proxy in pinned),
        "version": "+".join(proxy.version for proxy in pinned),
    }
    if len(pinned) > 1:
        fields["proxies"] = {
            proxy.shown_name: {
                "version": proxy.version,
                "strength": alignment.strengths[proxy.name],
            }
            for proxy in pinned
        }
    return fields


def named_version(admission: Admission) -> str:
    """`<proxy>@<version>`, for a header and the request log."""
    fields = proxy_and_version(admission)
    return f"{fields['proxy']}@{fields['version']}"


def respond(answer: Answer, raw_request: Request) -> Response:
    """Send the response as vLLM's own routes do."""
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, Whole):
        load_format = raw_request.headers.get(LOAD_FORMAT_HEADER, "")
        return JSONResponse(answer.model_dump(), headers=metrics_header(load_format))
    keep_alive_s = float(raw_request.app.state.args.sse_keep_alive_interval)
    return StreamingResponse(
        with_sse_keep_alive(answer, keep_alive_s), media_type="text/event-stream"
    )
