"""POST /judge: which of two responses is better. POST /judge/rank: which of several is best."""

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from judge.judge import Judge
from judge.likelihood import LikelihoodJudge
from judge.principles import Principle
from judge.prompts import Question
from judge.tournament import Pair, play
from judge.verdict import Ruling, Verdict
from server import metrics
from server.access import CALLER, Caller
from server.admission import judging_proxy
from server.engine import (
    ErrorResponse,
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from server.judges import Judges
from server.schemas import JudgeRequest, RankRequest
from server.state import served
from server.streams import as_event

router = APIRouter()

Rationales = dict[str, str]
"""By principle."""


@router.post(
    "/judge",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        500: {"model": ErrorResponse},
    },
)
@with_cancellation
@load_aware_call
async def judge_pairs(request: JudgeRequest, raw_request: Request) -> Response:
    """Which response is better, in both orders, by each principle; why, where it is asked.

    For `pairs` the answer has `verdicts`, one a pair.
    """
    judges = served(raw_request).judges
    principles, questions = judges.select(request), request.questions()
    caller = raw_request.scope[CALLER]
    if request.rationale:
        return await _explain(request, judges, principles, questions, caller)
    async with judging_proxy(request, served(raw_request), caller) as proxy:
        judge = judges.make(request.kind, proxy, tie_band=request.tie_band)
        rulings = await judges.compare(judge, questions, principles, caller)
    return _answer(request, judge, [_as_json(ruling) for ruling in rulings])


async def _explain(
    request: JudgeRequest,
    judges: Judges,
    principles: Mapping[str, Principle],
    questions: list[Question],
    caller: Caller,
) -> Response:
    """The rulings, and why."""
    room = request.max_rationale_tokens
    judge = judges.make_pairwise(tie_band=request.tie_band, room=room)
    rulings = await judges.compare(judge, questions, principles, caller)
    if request.stream:
        events = _stream(judge, questions[0], rulings[0], principles, room)
        return StreamingResponse(events, media_type="text/event-stream")
    rationales = await asyncio.gather(
        *(
            _write_rationales(judge, question, ruling, principles, room)
            for question, ruling in zip(questions, rulings, strict=True)
        )
    )
    verdicts = [_as_json(*each) for each in zip(rulings, rationales, strict=True)]
    return _answer(request, judge, verdicts)


def _answer(
    request: JudgeRequest, judge: Judge | LikelihoodJudge, verdicts: list[dict[str, Any]]
) -> Response:
    metrics.count_usage(judge.usage)
    answer = verdicts[0] if request.pairs is None else {"verdicts": verdicts}
    return JSONResponse(answer | {"usage": judge.usage.as_json()})


@router.post(
    "/judge/rank",
    dependencies=[Depends(validate_json_request)],
    responses={400: {"model": ErrorResponse}, 500: {"model": ErrorResponse}},
)
@with_cancellation
@load_aware_call
async def rank(request: RankRequest, raw_request: Request) -> Response:
    """The responses' ranking, the best first, and all comparisons that led to it.

    `judge.tournament.replay` finds the same ranking from them without a model.
    """
    judges, caller = served(raw_request).judges, raw_request.scope[CALLER]
    principles, turns = judges.select(request), request.turns()

    async def compare_round(pairs: list[Pair]) -> list[Ruling]:
        responses = request.responses
        questions = [Question(turns, responses[a], responses[b]) for a, b in pairs]
        return await judges.compare(judge, questions, principles, caller)

    seed = random.randrange(2**32) if request.seed is None else request.seed
    async with judging_proxy(request, served(raw_request), caller) as proxy:
        judge = judges.make(request.kind, proxy)
        receipt = await play(request.strategy, len(request.responses), compare_round, seed)
    metrics.count_usage(judge.usage)
    metrics.COMPARISONS.labels(request.strategy).observe(sum(map(len, receipt.rounds)))
    return JSONResponse(receipt.as_json() | {"usage": judge.usage.as_json()})


async def _write_rationales(
    judge: Judge,
    question: Question,
    ruling: Ruling,
    principles: Mapping[str, Principle],
    max_tokens: int,
) -> Rationales:
    async def write(name: str, verdict: Verdict) -> str:
        pieces = judge.rationale(question, principles[name], verdict, max_tokens)
        return "".join([piece async for piece in pieces])

    written = await asyncio.gather(*(write(*each) for each in ruling.by_principle.items()))
    return dict(zip(ruling.by_principle, written, strict=True))


async def _stream(
    judge: Judge,
    question: Question,
    ruling: Ruling,
    principles: Mapping[str, Principle],
    max_tokens: int,
) -> AsyncGenerator[str, None]:
    """The verdict at once, then the rationales piece by piece, then the bill."""
    try:
        yield as_event({"object": "judge.verdict"} | _as_json(ruling))
        for name, verdict in ruling.by_principle.items():
            async for piece in judge.rationale(question, principles[name], verdict, max_tokens):
                yield as_event({"object": "judge.rationale", "principle": name, "delta": piece})
    finally:
        metrics.count_usage(judge.usage)
    yield as_event({"object": "judge.usage", "usage": judge.usage.as_json()})
    yield "data: [DONE]\n\n"


def _as_json(ruling: Ruling, rationales: Rationales | None = None) -> dict[str, Any]:
    by_principle = {
        name: _verdict(verdict) | ({"rationale": rationales[name]} if rationales else {})
        for name, verdict in ruling.by_principle.items()
    }
    mean = _verdict(ruling.mean) | {"winner": ruling.winner}
    return mean | {"truncated": ruling.truncated, "principles": by_principle}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "winner": verdict.winner,
        "probability": verdict.probability,
        "orders": verdict.orders,
        "consistent": verdict.consistent,
    }
