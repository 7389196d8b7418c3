"""POST /v1/completions: vLLM's own, with a proxy and its statistics."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.admission import COMPLETIONS
from server.answers import add_alignment_stats, respond
from server.app_state import get_state
from server.engine import ErrorResponse, load_aware_call, validate_json_request, with_cancellation
from server.engine_wrapper import current_request
from server.schemas.generation import TextRequest
from server.schemas.report import TextResponse

router = APIRouter(tags=["Generation"])


@router.post(
    COMPLETIONS,
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": TextResponse, "content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
    },
)
@with_cancellation
@load_aware_call
async def create_completion(request: TextRequest, raw_request: Request) -> Response:
    """A completion: vLLM's, aligned by a proxy."""
    state, admitted = get_state(raw_request), current_request()
    assert admitted is not None, "a body that fits TextRequest was admitted"
    if state.completion is None:
        raise NotImplementedError("The model does not support Completions API")
    answer = await state.completion.create_completion(request, raw_request)
    return respond(await add_alignment_stats(answer, admitted, state), raw_request)
