"""POST /feedback: what people chose. It is kept beside the judge's verdicts, where `--feedback` says.

A choice is answered when it is on the disk. Verdicts are written behind the answers' backs: where they cannot be, the
answers go out all the same, and a metric counts what was lost.
"""

from http import HTTPStatus

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import JSONResponse, Response

from judge.feedback import FeedbackError, Preference
from server.engine import ErrorResponse, create_error_response, validate_json_request
from server.keeper import Keeper
from server.schemas import FeedbackRequest
from server.state import served

router = APIRouter()


@router.post(
    "/feedback",
    dependencies=[Depends(validate_json_request)],
    responses={
        201: {"description": "It is kept."},
        400: {"model": ErrorResponse},
        403: {"model": ErrorResponse, "description": "The server keeps no feedback."},
        404: {"model": ErrorResponse, "description": "No answer of this id is known."},
        503: {"model": ErrorResponse, "description": "It could not be written: try again."},
    },
)
async def give_feedback(request: FeedbackRequest, raw_request: Request) -> Response:
    """Which response was better: of two, or of the choices of an answer, by its id."""
    keeper = served(raw_request).keeper
    if keeper is None:
        raise HTTPException(403, "this server keeps no feedback: start it with --feedback")
    try:
        for row in await _preferences(request, keeper):
            await keeper.keep(row)
    except FeedbackError as error:
        # vLLM's handler of HTTPException would leave out the header.
        status = HTTPStatus.SERVICE_UNAVAILABLE
        answer = create_error_response(str(error), "ServiceUnavailableError", status)
        return JSONResponse(answer.model_dump(), status, headers={"Retry-After": "1"})
    return JSONResponse({"kept": True}, status_code=201)


async def _preferences(request: FeedbackRequest, keeper: Keeper) -> list[Preference]:
    if request.request_id is None:
        texts = request.response_a or "", request.response_b or ""
        chosen, rejected = texts if request.better == "a" else texts[::-1]
        return [Preference("person", request.turns(), chosen, rejected)]
    found = await keeper.answer(request.request_id)
    if found is None:
        raise HTTPException(
            404,
            f"no answer is known by the id {request.request_id!r}: those with n of 2 or more are kept",
        )
    turns, responses = found
    choice = request.choice or 0
    if choice >= len(responses):
        raise HTTPException(400, f"choice {choice} is not one of the {len(responses)} choices")
    others = [text for text in dict.fromkeys(responses) if text != responses[choice]]
    return [Preference("person", turns, responses[choice], text) for text in others]
