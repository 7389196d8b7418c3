"""POST /v1/chat/completions: vLLM's own, plus a proxy that aligns and a judge that chooses."""

from collections.abc import AsyncGenerator
from typing import Any, TypeAlias

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from server.admission import Plan, admit
from server.best_of import best_of, stream_winner
from server.engine import (
    LOAD_FORMAT_HEADER,
    ChatCompletionResponse,
    ErrorResponse,
    load_aware_call,
    metrics_header,
    should_include_usage,
    validate_json_request,
    with_cancellation,
    with_sse_keep_alive,
)
from server.receipts import COUNTS, attach_to_stream
from server.schemas import ChatRequest
from server.state import Served, served

router = APIRouter()

Answer: TypeAlias = ErrorResponse | ChatCompletionResponse | AsyncGenerator[str, None]


@router.post(
    "/v1/chat/completions",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
    },
)
@with_cancellation
@load_aware_call
async def create_chat_completion(request: ChatRequest, raw_request: Request) -> Response:
    """Every stage of a chat request."""
    state = served(raw_request)
    plan = admit(request, state)
    answer = await generate(plan, state, raw_request)
    if plan.best_of > 1 and isinstance(answer, ChatCompletionResponse):
        answer = await best_of(answer, request, plan, state)
    answer = await add_receipt(answer, plan, state, raw_request)
    if plan.best_of > 1 and request.stream and isinstance(answer, ChatCompletionResponse):
        answer = stream_winner(answer, include_usage=_wants_usage(request, state))
    return respond(answer, raw_request)


async def generate(plan: Plan, state: Served, raw_request: Request) -> Answer:
    if state.chat is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    return await state.chat.create_chat_completion(plan.request, raw_request)


async def add_receipt(answer: Answer, plan: Plan, state: Served, raw_request: Request) -> Answer:
    """Say what the proxy did, and call the model by the name that was asked for."""
    if isinstance(answer, ErrorResponse):
        return answer
    served_model = _name_in_answer(plan, state)
    asked_model = plan.asked_model or served_model

    async def make_receipt() -> dict[str, Any] | None:
        request_id = raw_request.state.request_metadata.request_id
        return await receipt(plan, state, request_id) if plan.wants_receipt else None

    if isinstance(answer, ChatCompletionResponse):
        answer.model = asked_model
        made = await make_receipt()
        if made is not None:
            judged = (answer.model_extra or {}).get("alignment", {})
            answer.alignment = made | judged
        return answer
    if plan.wants_receipt or asked_model != served_model:
        return attach_to_stream(
            answer,
            served_model=served_model,
            asked_model=asked_model,
            make_receipt=make_receipt,
        )
    return answer


def _name_in_answer(plan: Plan, state: Served) -> str:
    """vLLM answers with the first of the frozen LLM's names, or the LoRA adapter's."""
    model = plan.request.model
    return model if model in state.models.lora_requests else state.models.model_name()


def _wants_usage(request: ChatRequest, state: Served) -> bool:
    forced = state.chat is not None and state.chat.enable_force_include_usage
    return should_include_usage(request.stream_options, forced)[0]


async def receipt(plan: Plan, state: Served, request_id: str) -> dict[str, Any]:
    """The proxy, its version, and what it did, summed over the choices."""
    if plan.alignment is None or plan.alignment.proxy is None:
        return {"proxy": None, "version": None} | dict.fromkeys(COUNTS, 0)
    name = plan.alignment.proxy
    counts = await state.counts.take(request_id)
    return {"proxy": name, "version": counts.get("version", state.proxies[name].version)} | {
        key: counts.get(key, 0) for key in COUNTS
    }


def respond(answer: Answer, raw_request: Request) -> Response:
    """As vLLM's own route does."""
    if isinstance(answer, ErrorResponse):
        return JSONResponse(answer.model_dump(), status_code=answer.error.code)
    if isinstance(answer, ChatCompletionResponse):
        load_format = raw_request.headers.get(LOAD_FORMAT_HEADER, "")
        return JSONResponse(answer.model_dump(), headers=metrics_header(load_format))
    keep_alive_s = float(raw_request.app.state.args.sse_keep_alive_interval)
    return StreamingResponse(
        with_sse_keep_alive(answer, keep_alive_s), media_type="text/event-stream"
    )
