"""POST /v1/chat/completions: vLLM's own, plus a proxy that aligns and a judge that chooses."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from judge.messages import Unusable, read_messages
from server.access import CALLER
from server.admission import CHAT
from server.answers import Answer, add_receipt, respond
from server.best_of import best_of, check_best_of, stream_best_of
from server.engine import (
    ChatCompletionResponse,
    ErrorResponse,
    load_aware_call,
    should_include_usage,
    validate_json_request,
    with_cancellation,
)
from server.gate import current_plan
from server.keeper import Keeper, listen, new_id, responses_of
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
        drawn = await state.chat.create_chat_completion(request, raw_request)
        answer = await add_receipt(drawn, plan, state)
    else:
        check_best_of(request, plan, state, raw_request.scope[CALLER])
        if request.stream:
            wants_usage = _wants_usage(request, state)
            answer = await stream_best_of(
                request, plan, state, raw_request, include_usage=wants_usage
            )
        else:
            best = await best_of(request, plan, state, raw_request)
            answer = await add_receipt(best, plan, state)
    if state.keeper is not None and (request.n or 1) > 1:
        answer = remember(state.keeper, request, answer, raw_request.scope[CALLER].identity)
    return respond(answer, raw_request)


def remember(keeper: Keeper, request: ChatRequest, answer: Answer, caller: str) -> Answer:
    """Have an answer with several choices kept, so that its caller may choose by its id."""
    try:
        turns = read_messages(request.messages)
    except Unusable:  # not text: nothing to learn from
        return answer
    request_id = new_id()
    if isinstance(answer, ChatCompletionResponse):
        answer.id = request_id
        keeper.remember(request_id, caller, turns, responses_of(answer))
    elif isinstance(answer, AsyncGenerator):
        return listen(
            answer, request_id, lambda found: keeper.remember(request_id, caller, turns, found)
        )
    return answer


def _wants_usage(request: ChatRequest, state: Served) -> bool:
    forced = state.chat is not None and state.chat.enable_force_include_usage
    return should_include_usage(request.stream_options, forced)[0]
