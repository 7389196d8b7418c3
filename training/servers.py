"""HTTP requests to several Assent servers, some of which may fail.

A server that fails (`Failure`) is retried a few times; then the others continue without it. A request that a server
refuses is a `TrainingError` with the server's message.
"""

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import httpx

from training.console import TrainingError

API_KEY = "ASSENT_API_KEY"
"""The environment variable with an administrator's API key, for servers that require one."""
PAUSES = (1.0, 2.0, 4.0)  # seconds between retries of a server
# Timeouts: to connect, to load or unload a proxy, to answer a prompt.
CONNECT_SECONDS, LOAD_SECONDS, ANSWER_SECONDS = 10.0, 120.0, 1800.0

_T = TypeVar("_T")


class Failure(NamedTuple):
    """A server cannot be reached or reports an internal error; a retry may help."""

    message: str


async def ask_every(
    urls: Sequence[str], method: str, path: str, body: Any = None
) -> dict[str, httpx.Response | Failure]:
    """Send the same request to all servers; returns each one's response."""
    async with _client(LOAD_SECONDS) as http:
        results = await asyncio.gather(*(send(http, method, url + path, body) for url in urls))
    return dict(zip(urls, results, strict=True))


async def share_out(
    urls: Sequence[str],
    bodies: Sequence[Any],
    ask: Callable[[httpx.AsyncClient, str, Any], Awaitable[_T | Failure]],
    at_once: int,
) -> list[_T]:
    """One answer to each body. All servers take from one queue; failed requests return to it.

    Args:
        urls: the servers.
        bodies: the requests.
        ask: sends one of them to one server.
        at_once: concurrent requests on each server.

    Raises:
        TrainingError: no server is left; or whatever `ask` raises.
    """
    answers: dict[int, _T] = {}
    waiting: asyncio.Queue[int] = asyncio.Queue()
    lost: dict[str, str] = {}
    for number in range(len(bodies)):
        waiting.put_nowait(number)

    async def work(http: httpx.AsyncClient, url: str) -> None:
        """Send one request after another, until too many have failed in a row."""
        pauses = iter(PAUSES)
        while True:
            number = await waiting.get()
            result = await ask(http, url, bodies[number])
            if not isinstance(result, Failure):
                answers[number], pauses = result, iter(PAUSES)
                waiting.task_done()
                continue
            waiting.put_nowait(number)
            waiting.task_done()
            lost[url] = result.message
            if (pause := next(pauses, None)) is None:
                return
            await asyncio.sleep(pause)

    async with _client(ANSWER_SECONDS) as http:
        workers = [asyncio.create_task(work(http, url)) for _ in range(at_once) for url in urls]
        all_done = asyncio.create_task(waiting.join())
        try:
            running = {all_done, *workers}
            while not all_done.done() and running != {all_done}:
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # raises if the server refused a request
        finally:
            for task in (all_done, *workers):
                task.cancel()
            await asyncio.gather(all_done, *workers, return_exceptions=True)
    if len(answers) < len(bodies):
        raise TrainingError(f"no server is left: {listed(lost)}")
    return [answers[number] for number in range(len(bodies))]


def _client(seconds: float) -> httpx.AsyncClient:
    key = os.environ.get(API_KEY)
    return httpx.AsyncClient(
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(seconds, connect=CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None),
    )


async def send(
    http: httpx.AsyncClient, method: str, url: str, body: Any
) -> httpx.Response | Failure:
    try:
        response = await http.request(method, url, json=body)
    except httpx.TransportError as error:
        return Failure(f"it cannot be reached ({error or type(error).__name__})")
    return Failure(message_of(response)) if response.is_server_error else response


def content(response: Any, url: str) -> dict[str, Any]:
    """
    Raises:
        TrainingError: the server refuses.
    """
    if not response.is_success:
        raise TrainingError(f"{url} refuses: {message_of(response)}")
    return response.json()


def message_of(response: httpx.Response) -> str:
    """The server's error message, or the start of its response."""
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:200]
    return f"{response.status_code} {message}"


def checked(url: str) -> str:
    """
    Raises:
        TrainingError: it is no address of a server.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise TrainingError(f"--servers {url}: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise TrainingError(f"--servers {url}: an address is http://host:port")
    return url.rstrip("/")


def listed(lost: dict[str, str]) -> str:
    return "; ".join(f"{url}: {message}" for url, message in lost.items())
