"""POST /v1/chat/completions: vLLM's own, plus a proxy that aligns and a judge that chooses."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.admission import CHAT
from server.answers import add_receipt, respond
from server.best_of import best_of, check_best_of, stream_best_of
from server.engine import (
    ErrorResponse,
    load_aware_call,
    should_include_usage,
    validate_json_request,
    with_cancellation,
)
from server.gate import current_plan
from server.schemas import ChatRequest
from server.state import Served, served

router = APIRouter()


@router.post(
    CHAT,
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
    """Every stage of a chat request that the gate has let in."""
    state, plan = served(raw_request), current_plan()
    assert plan is not None, "a body that fits ChatRequest has passed the gate"
    if state.chat is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    if plan.best_of == 1:
        answer = await state.chat.create_chat_completion(request, raw_request)
        return respond(await add_receipt(answer, plan, state), raw_request)
    check_best_of(request, plan, state)
    if request.stream:
        include_usage = _wants_usage(request, state)
        return respond(
            await stream_best_of(request, plan, state, raw_request, include_usage=include_usage),
            raw_request,
        )
    best = await best_of(request, plan, state, raw_request)
    return respond(await add_receipt(best, plan, state), raw_request)


def _wants_usage(request: ChatRequest, state: Served) -> bool:
    forced = state.chat is not None and state.chat.enable_force_include_usage
    return should_include_usage(request.stream_options, forced)[0]
