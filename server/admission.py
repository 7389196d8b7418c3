"""Admission: which proxies align a request, or why it is refused. `middleware.alignment` calls it for every JSON body.

Proxies are chosen by `alignment` or by the model's name, `<model>:<proxy>` (`proxy_choice`). Both are taken out
of the body, so that vLLM's own handlers find a request for the frozen LLM.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from pydantic import ValidationError

from proxy.request import EXTRA_ARGS_KEY, WorkerAlignment
from server.access import Caller, Limits
from server.alignment_field import check_names, take_header
from server.alignment_stats import AlignmentCounts
from server.app_state import AppState
from server.engine import VLLMValidationError
from server.proxies import ServedVersion
from server.proxy_choice import choose_proxies, is_served, split_model_name
from server.schemas.alignment import AlignmentOptions, SampleJudgeOptions

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
    pinned: tuple[ServedVersion, ...]
    """The proxies' versions, which stay loaded until the response has ended."""
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
    """Resolve names, check the combination of options and pin the proxies' versions. Changes `body`.

    The caller of this function unpins the versions.

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
    alignment = options or AlignmentOptions.model_validate({})
    names, chosen = choose_proxies(model_name, named, alignment, state, caller)
    _check_combination(path, body, alignment, names)
    _check_limits(body, alignment, caller.limits)
    if path in COUNTING:
        chosen = {}
    admission = Admission(
        requested_model=model_name if model and is_served(model, state.models) else None,
        alignment=alignment.for_worker(chosen) if chosen else None,
        pinned=tuple(chosen),
        caller=caller,
        wants_stats=bool(names) or options is not None,
        best_of=alignment.best_of,
        judge=alignment.judge or SampleJudgeOptions.model_validate({}),
        sample_timeout=alignment.sample_timeout,
    )
    state.proxies.pin(*chosen)
    # A request that only names a model pays for no round trip to the engine.
    return AdmittedRequest(
        admission, AlignmentCounts(state.counts, in_response=options is not None)
    )


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
    path: str, body: dict[str, Any], options: AlignmentOptions, proxies: Collection[str]
) -> None:
    for option in ("strength", "max_rejections", "trace"):
        if not proxies and option in options.model_fields_set:
            _refuse(f"alignment.{option}", "needs a proxy: set alignment.proxy as well")
    if options.best_of > 1 and options.trace:
        _refuse("alignment.trace", "does not go with best_of above 1: trace the samples with n")
    if not proxies and options.best_of == 1:
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
