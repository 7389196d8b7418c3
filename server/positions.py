"""POST /positions: where given responses leave a proxy a choice, for a training elsewhere.

`training.proxy_dpo --rollout servers` asks for them: the LLM is here already, and weights need not be twice in
memory. Only an administrator may: hidden states say more about an LLM than its answers do.
"""

from typing import Annotated

import safetensors.torch
from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field

from proxy.positions import Positions, joined
from server.engine import ErrorResponse, read_responses, validate_json_request
from server.state import served

router = APIRouter()

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class GivenResponse(BaseModel):
    """A prompt and a response to it, in tokens."""

    model_config = ConfigDict(extra="forbid")

    prompt: TokenIds
    response: TokenIds


class PositionsRequest(BaseModel):
    """Responses, and the nucleus that a proxy would choose within."""

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
        400: {"model": ErrorResponse, "description": "A response that the LLM cannot read."},
    },
)
async def read_positions(request: PositionsRequest, raw_request: Request) -> Response:
    """Hidden states, candidates and taken tokens of the positions that leave a choice."""
    state = served(raw_request)
    config = state.engine.model_config
    longest, vocab_size = config.max_model_len, config.get_vocab_size()
    for number, each in enumerate(request.responses):
        tokens = len(each.prompt) + len(each.response)
        if tokens >= longest:
            raise HTTPException(
                400, f"responses[{number}]: {tokens} tokens, and at most {longest - 1} can be read"
            )
        if (most := max(*each.prompt, *each.response)) >= vocab_size:
            raise HTTPException(
                400, f"responses[{number}]: token {most}, and the LLM has {vocab_size}"
            )
    given = [(each.prompt, each.response) for each in request.responses]
    decoding = request.model_dump(include={"temperature", "top_k", "top_p", "max_candidates"})
    contents = await read_responses(state.engine, state.workers, given, decoding)
    if None in contents:  # the workers keep so much and no more
        raise HTTPException(503, "too much is read at once: send fewer or shorter responses")
    positions = joined([Positions(**safetensors.torch.load(each)) for each in contents if each])
    content = safetensors.torch.save(positions._asdict())
    return Response(content, media_type="application/octet-stream")
