"""uvicorn's HTTP protocol with bounds: what an unknown client may send, how slowly, and how slowly it may read.

uvicorn bounds heads of requests only with h11, its slower parser, and bounds no times but that of an idle connection. A
client without a key reaches this code, so nothing here depends on who it is. The bounds leave room for every honest
client; a load balancer in front may be stricter.

    connection opened, or request begun    HEAD_SECONDS to the end of the headers, at most MAX_HEAD_BYTES
    headers complete                       BODY_SECONDS to the end of the body
    response under way                     WRITE_SECONDS without reading any of it
"""

from asyncio import BaseTransport, TimerHandle
from http import HTTPStatus
from typing import Any, cast

from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_CONNECTIONS = 4096
MAX_HEAD_BYTES = 64 * 1024  # request line and headers
HEAD_SECONDS = 15.0
BODY_SECONDS = 120.0
WRITE_SECONDS = 60.0


def bound_connections() -> None:
    """Have uvicorn take this protocol where nobody asked for another."""
    HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedHttpProtocol.__name__}"


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection."""

    _deadline: TimerHandle | None = None  # of the request's head or body
    _write_deadline: TimerHandle | None = None
    _head_bytes = 0  # of a head that is not complete
    _in_head = True

    def connection_made(self, transport: BaseTransport) -> None:
        super().connection_made(cast(Any, transport))
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, f"the server has {MAX_CONNECTIONS} connections already")
        else:
            self._arm(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_write()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        # A chunk may end one request and begin another, so the count may be too large by a chunk, never too small.
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"request line and headers may have {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._arm(HEAD_SECONDS)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()
        if (
            self.pipeline
        ):  # it waits for an earlier one on this connection, which may take as long as it likes
            self._disarm()
        else:
            self._arm(BODY_SECONDS)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._disarm()
        super().on_message_complete()

    def handle_websocket_upgrade(self) -> None:
        self._disarm()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        """The transport's buffer is full: the client does not read."""
        super().pause_writing()
        self._disarm_write()
        self._write_deadline = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._disarm_write()

    def _arm(self, seconds: float) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, self._time_out)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _disarm_write(self) -> None:
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def _time_out(self) -> None:
        self._refuse(408, "the request did not arrive in time")

    def _refuse(self, status: int, message: str) -> None:
        """Answer, unless an answer is under way, and close."""
        self._disarm()
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            body = message.encode("ascii") + b"\n"
            head = (
                f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: text/plain\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            self.transport.write(head.encode("ascii") + body)
        self.transport.close()
