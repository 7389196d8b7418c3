"""Every name of vLLM's that the routes use, and the requests to its engine that are our own.

The start uses vLLM in `arguments`, `cli`, `doctor`, `kv_cache`, `plugin` and `tool_calls`; `vllm_patches` replaces
methods. No other file of the server imports vLLM.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from itertools import chain
from typing import Any

from vllm.engine.protocol import EngineClient
from vllm.entrypoints.anthropic.api_router import create_messages
from vllm.entrypoints.anthropic.protocol import (
    AnthropicErrorResponse,
    AnthropicMessagesRequest,
    AnthropicMessagesResponse,
)
from vllm.entrypoints.generate.base.serving import decode_token_ids
from vllm.entrypoints.generate.label_reads import next_token_label_reads
from vllm.entrypoints.openai.chat_completion.api_router import (
    ENDPOINT_LOAD_METRICS_FORMAT_HEADER_LABEL as LOAD_FORMAT_HEADER,
)
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
)
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest, CompletionResponse
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.openai.responses.api_router import create_responses
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest, ResponsesResponse
from vllm.entrypoints.serve.engine.protocol import (
    ErrorResponse,
    ModelCard,
    ModelList,
    UsageInfo,
)
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.exception_handling.handlers.validation import clean_loc_for_param
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    should_include_usage,
    validate_json_request,
    with_cancellation,
)
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import GracefulHTTPError, VLLMNotFoundError, VLLMValidationError
from vllm.inputs import tokens_input
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds, random_uuid
from vllm.v1.engine.exceptions import EngineDeadError

from proxy.request import (
    EXTRA_ARGS_KEY,
    READ_SAMPLING_PARAMS,
    ReadRequest,
    ScoreRequest,
    WorkerAlignment,
)

__all__ = [
    "LOAD_FORMAT_HEADER",
    "UNPROXIED_EXTRA_ARGS",
    "AnthropicErrorResponse",
    "AnthropicMessagesRequest",
    "AnthropicMessagesResponse",
    "ChatCompletionRequest",
    "ChatCompletionResponse",
    "CompletionRequest",
    "CompletionResponse",
    "EngineClient",
    "EngineDeadError",
    "ErrorResponse",
    "GracefulHTTPError",  # of any status
    "LoRARequest",
    "ModelCard",
    "ModelList",
    "OpenAIServingChat",
    "OpenAIServingCompletion",
    "OpenAIServingModels",
    "OwnExtraArgs",
    "RequestOutputKind",
    "ResponsesRequest",
    "ResponsesResponse",
    "UsageInfo",
    "VLLMNotFoundError",  # a 404
    "VLLMValidationError",  # a 400
    "Workers",
    "clean_loc_for_param",
    "create_error_response",
    "create_messages",
    "create_responses",
    "decode_token_ids",
    "load_aware_call",
    "metrics_header",
    "prompt_length",
    "random_uuid",
    "read_labels",
    "read_logprob",
    "read_probe_scores",
    "read_responses",
    "read_text",
    "should_include_usage",
    "tokenizer_of",
    "validate_json_request",
    "with_cancellation",
    "with_sse_keep_alive",
]


_PROMPTS_AT_ONCE = 128  # of a judge


class OwnExtraArgs(dict[str, Any]):
    """Marks the extra arguments of a request to the engine that is our own, not a client's."""


UNPROXIED_EXTRA_ARGS = OwnExtraArgs({EXTRA_ARGS_KEY: {"shadow": False}})
"""For a request that no proxy may act on or score, whatever its HTTP request says."""


class Workers:
    """The workers of all data-parallel engines. vLLM's own call returns the first engine's results only."""

    def __init__(self, engine: EngineClient) -> None:
        self._engine: Any = engine

    async def collective_rpc(self, method: str, *, args: tuple[Any, ...] = ()) -> list[Any]:
        """Call a method of every worker between two steps; returns one result a rank.

        An engine's error is raised at once, while the others still work on the call. Their next call
        runs after it.
        """
        core = self._engine.engine_core
        results = await core.call_utility_all_async("collective_rpc", method, None, args, None)
        return list(chain.from_iterable(results))


def tokenizer_of(engine: EngineClient) -> Any:
    """The LLM's tokenizer."""
    return engine.renderer.get_tokenizer()


def prompt_length(prompt: Any) -> int:
    """Number of tokens of a prompt, in any form that handlers pass to the engine."""
    return length_from_prompt_token_ids_or_embeds(
        prompt.get("prompt_token_ids"), prompt.get("prompt_embeds")
    )


async def read_labels(
    engine: EngineClient,
    prompts: Sequence[list[int]],
    labels: Sequence[tuple[int, ...]],
    lora: LoRARequest | None = None,
) -> list[tuple[float, ...]]:
    """The labels' next-token log-probabilities after each prompt.

    A part of them is read at once, because handing a prompt to the engine takes a millisecond of the event loop. They
    are those of the frozen LLM, or of a judge's adapter on it. No proxy takes part.
    """
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            logprob_token_ids=list(tokens),
            extra_args=UNPROXIED_EXTRA_ARGS,
        )
        for tokens in labels
    ]
    inputs = [tokens_input(prompt) for prompt in prompts]
    logprobs: list[tuple[float, ...]] = []
    for start in range(0, len(inputs), _PROMPTS_AT_ONCE):
        part = slice(start, start + _PROMPTS_AT_ONCE)
        request_id = f"judge-{random_uuid()}"
        reads = await next_token_label_reads(
            engine, inputs[part], params[part], request_id, lora_request=lora
        )
        logprobs += [tuple(read.logprobs) for read in reads]
    return logprobs


async def read_text(
    engine: EngineClient, prompt: list[int], max_tokens: int, lora: LoRARequest | None = None
) -> AsyncGenerator[tuple[str, int], None]:
    """Greedy continuation of the prompt: each piece's text and its number of tokens."""
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0,
        output_kind=RequestOutputKind.DELTA,
        extra_args=UNPROXIED_EXTRA_ARGS,
    )
    request_id = f"judge-{random_uuid()}"
    outputs = engine.generate(tokens_input(prompt), params, request_id, lora_request=lora)
    async with aclosing(outputs):  # a caller that stops reading aborts the request
        async for output in outputs:
            yield output.outputs[0].text, len(output.outputs[0].token_ids)


async def read_responses(
    engine: EngineClient,
    workers: Workers,
    responses: Sequence[tuple[list[int], list[int]]],
    decoding: Mapping[str, Any],
    take: str = "take_positions",
    *arguments: Any,
    at_once: int = 16,
) -> list[Any]:
    """Reads given responses: the positions where a proxy has a choice, or another of the workers' results on them.

    Args:
        engine, workers: of one server.
        responses: token ids of each prompt, and of the response to it.
        decoding: the settings of the nucleus, as in `ReadRequest`.
        take: the workers' method that returns the result, called with the requests' ids and `arguments`.
        at_once: number of responses in the engine; the workers hold what was read of them in bounded room.

    Returns:
        One result a response, by default `proxy.positions.Positions` as safetensors; None = the workers had no room
        for it.
    """

    def alignment(start: int) -> WorkerAlignment:
        return WorkerAlignment(read=ReadRequest(start=start, **decoding), shadow=False)

    return await _read_in_workers(engine, workers, responses, alignment, take, arguments, at_once)


async def read_probe_scores(
    engine: EngineClient, workers: Workers, responses: Sequence[tuple[list[int], list[int]]]
) -> list[float]:
    """The probe's score of each response; arguments as of `read_responses`."""

    def alignment(start: int) -> WorkerAlignment:
        return WorkerAlignment(read=ScoreRequest(start=start), shadow=False)

    return await _read_in_workers(
        engine, workers, responses, alignment, "take_probe_scores", (), _PROMPTS_AT_ONCE
    )


async def _read_in_workers(
    engine: EngineClient,
    workers: Workers,
    responses: Sequence[tuple[list[int], list[int]]],
    alignment: Callable[[int], WorkerAlignment],
    take: str,
    arguments: Sequence[Any],
    at_once: int,
) -> list[Any]:
    """As `read_responses`; `alignment` says what to read of a response, from where it begins."""

    async def read(prompt: list[int], response: list[int]) -> str:
        extra_args = OwnExtraArgs(alignment(len(prompt)).to_extra_args())
        params = SamplingParams(**READ_SAMPLING_PARAMS, extra_args=extra_args)
        inputs, request_id = tokens_input([*prompt, *response]), f"positions-{random_uuid()}"
        async with aclosing(engine.generate(inputs, params, request_id)) as outputs:
            async for _ in outputs:
                pass
        return request_id

    results: list[Any] = []
    for start in range(0, len(responses), at_once):
        batch = responses[start : start + at_once]
        request_ids = await asyncio.gather(*(read(*pair) for pair in batch))
        by_id: dict[str, Any] = {}
        for rank in await workers.collective_rpc(take, args=(request_ids, *arguments)):
            by_id |= rank
        results += [by_id.get(request_id) for request_id in request_ids]
    return results


async def read_logprob(
    engine: EngineClient, prompt: list[int], response: list[int], lora: LoRARequest | None = None
) -> float:
    """log π(response | prompt) in nats, summed over the response's tokens."""
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, extra_args=UNPROXIED_EXTRA_ARGS
    )
    ids = [*prompt, *response]
    request_id = f"judge-{random_uuid()}"
    outputs = engine.generate(tokens_input(ids), params, request_id, lora_request=lora)
    async with aclosing(outputs):
        async for output in outputs:
            last = output
    logprobs = last.prompt_logprobs or []
    positions = range(len(prompt), len(ids))
    return sum(row[ids[i]].logprob for i in positions if (row := logprobs[i]) is not None)
