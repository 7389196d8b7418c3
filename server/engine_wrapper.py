"""The engine as vLLM's handlers see it: every request that they draw carries the proxy that was admitted for it.

vLLM 0.32 has eight routes that generate text, each with a handler of its own. Instead of a copy of each, two methods
that all of them call are replaced (`vllm_patches`): the engine's `generate`, which adds the alignment to the sampling
parameters and counts tokens, and `model_name`, which gives back the name that the client used.

The handlers do not know about alignment. They run in the context of the HTTP request, where `current_request` finds
what `middleware.alignment` admitted.
"""

import copy
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

from judge.protocol import Usage
from proxy.request import EXTRA_ARGS_KEY, WorkerAlignment
from server import vllm_patches
from server.access import Limits
from server.admission import AdmittedRequest
from server.engine import (
    EngineClient,
    OpenAIServingModels,
    OwnExtraArgs,
    RequestOutputKind,
    VLLMValidationError,
    prompt_length,
)
from server.growth import GROWTH
from server.tracing import TRACE_HEADERS

CURRENT_REQUEST: ContextVar[AdmittedRequest | None] = ContextVar("current_request", default=None)


def current_request() -> AdmittedRequest | None:
    """The HTTP request that is being answered; None if its body is no JSON object."""
    return CURRENT_REQUEST.get()


def wrap_engine(
    engine: EngineClient, models: OpenAIServingModels, *, prompt_logprobs_refused: str | None
) -> None:
    """Have vLLM's handlers draw with the admitted proxy and answer with the client's model name.

    Args:
        engine, models: the objects that vLLM's handlers hold.
        prompt_logprobs_refused: why this server cannot give logprobs of prompts; None = it can.
    """
    model_name, numbers = models.model_name, itertools.count()

    def generate(
        prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        params, request = sampling_params, current_request()
        is_own = isinstance(params.extra_args, OwnExtraArgs)
        if not is_own:
            _check_arguments(params, prompt_logprobs_refused)
        if request is None:
            return original(prompt, params, request_id, **options)
        admission, counts = request
        limits = admission.caller.limits
        if not (is_own and admission.best_of > 1):
            check_prompt(limits, prompt)
        if is_own:
            options["trace_headers"] = TRACE_HEADERS.get()
            _count_judgments(request, 1)
            outputs = original(prompt, params, request_id, **options)
            return _count_judgment(outputs, request)
        if admission.alignment is not None:
            _check_logprobs(params, admission.alignment)
            params = copy.copy(params)  # the handler may use its own again
            params.extra_args = {**(params.extra_args or {}), **admission.alignment.to_extra_args()}
            # Clients choose request ids, and may choose the same one: no client must get another's trace or counts.
            request_id = f"{request_id}-p{next(numbers)}"
        if GROWTH.get() is not None:
            params = copy.copy(params)
            params.output_kind = RequestOutputKind.CUMULATIVE
        counts.engine_ids.append(request_id)
        counts.num_samples = params.n
        # Counted here, because every route comes here, whatever its body calls the number of samples.
        _check_limit("max_samples", len(counts.engine_ids) * params.n, limits.max_samples)
        outputs = original(prompt, params, request_id, **options)
        return _count(outputs, request, request_id)

    def name_in_response(lora_request: Any = None) -> str:
        request = current_request()
        requested = request.admission.requested_model if request is not None else None
        return requested or model_name(lora_request)

    original = vllm_patches.replace_generate(engine, generate)
    vllm_patches.replace_model_name(models, name_in_response)


def begin_judgments(prompt_lengths: Sequence[int]) -> None:
    """Count judgments that another server is about to make for the current request, against its caller's limits.

    Raises VLLMValidationError (400) beyond them.
    """
    request = current_request()
    if request is None:
        return
    if request.admission.best_of == 1:
        for length in prompt_lengths:
            _check_prompt_length(request.admission.caller.limits, length)
    _count_judgments(request, len(prompt_lengths))


def count_judge_tokens(usage: Usage) -> None:
    """Count what another server has read and written to judge for the current request."""
    if (request := current_request()) is not None:
        _count_judge_tokens(request, usage.prompt_tokens, usage.completion_tokens)


def check_prompt(limits: Limits, prompt: Any) -> None:
    """Raises VLLMValidationError where the prompt is longer than the caller's limit."""
    _check_prompt_length(limits, prompt_length(prompt))


def _check_prompt_length(limits: Limits, tokens: int) -> None:
    limit = limits.max_prompt_tokens
    if limit is not None and tokens > limit:
        raise VLLMValidationError(
            f"max_prompt_tokens: a prompt has {tokens} tokens, and this key may send {limit}",
            parameter="max_prompt_tokens",
        )


def _count_judgments(request: AdmittedRequest, number: int) -> None:
    request.counts.num_judgments += number
    limit = request.admission.caller.limits.max_judgments
    _check_limit("max_judgments", request.counts.num_judgments, limit)


def _count_judge_tokens(request: AdmittedRequest, prompt: int, completion: int) -> None:
    request.counts.tokens["judge_prompt"] += prompt
    request.counts.tokens["judge_completion"] += completion
    request.admission.caller.tokens.take(prompt + completion)


def _check_limit(name: str, count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        kind = name.removeprefix("max_")
        message = (
            f"{name}: the request asks for {count} {kind} or more, and this key may have {limit}"
        )
        raise VLLMValidationError(message, parameter=name)


def _check_arguments(params: Any, prompt_logprobs_refused: str | None) -> None:
    if EXTRA_ARGS_KEY in (params.extra_args or {}):  # by a route that `admission` does not check
        raise VLLMValidationError(f"the extra argument {EXTRA_ARGS_KEY!r} is reserved")
    if params.prompt_logprobs is not None and prompt_logprobs_refused is not None:
        raise VLLMValidationError(prompt_logprobs_refused, parameter="prompt_logprobs")


def _check_logprobs(params: Any, alignment: WorkerAlignment) -> None:
    """Refuse the log-likelihood of given text under a proxy, which would be the frozen LLM's."""
    if params.prompt_logprobs is not None and alignment.acts:
        raise VLLMValidationError(
            "prompt_logprobs, or echo with logprobs: log-likelihoods of a prompt are the frozen LLM's, not those under "
            f"the proxy {'+'.join(alignment.strengths)!r}: ask for them without it",
            parameter="prompt_logprobs",
        )


async def _count(
    outputs: AsyncGenerator[Any, None], request: AdmittedRequest, request_id: str
) -> AsyncGenerator[Any, None]:
    """The engine's outputs, with their tokens counted; at the end, the proxy's counts are read."""
    admission, counts = request
    growth, prompt_tokens = GROWTH.get(), 0
    async with aclosing(outputs):  # a handler that stops reading aborts the engine's request
        async for output in outputs:
            if not prompt_tokens:
                prompt_tokens = len(output.prompt_token_ids or ())
                counts.tokens["prompt"] += prompt_tokens
                admission.caller.tokens.take(prompt_tokens)
            for sample in output.outputs:
                key, tokens, text = (request_id, sample.index), len(sample.token_ids), sample.text
                if growth is not None:  # the output has all tokens so far, not the new ones
                    growth.update(sample.token_ids)
                    tokens -= counts.delivered[key]
                    if counts.texts is not None:
                        text = text[len(counts.texts[key]) :]
                counts.tokens["completion"] += tokens
                admission.caller.tokens.take(tokens)
                counts.delivered[key] += tokens
                if counts.texts is not None:
                    counts.texts[key] += text
            alignment = admission.alignment
            if output.finished and alignment is not None and not alignment.trace:
                counts.finish(request_id)
            yield output


async def _count_judgment(
    outputs: AsyncGenerator[Any, None], request: AdmittedRequest
) -> AsyncGenerator[Any, None]:
    """The outputs of a judge's request, with their tokens counted."""
    async with aclosing(outputs):
        async for output in outputs:
            prompt = len(output.prompt_token_ids or ()) if output.finished else 0
            _count_judge_tokens(request, prompt, len(output.outputs[0].token_ids))
            yield output
