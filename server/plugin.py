"""The endpoint plugin that hangs our routes into vLLM's OpenAI server.

vLLM finds such plugins through entry points and an environment variable; `install` hands it ours
directly. A route of ours takes the place of vLLM's route of the same path and method.
"""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

import vllm.plugins
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler

from server import chat, judging, listing
from server.auth import ApiKeyGuard
from server.receipts import CountsReader
from server.state import Served, ServedProxy


class AssentPlugin:
    name = "assent"
    required_tasks = ("generate",)

    def __init__(self, *, proxies: Mapping[str, ServedProxy], api_keys: Sequence[str]) -> None:
        self.proxies = dict(proxies)
        self.api_keys = list(api_keys)

    def attach_router(self, app: FastAPI) -> None:
        for router in (chat.router, judging.router, listing.router):
            app.include_router(router)
        # vLLM handles FastAPI's HTTPException; an unknown path raises Starlette's.
        app.add_exception_handler(HTTPException, http_exception_handler)
        if self.api_keys:
            app.add_middleware(ApiKeyGuard, keys=self.api_keys)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None, "only vLLM's render server has no engine"
        for served_proxy in self.proxies.values():
            await _load(engine_client, served_proxy)
        state.assent = Served(
            engine=engine_client,
            chat=state.openai_serving_chat,
            models=state.openai_serving_models,
            proxies=self.proxies,
            counts=CountsReader(engine_client),
        )


def install(plugin: AssentPlugin) -> None:
    """Make vLLM load this plugin, and no other."""

    def load_endpoint_plugins(supported_tasks: Any = None) -> list[AssentPlugin]:
        return [plugin]

    vllm.plugins.load_endpoint_plugins = load_endpoint_plugins


async def _load(engine: EngineClient, proxy: ServedProxy) -> None:
    """Have every worker load the checkpoint that the command line has checked."""
    for loaded in await engine.collective_rpc(
        "load_proxy", args=(proxy.name, str(proxy.directory))
    ):
        if loaded["version"] != proxy.version:
            raise RuntimeError(
                f"the checkpoint in {proxy.directory} changed while the server started: version "
                f"{proxy.version} was checked, {loaded['version']} was loaded; start it again"
            )
