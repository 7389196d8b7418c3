"""GET, POST and DELETE /proxies: what is loaded, and changing it while serving."""

import asyncio
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request
from fastapi import Path as PathParameter
from fastapi.responses import JSONResponse, Response

from server import metrics
from server.access import CALLER
from server.engine import ErrorResponse, validate_json_request
from server.proxies import LEARNED_NAME, Refusal, check_name, find_below
from server.remembered import Entry
from server.schemas import LearnRequest, LoadRequest
from server.state import served

router = APIRouter()

LearnedName = Annotated[str, PathParameter(pattern=f"^{LEARNED_NAME.pattern}$")]


@router.get("/proxies")
async def list_proxies(raw_request: Request) -> dict[str, Any]:
    """Every loaded version: what it is, whether it serves, and how many requests use it.

    `state` is `serving`, `shadow`, or `draining`: replaced or unloaded, but still in use. A key's own
    proxy is its key's alone to see, at `/proxies/{name}/learn`.
    """
    proxies = served(raw_request).proxies
    shown = [proxy.as_json() for proxy in proxies if not proxy.is_owned]
    return {"object": "list", "data": shown}


@router.post(
    "/proxies",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"description": "It was loaded already; if it had been replaced, it serves again."},
        201: {"description": "It was loaded. Requests that arrive from now on get it."},
        400: {"model": ErrorResponse, "description": "No such checkpoint, or not for this LLM."},
        403: {"model": ErrorResponse, "description": "The server has no --proxy-root."},
        409: {"model": ErrorResponse, "description": "The name stands for something else."},
    },
)
async def load_proxy(request: LoadRequest, raw_request: Request) -> Response:
    """Load a checkpoint below --proxy-root under a name: on all ranks, or nothing changes.

    Under a name in use it takes the place of the version before it: new requests get the new one,
    and those under way keep theirs. Loading the older one again is the way back. `remembered` says
    whether a restart, and other servers with this --proxy-root, will find it in proxies.json.
    """
    state = served(raw_request)
    try:
        if state.proxies.root is None:
            raise Refusal(
                403, "no directory is open for loading proxies: start with --proxy-root DIR"
            )
        models = {base.name for base in state.models.base_model_paths}
        check_name(request.name, models | set(state.models.lora_requests))
        directory = find_below(state.proxies.root, request.path)
        assert state.remembered is not None, "it comes with the root"
        async with state.remembered.changing:
            proxy, is_new = await state.proxies.load(request.name, directory, shadow=request.shadow)
            entry = Entry(path=request.path, version=proxy.version, shadow=request.shadow)
            remembered = await asyncio.to_thread(state.remembered.change, request.name, entry)
    except Refusal as refusal:
        metrics.PROXY_CHANGES.labels("refused").inc()
        raise _http(refusal, state.proxies.root) from None
    metrics.PROXY_CHANGES.labels("loaded").inc()
    answer = proxy.as_json() | {"remembered": remembered}
    return JSONResponse(answer, status_code=201 if is_new else 200)


@router.delete(
    "/proxies/{name}",
    responses={
        200: {"description": "It is unloaded."},
        202: {"description": "No new request gets it; it goes with the last one that uses it."},
        404: {"model": ErrorResponse, "description": "There is no such proxy."},
    },
)
async def unload_proxy(name: str, raw_request: Request, version: str | None = None) -> Response:
    """Unload what the name stands for, or another version of it that still drains."""
    state = served(raw_request)
    remembered = state.remembered
    try:
        async with remembered.changing if remembered is not None else nullcontext():
            proxy = await state.proxies.unload(name, version)
            if remembered is not None and state.proxies.bound(name) is None:
                await asyncio.to_thread(remembered.change, name, None)
    except Refusal as refusal:
        metrics.PROXY_CHANGES.labels("refused").inc()
        raise _http(refusal) from None
    metrics.PROXY_CHANGES.labels("unloaded").inc()
    return JSONResponse(proxy.as_json(), status_code=200 if proxy.state == "unloaded" else 202)


@router.get(
    "/proxies/{name}/learn",
    responses={
        400: {"model": ErrorResponse, "description": "No name of a proxy that is learned."},
        403: {
            "model": ErrorResponse,
            "description": "The server has no --feedback and --proxy-root.",
        },
        404: {"model": ErrorResponse, "description": "Nothing is learned by this name."},
    },
)
async def learning_status(name: LearnedName, raw_request: Request) -> dict[str, Any]:
    """What is learned under a name: the last pass, the versions, and which of them serves.

    Of a name with a proxy for each key, the caller's own.
    """
    state = served(raw_request)
    try:
        if state.learning is None:
            raise Refusal(403, CANNOT_LEARN)
        return state.learning.status(name, raw_request.scope[CALLER])
    except Refusal as refusal:
        raise _http(refusal) from None


@router.post(
    "/proxies/{name}/learn",
    responses={
        200: {"description": "What came of it."},
        400: {"model": ErrorResponse, "description": "No name, or nobody's verdicts."},
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
    """A pass over the verdicts now. Answers when it is done, which may take minutes.

    A version that is better than what the name stands for serves from then on. `passes` has one
    entry, or of a name with a proxy for each key one for each of these.
    """
    state, request = served(raw_request), request or LearnRequest.model_validate({})
    try:
        if state.learning is None:
            raise Refusal(403, CANNOT_LEARN)
        models = {base.name for base in state.models.base_model_paths}
        check_name(name, models | set(state.models.lora_requests))
        # It goes on, whether its client waits or not.
        passes = await asyncio.shield(state.learning.learn(name, request.sources))
    except Refusal as refusal:
        raise _http(refusal) from None
    return {"object": "proxy.learning", "name": name, "passes": passes}


CANNOT_LEARN = "this server learns nothing: start it with --feedback FILE and --proxy-root DIR"


def _http(refusal: Refusal, root: Path | None = None) -> HTTPException:
    """Paths as the client knows them; vLLM makes "<path>" of absolute ones in its answers."""
    message = str(refusal)
    if root is not None:
        message = message.replace(f"{root.resolve()}/", "")
    return HTTPException(refusal.status, message)
