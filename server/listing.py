"""GET /v1/models: what can be asked for."""

from typing import Any

from fastapi import APIRouter, Request

from server.admission import names
from server.state import served

router = APIRouter()


@router.get("/v1/models")
async def list_models(raw_request: Request) -> dict[str, Any]:
    """The LLM under its own names, its LoRA adapters, and one `<model>:<proxy>` for each of these."""
    state = served(raw_request)
    listed = await state.models.show_available_models()
    listed.data += [
        card.model_copy(update={"id": f"{card.id}:{proxy}", "parent": card.id})
        for card in listed.data
        for proxy in names(state)
    ]
    return listed.model_dump()
