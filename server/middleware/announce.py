"""The last lines of the start-up log: the addresses, the models and proxies, and a request to try next."""

import asyncio
import json
import logging
from argparse import Namespace
from collections.abc import Sequence

from starlette.datastructures import State
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.access import Access
from server.app_state import AppState

logger = logging.getLogger(__name__)

_SECONDS = 0.1  # uvicorn logs and opens its port within some ms after "lifespan.startup.complete"


class AnnounceMiddleware:
    """ASGI middleware; acts on the server's own start alone."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            return await self.app(scope, receive, send)

        async def announce_after_start(message: Message) -> None:
            await send(message)
            if message["type"] == "lifespan.startup.complete":
                loop = asyncio.get_running_loop()
                loop.call_later(_SECONDS, self._announce, scope["app"].state)

        await self.app(scope, receive, announce_after_start)

    def _announce(self, state: State) -> None:
        args: Namespace = state.args
        assent: AppState = state.assent
        models = [model.name for model in assent.models.base_model_paths]
        models += list(assent.models.lora_requests)
        for line in startup_lines(
            args,
            models=models,
            proxies=[proxy.name for proxy in assent.proxies if proxy.state == "serving"],
            shadows=[proxy.name for proxy in assent.proxies if proxy.state == "shadow"],
            learned=assent.learning.learned.names() if assent.learning is not None else [],
            needs_key=bool(self.access.callers),
            can_chat=assent.chat is not None,
        ):
            logger.info(line)


def startup_lines(
    args: Namespace,
    *,
    models: Sequence[str],
    proxies: Sequence[str],
    shadows: Sequence[str],
    learned: Sequence[str],
    needs_key: bool,
    can_chat: bool,
) -> list[str]:
    """What the server serves, and how to ask it.

    Args:
        args: of the command line.
        models, proxies, shadows: names.
        learned: names of --learn, loaded or not.
        needs_key: whether requests need an API key.
        can_chat: whether the model has a chat template.
    """
    scheme = "https" if args.ssl_certfile else "http"
    host = f"[{args.host}]" if args.host and ":" in args.host else args.host or "0.0.0.0"
    address = f"the socket {args.uds}" if args.uds else f"{scheme}://{host}:{args.port}"
    lines = [f"Assent serves on {address}"]
    if not args.uds:
        lines.append(f"See it in a browser: {_url(args, scheme)}/")
    lines.append(f"Models: {', '.join(models)}")
    if proxies:
        names = ", ".join(f"{models[0]}:{name}" for name in proxies)
        lines.append(f"Proxies: {', '.join(proxies)} (ask for {names})")
    else:
        lines.append(
            "Proxies: none; load one with --proxy NAME=DIR, or while serving with --proxy-root DIR"
        )
    if shadows:
        lines.append(f"Shadow proxies, which only score: {', '.join(shadows)}")
    if learned:
        lines.append(f"Learned while serving: {', '.join(learned)}")
    lines.append(f"Tool calls: {args.tool_calls}")
    return [*lines, f"Try: {_curl(args, scheme, models, proxies, needs_key, can_chat)}"]


def _url(args: Namespace, scheme: str) -> str:
    """The address on this machine."""
    local = "127.0.0.1" if args.host in (None, "", "0.0.0.0", "::") else args.host
    host = f"[{local}]" if ":" in local else local
    return f"{scheme}://{host}:{args.port}"


def _curl(
    args: Namespace,
    scheme: str,
    models: Sequence[str],
    proxies: Sequence[str],
    needs_key: bool,
    can_chat: bool,
) -> str:
    """A command line that any shell runs on this machine."""
    url = "http://localhost" if args.uds else _url(args, scheme)
    body: dict[str, object] = {"model": f"{models[0]}:{proxies[0]}" if proxies else models[0]}
    if can_chat:
        path = "/v1/chat/completions"
        body["messages"] = [{"role": "user", "content": "Hello."}]
    else:
        path = "/v1/completions"
        body |= {"prompt": "Hello.", "max_tokens": 32}
    options = [f"--unix-socket {args.uds}"] * bool(args.uds)
    options += ['-H "Authorization: Bearer $ASSENT_API_KEY"'] * needs_key
    options += ["-H 'Content-Type: application/json'", f"-d '{json.dumps(body)}'"]
    return " ".join([f"curl {url}{path}", *options])
