"""GET /proxies/NAME/card: what a proxy's makers say of it."""

import asyncio
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import PlainTextResponse, Response

from server.app_state import get_state
from server.engine import ErrorResponse

router = APIRouter(tags=["Proxies"])

FILE = "README.md"
MAX_BYTES = 256 * 1024


@router.get(
    "/proxies/{name}/card",
    response_class=Response,  # not FastAPI's, which would be documented as text/plain
    responses={
        200: {"content": {"text/markdown": {}}},
        404: {"model": ErrorResponse, "description": "There is no such proxy, or it has no card."},
    },
)
async def show_card(name: str, raw_request: Request) -> Response:
    """README.md in the checkpoint's directory of the version that a name stands for, up to 256 KiB."""
    proxies = get_state(raw_request).proxies
    proxy = proxies.bound(name)
    if proxy is None or proxy.is_owned:
        raise HTTPException(404, f"No proxy {name!r} is loaded.")
    directory = Path(proxy.description["directory"])
    card = await asyncio.to_thread(read_card, directory, proxies.root)
    if card is None:
        raise HTTPException(404, f"The proxy {name!r} has no card: there is no {FILE} with it.")
    return PlainTextResponse(card, media_type="text/markdown")


def read_card(directory: Path, root: Path | None) -> str | None:
    """The beginning of the card in a checkpoint's directory, whose links are resolved; None = there is none.

    No link leads out of --proxy-root, as with the checkpoint's other files.
    """
    try:
        file = (directory / FILE).resolve(strict=True)
        root = root.resolve() if root is not None else None
        if root is not None and directory.is_relative_to(root) and not file.is_relative_to(root):
            return None
        if not file.is_file():  # reading a pipe might never end
            return None
        with file.open("rb") as card:
            return card.read(MAX_BYTES).decode(errors="replace")
    except (OSError, RuntimeError):  # missing, not readable, a loop of links
        return None
