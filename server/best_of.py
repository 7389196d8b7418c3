"""Best of N: samples, the judge's ranking of them, and the best as the answer.

Samples and judgments are requests to one engine and share its prefix cache. When the client disconnects, all of them
are aborted.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from time import monotonic

from fastapi import Request

from judge.pairwise import PairwiseJudge
from judge.prompts import Choice, Question
from judge.protocol import Usage
from judge.tournament import ONE_CALL, Pair, TournamentRecord, choose, comparisons_of, play
from judge.verdict import PairResult, Verdict
from server import metrics
from server.access import CALLER, Caller
from server.admission import Admission
from server.app_state import AppState
from server.engine import (
    ChatCompletionResponse,
    ErrorResponse,
    VLLMValidationError,
    create_error_response,
)
from server.judges import conversation
from server.proxy_choice import find_proxy, judging_proxies
from server.samples import DroppedSample, Report, Samples, text_of_answer
from server.schemas.generation import ChatRequest

FORFEIT = "forfeit"
"""Stands in a principle's place where a sample dropped out before it was compared."""


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
    if not _draws_all(admission) and (request.n or 1) > 1:
        refuse("n", "must be 1 with strategy adaptive or prefix_tokens: only the best is completed")
    state.judges.select(admission.judge)
    for name in admission.judge.strengths:
        find_proxy(name, state, caller)
    conversation(request.messages)


async def best_of(
    request: ChatRequest,
    admission: Admission,
    state: AppState,
    raw_request: Request,
    report: Report = lambda progress: None,
) -> ChatCompletionResponse | ErrorResponse:
    """Sample, judge, and return the best, with the tournament's record and the tokens of all in `usage`.

    The judge reads the frozen LLM: its requests carry no proxy.
    """
    start = monotonic()
    if state.chat is None:
        raise NotImplementedError("The model does not support Chat Completions API")
    samples = Samples(request, admission, state.chat, raw_request, report)
    try:
        caller = raw_request.scope[CALLER]
        answer = await _best_of(request, admission, state, caller, samples, report)
    finally:
        await samples.close()
    metrics.BEST_OF_SAMPLES.inc(samples.drawn)
    metrics.BEST_OF_STOPPED.inc(len(samples.stopped))
    metrics.BEST_OF_SECONDS.observe(monotonic() - start)
    return answer


def _draws_all(admission: Admission) -> bool:
    """Whether all samples are drawn at once and judged when they are whole."""
    judge = admission.judge
    return judge.strategy != "adaptive" and judge.prefix_tokens is None


async def _best_of(
    request: ChatRequest,
    admission: Admission,
    state: AppState,
    caller: Caller,
    samples: Samples,
    report: Report,
) -> ChatCompletionResponse | ErrorResponse:
    judged = list(range(admission.best_of))
    if _draws_all(admission):
        for index in judged:
            samples.draw(index)
        await asyncio.gather(*map(samples.finish, judged))
        judged = [index for index in judged if index not in samples.dropped]
    if not judged:
        return _failure(samples.dropped)
    record, usage, principles = await _rank(
        request, admission, state, caller, samples, judged, report
    )
    ranked = [await samples.finish(judged[i]) for i in record.ranking[: request.n or 1]]
    best = [sample for sample in ranked if isinstance(sample, ChatCompletionResponse)]
    if not best:  # the winner has dropped out since it was compared
        return _failure(samples.dropped)
    answer = _choose(best, samples.completion_tokens)
    _add_usage(answer, usage)
    answer.alignment = {
        "best_of": admission.best_of,
        "drawn": samples.drawn,
        "stopped": samples.stopped,
        "dropped": [{"index": i, "reason": s.reason} for i, s in samples.dropped.items()],
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
    samples: Samples,
    judged: Sequence[int],
    report: Report,
) -> tuple[TournamentRecord, Usage, list[str]]:
    """The tournament, the tokens that its judge used, and the names of its principles.

    Args:
        judged: the samples, by the tournament's indices.
    """
    turns = conversation(request.messages)
    settings, judges = admission.judge, state.judges
    principles = judges.select(settings)
    compared, rounds = 0, 0

    async def read(index: int, tokens: int | None) -> str | None:
        """None: it has dropped out."""
        if tokens is None:
            sample = await samples.finish(judged[index])
        else:
            part = await samples.read(judged[index], tokens)
            if isinstance(part, list):
                return judges.tokenizer.decode(part)
            sample = part
        return None if isinstance(sample, DroppedSample) else text_of_answer(sample)

    async def compare_round(pairs: list[Pair], tokens: int | None) -> list[PairResult]:
        nonlocal compared, rounds
        playing = [index for pair in pairs for index in pair]
        for index in playing:
            samples.draw(judged[index])
        read_texts = await asyncio.gather(*(read(index, tokens) for index in playing))
        texts = dict(zip(playing, read_texts, strict=True))
        questions = [
            Question(turns, first, second)
            for first, second in ((texts[a], texts[b]) for a, b in pairs)
            if first is not None and second is not None
        ]
        judged_texts = judges.compare(judge, questions, principles, caller, whole=tokens is None)
        judgments = iter(await judged_texts)
        results = [
            _forfeit(texts[a] is None, texts[b] is None) or next(judgments) for a, b in pairs
        ]
        comparisons = comparisons_of(pairs, results, tokens)
        compared, rounds = compared + len(comparisons), rounds + 1
        entries = [asdict(comparison) for comparison in comparisons]
        report({"stage": "judging", "done": compared, "comparisons": entries})
        for comparison in comparisons:
            samples.stop(judged[sum(comparison.pair) - comparison.winner], rounds)
        return results

    async with judging_proxies(settings, state, caller) as proxies:
        judge = judges.make(settings.kind, principles, proxies)
        try:
            seed = _seed(request, admission)
            if settings.strategy == ONE_CALL:
                assert isinstance(judge, PairwiseJudge), "the request was checked"
                texts = [await read(i, None) or "" for i in range(len(judged))]
                read_all = partial(judge.choose, Choice(turns, tuple(texts)))
                record = await choose(len(judged), read_all, seed, settings.rotations)
            else:
                record = await play(
                    settings.strategy, len(judged), compare_round, seed, settings.prefix_tokens
                )
        finally:
            metrics.count_usage(judge.usage)
    metrics.COMPARISONS.labels(settings.strategy).observe(compared or len(record.readings))
    return record, judge.usage, list(principles)


def _forfeit(first_dropped: bool, second_dropped: bool) -> PairResult | None:
    """The result of a comparison without one of its samples; None = both are there."""
    if not (first_dropped or second_dropped):
        return None
    probability = 0.5 + 0.5 * (second_dropped - first_dropped)
    return PairResult({FORFEIT: Verdict((probability, probability))})


def _failure(dropped: dict[int, DroppedSample]) -> ErrorResponse:
    """The error to answer with when no sample is left: the request's fault, or why each one dropped out."""
    for sample in dropped.values():
        if sample.error is not None and sample.error.error.code < 500:
            return sample.error
    reasons = "; ".join(f"sample {index} {sample.reason}" for index, sample in dropped.items())
    failed = any(sample.error is not None for sample in dropped.values())
    return create_error_response(
        f"no sample is left to judge: {reasons}",
        err_type="ServiceUnavailableError" if failed else "TimeoutError",
        status_code=HTTPStatus.SERVICE_UNAVAILABLE if failed else HTTPStatus.GATEWAY_TIMEOUT,
    )


def _seed(request: ChatRequest, admission: Admission) -> int:
    if admission.judge.seed is not None:
        return admission.judge.seed
    return request.seed if request.seed is not None else random.randrange(2**32)


def _choose(best: list[ChatCompletionResponse], completion_tokens: int) -> ChatCompletionResponse:
    """One response with the best samples as its choices; `usage` counts the prompt once, and all completions."""
    answer = best[0]
    answer.choices = [sample.choices[0] for sample in best]
    for index, choice in enumerate(answer.choices):
        choice.index = index
    answer.usage.completion_tokens = completion_tokens
    return answer


def _add_usage(answer: ChatCompletionResponse, judge: Usage) -> None:
    usage = answer.usage
    usage.prompt_tokens += judge.prompt_tokens
    usage.completion_tokens = (usage.completion_tokens or 0) + judge.completion_tokens
    usage.total_tokens = usage.prompt_tokens + usage.completion_tokens
