"""A client of a running server, synchronous and asynchronous.

    from assent import Alignment, Client

    with Client("http://127.0.0.1:8000") as client:
        answer = client.chat("Why is the sky blue?", alignment=Alignment(proxy="plain"), max_tokens=100)
        print(answer.text, answer.alignment)

It needs httpx, and nothing else. `docs/python.md` has an example of each method; `assent.calls` has their arguments.
"""

import inspect
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, get_args
from urllib.parse import quote

import httpx

from assent import calls
from assent.calls import Call, Prompt
from assent.results import Alignment, Answer, AssentError, Json, Piece
from assent.streams import AnswerBuilder

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "ASSENT_API_KEY"
TIMEOUT = 600.0
"""Seconds: best of N on a slow machine takes minutes."""

P = ParamSpec("P")
Result = TypeVar("Result")


def _blocking(make: Callable[P, Call[Result]]) -> "Callable[Concatenate[Client, P], Result]":
    """A method of `Client` that sends what `make` makes."""

    @wraps(make)
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return self._send(make(*args, **kwargs))

    return _with_self(method, make)


def _awaitable(
    make: Callable[P, Call[Result]],
) -> "Callable[Concatenate[AsyncClient, P], Awaitable[Result]]":
    """A method of `AsyncClient` that sends what `make` makes."""

    @wraps(make)
    async def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Result:
        return await self._send(make(*args, **kwargs))

    return _with_self(method, make)


Method = TypeVar("Method", bound=Callable[..., Any])


def _with_self(method: Method, make: Callable[..., Any]) -> Method:
    """With the signature that `help` and editors show: `make`'s, with what its call returns."""
    made = inspect.signature(make)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    (result,) = get_args(made.return_annotation)
    signature = made.replace(
        parameters=[first, *made.parameters.values()], return_annotation=result
    )
    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


class Client:
    """Talks to one server. A context manager, or `close` it.

    Args:
        url: the server's address
        api_key: None = the variable ASSENT_API_KEY, if it is set
        timeout: seconds without a byte of the answer
    """

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self._http = httpx.Client(**_settings(url, api_key, timeout))

    chat = _blocking(calls.chat)
    judge = _blocking(calls.judge)
    rank = _blocking(calls.rank)
    feedback = _blocking(calls.feedback)
    models = _blocking(calls.models)
    proxies = _blocking(calls.proxies)
    load_proxy = _blocking(calls.load_proxy)
    unload_proxy = _blocking(calls.unload_proxy)

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        alignment: Alignment | None = None,
        **parameters: Any,
    ) -> "ChatStream":
        """As `chat`, in pieces: iterate over it; afterwards its `answer` is what `chat` returns."""
        call = calls.chat(prompt, model=model, alignment=alignment, stream=True, **parameters)
        return ChatStream(self._http, call)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _send(self, call: Call[Result]) -> Result:
        try:
            response = self._http.request(
                call.method, quote(call.path), json=call.body, params=call.params
            )
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error
        return call.read(_checked(response))


class AsyncClient:
    """As `Client`, with methods to be awaited."""

    def __init__(
        self, url: str = DEFAULT_URL, *, api_key: str | None = None, timeout: float = TIMEOUT
    ) -> None:
        self._http = httpx.AsyncClient(**_settings(url, api_key, timeout))

    chat = _awaitable(calls.chat)
    judge = _awaitable(calls.judge)
    rank = _awaitable(calls.rank)
    feedback = _awaitable(calls.feedback)
    models = _awaitable(calls.models)
    proxies = _awaitable(calls.proxies)
    load_proxy = _awaitable(calls.load_proxy)
    unload_proxy = _awaitable(calls.unload_proxy)

    def stream(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        alignment: Alignment | None = None,
        **parameters: Any,
    ) -> "AsyncChatStream":
        """As `chat`, in pieces: iterate over it; afterwards its `answer` is what `chat` returns."""
        call = calls.chat(prompt, model=model, alignment=alignment, stream=True, **parameters)
        return AsyncChatStream(self._http, call)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def _send(self, call: Call[Result]) -> Result:
        try:
            response = await self._http.request(
                call.method, quote(call.path), json=call.body, params=call.params
            )
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error
        return call.read(_checked(response))


class ChatStream:
    """The pieces of one answer, once."""

    def __init__(self, http: httpx.Client, call: Call[Answer]) -> None:
        self._http, self._call, self._builder = http, call, AnswerBuilder()

    @property
    def answer(self) -> Answer:
        """All that has come so far, as one answer."""
        return self._builder.answer()

    def __iter__(self) -> Iterator[Piece]:
        call = self._call
        try:
            with self._http.stream(call.method, call.path, json=call.body) as response:
                if response.is_error:
                    response.read()
                _checked_status(response)
                for line in response.iter_lines():
                    yield from self._builder.add(line)
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error


class AsyncChatStream:
    """The pieces of one answer, once."""

    def __init__(self, http: httpx.AsyncClient, call: Call[Answer]) -> None:
        self._http, self._call, self._builder = http, call, AnswerBuilder()

    @property
    def answer(self) -> Answer:
        """All that has come so far, as one answer."""
        return self._builder.answer()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        call = self._call
        try:
            async with self._http.stream(call.method, call.path, json=call.body) as response:
                if response.is_error:
                    await response.aread()
                _checked_status(response)
                async for line in response.aiter_lines():
                    for piece in self._builder.add(line):
                        yield piece
        except httpx.HTTPError as error:
            raise _unreachable(self._http.base_url, error) from error


def _settings(url: str, api_key: str | None, timeout: float) -> Json:
    key = api_key or os.environ.get(KEY_VARIABLE)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {"base_url": url.rstrip("/").removesuffix("/v1"), "headers": headers, "timeout": timeout}


def _checked(response: httpx.Response) -> Any:
    _checked_status(response)
    try:
        return response.json()
    except ValueError:
        raise AssentError(
            f"{response.url} answered no JSON: is it an Assent server?", response.status_code
        ) from None


def _checked_status(response: httpx.Response) -> None:
    """
    Raises:
        AssentError: the server refused the request; with its own message.
    """
    if response.is_success:
        return
    try:
        body = json.loads(response.text)
        message = body["error"]["message"] if "error" in body else body["detail"]
    except (ValueError, KeyError, TypeError):
        message = response.text.strip() or response.reason_phrase
    raise AssentError(str(message), response.status_code)


def _unreachable(url: httpx.URL, error: httpx.HTTPError) -> AssentError:
    return AssentError(f"{url}: no answer: {str(error) or type(error).__name__}")
