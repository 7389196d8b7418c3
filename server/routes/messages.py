"""POST /v1/messages, Anthropic's API: vLLM's own, with a proxy and its statistics."""

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.admission import MESSAGES
from server.answers import add_to_response
from server.engine import AnthropicErrorResponse, create_messages, validate_json_request
from server.schemas.generation import MessageRequest
from server.schemas.report import MessageResponse

router = APIRouter()  # without a tag: its errors have another shape than those of our routes


@router.post(
    MESSAGES,
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": MessageResponse, "content": {"text/event-stream": {}}},
        400: {"model": AnthropicErrorResponse},
        404: {"model": AnthropicErrorResponse},
        500: {"model": AnthropicErrorResponse},
    },
)
async def create_message(request: MessageRequest, raw_request: Request) -> Response:
    """vLLM's message, with `alignment` in it; in a stream in `message_start` and `message_delta`."""
    response = await create_messages(request, raw_request)
    return await add_to_response(response)
