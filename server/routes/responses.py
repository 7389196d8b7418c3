"""POST /v1/responses: vLLM's own, with a proxy and its statistics."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.admission import RESPONSES
from server.answers import add_to_response
from server.engine import ErrorResponse, create_responses, validate_json_request
from server.schemas.generation import ResponseRequest
from server.schemas.report import ResponseObject

router = APIRouter(tags=["Generation"])


@router.post(
    RESPONSES,
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": ResponseObject, "content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
    },
)
async def create_response(request: ResponseRequest, raw_request: Request) -> Response:
    """vLLM's response, with `alignment` in it; in a stream in each event that holds the whole response."""
    response = await create_responses(request, raw_request)
    return await add_to_response(response)
