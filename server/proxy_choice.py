"""Which proxies a request names, and the versions that the names stand for.

A request names one proxy by `alignment.proxy`, several with a strength each by `alignment.proxies`, or either by the
model's name: `<model>:<proxy>`, `<model>:<proxy>+<proxy>`.
"""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from proxy.request import EXTRA_ARGS_KEY, MAX_PROXIES
from server.access import Caller
from server.app_state import AppState
from server.engine import OpenAIServingModels, VLLMNotFoundError, VLLMValidationError
from server.proxies import OWNER, ServedVersion
from server.schemas.alignment import AlignmentOptions, JudgeSettings

Chosen = dict[ServedVersion, float]
"""The proxies that decide or judge together, and the strength of each."""


async def load_own_proxies(body: dict[str, Any], state: AppState, caller: Caller) -> None:
    """Load what a request names of the caller's own learned proxies."""
    if state.learning is None:
        return
    options = body.get(EXTRA_ARGS_KEY)
    options = options if isinstance(options, dict) else {}
    several = options.get("proxies")
    names = [options.get("proxy"), *(several if isinstance(several, dict) else ())]
    names += names_in(split_model_name(body.get("model"), state.models)[1])
    for name in names[: 2 * MAX_PROXIES]:
        if isinstance(name, str):
            await state.learning.learned.wake(name, caller)


def choose_proxies(
    model_name: Any, named: str | None, options: AlignmentOptions, state: AppState, caller: Caller
) -> tuple[list[str], Chosen]:
    """The names that a request has for its proxies, and what they stand for: less where nothing was learned yet.

    Args:
        model_name: of the request.
        named: the part of it that names proxies.

    Raises VLLMNotFoundError (404) for an unknown name, VLLMValidationError (400) for proxies that do not go together.
    """
    strengths = options.strengths
    if names := names_in(named):
        if strengths and {*strengths} != {*names}:
            field = "proxy" if options.proxies is None else "proxies"
            raise VLLMValidationError(
                f"model {model_name!r} names the proxy {named!r}, but alignment.{field} is "
                f"{getattr(options, field)!r}: name one",
                parameter=f"alignment.{field}",
            )
        if len({*names}) != len(names) or len(names) > MAX_PROXIES:
            raise VLLMValidationError(
                f"model {model_name!r} names a proxy twice, or more than {MAX_PROXIES}",
                parameter="model",
            )
        strengths = strengths or dict.fromkeys(names, options.strength)
    found = {name: find_proxy(name, state, caller) for name in sorted(strengths)}
    chosen = {proxy: strengths[name] for name, proxy in found.items() if proxy is not None}
    _check_together(chosen)
    return [*strengths], chosen


def _check_together(chosen: Mapping[ServedVersion, float]) -> None:
    temperatures = {
        proxy.shown_name: proxy.description["temperature"]
        for proxy, strength in chosen.items()
        if strength > 0
    }
    if len({*temperatures.values()}) > 1:
        listed = ", ".join(f"{name} at {t:g}" for name, t in temperatures.items())
        raise VLLMValidationError(
            f"alignment.proxies: these proxies were trained at different temperatures ({listed}), and each knows only "
            "the candidates and probabilities of its own: combine proxies of one temperature",
            parameter="alignment.proxies",
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
        raise VLLMValidationError(
            f"alignment.proxy {name!r} is a shadow: it scores tokens and never acts",
            parameter="alignment.proxy",
        )
    return proxy


def proxy_names(state: AppState) -> list[str]:
    """The proxies that a request may name."""
    learned = state.learning.learned.names() if state.learning is not None else []
    return [*dict.fromkeys([*state.proxies.names(), *learned])]


@asynccontextmanager
async def judging_proxies(
    settings: JudgeSettings, state: AppState, caller: Caller
) -> AsyncIterator[Chosen]:
    """The proxies that judge, pinned while the block lasts; {} = another kind of judge does.

    Raises VLLMNotFoundError (404) for an unknown name, VLLMValidationError (400) where nothing was learned yet.
    """
    chosen: Chosen = {}
    for name, strength in settings.strengths.items():
        if state.learning is not None:
            await state.learning.learned.wake(name, caller)
        proxy = find_proxy(name, state, caller)
        if proxy is None:
            raise VLLMValidationError(
                f"proxy: nothing was learned as {name!r} yet", parameter="proxy"
            )
        chosen[proxy] = strength
    state.proxies.pin(*chosen)
    try:
        yield chosen
    finally:
        state.proxies.unpin(*chosen)


def is_served(name: str, models: OpenAIServingModels) -> bool:
    """Whether it is a name of the LLM or of an adapter."""
    return models.is_base_model(name) or name in models.lora_requests


def split_model_name(model: Any, models: OpenAIServingModels) -> tuple[str | None, str | None]:
    """`<model>:<proxies>` -> (model, proxies); a name that is served as it stands has none."""
    if not isinstance(model, str) or not model:
        return None, None
    if is_served(model, models):
        return model, None
    prefix, colon, suffix = model.rpartition(":")
    return (prefix, suffix) if colon and is_served(prefix, models) else (model, None)


def names_in(named: str | None) -> list[str]:
    """`a+b` -> a and b; a proxy's name has no +."""
    return [] if named is None else named.split("+")
