"""GET /ready: whether requests can be answered now. vLLM's GET /health: whether the process should live on."""

from http import HTTPStatus

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.app_state import get_state
from server.engine import ErrorResponse, create_error_response

router = APIRouter(tags=["Operation"])


@router.get(
    "/ready",
    response_class=Response,
    responses={
        200: {"description": "The engine answers."},
        503: {"model": ErrorResponse, "description": "The engine does not answer."},
    },
)
async def ready(raw_request: Request) -> Response:
    """200 if the engine answers, so that a load balancer may send requests here; else 503.

    After SIGTERM it is 503 too. Needs no key.
    """
    if await get_state(raw_request).readiness.check():
        return Response()
    status = HTTPStatus.SERVICE_UNAVAILABLE
    error = create_error_response("The engine does not answer.", status.phrase, status)
    return JSONResponse(error.model_dump(), status)
