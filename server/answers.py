"""What we add to vLLM's answers, whole or streamed, and how they go out."""

from collections.abc import AsyncGenerator
from typing import Any, TypeAlias

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.admission import Plan
from server.engine import (
    LOAD_FORMAT_HEADER,
    ChatCompletionResponse,
    CompletionResponse,
    ErrorResponse,
    metrics_header,
    with_sse_keep_alive,
)
from server.receipts import COUNTS, sum_counts
from server.state import Served
from server.streams import attach_to_stream
from server.traces import Trace

Whole: TypeAlias = ChatCompletionResponse | CompletionResponse
Answer: TypeAlias = ErrorResponse | Whole | AsyncGenerator[str, None]


async def add_receipt(answer: Answer, plan: Plan, state: Served) -> Answer:
    """Say what the proxy did: `alignment` in the answer, or in the last chunk of a stream."""
    if isinstance(answer, ErrorResponse) or not plan.wants_receipt:
        return answer
    trace = Trace(plan, state) if plan.alignment is not None and plan.alignment.trace else None

    async def make_receipt() -> dict[str, Any]:
        truncated = {"trace_truncated": trace.is_truncated()} if trace is not None else {}
        return await receipt(plan) | truncated

    if not isinstance(answer, Whole):
        advance = trace.advance if trace is not None else None
        return attach_to_stream(answer, make_receipt=make_receipt, trace=advance)
    # The trace first: a request whose counts were taken is forgotten.
    traced = await trace.advance() if trace is not None else []
    judged = (answer.model_extra or {}).get("alignment", {})
    answer.alignment = await make_receipt() | judged
    if trace is not None:
        by_choice = {each["index"]: each["entries"] for each in traced}
        answer.alignment["trace"] = [by_choice.get(i, []) for i in range(len(answer.choices))]
    return answer


async def receipt(plan: Plan) -> dict[str, Any]:
    """The proxy, the version that the request was pinned to, and what it did, over all choices."""
    if plan.pinned is None:
        return {"proxy": None, "version": None} | dict.fromkeys(COUNTS, 0)
    named = {"proxy": plan.pinned.shown_name, "version": plan.pinned.version}
    return named if plan.take_counts is None else named | sum_counts(await plan.all_counts())


def respond(answer: Answer, raw_request: Request) -> Response:
    """As vLLM's own routes do."""
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, Whole):
        load_format = raw_request.headers.get(LOAD_FORMAT_HEADER, "")
        return JSONResponse(answer.model_dump(), headers=metrics_header(load_format))
    keep_alive_s = float(raw_request.app.state.args.sse_keep_alive_interval)
    return StreamingResponse(
        with_sse_keep_alive(answer, keep_alive_s), media_type="text/event-stream"
    )
