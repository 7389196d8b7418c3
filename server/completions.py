"""POST /v1/completions: vLLM's own, plus a proxy that aligns and its receipt."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.admission import COMPLETIONS
from server.answers import add_receipt, respond
from server.engine import ErrorResponse, load_aware_call, validate_json_request, with_cancellation
from server.gate import current_plan
from server.schemas import TextRequest
from server.state import served

router = APIRouter()


@router.post(
    COMPLETIONS,
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
async def create_completion(request: TextRequest, raw_request: Request) -> Response:
    """Every stage of a completion request that the gate has let in."""
    state, plan = served(raw_request), current_plan()
    assert plan is not None, "a body that fits TextRequest has passed the gate"
    if state.completion is None:
        raise NotImplementedError("The model does not support Completions API")
    answer = await state.completion.create_completion(request, raw_request)
    return respond(await add_receipt(answer, plan, state), raw_request)
