"""The server's routes, each written once: a function makes the `Call`, and both clients send it.

What a route accepts is checked by the server alone; an argument that is None is left out.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

from assent.results import (
    Alignment,
    Answer,
    Json,
    JudgeKind,
    PairVerdict,
    ProxyInfo,
    Ranking,
    read_answer,
    read_pair_verdict,
    read_proxy,
    read_ranking,
)

Result = TypeVar("Result")
Prompt = str | Sequence[Mapping[str, Any]]
"""A single user turn, or chat messages."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A request, and how its answer is read."""

    method: str
    path: str
    read: Callable[[Any], Result]
    body: Json | None = None
    params: Json | None = None


def chat(
    prompt: Prompt,
    *,
    model: str | None = None,
    alignment: Alignment | None = None,
    **parameters: Any,
) -> Call[Answer]:
    """An answer to a prompt.

    Args:
        prompt: a text, or chat messages
        model: None = the served one; `<model>:<proxy>` chooses a proxy, too
        alignment: proxies, strength, trace, best of N
        parameters: the others of `/v1/chat/completions`, such as `seed`, `n`, `temperature`, `max_tokens`

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    body = {"model": model, "messages": messages, "alignment": alignment and _given(alignment)}
    return Call("POST", "/v1/chat/completions", read_answer, _without_none(body | parameters))


def judge(
    prompt: Prompt,
    response_a: str,
    response_b: str,
    *,
    principles: Sequence[str] | None = None,
    kind: JudgeKind | None = None,
    proxy: str | None = None,
    proxies: Mapping[str, float] | None = None,
    tie_band: float | None = None,
    rationale: bool | None = None,
    max_rationale_tokens: int | None = None,
) -> Call[PairVerdict]:
    """Which of two responses is better, asked in both orders.

    Args:
        prompt: what was responded to
        response_a: one response
        response_b: the other
        principles: names of what to judge by; the majority decides. None = the first
        kind: who judges; None = the LLM, or its LoRA
        proxy: with kind `proxy`, the loaded proxy that does
        proxies: several, and the strength of each, in its place
        tie_band: a probability nearer to 0.5 than this is a tie
        rationale: add the reasons in words, for each principle
        max_rationale_tokens: for each principle

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    body = {
        **_conversation(prompt), "response_a": response_a, "response_b": response_b, "principles": principles,
        "kind": kind, "proxy": proxy, "proxies": proxies, "tie_band": tie_band, "rationale": rationale,
        "max_rationale_tokens": max_rationale_tokens,
    }  # fmt: skip
    return Call("POST", "/judge", read_pair_verdict, _without_none(body))


def rank(
    prompt: Prompt,
    responses: Sequence[str],
    *,
    strategy: Literal["knock-out", "final-four", "round-robin", "one-call"] | None = None,
    rotations: int | None = None,
    principles: Sequence[str] | None = None,
    kind: JudgeKind | None = None,
    proxy: str | None = None,
    proxies: Mapping[str, float] | None = None,
    seed: int | None = None,
) -> Call[Ranking]:
    """Which of several responses is best, by a tournament.

    Args:
        prompt: what was responded to
        responses: up to 64
        strategy: which pairs are compared, or all at once; None = knock-out
        rotations: with `one-call`, in how many orders they are shown; None = as many as there are responses
        principles: names of what to judge by
        kind: who judges
        proxy: with kind `proxy`, the loaded proxy that does
        proxies: several, and the strength of each, in its place
        seed: of the draw; None = a random one

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    body = {
        **_conversation(prompt), "responses": [*responses], "strategy": strategy, "principles": principles,
        "kind": kind, "proxy": proxy, "proxies": proxies, "seed": seed, "rotations": rotations,
    }  # fmt: skip
    return Call("POST", "/judge/rank", read_ranking, _without_none(body))


def feedback(
    request_id: str | None = None,
    choice: int | None = None,
    *,
    prompt: Prompt | None = None,
    response_a: str | None = None,
    response_b: str | None = None,
    better: Literal["a", "b"] | None = None,
) -> Call[None]:
    """Tell the server which response was better; it needs `--feedback`.

    Either an earlier answer's `id` with the index of its better choice, or a prompt with two responses.

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    conversation = {} if prompt is None else _conversation(prompt)
    body = {
        **conversation, "request_id": request_id, "choice": choice, "response_a": response_a,
        "response_b": response_b, "better": better,
    }  # fmt: skip
    return Call("POST", "/feedback", lambda raw: None, _without_none(body))


def models() -> Call[list[str]]:
    """Names that a request's `model` may have: the LLM, and the LLM with each proxy."""
    return Call("GET", "/v1/models", lambda raw: [entry["id"] for entry in raw["data"]])


def proxies() -> Call[list[ProxyInfo]]:
    """All loaded versions, shadows and those that are being replaced included."""
    return Call("GET", "/proxies", lambda raw: [read_proxy(entry) for entry in raw["data"]])


def load_proxy(name: str, path: str, *, shadow: bool = False) -> Call[ProxyInfo]:
    """Load a checkpoint under a name, or replace what the name stands for; for administrators.

    Args:
        name: what requests will use
        path: the checkpoint's directory, relative to the server's `--proxy-root`
        shadow: let it score without acting

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    return Call("POST", "/proxies", read_proxy, {"name": name, "path": path, "shadow": shadow})


def unload_proxy(name: str, version: str | None = None) -> Call[ProxyInfo]:
    """Unload a name's current version, or another one; for administrators. Requests under way keep theirs.

    Raises:
        AssentError: the server refused it or cannot be reached.
    """
    return Call(
        "DELETE", f"/proxies/{name}", read_proxy, params=_without_none({"version": version})
    )


def _conversation(prompt: Prompt) -> Json:
    return {"prompt": prompt} if isinstance(prompt, str) else {"messages": [*prompt]}


def _given(alignment: Alignment) -> Json:
    fields = asdict(alignment)
    if fields["judge"] is not None:
        fields["judge"] = _without_none(fields["judge"])
    return _without_none(fields)


def _without_none(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
