"""The endpoint plugin that adds our routes and middleware to vLLM's OpenAI server.

vLLM finds such plugins through entry points and an environment variable; `vllm_patches.install_plugin` hands it ours
directly. A plugin's route replaces vLLM's route of the same path and method.
"""

from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import FastAPI
from starlette.datastructures import State
from starlette.exceptions import HTTPException
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.exception_handling.handlers.http import http_exception_handler
from vllm.platforms import current_platform

from judge.feedback import Feedback
from judge.principles import DEFAULT, Principle
from proxy.checkpoint import BaseModelId, resolve_model_dir
from server import openapi, vllm_patches
from server.access import Access
from server.alignment_stats import WorkerReader
from server.app_state import AppState
from server.ending import end_soon
from server.engine import Workers
from server.engine_wrapper import begin_judgments, count_judge_tokens, wrap_engine
from server.feedback_writer import FeedbackWriter
from server.judge_adapters import Adapter, JudgeKind
from server.judges import Judges
from server.learned_proxy import Spec
from server.learning import Learning
from server.middleware.access import AccessMiddleware
from server.middleware.alignment import AlignmentMiddleware
from server.middleware.announce import AnnounceMiddleware
from server.middleware.anthropic_errors import AnthropicErrorMiddleware
from server.middleware.drain import DrainMiddleware
from server.middleware.request_log import RequestLogMiddleware
from server.proxies import Checkpoint, Proxies
from server.proxy_manifest import ProxyManifest
from server.readiness import Readiness
from server.remote_client import EndpointClient, Meter, RewardClient, connect
from server.remote_judges import RemoteJudge, RemoteKind
from server.routes import (
    cards,
    chat,
    completions,
    feedback,
    health,
    judge,
    messages,
    models,
    page,
    positions,
    proxies,
    responses,
)
from server.validation_errors import validation_error_handler

ROUTES = (
    *(chat, completions, responses, messages, models),
    *(judge, feedback, proxies, cards, positions, health, page),
)


@dataclass(kw_only=True)
class AssentPlugin:
    """Implements vLLM's interface of endpoint plugins."""

    name = "assent"
    required_tasks = ("generate",)

    proxies: Iterable[Checkpoint]
    """To load at the start."""
    access: Access
    max_body_bytes: int
    log_texts: bool
    tracing: bool
    """Whether vLLM exports spans."""
    drain_seconds: float
    base: BaseModelId | None = None
    """Identity of the LLM; None = unknown."""
    proxy_root: Path | None = None
    principles: Mapping[str, Principle] = field(default_factory=lambda: DEFAULT)
    adapters: Mapping[JudgeKind, Adapter] = field(default_factory=dict)
    remote_judges: Mapping[RemoteKind, RemoteJudge] = field(default_factory=dict)
    judge_keys: Mapping[str, str] = field(default_factory=dict, repr=False)
    """API keys of judges on other servers, by variable."""
    feedback: Feedback | None = None
    learn: Sequence[Spec] = ()
    engine_died: bool = False
    """Set when the server shuts down."""

    def attach_router(self, app: FastAPI) -> None:
        """Called by vLLM when its own routes are complete."""
        for module in ROUTES:
            app.include_router(module.router)
        app.mount("/page", page.PageFiles())
        if app.openapi_url is not None:
            openapi.describe(app)
        # vLLM handles FastAPI's HTTPException; an unknown path raises Starlette's.
        app.add_exception_handler(HTTPException, http_exception_handler)
        vllm_patches.replace_validation_handler(validation_error_handler)
        # The last one added is the first to see a request.
        app.add_middleware(AlignmentMiddleware)
        app.add_middleware(AccessMiddleware, access=self.access, max_body_bytes=self.max_body_bytes)
        app.add_middleware(DrainMiddleware, seconds=self.drain_seconds)
        app.add_middleware(AnthropicErrorMiddleware)
        app.add_middleware(RequestLogMiddleware, texts=self.log_texts, tracing=self.tracing)
        app.add_middleware(AnnounceMiddleware, access=self.access)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Called by vLLM when the engine runs and its own state is complete."""
        assert engine_client is not None, "only vLLM's render server has no engine"
        state.assent = await self._make_state(engine_client, state, args)
        vllm_patches.on_shutdown(engine_client, lambda: self._shut_down(engine_client))
        wrap_engine(
            engine_client,
            state.openai_serving_models,
            prompt_logprobs_refused=_why_no_prompt_logprobs(engine_client),
        )

    async def _make_state(self, engine: EngineClient, state: State, args: Namespace) -> AppState:
        workers = Workers(engine)
        proxies = Proxies(workers, base=self.base, root=self.proxy_root)
        for checkpoint in self.proxies:
            await proxies.load(checkpoint.name, checkpoint.directory, shadow=checkpoint.shadow)
        if "probe" in self.adapters:
            directory = self.adapters["probe"].directory
            await workers.collective_rpc("load_probe", args=(str(directory),))
        manifest = None
        if self.proxy_root is not None:
            manifest = ProxyManifest(self.proxy_root, proxies)
            await manifest.reconcile()
            manifest.watch()
        feedback_writer = FeedbackWriter(self.feedback) if self.feedback is not None else None
        chat = state.openai_serving_chat
        learning = None
        if feedback_writer is not None and manifest is not None:
            assert self.base is not None, (
                "the command line identifies the LLM where there is a root"
            )
            model = {
                "model": str(_directory_of(args)),
                "base": self.base.model_dump(),
                "chat_template": chat.chat_template if chat is not None else None,
            }
            learning = Learning(
                self.learn, feedback_writer, proxies, manifest, engine, workers, model=model
            )
            learning.watch()
        clients: dict[JudgeKind, RewardClient | EndpointClient] = {
            kind: connect(
                judge,
                self.judge_keys.get(judge.api_key_env or ""),
                Meter(begin_judgments, count_judge_tokens),
            )
            for kind, judge in self.remote_judges.items()
        }
        return AppState(
            engine=engine,
            workers=workers,
            chat=chat,
            completion=state.openai_serving_completion,
            models=state.openai_serving_models,
            proxies=proxies,
            manifest=manifest,
            judges=Judges(
                *(engine, workers, chat, self.principles, self.adapters, clients, feedback_writer)
            ),
            feedback_writer=feedback_writer,
            learning=learning,
            readiness=Readiness(workers),
            counts=WorkerReader(workers, "take_alignment_counts"),
            traces=WorkerReader(workers, "take_traces"),
        )

    def _shut_down(self, engine: EngineClient) -> None:
        """An engine that has failed before its shutdown has died."""
        self.engine_died |= engine.errored
        end_soon(exit_code=int(self.engine_died))


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
