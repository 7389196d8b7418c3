"""The endpoint plugin that hangs our routes into vLLM's OpenAI server.

vLLM finds such plugins through entry points and an environment variable; `install` hands it ours
directly. A route of ours takes the place of vLLM's route of the same path and method.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import vllm.plugins
from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.platforms import current_platform

from judge.feedback import Feedback
from judge.principles import DEFAULT, Principle
from proxy.checkpoint import BaseModelId, resolve_model_dir
from server import chat, completions, feedback, judging, listing, managing, positions
from server.access import Access, AccessGuard
from server.adapters import Adapter, JudgeKind
from server.drain import Drain
from server.engine import Workers
from server.gate import Gate, guard
from server.judges import Judges
from server.keeper import Keeper
from server.learned_proxy import Spec
from server.learning import Learning
from server.proxies import Checkpoint, Proxies
from server.receipts import WorkerReader
from server.remembered import Remembered
from server.request_log import RequestLog
from server.state import Served


class AssentPlugin:
    name = "assent"
    required_tasks = ("generate",)

    def __init__(
        self,
        *,
        proxies: Iterable[Checkpoint],
        access: Access,
        max_body_bytes: int,
        log_texts: bool,
        drain_seconds: float,
        base: BaseModelId | None = None,
        proxy_root: Path | None = None,
        principles: Mapping[str, Principle] = DEFAULT,
        adapters: Mapping[JudgeKind, Adapter] | None = None,
        feedback: Feedback | None = None,
        learn: Sequence[Spec] = (),
    ) -> None:
        self.proxies = list(proxies)
        self.access, self.max_body_bytes = access, max_body_bytes
        self.log_texts, self.drain_seconds = log_texts, drain_seconds
        self.base = base
        self.proxy_root = proxy_root
        self.principles = principles
        self.adapters = adapters or {}
        self.feedback = feedback
        self.learn = learn
        self.engine_died = False
        """Known when the server has stopped."""

    def attach_router(self, app: FastAPI) -> None:
        for module in (chat, completions, feedback, judging, listing, managing, positions):
            app.include_router(module.router)
        # vLLM handles FastAPI's HTTPException; an unknown path raises Starlette's.
        app.add_exception_handler(HTTPException, http_exception_handler)
        app.add_middleware(Gate)
        # What is added last comes first.
        app.add_middleware(AccessGuard, access=self.access, max_body_bytes=self.max_body_bytes)
        app.add_middleware(Drain, seconds=self.drain_seconds)
        app.add_middleware(RequestLog, texts=self.log_texts)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        assert engine_client is not None, "only vLLM's render server has no engine"
        models = state.openai_serving_models
        workers = Workers(engine_client)
        proxies = Proxies(workers, base=self.base, root=self.proxy_root)
        for each in self.proxies:
            await proxies.load(each.name, each.directory, shadow=each.shadow)
        remembered = None
        if self.proxy_root is not None:
            remembered = Remembered(self.proxy_root, proxies)
            await remembered.keep_up()
            remembered.follow()
        keeper = Keeper(self.feedback) if self.feedback is not None else None
        learning = None
        if keeper is not None and remembered is not None:
            assert self.base is not None, "taken where there is a root"
            chat = state.openai_serving_chat
            model = {
                "model": str(_directory_of(args)),
                "base": self.base.model_dump(),
                "chat_template": chat.chat_template if chat is not None else None,
            }
            learning = Learning(
                self.learn, keeper, proxies, remembered, engine_client, workers, model=model
            )
            learning.follow()
        state.assent = Served(
            engine=engine_client,
            workers=workers,
            chat=state.openai_serving_chat,
            completion=state.openai_serving_completion,
            models=models,
            proxies=proxies,
            remembered=remembered,
            judges=Judges(
                engine_client,
                workers,
                state.openai_serving_chat,
                self.principles,
                self.adapters,
                keeper,
            ),
            keeper=keeper,
            learning=learning,
            counts=WorkerReader(workers, "take_alignment_counts"),
            traces=WorkerReader(workers, "take_traces"),
        )
        self._notice_its_death(engine_client)
        guard(engine_client, models, prompt_logprobs_refused=_why_no_prompt_logprobs(engine_client))

    def _notice_its_death(self, engine: EngineClient) -> None:
        """An engine that is to be shut down and runs no longer has died."""
        shutdown, asked = engine.shutdown, False

        def noticed(*args: Any, **options: Any) -> Any:
            nonlocal asked
            self.engine_died |= engine.errored and not asked
            asked = True
            return shutdown(*args, **options)

        engine.shutdown = noticed


def install(plugin: AssentPlugin) -> None:
    """Make vLLM load this plugin, and no other."""

    def load_endpoint_plugins(supported_tasks: Any = None) -> list[AssentPlugin]:
        return [plugin]

    vllm.plugins.load_endpoint_plugins = load_endpoint_plugins


def _directory_of(args: Namespace) -> Path:
    return resolve_model_dir(args.model, args.revision, cache_dir=args.download_dir)


def _why_no_prompt_logprobs(engine: EngineClient) -> str | None:
    """vLLM's CPU kernels for LoRA end the engine when they meet logits of a whole prompt."""
    lora = engine.vllm_config.lora_config
    if lora is None or not current_platform.is_cpu():
        return None
    if lora.target_modules is not None and "lm_head" not in lora.target_modules:
        return None
    return (
        "prompt_logprobs, or echo with logprobs, do not work on a CPU with LoRA: start the server "
        "with --lora-target-modules that leave out lm_head"
    )
