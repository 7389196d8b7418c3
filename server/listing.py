"""GET /v1/models and GET /proxies: what can be asked for."""

from typing import Any

from fastapi import APIRouter, Request

from server.state import served

router = APIRouter()


@router.get("/v1/models")
async def list_models(raw_request: Request) -> dict[str, Any]:
    """The frozen LLM under its own names, and one `<model>:<proxy>` per name and proxy."""
    state = served(raw_request)
    listed = await state.models.show_available_models()
    names = {base.name for base in state.models.base_model_paths}
    listed.data += [
        card.model_copy(update={"id": f"{card.id}:{proxy}", "parent": card.id})
        for card in listed.data
        if card.id in names
        for proxy in state.proxies
    ]
    return listed.model_dump()


@router.get("/proxies")
async def list_proxies(raw_request: Request) -> dict[str, Any]:
    """Name, version, directory and training record of every loaded proxy."""
    return {
        "object": "list",
        "data": [
            {
                "object": "proxy",
                "name": proxy.name,
                "version": proxy.version,
                "directory": str(proxy.directory),
                "training": proxy.training,
            }
            for proxy in served(raw_request).proxies.values()
        ],
    }
