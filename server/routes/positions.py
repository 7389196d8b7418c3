"""POST /positions: reads given responses, for a training in another process.

`training.proxy_dpo --rollout servers` uses it: the server has the LLM in memory already. Only an administrator may send
it, because hidden states reveal more about an LLM than its responses do.
"""

from typing import Annotated

import safetensors.torch
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from proxy.positions import Positions, joined
from server.app_state import get_state
from server.engine import ErrorResponse, read_responses, validate_json_request

router = APIRouter(tags=["Proxies"])

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class GivenResponse(BaseModel):
    """A prompt and a response to it, in tokens."""

    model_config = ConfigDict(extra="forbid")

    prompt: TokenIds
    response: TokenIds


class PositionsRequest(BaseModel):
    """Responses, and the nucleus of candidates at each position."""

    model_config = ConfigDict(extra="forbid")

    responses: list[GivenResponse] = Field(min_length=1, max_length=64)
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    top_k: int = Field(0, ge=0, description="0 = no limit but max_candidates.")
    top_p: float = Field(1.0, gt=0, le=1)
    max_candidates: int = Field(16, gt=0, le=1024)


@router.post(
    "/positions",
    dependencies=[Depends(validate_json_request)],
    response_class=Response,
    responses={
        200: {
            "content": {"application/octet-stream": {}},
            "description": "`proxy.positions.Positions` of all responses, as safetensors.",
        },
        400: {
            "model": ErrorResponse,
            "description": "A response that is too long, or an unknown token.",
        },
        503: {
            "model": ErrorResponse,
            "description": "Too much is read at once, or the server stops.",
        },
    },
)
async def read_positions(request: PositionsRequest, raw_request: Request) -> Response:
    """Hidden states, candidates and emitted tokens of the positions with more than one candidate."""
    state = get_state(raw_request)
    config = state.engine.model_config
    limit, vocab_size = config.max_model_len, config.get_vocab_size()
    for number, item in enumerate(request.responses):
        tokens = len(item.prompt) + len(item.response)
        if tokens >= limit:
            raise HTTPException(
                400, f"responses[{number}]: {tokens} tokens, and at most {limit - 1} can be read"
            )
        if (largest := max(*item.prompt, *item.response)) >= vocab_size:
            raise HTTPException(
                400, f"responses[{number}]: token {largest}, and the LLM has {vocab_size}"
            )
    responses = [(item.prompt, item.response) for item in request.responses]
    decoding = request.model_dump(include={"temperature", "top_k", "top_p", "max_candidates"})
    contents = await read_responses(state.engine, state.workers, responses, decoding)
    if None in contents:  # the workers have bounded room
        raise HTTPException(503, "too much is read at once: send fewer or shorter responses")
    positions = joined(
        [Positions(**safetensors.torch.load(content)) for content in contents if content]
    )
    content = safetensors.torch.save(positions._asdict())
    return Response(content, media_type="application/octet-stream")
