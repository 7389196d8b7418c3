"""Which proxy speaks in a request, or why it cannot. Every JSON request passes here (see `gate`).

A proxy is chosen by `alignment.proxy` or by the model's name, `<model>:<proxy>`. Both are taken out
of the body, so that vLLM's own handlers find a request for the frozen LLM.
"""

import asyncio
import json
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from proxy.request import EXTRA_ARGS_KEY, WorkerAlignment
from server.access import Caller, Limits
from server.engine import OpenAIServingModels, VLLMNotFoundError, VLLMValidationError
from server.proxies import OWNER, LoadedProxy
from server.receipts import BySample
from server.schemas import AlignmentOptions, JudgeOptions, JudgeSettings
from server.state import Served

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

# Where the model speaks, and so a proxy can; every draw there passes the gate of the engine.
SPEAKING = {
    CHAT,
    COMPLETIONS,
    RESPONSES,
    "/v1/chat/completions/batch",
    "/v1/messages",
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
}
# Where `<model>:<proxy>` means just the model: nothing is drawn.
COUNTING = {"/tokenize", "/v1/messages/count_tokens"}


@dataclass
class Plan:
    """What was admitted, and what becomes of it."""

    asked_model: str | None
    """The name that the client used; None if it used none, or one that is not served."""
    alignment: WorkerAlignment | None
    """What the worker is told; None where no proxy takes part."""
    pinned: LoadedProxy | None
    limits: Limits
    wants_receipt: bool
    best_of: int
    judge: JudgeOptions
    sample_timeout: float | None
    """Seconds that a sample of several may take."""
    engine_ids: list[str] = field(default_factory=list)
    """The requests to the engine, as it knows them, but a judge's: one per prompt, each with n samples."""
    num_samples: int = 1
    """n of each of them."""
    delivered: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(engine's id, sample) -> tokens that the engine has handed out; counted for traces only."""
    tokens: Counter[str] = field(default_factory=Counter)
    """What was spent: `prompt`, `completion`, and `judge_prompt`, `judge_completion`."""
    texts: defaultdict[tuple[str, int], str] | None = None
    """(engine's id, sample) -> what was said; None = it is not to be kept."""
    take_counts: Callable[[list[str]], Awaitable[BySample]] | None = None
    """How to ask the worker what the proxy did, which takes a round trip to the engine; None for
    requests without an `alignment` object: whoever just names a model reads no counts."""
    counts: dict[str, asyncio.Task[BySample]] = field(default_factory=dict)
    """What it did, by the engine's id: asked for as soon as a request has ended, for the answer is
    still to be put together."""

    def finish(self, engine_id: str) -> None:
        """Nothing more will be drawn for this request: ask for its counts."""
        if self.take_counts is not None and engine_id not in self.counts:
            take = self.take_counts([engine_id])
            self.counts[engine_id] = asyncio.ensure_future(take)

    async def all_counts(self) -> BySample:
        """The counts of all requests, by the ids given to the engine, and sample."""
        found: BySample = {}
        for engine_id in self.engine_ids:
            self.finish(engine_id)
        for task in self.counts.values():
            found |= await task
        return found


async def wake(body: dict[str, Any], state: Served, caller: Caller) -> None:
    """Have the proxy that a request names loaded, if it is the caller's own."""
    if state.learning is None:
        return
    options = body.get(EXTRA_ARGS_KEY)
    name = options.get("proxy") if isinstance(options, dict) else None
    name = name or split_model_name(body.get("model"), state.models)[1]
    if isinstance(name, str):
        await state.learning.wake(name, caller)


def admit(path: str, body: dict[str, Any], state: Served, caller: Caller) -> Plan:
    """Resolve names, pin the proxy's version, and refuse what cannot be. Changes `body`.

    The caller unpins what the plan has pinned.

    Raises VLLMNotFoundError (404) for a proxy that is not loaded, VLLMValidationError (400) for a
    combination that makes no sense.
    """
    _check_raw_arguments(body)
    asked = body.get("model")
    model, named = split_model_name(asked, state.models)
    options = _options(body.pop(EXTRA_ARGS_KEY, None))
    if named is not None:
        body["model"] = model
    if named is not None or options is not None:
        _check_route(path, named, options)
    if named and options is not None and options.proxy and named != options.proxy:
        raise VLLMValidationError(
            f"model {asked!r} names the proxy {named!r}, but alignment.proxy is "
            f"{options.proxy!r}: name one",
            parameter="alignment.proxy",
        )
    given = options or AlignmentOptions.model_validate({})
    name = given.proxy or named
    pinned = find(name, state, caller) if name is not None else None
    _check(path, body, given, name)
    _check_limits(body, given, caller.limits)
    if path in COUNTING:
        pinned = None
    plan = Plan(
        asked_model=asked if model and is_served(model, state.models) else None,
        alignment=given.for_worker(pinned.name, pinned.version) if pinned is not None else None,
        pinned=pinned,
        limits=caller.limits,
        wants_receipt=name is not None or options is not None,
        best_of=given.best_of,
        judge=given.judge or JudgeOptions.model_validate({}),
        sample_timeout=given.sample_timeout,
        take_counts=state.counts.take if options is not None else None,
    )
    if pinned is not None:
        state.proxies.pin(pinned)
    return plan


def find(name: str, state: Served, caller: Caller) -> LoadedProxy | None:
    """What a name stands for to a caller, if it may speak; None = it is to be learned yet: the frozen LLM speaks."""
    is_learned = state.learning is not None and name in state.learning.names()
    if state.learning is not None and is_learned:
        proxy = state.learning.find(name, caller)
    else:
        proxy = state.proxies.bound(name) if OWNER not in name else None
    if proxy is None:
        if is_learned:
            return None
        loaded = ", ".join(names(state)) or "none"
        raise VLLMNotFoundError(f"The proxy {name!r} is not loaded. Loaded are: {loaded}.")
    if proxy.state == "shadow":
        _refuse("alignment.proxy", f"{name!r} is a shadow: it scores what is said and never acts")
    return proxy


def names(state: Served) -> list[str]:
    """The proxies that a request may ask for."""
    learned = state.learning.names() if state.learning is not None else []
    return [*dict.fromkeys([*state.proxies.names(), *learned])]


@asynccontextmanager
async def judging_proxy(
    settings: JudgeSettings, state: Served, caller: Caller
) -> AsyncIterator[LoadedProxy | None]:
    """The proxy that is to judge, loaded as long as the block lasts; None = another kind of judge does.

    Raises VLLMNotFoundError (404) where there is none such, VLLMValidationError (400) where nothing was learned yet.
    """
    if settings.proxy is None:
        yield None
        return
    if state.learning is not None:
        await state.learning.wake(settings.proxy, caller)
    proxy = find(settings.proxy, state, caller)
    if proxy is None:
        raise VLLMValidationError(
            f"proxy: nothing was learned as {settings.proxy!r} yet", parameter="proxy"
        )
    state.proxies.pin(proxy)
    try:
        yield proxy
    finally:
        state.proxies.unpin(proxy)


def is_served(name: str, models: OpenAIServingModels) -> bool:
    return models.is_base_model(name) or name in models.lora_requests


def split_model_name(model: Any, models: OpenAIServingModels) -> tuple[str | None, str | None]:
    """`<model>:<proxy>` -> (model, proxy); a name that is served as it stands has no proxy."""
    if not isinstance(model, str) or not model:
        return None, None
    if is_served(model, models):
        return model, None
    prefix, colon, suffix = model.rpartition(":")
    return (prefix, suffix) if colon and is_served(prefix, models) else (model, None)


def _check_raw_arguments(body: dict[str, Any]) -> None:
    """Extra arguments travel to the engine as they are: what would fail there is refused here."""
    sampling = body.get("sampling_params")
    extra_args = sampling.get("extra_args") if isinstance(sampling, dict) else None
    raw = {"vllm_xargs": body.get("vllm_xargs"), "sampling_params.extra_args": extra_args}
    for name, found in raw.items():
        if not isinstance(found, dict):  # wrong types are for vLLM's own validation
            continue
        if EXTRA_ARGS_KEY in found:
            _refuse(
                f"{name}.{EXTRA_ARGS_KEY}",
                f"is reserved: send the `{EXTRA_ARGS_KEY}` object instead",
            )
        for key in ("kv_transfer_params", "ec_transfer_params"):
            if not isinstance(found.get(key, {}), dict):
                _refuse(f"{name}.{key}", "must be an object")
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse(name, "has a string that is not Unicode text: half of a surrogate pair")


def _options(given: Any) -> AlignmentOptions | None:
    if given is None:
        return None
    try:
        return AlignmentOptions.model_validate(given)
    except ValidationError as error:
        first, *more = error.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join([EXTRA_ARGS_KEY, *(str(part) for part in first["loc"])])
        rest = f" (and {len(more)} more)" if more else ""
        raise VLLMValidationError(f"{where}: {first['msg']}{rest}", parameter=where) from None


def _check_route(path: str, named: str | None, options: AlignmentOptions | None) -> None:
    if path not in SPEAKING and (options is not None or path not in COUNTING):
        what = f"the proxy {named!r} in the model's name" if named else f"`{EXTRA_ARGS_KEY}`"
        raise VLLMValidationError(
            f"{what} means nothing to {path}: it works on {', '.join(sorted(SPEAKING))}",
            parameter="model" if named else EXTRA_ARGS_KEY,
        )
    asked = options or AlignmentOptions.model_validate({})
    if asked.best_of > 1 and path != CHAT:
        _refuse("alignment.best_of", f"is taken by {CHAT} only")
    if asked.trace and path not in (CHAT, COMPLETIONS):
        _refuse("alignment.trace", f"is taken by {CHAT} and {COMPLETIONS} only")


def _check(path: str, body: dict[str, Any], options: AlignmentOptions, proxy: str | None) -> None:
    for option in ("strength", "max_rejections", "trace"):
        if proxy is None and option in options.model_fields_set:
            _refuse(f"alignment.{option}", "needs a proxy: set alignment.proxy as well")
    if options.best_of > 1 and options.trace:
        _refuse("alignment.trace", "does not go with best_of above 1: trace the samples with n")
    if proxy is None and options.best_of == 1:
        return
    if body.get("use_beam_search") not in (None, False):
        _refuse("use_beam_search", "does not go with alignment: beams are not sampled")
    if path == RESPONSES and body.get("background") not in (None, False):
        _refuse("background", "does not go with a proxy: its version is kept for an open answer")


def _check_limits(body: dict[str, Any], options: AlignmentOptions, limits: Limits) -> None:
    if options.trace and not limits.trace:
        _refuse("alignment.trace", "is not open to this key")
    prompts = body.get("prompt", body.get("messages"))
    # Several prompts are a list of strings or of lists; a list of numbers is one prompt's tokens.
    several = isinstance(prompts, list) and all(isinstance(each, str | list) for each in prompts)
    n = body.get("n")
    samples = max(n if isinstance(n, int) else 1, options.best_of)
    samples *= len(prompts) if isinstance(prompts, list) and several else 1
    if limits.max_samples is not None and samples > limits.max_samples:
        _refuse(
            "max_samples:",
            f"the request asks for {samples} answers, and this key may have {limits.max_samples}",
        )


def _refuse(parameter: str, reason: str) -> None:
    raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)
