"""Best of N: N sampled answers, the judge's ranking of them, and the best of these.

Samples and judgments are requests to one engine and share its prefix cache. A sample that fails or
takes too long drops out; whoever gives up on the request gives up on all of them.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from fastapi import Request

from judge.messages import text_of
from judge.prompts import Question
from judge.tournament import Pair, play
from judge.verdict import Ruling
from server import metrics
from server.access import CALLER, Caller
from server.admission import Plan, find, judging_proxy
from server.answers import Answer, add_receipt
from server.engine import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    VLLMValidationError,
    create_error_response,
)
from server.judges import conversation
from server.keeper import response_of
from server.schemas import ChatRequest
from server.state import Served
from server.streams import as_event

FAILED = ("abort", "error")
"""Finish reasons of a sample that nobody should be shown."""

Report = Callable[[ChatCompletionResponse, dict[str, Any]], None]
"""Told of progress: any finished sample, and how far it is."""


def check_best_of(request: ChatRequest, plan: Plan, state: Served, caller: Caller) -> None:
    """Raises VLLMValidationError (400) before anything is sampled that could not be judged.

    VLLMNotFoundError (404) where the proxy that is to judge is not loaded.
    """

    def refuse(parameter: str, reason: str) -> None:
        raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)

    if (request.n or 1) > plan.best_of:
        refuse("n", f"must be {plan.best_of} at most: alignment.best_of has no more samples")
    if request.temperature == 0:
        refuse("temperature", "must be above 0 with alignment.best_of: samples must differ")
    state.judges.select(plan.judge)
    if plan.judge.proxy is not None:
        find(plan.judge.proxy, state, caller)
    conversation(request.messages)


async def best_of(
    request: ChatRequest,
    plan: Plan,
    state: Served,
    raw_request: Request,
    report: Report = lambda sample, progress: None,
) -> ChatCompletionResponse | ErrorResponse:
    """Draw, judge, and keep the best, with the receipt and the bill.

    The judge reads the frozen LLM: its requests carry no proxy.
    """
    start = monotonic()
    drawn = await _draw(request, plan, state, raw_request, report)
    samples = {i: each for i, each in enumerate(drawn) if not isinstance(each, str | ErrorResponse)}
    failed = {i: each for i, each in enumerate(drawn) if isinstance(each, str | ErrorResponse)}
    if not samples:
        return _failure(list(failed.values()))
    finished = list(samples.values())
    texts = [_text(sample) for sample in finished]
    turns = conversation(request.messages)
    principles, caller = state.judges.select(plan.judge), raw_request.scope[CALLER]
    compared = 0

    async def compare_round(pairs: list[Pair]) -> list[Ruling]:
        nonlocal compared
        questions = [Question(turns, texts[first], texts[second]) for first, second in pairs]
        rulings = await state.judges.compare(judge, questions, principles, caller)
        compared += len(pairs)
        report(finished[0], {"stage": "judging", "done": compared})
        return rulings

    metrics.BEST_OF_SAMPLES.inc(len(texts))
    async with judging_proxy(plan.judge, state, caller) as proxy:
        judge = state.judges.make(plan.judge.kind, proxy)
        try:
            receipt = await play(
                plan.judge.strategy, len(texts), compare_round, _seed(request, plan)
            )
        finally:
            metrics.count_usage(judge.usage)
    metrics.COMPARISONS.labels(plan.judge.strategy).observe(compared)
    metrics.BEST_OF_SECONDS.observe(monotonic() - start)
    answer = _choose(finished, receipt.ranking[: request.n or 1])
    answer.usage.prompt_tokens += judge.usage.prompt_tokens
    answer.usage.completion_tokens = (
        answer.usage.completion_tokens or 0
    ) + judge.usage.completion_tokens
    answer.usage.total_tokens = answer.usage.prompt_tokens + answer.usage.completion_tokens
    answer.alignment = {
        "best_of": plan.best_of,
        "dropped": [{"index": i, "reason": _reason(each)} for i, each in failed.items()],
        "judge": {
            "kind": plan.judge.kind,
            "principles": list(principles),
            **receipt.as_json(),
            "usage": judge.usage.as_json(),
        },
    }
    return answer


async def _draw(
    request: ChatRequest, plan: Plan, state: Served, raw_request: Request, report: Report
) -> list[ChatCompletionResponse | ErrorResponse | str]:
    """Each of N samples, or why there is none. Sample i has the request's seed + i, as with n."""
    handler = state.chat
    if handler is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    tasks = [
        asyncio.create_task(_sample(handler, request, i, raw_request)) for i in range(plan.best_of)
    ]
    done = 0

    def count(task: asyncio.Task[Any]) -> None:
        nonlocal done
        done += 1
        if not task.cancelled() and task.exception() is None:
            found = task.result()
            if isinstance(found, ChatCompletionResponse):
                report(found, {"stage": "sampling", "done": done, "of": len(tasks)})

    for task in tasks:
        task.add_done_callback(count)
    try:
        await asyncio.wait(tasks, timeout=plan.sample_timeout)
        late = [task for task in tasks if not task.done()]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)  # they leave the engine
        return [
            f"not finished after {plan.sample_timeout:g} seconds" if task in late else task.result()
            for task in tasks
        ]
    finally:
        for task in tasks:
            task.cancel()


async def _sample(
    handler: OpenAIServingChat, request: ChatRequest, index: int, raw_request: Request
) -> ChatCompletionResponse | ErrorResponse | str:
    one: dict[str, Any] = {"n": 1, "stream": False, "stream_options": None}
    if request.seed is not None:
        one["seed"] = request.seed + index
    vllms: ChatCompletionRequest = request.model_copy(update=one)
    try:
        answer = await handler.create_chat_completion(vllms, raw_request)
    except EngineDeadError:
        raise
    except Exception as error:  # whatever it is, the others may do without this one
        return create_error_response(error)
    if isinstance(answer, ErrorResponse):
        return answer
    assert isinstance(answer, ChatCompletionResponse), "it was not to be streamed"
    reason = answer.choices[0].finish_reason
    return f"ended with {reason!r}" if reason in FAILED else answer


def _failure(reasons: list[ErrorResponse | str]) -> ErrorResponse:
    """What to answer when no sample is left."""
    for reason in reasons:
        if isinstance(reason, ErrorResponse):
            return reason
    return create_error_response(TimeoutError(f"no sample is left to judge: {reasons[0]}"))


def _reason(failed: ErrorResponse | str) -> str:
    return failed.error.message if isinstance(failed, ErrorResponse) else failed


def _text(sample: ChatCompletionResponse) -> str:
    """What the judge reads: the content, and the calls of tools as it knows them."""
    return text_of(response_of(sample.choices[0].message.model_dump()))


def _seed(request: ChatRequest, plan: Plan) -> int:
    if plan.judge.seed is not None:
        return plan.judge.seed
    return request.seed if request.seed is not None else random.randrange(2**32)


def _choose(samples: list[ChatCompletionResponse], best: list[int]) -> ChatCompletionResponse:
    """One answer with the best samples as its choices; the prompt is billed once, all completions are."""
    answer = samples[best[0]]
    answer.choices = [samples[i].choices[0] for i in best]
    for index, choice in enumerate(answer.choices):
        choice.index = index
    answer.usage.completion_tokens = sum(s.usage.completion_tokens or 0 for s in samples)
    return answer


async def stream_best_of(
    request: ChatRequest,
    plan: Plan,
    state: Served,
    raw_request: Request,
    *,
    include_usage: bool,
) -> Answer:
    """Server-sent events: progress as soon as a sample is finished, then the winner.

    Whatever fails before that is an answer, or an exception, as without streaming.
    """
    queue: asyncio.Queue[tuple[ChatCompletionResponse, dict[str, Any]] | None] = asyncio.Queue()

    async def work() -> Answer:
        answer = await best_of(
            request, plan, state, raw_request, lambda *each: queue.put_nowait(each)
        )
        return await add_receipt(answer, plan, state)

    task = asyncio.create_task(work())
    task.add_done_callback(lambda _: queue.put_nowait(None))
    try:
        first = await queue.get()
    except asyncio.CancelledError:
        task.cancel()
        raise
    if first is None:
        return await task

    async def events() -> AsyncGenerator[str, None]:
        head = {"id": first[0].id, "created": first[0].created, "model": first[0].model}
        head["object"] = "chat.completion.chunk"
        delta: dict[str, Any] = {"role": "assistant", "content": ""}
        progress: tuple[ChatCompletionResponse, dict[str, Any]] | None = first
        try:
            while progress is not None:
                # A choice in each, if an empty one: many clients look at the first without asking.
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                yield as_event(head | {"choices": [choice], "alignment": {"progress": progress[1]}})
                delta, progress = {}, await queue.get()
            answer = await task
            if isinstance(answer, ErrorResponse):
                yield as_event(answer.model_dump())
            else:
                assert isinstance(answer, ChatCompletionResponse)
                for event in winners(answer, head, include_usage):
                    yield event
        except Exception as error:  # as vLLM's streams do: the head has gone out
            yield as_event(create_error_response(error).model_dump())
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        yield "data: [DONE]\n\n"

    return events()


def winners(answer: ChatCompletionResponse, head: dict[str, Any], include_usage: bool) -> list[str]:
    """The finished answer as events: each choice in one piece, then usage where it was asked for."""
    data = answer.model_dump(exclude_none=True)
    chunks: list[dict[str, Any]] = []
    for choice in data["choices"]:
        message = choice.pop("message")
        for index, call in enumerate(message.get("tool_calls", ())):
            call["index"] = index
        chunks.append(head | {"choices": [choice | {"delta": message}]})
    if include_usage:
        chunks.append(head | {"choices": [], "usage": data["usage"]})
    chunks[-1]["alignment"] = data["alignment"]
    return [as_event(chunk) for chunk in chunks]
