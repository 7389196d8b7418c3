"""GET, POST and DELETE /proxies: the loaded proxies, changed while serving. /proxies/NAME/learn: learning them."""

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response

from server import metrics
from server.access import CALLER
from server.app_state import get_state
from server.engine import ErrorResponse, validate_json_request
from server.proxies import PROXY_NAME, ProxyStateError, check_name, find_below
from server.proxy_manifest import Entry
from server.schemas.proxies import (
    LearningPasses,
    LearningStatus,
    LearnRequest,
    LoadedProxy,
    LoadRequest,
    ProxyDescription,
    ProxyList,
)

router = APIRouter(tags=["Proxies"])

LearnedName = Annotated[str, PathParameter(pattern=f"^{PROXY_NAME.pattern}$")]


@router.get("/proxies", responses={200: {"model": ProxyList}})
async def list_proxies(raw_request: Request) -> dict[str, Any]:
    """Every loaded version: its sizes and training, its state, and how many requests use it.

    `state` is `serving`, `shadow`, or `draining`: replaced or unloaded, but still in use. A key's own
    proxy is shown to this key alone, at `/proxies/{name}/learn`.
    """
    proxies = get_state(raw_request).proxies
    is_admin = raw_request.scope[CALLER].admin
    shown = [proxy.as_json(with_directory=is_admin) for proxy in proxies if not proxy.is_owned]
    return {"object": "list", "data": shown}


@router.post(
    "/proxies",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {
            "model": LoadedProxy,
            "description": "It was loaded already; if it had been replaced, it serves again.",
        },
        201: {
            "model": LoadedProxy,
            "description": "It was loaded. Requests that arrive from now on get it.",
        },
        400: {"model": ErrorResponse, "description": "No such checkpoint, or not for this LLM."},
        403: {"model": ErrorResponse, "description": "The server has no --proxy-root."},
        409: {"model": ErrorResponse, "description": "The name stands for something else."},
    },
)
async def load_proxy(request: LoadRequest, raw_request: Request) -> Response:
    """Load a checkpoint below --proxy-root under a name: on all ranks, or nothing changes.

    Under a name in use it replaces the earlier version: new requests get the new one, and those
    under way keep theirs. Load the older one again to roll back. `remembered` says whether a restart,
    and other servers with this --proxy-root, will find it in proxies.json.
    """
    state = get_state(raw_request)
    try:
        if state.proxies.root is None:
            raise ProxyStateError(
                403, "no directory is open for loading proxies: start with --proxy-root DIR"
            )
        models = {base.name for base in state.models.base_model_paths}
        check_name(request.name, models | set(state.models.lora_requests))
        directory = find_below(state.proxies.root, request.path)
        assert state.manifest is not None, "every server with a root has a manifest"
        async with state.manifest.changing:
            proxy, is_new = await state.proxies.load(request.name, directory, shadow=request.shadow)
            entry = Entry(path=request.path, version=proxy.version, shadow=request.shadow)
            is_remembered = await asyncio.to_thread(state.manifest.change, request.name, entry)
    except ProxyStateError as error:
        metrics.PROXY_CHANGES.labels("refused").inc()
        raise _http(error, state.proxies.root) from None
    metrics.PROXY_CHANGES.labels("loaded").inc()
    answer = proxy.as_json(with_directory=True) | {"remembered": is_remembered}
    return JSONResponse(answer, status_code=201 if is_new else 200)


@router.delete(
    "/proxies/{name}",
    responses={
        200: {"model": ProxyDescription, "description": "It is unloaded."},
        202: {
            "model": ProxyDescription,
            "description": "No new request gets it; it is unloaded after the last one that uses it.",
        },
        404: {"model": ErrorResponse, "description": "There is no such proxy."},
    },
)
async def unload_proxy(name: str, raw_request: Request, version: str | None = None) -> Response:
    """Unload the name's current version, or another one that is still draining."""
    state = get_state(raw_request)
    manifest = state.manifest
    try:
        async with manifest.changing if manifest is not None else nullcontext():
            proxy = await state.proxies.unload(name, version)
            if manifest is not None and state.proxies.bound(name) is None:
                await asyncio.to_thread(manifest.change, name, None)
    except ProxyStateError as error:
        metrics.PROXY_CHANGES.labels("refused").inc()
        raise _http(error) from None
    metrics.PROXY_CHANGES.labels("unloaded").inc()
    return JSONResponse(
        proxy.as_json(with_directory=True), status_code=200 if proxy.state == "unloaded" else 202
    )


@router.get(
    "/proxies/{name}/learn",
    responses={
        200: {"model": LearningStatus},
        400: {
            "model": ErrorResponse,
            "description": "Not a name that a proxy can be learned under.",
        },
        403: {
            "model": ErrorResponse,
            "description": "The server has no --feedback and --proxy-root.",
        },
        404: {"model": ErrorResponse, "description": "Nothing is learned by this name."},
    },
)
async def learning_status(name: LearnedName, raw_request: Request) -> dict[str, Any]:
    """The state of learning under a name: the last pass, the versions, and which of them serves.

    Of a name with a proxy for each key, the caller's own proxy.
    """
    state = get_state(raw_request)
    try:
        if state.learning is None:
            raise ProxyStateError(403, CANNOT_LEARN)
        return state.learning.learned.status(name, raw_request.scope[CALLER])
    except ProxyStateError as error:
        raise _http(error) from None


@router.post(
    "/proxies/{name}/learn",
    responses={
        200: {"model": LearningPasses, "description": "The outcome of each pass."},
        400: {"model": ErrorResponse, "description": "Not such a name, or no source of verdicts."},
        403: {
            "model": ErrorResponse,
            "description": "The server has no --feedback and --proxy-root.",
        },
        409: {"model": ErrorResponse, "description": "The name stands for something else."},
    },
)
async def learn(
    name: LearnedName,
    raw_request: Request,
    request: LearnRequest | None = None,
) -> dict[str, Any]:
    """Learn from the verdicts now. The response comes when the pass is done, which may take minutes.

    A version that is better than the name's current one serves from then on. `passes` has one
    entry, or for a name with a proxy for each key one entry a key.
    """
    state, request = get_state(raw_request), request or LearnRequest.model_validate({})
    try:
        if state.learning is None:
            raise ProxyStateError(403, CANNOT_LEARN)
        models = {base.name for base in state.models.base_model_paths}
        check_name(name, models | set(state.models.lora_requests))
        # The pass goes on when the client disconnects.
        passes = await asyncio.shield(state.learning.learn(name, request.sources))
    except ProxyStateError as error:
        raise _http(error) from None
    return {"object": "proxy.learning", "name": name, "passes": passes}


CANNOT_LEARN = "this server learns nothing: start it with --feedback FILE and --proxy-root DIR"


def _http(error: ProxyStateError, root: Path | None = None) -> HTTPException:
    """With paths relative to the root, as the client knows them: vLLM replaces absolute ones by "<path>"."""
    message = str(error)
    if root is not None:
        message = message.replace(f"{root.resolve()}/", "")
    return HTTPException(error.status, message)
