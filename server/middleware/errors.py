"""Error responses of the middleware, in OpenAI's shape. vLLM's `ErrorResponse` is for its handlers alone."""

from typing import NamedTuple

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send


class HTTPErrorResponse(NamedTuple):
    """An ASGI app that answers with an error."""

    status: int
    kind: str
    message: str
    headers: dict[str, str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A new response for each request: other middleware may add headers to it.
        error = {
            "message": self.message,
            "type": self.kind,
            "param": None,
            "code": self.status,
        }
        response = JSONResponse({"error": error}, self.status, self.headers)
        await response(scope, receive, send)
