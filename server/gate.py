"""The gates that every request passes, whichever of vLLM's many routes it is for.

vLLM 0.32 has eight routes on which the model speaks, each with a request type and a handler of its
own. Instead of a copy of each there is one gate before the routes and one before the engine:

    body ──► Gate ──► vLLM's route and handler ──► engine.generate ──► tokens
              │ admits, pins                          ▲ told which proxy speaks
              └────────── plan (a context variable) ──┘

`Gate` is an ASGI middleware. It has `admission.admit` read the JSON body and take proxy and
`alignment` out of it, keeps the plan in a context variable while the app answers, and holds the pin
on the proxy's version until the answer has ended: sent, failed or given up by the client. What
`admission` does not know to honour it refuses, so a new route of vLLM's never drops a proxy.

`guard` wraps two methods: the engine's `generate`, through which all of vLLM's handlers draw, adds
the plan to the sampling parameters; the `model_name` with which they answer gives back the name
that was asked for. `Assent-Proxy` in an answer's headers names the proxy and its version.
"""

import asyncio
import copy
import itertools
import json
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from proxy.request import EXTRA_ARGS_KEY
from server.access import CALLER, Limits
from server.admission import Plan, admit, wake
from server.engine import (
    EngineClient,
    OpenAIServingModels,
    OwnExtraArgs,
    VLLMNotFoundError,
    VLLMValidationError,
    create_error_response,
    prompt_length,
)
from server.request_log import BODY, PLAN, TEXTS
from server.state import Served

PROXY_HEADER = "Assent-Proxy"

_PLAN: ContextVar[Plan | None] = ContextVar("plan", default=None)
_FLUSH_SECONDS = 2.0
_FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")


def current_plan() -> Plan | None:
    """The plan of the request that is being answered; None if its body is no JSON object."""
    return _PLAN.get()


class Gate:
    """ASGI middleware; must come after the API key's."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["type"] == "http" and path == "/metrics":
            await _bring_up_to_date(scope["app"].state.assent)
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if Headers(scope=scope).get("content-type", "").startswith(_FORMS):
            return await self.app(scope, receive, send)
        content = await _read(receive)
        if content is None:  # the client has gone
            return
        body = _parse(content)
        if body is None:  # the route will say what is wrong with it
            return await self.app(scope, _replay(content, receive), send)

        state = scope["app"].state.assent
        before = body.get("model"), EXTRA_ARGS_KEY in body
        try:
            await wake(body, state, scope[CALLER])
            plan = scope[PLAN] = admit(path, body, state, scope[CALLER])
        except (VLLMNotFoundError, VLLMValidationError) as error:
            answer = create_error_response(error)
            response = JSONResponse(answer.model_dump(), status_code=answer.error.code)
            return await response(scope, receive, send)
        if scope[TEXTS]:
            scope[BODY], plan.texts = content, defaultdict(str)
        if before != (body.get("model"), False):
            content = json.dumps(body).encode()
        token = _PLAN.set(plan)
        try:
            await self.app(scope, _replay(content, receive), _naming_proxy(plan, send))
        finally:
            _PLAN.reset(token)
            if plan.pinned is not None:
                state.proxies.unpin(plan.pinned)


def guard(
    engine: EngineClient, models: OpenAIServingModels, *, prompt_logprobs_refused: str | None
) -> None:
    """Have vLLM's handlers draw with the plan's proxy and answer with the plan's model name.

    Args:
        engine, models: what vLLM's handlers hold; two of their methods are replaced.
        prompt_logprobs_refused: why this server cannot give logprobs of prompts; None = it can.
    """
    generate, model_name = engine.generate, models.model_name
    numbers = itertools.count()

    def generate_aligned(
        prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        params, plan = sampling_params, current_plan()
        is_own = isinstance(params.extra_args, OwnExtraArgs)
        if not is_own:
            if EXTRA_ARGS_KEY in (params.extra_args or {}):  # a way in that `admit` does not know
                raise VLLMValidationError(f"the extra argument {EXTRA_ARGS_KEY!r} is reserved")
            if params.prompt_logprobs is not None and prompt_logprobs_refused is not None:
                raise VLLMValidationError(prompt_logprobs_refused, parameter="prompt_logprobs")
        if plan is None:
            return generate(prompt, params, request_id, **options)
        if not (is_own and plan.best_of > 1):
            check_prompt(plan.limits, prompt)
        if is_own:
            return _counted(generate(prompt, params, request_id, **options), plan)
        if plan.alignment is not None:
            params = copy.copy(params)  # a handler may use its own again
            params.extra_args = {**(params.extra_args or {}), **plan.alignment.to_extra_args()}
            # Clients choose request ids, alike ones even; nobody must get another's trace or counts.
            request_id = f"{request_id}-p{next(numbers)}"
        plan.engine_ids.append(request_id)
        plan.num_samples = params.n
        return _watched(generate(prompt, params, request_id, **options), plan, request_id)

    def name_in_answer(lora_request: Any = None) -> str:
        plan = current_plan()
        asked = plan.asked_model if plan is not None else None
        return asked or model_name(lora_request)

    engine.generate = generate_aligned
    models.model_name = name_in_answer


def check_prompt(limits: Limits, prompt: Any) -> None:
    """Raises VLLMValidationError where the caller may not have the model read so long a prompt."""
    most = limits.max_prompt_tokens
    if most is not None and (tokens := prompt_length(prompt)) > most:
        raise VLLMValidationError(
            f"max_prompt_tokens: a prompt has {tokens} tokens, and this key may send {most}",
            parameter="max_prompt_tokens",
        )


async def _watched(
    outputs: AsyncGenerator[Any, None], plan: Plan, request_id: str
) -> AsyncGenerator[Any, None]:
    """The engine's outputs; keeps account of them, and has the receipt made at the end."""
    async with aclosing(outputs):  # whoever gives up on us gives up on the engine's request
        async for output in outputs:
            for sample in output.outputs:
                plan.tokens["completion"] += len(sample.token_ids)
                plan.delivered[request_id, sample.index] += len(sample.token_ids)
                if plan.texts is not None:
                    plan.texts[request_id, sample.index] += sample.text
            if output.finished:
                plan.tokens["prompt"] += len(output.prompt_token_ids or ())
                if plan.alignment is not None and not plan.alignment.trace:
                    plan.finish(request_id)
            yield output


async def _counted(outputs: AsyncGenerator[Any, None], plan: Plan) -> AsyncGenerator[Any, None]:
    """A judge's."""
    async with aclosing(outputs):
        async for output in outputs:
            plan.tokens["judge_completion"] += len(output.outputs[0].token_ids)
            if output.finished:
                plan.tokens["judge_prompt"] += len(output.prompt_token_ids or ())
            yield output


async def _bring_up_to_date(state: Served) -> None:
    """Have the worker write its counters down, which it otherwise does every now and then."""
    with suppress(Exception):  # the engine may be dead; its last counters are worth a look then
        await asyncio.wait_for(state.workers.collective_rpc("flush_metrics"), _FLUSH_SECONDS)


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) else None


async def _read(receive: Receive) -> bytes | None:
    """The whole body, or None if the client went away before its end."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


def _replay(content: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body in one piece, then whatever the client does next."""
    pieces: list[Message] = [{"type": "http.request", "body": content, "more_body": False}]

    async def replayed() -> Message:
        return pieces.pop() if pieces else await receive()

    return replayed


def _naming_proxy(plan: Plan, send: Send) -> Send:
    if plan.pinned is None:
        return send
    value = f"{plan.pinned.shown_name}@{plan.pinned.version}"

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] < 400:
            MutableHeaders(scope=message)[PROXY_HEADER] = value
        await send(message)

    return named
