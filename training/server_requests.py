"""Single requests of a training to one server: a traced response, a plain response, the positions of given ones."""

from typing import Any, NamedTuple

import httpx
import safetensors.torch

from proxy.positions import Positions
from training.console import TrainingError
from training.servers import Failure, content, send
from training.traces import Entry


class TracedResponse(NamedTuple):
    response: list[int]
    trace: list[Entry]
    counts: dict[str, int]


async def ask_positions(http: httpx.AsyncClient, url: str, body: Any) -> Positions | Failure:
    """The positions of given responses.

    Raises:
        TrainingError: the server refuses the request.
    """
    answer = await send(http, "POST", f"{url}/positions", body)
    if isinstance(answer, Failure):
        return answer
    if not answer.is_success:
        content(answer, url)  # raises with the server's message
    return Positions(**safetensors.torch.load(answer.content))


async def ask_response(
    version: str | None, http: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> list[int] | Failure:
    """The token ids of a response of this version of the proxy; None = of the frozen LLM.

    Raises:
        TrainingError: the server refuses the request, or ended the response too early.
    """
    completion = await _completed(version, http, url, body)
    if isinstance(completion, Failure):
        return completion
    response = completion["choices"][0]["token_ids"]
    _refuse_cut(url, body, response)
    return response


async def _completed(
    version: str | None, http: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> Any | Failure:
    """The completion by this version of the proxy; None = by the frozen LLM.

    Raises:
        TrainingError: the server refuses the request.
    """
    answer = await send(http, "POST", f"{url}/v1/completions", body)
    if isinstance(answer, Failure):
        return answer
    completion = content(answer, url)
    if version is not None and completion["alignment"]["version"] != version:
        # A retry may help: servers with the same root synchronise.
        return Failure(
            f"it answers with version {completion['alignment']['version']}, and not {version}"
        )
    return completion


def _refuse_cut(url: str, body: dict[str, Any], response: list[int]) -> None:
    """
    Raises:
        TrainingError: the server ended the response too early.
    """
    if len(response) < body["max_tokens"] and response[-1] not in body["stop_token_ids"]:
        raise TrainingError(
            f"{url} has ended a response after {len(response)} tokens: raise its --max-model-len, or the "
            f"max_new_tokens of its generation config, to allow {body['max_tokens']} tokens"
        )


async def ask_traced(
    version: str, http: httpx.AsyncClient, url: str, body: dict[str, Any]
) -> TracedResponse | Failure:
    """A response of this version of the proxy, with its trace.

    Raises:
        TrainingError: the server refuses the request, or the trace is incomplete.
    """
    completion = await _completed(version, http, url, body)
    if isinstance(completion, Failure):
        return completion
    stats, response = completion["alignment"], completion["choices"][0]["token_ids"]
    (trace,) = stats["trace"]
    if stats["trace_truncated"] or [entry["token_id"] for entry in trace] != response:
        raise TrainingError(
            f"{url} has dropped part of a trace, as happens with too many traced requests at once: "
            "lower --server-requests, or stop its other clients"
        )
    _refuse_cut(url, body, response)
    return TracedResponse(response, trace, stats)
