"""GET /: the page that shows what the server does, and GET /page/...: its files.

Neither needs a key, because the files say nothing about this server. What the page asks the server for does: a person
types the key into the page.
"""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.types import Scope

DIRECTORY = Path(__file__).parents[1] / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # a browser asks whether they have changed
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

router = APIRouter()


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(DIRECTORY / "index.html", headers=HEADERS)


class PageFiles(StaticFiles):
    """The page's style sheets, modules and icon."""

    def __init__(self) -> None:
        super().__init__(directory=DIRECTORY)

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response
