"""POST /v1/chat/completions: vLLM's own, with a proxy that aligns and a judge that chooses."""

from collections.abc import AsyncGenerator

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from judge.messages import Unusable, read_messages
from server.access import CALLER
from server.admission import CHAT, AdmittedRequest
from server.answers import Answer, add_alignment_stats, respond
from server.app_state import AppState, get_state
from server.best_of import best_of, check_best_of
from server.best_of_stream import stream_best_of
from server.engine import (
    ChatCompletionResponse,
    ErrorResponse,
    load_aware_call,
    should_include_usage,
    validate_json_request,
    with_cancellation,
)
from server.engine_wrapper import current_request
from server.feedback_writer import FeedbackWriter, new_id, record_stream, responses_of
from server.schemas.generation import ChatRequest
from server.schemas.report import ChatResponse

router = APIRouter(tags=["Generation"])


@router.post(
    CHAT,
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": ChatResponse, "content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
        502: {"model": ErrorResponse, "description": "A judge on another server fails."},
        503: {
            "model": ErrorResponse,
            "description": "No sample is left to judge, or the server stops.",
        },
        504: {
            "model": ErrorResponse,
            "description": "No sample was finished, or no judge answered, in time.",
        },
    },
)
@with_cancellation
@load_aware_call
async def create_chat_completion(request: ChatRequest, raw_request: Request) -> Response:
    """A chat completion: vLLM's, aligned by a proxy, or the best of N by the judge."""
    state, admitted = get_state(raw_request), current_request()
    assert admitted is not None, "a body that fits ChatRequest was admitted"
    if state.chat is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    if admitted.admission.best_of == 1:
        sampled = await state.chat.create_chat_completion(request, raw_request)
        answer = await add_alignment_stats(sampled, admitted, state)
    else:
        answer = await _best_of(request, admitted, state, raw_request)
    if state.feedback_writer is not None and (request.n or 1) > 1:
        caller = raw_request.scope[CALLER].identity
        answer = record_answer(state.feedback_writer, request, answer, caller)
    return respond(answer, raw_request)


async def _best_of(
    request: ChatRequest, admitted: AdmittedRequest, state: AppState, raw_request: Request
) -> Answer:
    check_best_of(request, admitted.admission, state, raw_request.scope[CALLER])
    if not request.stream:
        best = await best_of(request, admitted.admission, state, raw_request)
        return await add_alignment_stats(best, admitted, state)
    forced = state.chat is not None and state.chat.enable_force_include_usage
    include_usage = should_include_usage(request.stream_options, forced)[0]
    return await stream_best_of(request, admitted, state, raw_request, include_usage=include_usage)


def record_answer(
    feedback_writer: FeedbackWriter, request: ChatRequest, answer: Answer, caller: str
) -> Answer:
    """Record an answer with several choices under an id of ours, so that its caller can choose by the id."""
    try:
        turns = read_messages(request.messages)
    except Unusable:  # not text: nothing to learn from
        return answer
    request_id = new_id()
    if isinstance(answer, ChatCompletionResponse):
        answer.id = request_id
        feedback_writer.record_answer(request_id, caller, turns, responses_of(answer))
    elif isinstance(answer, AsyncGenerator):
        return record_stream(
            answer,
            request_id,
            lambda responses: feedback_writer.record_answer(request_id, caller, turns, responses),
        )
    return answer
