"""Clients that want to exhaust the server, beside the honest ones of `crowd`."""

import asyncio
import json
import random
from contextlib import suppress
from time import monotonic
from urllib.parse import urlsplit

import aiohttp

from benchmarks.soak.crowd import Record
from benchmarks.soak.requests import MODEL

FLOOD_BYTES = 20_000_000
"""Of headers; a server that reads them all has no limit."""
LINE = b"a: " + b"b" * 10_000 + b"\r\n"
UNREAD_SECONDS = 5.0
LONG_TEXT = "You may open it with a fork. " * 5000


class Attacker:
    """Attacks, one after another, and notes how the server held."""

    def __init__(self, http: aiohttp.ClientSession, url: str, record: Record) -> None:
        self._http, self._record = http, record
        address = urlsplit(url)
        self._host, self._port = address.hostname, address.port

    async def run(self, rng: random.Random, until: float) -> None:
        attacks = self._flood, self._half_open, self._unread, self._long_judgment
        while monotonic() < until:
            attack = rng.choice(attacks)
            kind = f"hostile, {attack.__name__[1:].replace('_', ' ')}"
            try:
                held = await attack()
                self._record.note(kind, "refused" if held else "wrong")
            except Exception as error:
                self._record.note(kind, "lost", repr(error))

    async def _flood(self) -> bool:
        """Headers without an end: the server closes the connection soon."""
        _, writer = await asyncio.open_connection(self._host, self._port)
        sent = 0
        try:
            writer.write(b"GET /v1/models HTTP/1.1\r\n")
            while sent < FLOOD_BYTES:
                writer.write(LINE)
                await writer.drain()
                sent += len(LINE)
        except OSError:
            return True
        finally:
            writer.close()
        return False

    async def _half_open(self) -> bool:
        """A request that does not go on: it is answered with 408."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n")
            answer = await asyncio.wait_for(reader.read(), 60)
        finally:
            writer.close()
        return answer.startswith(b"HTTP/1.1 408 ")

    async def _unread(self) -> bool:
        """A long stream that nobody reads, and a client that disconnects at last."""
        body = {"model": MODEL, "prompt": "a", "n": 16, "max_tokens": 500, "ignore_eos": True}
        content = json.dumps(body | {"stream": True}).encode()
        head = (
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\n\r\n"
        )
        _, writer = await asyncio.open_connection(self._host, self._port, limit=1024)
        writer.write(head.encode() + content)
        await asyncio.sleep(UNREAD_SECONDS)
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()
        return True

    async def _long_judgment(self) -> bool:
        """Responses far beyond the LLM's context: they are shortened."""
        body = {"prompt": "May I?", "response_a": LONG_TEXT, "response_b": LONG_TEXT[5:]}
        async with self._http.post("/judge", json=body) as reply:
            return reply.status == 200 and (await reply.json())["truncated"] is True
