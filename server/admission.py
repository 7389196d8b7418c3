"""Admission: which proxy aligns a request, or why it is refused. `middleware.alignment` calls it for every JSON body.

A proxy is chosen by `alignment.proxy` or by the model's name, `<model>:<proxy>`. Both are taken out
of the body, so that vLLM's own handlers find a request for the frozen LLM.
"""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from proxy.request import EXTRA_ARGS_KEY, WorkerAlignment
from server.access import Caller, Limits
from server.alignment_field import check_names, take_header
from server.alignment_stats import AlignmentCounts
from server.app_state import AppState
from server.engine import OpenAIServingModels, VLLMNotFoundError, VLLMValidationError
from server.proxies import OWNER, ServedVersion
from server.schemas.alignment import AlignmentOptions, JudgeSettings, SampleJudgeOptions

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"
MESSAGES = "/v1/messages"
BATCH = "/v1/chat/completions/batch"

GENERATING = {
    CHAT,
    COMPLETIONS,
    RESPONSES,
    BATCH,
    MESSAGES,
    "/cohere/v2/chat",
    "/inference/v1/generate",
    "/invocations",
}
"""Routes that generate text, so that a proxy can align it. All of them draw through `engine_wrapper`."""
COUNTING = {"/tokenize", f"{MESSAGES}/count_tokens"}
"""Routes that generate nothing: `<model>:<proxy>` means just the model."""


@dataclass(frozen=True)
class Admission:
    """What was admitted."""

    requested_model: str | None
    """The name that the client used; None if it used none, or one that is not served."""
    alignment: WorkerAlignment | None
    """The request's options for the worker; None = no proxy takes part."""
    pinned: ServedVersion | None
    """The proxy's version, which stays loaded until the response has ended."""
    caller: Caller
    wants_stats: bool
    """Whether the response reports proxy and version."""
    best_of: int
    judge: SampleJudgeOptions
    sample_timeout: float | None
    """Seconds that a sample of a best-of-N request may take."""


class AdmittedRequest(NamedTuple):
    """One HTTP request on its way through the server."""

    admission: Admission
    counts: AlignmentCounts


async def load_own_proxy(body: dict[str, Any], state: AppState, caller: Caller) -> None:
    """Load the proxy that a request names, if it is the caller's own learned proxy."""
    if state.learning is None:
        return
    options = body.get(EXTRA_ARGS_KEY)
    name = options.get("proxy") if isinstance(options, dict) else None
    name = name or split_model_name(body.get("model"), state.models)[1]
    if isinstance(name, str):
        await state.learning.learned.wake(name, caller)


def read_fields(path: str, body: dict[str, Any], header: str | None) -> None:
    """Put the header's alignment into the body, and refuse misspelt fields.

    Args:
        header: the value of `Assent-Alignment`; None = the request has none.

    Raises VLLMValidationError (400).
    """
    if path in GENERATING:
        n = body.get("n") if path == COMPLETIONS else None
        # OpenAI's `best_of` of completions selects nothing where it is n.
        takes_best_of = path == BATCH or (isinstance(n, int) and body.get("best_of") == n)
        check_names(body, takes_best_of=takes_best_of)
    if header is not None:
        # A client that sends the header with each request may count tokens.
        take_header(header, dict(body) if path in COUNTING else body)


def admit(path: str, body: dict[str, Any], state: AppState, caller: Caller) -> AdmittedRequest:
    """Resolve names, check the combination of options and pin the proxy's version. Changes `body`.

    The caller of this function unpins the version.

    Raises VLLMNotFoundError (404) for a proxy that is not loaded, VLLMValidationError (400) for a
    combination that makes no sense.
    """
    _check_raw_arguments(body)
    model_name = body.get("model")
    model, named = split_model_name(model_name, state.models)
    options = _parse_options(body.pop(EXTRA_ARGS_KEY, None))
    if named is not None:
        body["model"] = model
    if named is not None or options is not None:
        _check_route(path, named, options)
    if named and options is not None and options.proxy and named != options.proxy:
        raise VLLMValidationError(
            f"model {model_name!r} names the proxy {named!r}, but alignment.proxy is "
            f"{options.proxy!r}: name one",
            parameter="alignment.proxy",
        )
    alignment = options or AlignmentOptions.model_validate({})
    name = alignment.proxy or named
    pinned = find_proxy(name, state, caller) if name is not None else None
    _check_combination(path, body, alignment, name)
    _check_limits(body, alignment, caller.limits)
    if path in COUNTING:
        pinned = None
    admission = Admission(
        requested_model=model_name if model and is_served(model, state.models) else None,
        alignment=alignment.for_worker(pinned.name, pinned.version) if pinned is not None else None,
        pinned=pinned,
        caller=caller,
        wants_stats=name is not None or options is not None,
        best_of=alignment.best_of,
        judge=alignment.judge or SampleJudgeOptions.model_validate({}),
        sample_timeout=alignment.sample_timeout,
    )
    if pinned is not None:
        state.proxies.pin(pinned)
    # A request that only names a model pays for no round trip to the engine.
    return AdmittedRequest(
        admission, AlignmentCounts(state.counts, in_response=options is not None)
    )


def find_proxy(name: str, state: AppState, caller: Caller) -> ServedVersion | None:
    """What a name stands for to a caller; None = nothing was learned yet: the frozen LLM answers.

    Raises VLLMNotFoundError (404) for an unknown name, VLLMValidationError (400) for a shadow.
    """
    is_learned = state.learning is not None and name in state.learning.learned.names()
    if state.learning is not None and is_learned:
        proxy = state.learning.learned.find(name, caller)
    else:
        proxy = state.proxies.bound(name) if OWNER not in name else None
    if proxy is None:
        if is_learned:
            return None
        loaded = ", ".join(proxy_names(state)) or "none"
        raise VLLMNotFoundError(f"The proxy {name!r} is not loaded. Loaded are: {loaded}.")
    if proxy.state == "shadow":
        _refuse("alignment.proxy", f"{name!r} is a shadow: it scores tokens and never acts")
    return proxy


def proxy_names(state: AppState) -> list[str]:
    """The proxies that a request may name."""
    learned = state.learning.learned.names() if state.learning is not None else []
    return [*dict.fromkeys([*state.proxies.names(), *learned])]


@asynccontextmanager
async def judging_proxy(
    settings: JudgeSettings, state: AppState, caller: Caller
) -> AsyncIterator[ServedVersion | None]:
    """The proxy that judges, pinned while the block lasts; None = another kind of judge does.

    Raises VLLMNotFoundError (404) for an unknown name, VLLMValidationError (400) where nothing was learned yet.
    """
    if settings.proxy is None:
        yield None
        return
    if state.learning is not None:
        await state.learning.learned.wake(settings.proxy, caller)
    proxy = find_proxy(settings.proxy, state, caller)
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
    """Whether it is a name of the LLM or of an adapter."""
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
    """Extra arguments travel to the engine unchanged: refuse here what would fail there."""
    sampling = body.get("sampling_params")
    extra_args = sampling.get("extra_args") if isinstance(sampling, dict) else None
    raw = {"vllm_xargs": body.get("vllm_xargs"), "sampling_params.extra_args": extra_args}
    for name, arguments in raw.items():
        if not isinstance(arguments, dict):  # vLLM's own validation refuses wrong types
            continue
        if EXTRA_ARGS_KEY in arguments:
            _refuse(
                f"{name}.{EXTRA_ARGS_KEY}",
                f"is reserved: send the `{EXTRA_ARGS_KEY}` object instead",
            )
        for key in ("kv_transfer_params", "ec_transfer_params"):
            if not isinstance(arguments.get(key, {}), dict):
                _refuse(f"{name}.{key}", "must be an object")
        try:
            json.dumps(arguments, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse(name, "has a string that is not Unicode text: half of a surrogate pair")


def _parse_options(content: Any) -> AlignmentOptions | None:
    if content is None:
        return None
    try:
        return AlignmentOptions.model_validate(content)
    except ValidationError as error:
        first, *others = error.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join([EXTRA_ARGS_KEY, *(str(part) for part in first["loc"])])
        rest = f" (and {len(others)} more)" if others else ""
        raise VLLMValidationError(f"{where}: {first['msg']}{rest}", parameter=where) from None


def _check_route(path: str, named: str | None, options: AlignmentOptions | None) -> None:
    if path not in GENERATING and (options is not None or path not in COUNTING):
        subject = f"the proxy {named!r} in the model's name" if named else f"`{EXTRA_ARGS_KEY}`"
        raise VLLMValidationError(
            f"{subject} means nothing to {path}: it works on {', '.join(sorted(GENERATING))}",
            parameter="model" if named else EXTRA_ARGS_KEY,
        )
    if options is None:
        return
    if options.best_of > 1 and path != CHAT:
        _refuse("alignment.best_of", f"is taken by {CHAT} only")
    if options.trace and path not in (CHAT, COMPLETIONS):
        _refuse("alignment.trace", f"is taken by {CHAT} and {COMPLETIONS} only")


def _check_combination(
    path: str, body: dict[str, Any], options: AlignmentOptions, proxy: str | None
) -> None:
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
    several = isinstance(prompts, list) and all(isinstance(item, str | list) for item in prompts)
    n = body.get("n")
    samples = max(n if isinstance(n, int) else 1, options.best_of)
    samples *= len(prompts) if isinstance(prompts, list) and several else 1
    if limits.max_samples is not None and samples > limits.max_samples:
        _refuse(
            "max_samples:",
            f"the request asks for {samples} answers, and this key may have {limits.max_samples}",
        )


def _refuse(parameter: str, reason: str) -> NoReturn:
    raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)
