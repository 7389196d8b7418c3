"""GET /ready: whether requests can be answered now. vLLM's GET /health: whether the process should live on."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from server.app_state import get_state

router = APIRouter()


@router.get("/ready", responses={503: {"description": "The engine does not answer."}})
async def ready(raw_request: Request) -> Response:
    """200 if the engine answers, so that a load balancer may send requests here; else 503.

    After SIGTERM it is 503 too. Needs no key.
    """
    if await get_state(raw_request).readiness.check():
        return Response()
    return JSONResponse({"error": {"message": "The engine does not answer.", "code": 503}}, 503)
