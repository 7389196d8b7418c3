"""POST /feedback keeps what people chose, in the database of `--feedback`. GET counts it, and DELETE forgets it.

A choice is acknowledged when it is on the disk, and kept only if training can read it. The judge's verdicts are in the
same database; they are written later, and a metric counts those that could not be written.
"""

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from judge.feedback import SOURCES, FeedbackError, Preference
from judge.feedback_tables import without_password
from judge.messages import Message, Unusable, read_messages, text_of
from judge.rows import PrefersNothing
from server.access import CALLER
from server.app_state import get_state
from server.engine import ErrorResponse, create_error_response, validate_json_request
from server.feedback_writer import FeedbackWriter
from server.schemas.feedback import FeedbackCounts, FeedbackKept, FeedbackRequest, Forgotten

router = APIRouter(tags=["Feedback"])


@router.post(
    "/feedback",
    status_code=201,
    dependencies=[Depends(validate_json_request)],
    responses={
        201: {"model": FeedbackKept, "description": "The choice is on the disk."},
        400: {"model": ErrorResponse, "description": "Training could not use it."},
        403: {"model": ErrorResponse, "description": "The server keeps no feedback."},
        404: {"model": ErrorResponse, "description": "No answer with this id is known."},
        503: {"model": ErrorResponse, "description": "The choice could not be written: try again."},
    },
)
async def give_feedback(request: FeedbackRequest, raw_request: Request) -> Response:
    """Which response was better: of two texts, or of the choices of an earlier answer, by its id."""
    feedback_writer = get_state(raw_request).feedback_writer
    if feedback_writer is None:
        raise HTTPException(403, NOTHING_KEPT)
    try:
        await feedback_writer.add(
            await _preferences(request, feedback_writer, raw_request.scope[CALLER].identity)
        )
    except FeedbackError as error:
        return _unavailable(error)
    return JSONResponse({"kept": True}, status_code=201)


@router.get(
    "/feedback",
    responses={
        200: {"model": FeedbackCounts},
        503: {"model": ErrorResponse, "description": "The database cannot be read."},
    },
)
async def count_feedback(raw_request: Request) -> Response:
    """The number of preferences kept of the caller: a person's choices, and the judge's verdicts.

    `enabled` is whether the server keeps feedback. Where it lies, `database`, is for administrators.
    """
    writer, caller = get_state(raw_request).feedback_writer, raw_request.scope[CALLER]
    answer: dict[str, Any] = {"enabled": writer is not None} | dict.fromkeys(SOURCES, 0)
    if writer is not None:
        try:
            counts = await writer.counts()
        except FeedbackError as error:
            return _unavailable(error)
        answer |= {source: counts.get((source, caller.identity), 0) for source in SOURCES}
        answer |= {"database": without_password(writer.feedback.url)} if caller.admin else {}
    return JSONResponse(answer)


@router.delete(
    "/feedback",
    responses={
        200: {"model": Forgotten, "description": "The rows are deleted."},
        403: {
            "model": ErrorResponse,
            "description": "It keeps no feedback, or the key is not an administrator's.",
        },
        503: {"model": ErrorResponse, "description": "Nothing was deleted: try again."},
    },
)
async def forget(raw_request: Request, caller: str | None = None) -> Response:
    """Forget everything kept of a caller: choices, verdicts, answers, and every proxy version learned from them.

    An administrator may name another caller, as the file of --access does.
    """
    state, own = get_state(raw_request), raw_request.scope[CALLER]
    if state.feedback_writer is None:
        raise HTTPException(403, NOTHING_KEPT)
    if caller not in (None, own.identity) and not own.admin:
        raise HTTPException(403, "only an administrator may have another caller forgotten")
    identity = caller or own.identity
    try:
        if state.learning is not None:
            forgotten = await state.learning.forget(identity)
        else:
            forgotten = await state.feedback_writer.forget(identity)
    except FeedbackError as error:
        return _unavailable(error)
    return JSONResponse({"forgotten": forgotten})


NOTHING_KEPT = "this server keeps no feedback: start it with --feedback"


def _unavailable(error: FeedbackError) -> JSONResponse:
    # vLLM's handler of HTTPException drops headers.
    status = HTTPStatus.SERVICE_UNAVAILABLE
    answer = create_error_response(str(error), "ServiceUnavailableError", status)
    return JSONResponse(answer.model_dump(), status, headers={"Retry-After": "1"})


async def _preferences(
    request: FeedbackRequest, feedback_writer: FeedbackWriter, caller: str
) -> list[Preference]:
    """The caller's preferences, checked as training will read them."""
    if request.request_id is None:
        texts = request.response_a or "", request.response_b or ""
        better, worse = texts if request.better == "a" else texts[::-1]
        return [
            _checked(Preference("person", _messages(request.turns()), better, worse, caller=caller))
        ]
    recorded = await feedback_writer.answer(request.request_id, caller)
    if recorded is None:
        raise HTTPException(
            404,
            f"no answer is known by the id {request.request_id!r} to this caller: those with n of 2 or more are kept",
        )
    turns, responses = recorded
    choice = request.choice or 0
    if choice >= len(responses):
        raise HTTPException(400, f"choice {choice} is not one of the {len(responses)} choices")
    chosen = responses[choice]
    others = {text_of(response): response for response in responses}
    del others[text_of(chosen)]
    if not others:
        raise HTTPException(400, "all choices are the same: none is better")
    return [_checked(_preference(turns, chosen, other, caller)) for other in others.values()]


def _preference(
    turns: list[Message], chosen: Message, rejected: Message, caller: str
) -> Preference:
    return Preference(
        "person",
        turns,
        chosen["content"],
        rejected["content"],
        chosen_calls=chosen.get("tool_calls"),
        rejected_calls=rejected.get("tool_calls"),
        caller=caller,
    )


def _checked(preference: Preference) -> Preference:
    try:
        preference.as_row()
    except PrefersNothing:
        raise HTTPException(400, "the responses are the same: neither is better") from None
    except Unusable as error:
        raise HTTPException(400, f"training could not use it: {error}") from None
    return preference


def _messages(turns: list[dict[str, Any]]) -> list[Message]:
    try:
        return read_messages(turns)
    except Unusable as error:
        raise HTTPException(400, f"messages: {error}") from None
