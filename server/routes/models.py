"""GET /v1/models: the names that a request may use; GET /v1/models/NAME: one of them."""

from typing import Any

from fastapi import APIRouter, Request

from server.access import CALLER
from server.app_state import get_state
from server.engine import ErrorResponse, ModelCard, ModelList, VLLMNotFoundError
from server.proxy_choice import proxy_names

router = APIRouter(tags=["Generation"])


@router.get("/v1/models", responses={200: {"model": ModelList}})
async def list_models(raw_request: Request) -> dict[str, Any]:
    """The LLM under its own names, its LoRA adapters, and one `<model>:<proxy>` for each of these.

    `root`, where a model's files lie, is for administrators.
    """
    return (await _show_models(raw_request)).model_dump()


@router.get(
    "/v1/models/{name:path}",
    responses={
        200: {"model": ModelCard},
        404: {"model": ErrorResponse, "description": "No model has this name."},
    },
)
async def retrieve_model(name: str, raw_request: Request) -> dict[str, Any]:
    """One of the list. A name may have slashes."""
    for card in (await _show_models(raw_request)).data:
        if card.id == name:
            return card.model_dump()
    raise VLLMNotFoundError(f"The model {name!r} does not exist: GET /v1/models lists all.")


async def _show_models(raw_request: Request) -> ModelList:
    state = get_state(raw_request)
    listed = await state.models.show_available_models()
    if not raw_request.scope[CALLER].admin:
        listed.data = [card.model_copy(update={"root": card.id}) for card in listed.data]
    listed.data += [
        card.model_copy(update={"id": f"{card.id}:{proxy}", "parent": card.id})
        for card in listed.data
        for proxy in proxy_names(state)
    ]
    return listed
