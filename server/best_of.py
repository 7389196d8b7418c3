"""Best of N: N samples, the judge's ranking of them, and the best as the answer.

Samples and judgments are requests to one engine and share its prefix cache. A sample that fails or
takes too long drops out. When the client disconnects, all samples and judgments are aborted.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from http import HTTPStatus
from time import monotonic
from typing import Any

from fastapi import Request

from judge.messages import text_of
from judge.prompts import Question
from judge.protocol import Usage
from judge.tournament import Pair, TournamentRecord, comparison_of, play
from judge.verdict import PairResult
from server import metrics
from server.access import CALLER, Caller
from server.admission import Admission
from server.app_state import AppState
from server.engine import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    VLLMValidationError,
    create_error_response,
)
from server.feedback_writer import response_of
from server.judges import conversation
from server.proxy_choice import find_proxy, judging_proxies
from server.schemas.generation import ChatRequest

FAILED = ("abort", "error")
"""Finish reasons of a sample that must not be shown."""

Report = Callable[[ChatCompletionResponse, dict[str, Any]], None]
"""Called with progress: any finished sample, and the progress so far."""


@dataclass(frozen=True)
class DroppedSample:
    """A sample that takes no part in the tournament."""

    reason: str
    error: ErrorResponse | None = None
    """vLLM's error, where there is one."""


def check_best_of(
    request: ChatRequest, admission: Admission, state: AppState, caller: Caller
) -> None:
    """Raises VLLMValidationError (400) before anything is sampled that could not be judged.

    VLLMNotFoundError (404) where the proxy that is to judge is not loaded.
    """

    def refuse(parameter: str, reason: str) -> None:
        raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)

    if (request.n or 1) > admission.best_of:
        refuse("n", f"must be {admission.best_of} at most: alignment.best_of has no more samples")
    if request.temperature == 0:
        refuse("temperature", "must be above 0 with alignment.best_of: samples must differ")
    state.judges.select(admission.judge)
    for name in admission.judge.strengths:
        find_proxy(name, state, caller)
    conversation(request.messages)


async def best_of(
    request: ChatRequest,
    admission: Admission,
    state: AppState,
    raw_request: Request,
    report: Report = lambda sample, progress: None,
) -> ChatCompletionResponse | ErrorResponse:
    """Sample, judge, and return the best, with the tournament's record and the tokens of all in `usage`.

    The judge reads the frozen LLM: its requests carry no proxy.
    """
    start = monotonic()
    drawn = await _sample_all(request, admission, state, raw_request, report)
    dropped = {i: sample for i, sample in enumerate(drawn) if isinstance(sample, DroppedSample)}
    samples = [sample for sample in drawn if not isinstance(sample, DroppedSample)]
    if not samples:
        return _failure(list(dropped.values()))
    metrics.BEST_OF_SAMPLES.inc(len(samples))
    record, usage, principles = await _rank(
        request, admission, state, raw_request.scope[CALLER], samples, report
    )
    metrics.BEST_OF_SECONDS.observe(monotonic() - start)
    answer = _choose(samples, record.ranking[: request.n or 1])
    _add_usage(answer, usage)
    answer.alignment = {
        "best_of": admission.best_of,
        "dropped": [{"index": i, "reason": sample.reason} for i, sample in dropped.items()],
        "judge": {
            "kind": admission.judge.kind,
            "principles": principles,
            **record.as_json(),
            "usage": usage.as_json(),
        },
    }
    return answer


async def _rank(
    request: ChatRequest,
    admission: Admission,
    state: AppState,
    caller: Caller,
    samples: Sequence[ChatCompletionResponse],
    report: Report,
) -> tuple[TournamentRecord, Usage, list[str]]:
    """The tournament, the tokens that its judge used, and the names of its principles."""
    texts = [_text(sample) for sample in samples]
    turns = conversation(request.messages)
    settings, judges = admission.judge, state.judges
    principles = judges.select(settings)
    compared = 0

    async def compare_round(pairs: list[Pair]) -> list[PairResult]:
        nonlocal compared
        questions = [Question(turns, texts[first], texts[second]) for first, second in pairs]
        results = await judges.compare(judge, questions, principles, caller)
        compared += len(pairs)
        comparisons = [asdict(comparison_of(*game)) for game in zip(pairs, results, strict=True)]
        progress = {"stage": "judging", "done": compared, "comparisons": comparisons}
        report(samples[0], progress)
        return results

    async with judging_proxies(settings, state, caller) as proxies:
        judge = judges.make(settings.kind, principles, proxies)
        try:
            seed = _seed(request, admission)
            record = await play(settings.strategy, len(texts), compare_round, seed)
        finally:
            metrics.count_usage(judge.usage)
    metrics.COMPARISONS.labels(settings.strategy).observe(compared)
    return record, judge.usage, list(principles)


async def _sample_all(
    request: ChatRequest,
    admission: Admission,
    state: AppState,
    raw_request: Request,
    report: Report,
) -> list[ChatCompletionResponse | DroppedSample]:
    """N samples. Sample i has the request's seed + i, as with n."""
    handler, timeout = state.chat, admission.sample_timeout
    if handler is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    tasks = [
        asyncio.create_task(_sample(handler, request, i, raw_request))
        for i in range(admission.best_of)
    ]
    done = 0

    def count(task: asyncio.Task[ChatCompletionResponse | DroppedSample]) -> None:
        nonlocal done
        done += 1
        if not task.cancelled() and task.exception() is None:
            sample = task.result()
            if not isinstance(sample, DroppedSample):
                finished = {"index": tasks.index(task), "text": _text(sample)}
                report(sample, {"stage": "sampling", "done": done, "of": len(tasks)} | finished)

    for task in tasks:
        task.add_done_callback(count)
    try:
        await asyncio.wait(tasks, timeout=timeout)
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)  # the engine aborts their requests
        too_late = DroppedSample(f"was not finished after {timeout or 0:g} seconds")
        return [too_late if task in late else task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()


async def _sample(
    handler: OpenAIServingChat, request: ChatRequest, index: int, raw_request: Request
) -> ChatCompletionResponse | DroppedSample:
    update: dict[str, Any] = {"n": 1, "stream": False, "stream_options": None}
    if request.seed is not None:
        update["seed"] = request.seed + index
    single: ChatCompletionRequest = request.model_copy(update=update)
    try:
        answer = await handler.create_chat_completion(single, raw_request)
    except EngineDeadError:
        raise
    except Exception as error:  # the other samples may succeed
        answer = create_error_response(error)
    if isinstance(answer, ErrorResponse):
        return DroppedSample(f"failed: {answer.error.message}", answer)
    assert isinstance(answer, ChatCompletionResponse), "the request asked for no stream"
    reason = answer.choices[0].finish_reason
    return DroppedSample(f"ended with {reason!r}") if reason in FAILED else answer


def _failure(dropped: list[DroppedSample]) -> ErrorResponse:
    """The error to answer with when no sample is left: the request's fault, or why each one dropped out."""
    for sample in dropped:
        if sample.error is not None and sample.error.error.code < 500:
            return sample.error
    reasons = "; ".join(f"sample {index} {sample.reason}" for index, sample in enumerate(dropped))
    failed = any(sample.error is not None for sample in dropped)
    return create_error_response(
        f"no sample is left to judge: {reasons}",
        err_type="ServiceUnavailableError" if failed else "TimeoutError",
        status_code=HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.GATEWAY_TIMEOUT,
    )


def _text(sample: ChatCompletionResponse) -> str:
    """What the judge reads: the content, and tool calls as text."""
    return text_of(response_of(sample.choices[0].message.model_dump()))


def _seed(request: ChatRequest, admission: Admission) -> int:
    if admission.judge.seed is not None:
        return admission.judge.seed
    return request.seed if request.seed is not None else random.randrange(2**32)


def _choose(samples: list[ChatCompletionResponse], best: list[int]) -> ChatCompletionResponse:
    """One response with the best samples as its choices; `usage` counts the prompt once, and all completions."""
    answer = samples[best[0]]
    answer.choices = [samples[i].choices[0] for i in best]
    for index, choice in enumerate(answer.choices):
        choice.index = index
    answer.usage.completion_tokens = sum(s.usage.completion_tokens or 0 for s in samples)
    return answer


def _add_usage(answer: ChatCompletionResponse, judge: Usage) -> None:
    usage = answer.usage
    usage.prompt_tokens += judge.prompt_tokens
    usage.completion_tokens = (usage.completion_tokens or 0) + judge.completion_tokens
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
