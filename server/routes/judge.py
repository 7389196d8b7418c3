"""POST /judge: which of two responses is better. POST /judge/rank: which of several is best. GET /judge: who judges."""

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from functools import partial
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from judge.pairwise import PairwiseJudge
from judge.principles import Principle
from judge.prompts import Choice, Question
from judge.protocol import Judge
from judge.tournament import ONE_CALL, Pair, choose, play
from judge.verdict import PairResult, Verdict
from server import metrics
from server.access import CALLER, Caller
from server.app_state import get_state
from server.engine import (
    ErrorResponse,
    load_aware_call,
    validate_json_request,
    with_cancellation,
)
from server.judges import Judges
from server.proxy_choice import judging_proxies
from server.schemas.judge import (
    JudgeList,
    JudgeRequest,
    PairResponse,
    PairsResponse,
    RankRequest,
)
from server.schemas.report import Tournament
from server.streams import DONE, as_event

router = APIRouter(tags=["Judge"])

Rationales = dict[str, str]
"""By principle."""


@router.get("/judge", responses={200: {"model": JudgeList}})
async def list_judges(raw_request: Request) -> dict[str, Any]:
    """The judges that a request may name by `kind`.

    `pairwise` is the LLM itself; `proxy` stands for every loaded proxy.
    """
    judges = get_state(raw_request).judges
    data = [{"kind": kind, "principles": judges.principles_of(kind)} for kind in judges.kinds]
    return {"object": "list", "data": data}


@router.post(
    "/judge",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": PairResponse | PairsResponse, "content": {"text/event-stream": {}}},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse, "description": "The proxy that is to judge is not loaded."},
        500: {"model": ErrorResponse},
        502: {"model": ErrorResponse, "description": "A judge on another server fails."},
        504: {"model": ErrorResponse, "description": "It does not answer in time."},
    },
)
@with_cancellation
@load_aware_call
async def judge_pairs(request: JudgeRequest, raw_request: Request) -> Response:
    """Which response is better, in both orders, by each principle; with the reasons if `rationale` is set.

    For `pairs` the response has `verdicts`, one a pair.
    """
    state, caller = get_state(raw_request), raw_request.scope[CALLER]
    judges = state.judges
    principles, questions = judges.select(request), request.questions()
    if request.rationale:
        return await _explain(request, judges, principles, questions, caller)
    async with judging_proxies(request, state, caller) as proxies:
        judge = judges.make(request.kind, principles, proxies, tie_band=request.tie_band)
        results = await judges.compare(judge, questions, principles, caller)
    return _answer(request, judge, [_as_json(result) for result in results])


async def _explain(
    request: JudgeRequest,
    judges: Judges,
    principles: Mapping[str, Principle],
    questions: list[Question],
    caller: Caller,
) -> Response:
    """The results with their rationales."""
    limit = request.max_rationale_tokens
    judge = judges.make_pairwise(principles, tie_band=request.tie_band, room=limit)
    results = await judges.compare(judge, questions, principles, caller)
    if request.stream:
        events = _stream(judge, questions[0], results[0], limit)
        return StreamingResponse(events, media_type="text/event-stream")
    rationales = await asyncio.gather(
        *(
            _write_rationales(judge, question, result, limit)
            for question, result in zip(questions, results, strict=True)
        )
    )
    verdicts = [_as_json(*pair) for pair in zip(results, rationales, strict=True)]
    return _answer(request, judge, verdicts)


def _answer(request: JudgeRequest, judge: Judge, verdicts: list[dict[str, Any]]) -> Response:
    metrics.count_usage(judge.usage)
    answer = verdicts[0] if request.pairs is None else {"verdicts": verdicts}
    return JSONResponse(answer | {"usage": judge.usage.as_json()})


@router.post(
    "/judge/rank",
    dependencies=[Depends(validate_json_request)],
    responses={
        200: {"model": Tournament},
        400: {"model": ErrorResponse},
        404: {"model": ErrorResponse, "description": "The proxy that is to judge is not loaded."},
        500: {"model": ErrorResponse},
        502: {"model": ErrorResponse, "description": "A judge on another server fails."},
        504: {"model": ErrorResponse, "description": "It does not answer in time."},
    },
)
@with_cancellation
@load_aware_call
async def rank(request: RankRequest, raw_request: Request) -> Response:
    """The responses' ranking, the best first, and all comparisons that led to it.

    `judge.tournament.replay` finds the same ranking from them without a model.
    """
    state, caller = get_state(raw_request), raw_request.scope[CALLER]
    judges = state.judges
    principles, turns = judges.select(request), request.turns()

    async def compare_round(pairs: list[Pair], tokens: int | None) -> list[PairResult]:
        del tokens  # the responses are whole
        responses = request.responses
        questions = [Question(turns, responses[a], responses[b]) for a, b in pairs]
        return await judges.compare(judge, questions, principles, caller)

    seed = random.randrange(2**32) if request.seed is None else request.seed
    async with judging_proxies(request, state, caller) as proxies:
        judge, num = judges.make(request.kind, principles, proxies), len(request.responses)
        if request.strategy == ONE_CALL:
            assert isinstance(judge, PairwiseJudge), "the request was checked"
            read = partial(judge.choose, Choice(turns, tuple(request.responses)))
            record = await choose(num, read, seed, request.rotations)
        else:
            record = await play(request.strategy, num, compare_round, seed)
    metrics.count_usage(judge.usage)
    metrics.COMPARISONS.labels(request.strategy).observe(
        sum(map(len, record.rounds)) or len(record.readings)
    )
    return JSONResponse(record.as_json() | {"usage": judge.usage.as_json()})


async def _write_rationales(
    judge: PairwiseJudge, question: Question, result: PairResult, max_tokens: int
) -> Rationales:
    async def write(principle: str, verdict: Verdict) -> str:
        pieces = judge.rationale(question, principle, verdict, max_tokens)
        return "".join([piece async for piece in pieces])

    texts = await asyncio.gather(*(write(*item) for item in result.by_principle.items()))
    return dict(zip(result.by_principle, texts, strict=True))


async def _stream(
    judge: PairwiseJudge, question: Question, result: PairResult, max_tokens: int
) -> AsyncGenerator[str, None]:
    """The verdict at once, then the rationales piece by piece, then the usage."""
    try:
        yield as_event({"object": "judge.verdict"} | _as_json(result))
        for principle, verdict in result.by_principle.items():
            async for piece in judge.rationale(question, principle, verdict, max_tokens):
                event = {"object": "judge.rationale", "principle": principle, "delta": piece}
                yield as_event(event)
    finally:
        metrics.count_usage(judge.usage)
    yield as_event({"object": "judge.usage", "usage": judge.usage.as_json()})
    yield DONE


def _as_json(result: PairResult, rationales: Rationales | None = None) -> dict[str, Any]:
    by_principle = {
        name: _verdict(verdict) | ({"rationale": rationales[name]} if rationales else {})
        for name, verdict in result.by_principle.items()
    }
    mean = _verdict(result.mean) | {"winner": result.winner}
    return mean | {"truncated": result.truncated, "principles": by_principle}


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "winner": verdict.winner,
        "probability": verdict.probability,
        "orders": verdict.orders,
        "consistent": verdict.consistent,
    }
