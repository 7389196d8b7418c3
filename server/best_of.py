"""Best of N: the judge's knock-out tournament over N sampled answers, and its winner."""

import random
from collections.abc import AsyncGenerator
from typing import Any

from judge.tournament import Pair, knock_out
from judge.verdict import Verdict
from server import metrics
from server.admission import Plan
from server.engine import ChatCompletionResponse, UsageInfo, VLLMValidationError
from server.judging import check_fits, compare, conversation, engine_judge
from server.schemas import ChatRequest
from server.state import Served
from server.streams import as_event


def check_best_of(request: ChatRequest, plan: Plan, state: Served) -> None:
    """Raises VLLMValidationError (400) before anything is sampled that could not be judged."""

    def refuse(parameter: str, reason: str) -> None:
        raise VLLMValidationError(f"{parameter} {reason}", parameter=parameter)

    if request.n not in (None, 1):
        refuse("n", "must be 1 with alignment.best_of above 1: one winner is returned")
    if request.temperature == 0:
        refuse("temperature", "must be above 0 with alignment.best_of: samples must differ")
    if request.tools:
        refuse("tools", "do not go with alignment.best_of above 1: only text can be judged")
    prompt = conversation(request.messages)
    for principle in plan.judge.principles:  # even two empty answers may be too long
        check_fits(state, prompt, ("", ""), principle)


async def best_of(
    sampled: ChatCompletionResponse, request: ChatRequest, plan: Plan, state: Served
) -> ChatCompletionResponse:
    """Judge the N choices of `sampled`; keep the winner, the receipt and the bill.

    The judge reads the frozen LLM: its requests carry no proxy.
    """
    choices = sorted(sampled.choices, key=lambda choice: choice.index)
    texts = [choice.message.content or "" for choice in choices]
    prompt = conversation(request.messages)
    judge = engine_judge(state)

    async def compare_round(pairs: list[Pair]) -> list[Verdict]:
        shown = [(texts[first], texts[second]) for first, second in pairs]
        by_principle = await compare(judge, prompt, shown, plan.judge.principles)
        return [combined for combined, _ in by_principle]

    result = await knock_out(len(texts), compare_round, _seed(request, plan))
    metrics.BEST_OF_SAMPLES.inc(len(texts))
    metrics.count_usage(judge.usage)

    winner = choices[result.winner]
    winner.index = 0
    sampled.choices = [winner]
    add_usage(sampled.usage, judge.usage.prompt_tokens, judge.usage.completion_tokens)
    sampled.alignment = {
        "best_of": len(texts),
        "judge": {
            "principles": plan.judge.principles,
            **result.as_json(),
            "usage": judge.usage.as_json(),
        },
    }
    return sampled


def _seed(request: ChatRequest, plan: Plan) -> int:
    if plan.judge.seed is not None:
        return plan.judge.seed
    return request.seed if request.seed is not None else random.randrange(2**32)


def add_usage(usage: UsageInfo, prompt_tokens: int, completion_tokens: int) -> None:
    usage.prompt_tokens += prompt_tokens
    usage.completion_tokens = (usage.completion_tokens or 0) + completion_tokens
    usage.total_tokens += prompt_tokens + completion_tokens


async def stream_winner(
    answer: ChatCompletionResponse, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The finished answer as server-sent events: role, text, then usage where it was asked for."""
    data = answer.model_dump(exclude_none=True)
    choice = data["choices"][0]
    message = choice.pop("message")
    head = {key: data[key] for key in ("id", "created", "model")}
    head["object"] = "chat.completion.chunk"

    def chunk(choices: list[dict[str, Any]]) -> dict[str, Any]:
        return head | {"choices": choices}

    role = {"role": message.pop("role"), "content": ""}
    last = chunk([choice | {"delta": message}])
    yield as_event(chunk([{"index": 0, "delta": role, "finish_reason": None}]))
    if include_usage:
        yield as_event(last)
        last = chunk([]) | {"usage": data["usage"]}
    yield as_event(last | {"alignment": data["alignment"]})
    yield "data: [DONE]\n\n"
