"""Which proxy speaks in a chat request, or why it cannot.

A proxy is chosen by `alignment.proxy` or by the model's name, `<model>:<proxy>`.
"""

from dataclasses import dataclass
from typing import Any

from proxy.request import Alignment
from server.engine import (
    ChatCompletionRequest,
    OpenAIServingModels,
    VLLMNotFoundError,
    VLLMValidationError,
)
from server.schemas import AlignmentOptions, ChatRequest, JudgeOptions
from server.state import Served


@dataclass(frozen=True)
class Plan:
    request: ChatCompletionRequest
    """What vLLM is asked: the frozen LLM's own name, the proxy in its extra arguments."""
    asked_model: str | None
    """The name that the client used; None if it used none."""
    alignment: Alignment | None
    """None where no proxy takes part."""
    wants_receipt: bool
    best_of: int
    judge: JudgeOptions


def admit(request: ChatRequest, served: Served) -> Plan:
    """Resolve names and refuse what cannot be.

    Raises VLLMNotFoundError (404) for a proxy that is not loaded, VLLMValidationError (400) for a
    combination that makes no sense.
    """
    model, named = split_model_name(request.model, served.models)
    options = request.alignment or AlignmentOptions.model_validate({})
    if named and options.proxy and named != options.proxy:
        raise VLLMValidationError(
            f"model {request.model!r} names the proxy {named!r}, but alignment.proxy is "
            f"{options.proxy!r}: name one",
            parameter="alignment.proxy",
        )
    name = options.proxy or named
    if name is not None and name not in served.proxies:
        raise VLLMNotFoundError(
            f"The proxy {name!r} is not loaded. Loaded are: {', '.join(served.proxies) or 'none'}."
        )
    _check(request, options, name)
    alignment = options.for_proxy(name) if name is not None else None
    return Plan(
        request=_for_vllm(request, model, alignment, options.best_of),
        asked_model=request.model,
        alignment=alignment,
        wants_receipt=name is not None or request.alignment is not None,
        best_of=options.best_of,
        judge=options.judge or JudgeOptions.model_validate({}),
    )


def split_model_name(
    model: str | None, models: OpenAIServingModels
) -> tuple[str | None, str | None]:
    """`<model>:<proxy>` -> (model, proxy); a name that is served as it stands has no proxy."""

    def is_served(name: str) -> bool:
        return models.is_base_model(name) or name in models.lora_requests

    if not model or is_served(model):
        return model, None
    prefix, colon, suffix = model.rpartition(":")
    return (prefix, suffix) if colon and is_served(prefix) else (model, None)


def _check(request: ChatRequest, options: AlignmentOptions, proxy: str | None) -> None:
    for field in ("strength", "max_rejections"):
        if proxy is None and field in options.model_fields_set:
            _refuse(f"alignment.{field}", "needs a proxy: set alignment.proxy as well")
    if (proxy is not None or options.best_of > 1) and request.use_beam_search:
        _refuse("use_beam_search", "does not go with alignment: beams are not sampled")
    if options.best_of > 1:
        if request.n not in (None, 1):
            _refuse("n", "must be 1 with alignment.best_of above 1: one winner is returned")
        if request.temperature == 0:
            _refuse("temperature", "must be above 0 with alignment.best_of: samples must differ")
        if request.tools:
            _refuse("tools", "do not go with alignment.best_of above 1: only text can be judged")


def _refuse(parameter: str, reason: str) -> None:
    raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)


def _for_vllm(
    request: ChatRequest, model: str | None, alignment: Alignment | None, best_of: int
) -> ChatCompletionRequest:
    changes: dict[str, Any] = {"model": model, "alignment": None}
    if alignment is not None:
        changes["vllm_xargs"] = {**(request.vllm_xargs or {}), **alignment.to_extra_args()}
    if best_of > 1:
        changes |= {"n": best_of, "stream": False, "stream_options": None}
    return request.model_copy(update=changes)
