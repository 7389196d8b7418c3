"""Error responses of the middleware, in OpenAI's shape. vLLM's `ErrorResponse` is for its handlers alone."""

import json
from typing import Any, NamedTuple

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from server.middleware.anthropic_errors import anthropic_error, takes_anthropic_errors


class HTTPErrorResponse(NamedTuple):
    """An ASGI app that answers with an error."""

    status: int
    kind: str
    message: str
    headers: dict[str, str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A new response for each request: other middleware may add headers to it.
        response = JSONResponse({"error": self._error()}, self.status, self.headers)
        await response(scope, receive, send)

    def as_event(self, scope: Scope) -> bytes:
        """The error as the last server-sent event of the response to a request."""
        if takes_anthropic_errors(scope):
            error = anthropic_error(self.status, self.message)
            return f"event: error\ndata: {json.dumps(error)}\n\n".encode()
        return f"data: {json.dumps({'error': self._error()})}\n\n".encode()

    def _error(self) -> dict[str, Any]:
        return {
            "message": self.message,
            "type": self.kind,
            "param": None,
            "code": self.status,
        }
