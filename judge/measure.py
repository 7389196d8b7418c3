"""What each strategy of answering wins and costs on a running server; `judge.plan` chooses from the results.

A strategy is a proxy (or none) with a number of samples. Every prompt is answered by every strategy, in random order,
so that whatever slows the server down slows all of them. The win rate of a strategy is against the frozen LLM's single
answers to the same prompts; ties count half.
"""

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles
from typing import Any

import httpx
from pydantic import PositiveInt
from tqdm import tqdm

from judge.client import auth_headers
from judge.functions import load_function
from judge.messages import Message, as_texts
from judge.options import Seed
from judge.rows import RowOptions

PAIRS_PER_REQUEST = 64
Grader = Callable[..., Sequence[float]]
"""Called with N `prompts` (lists of chat messages) and `completions` (texts); a score each, higher is better."""


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(RowOptions):
    """What to measure, on which server."""

    base_url: str = "http://127.0.0.1:8000"
    """The server."""
    api_key: str | None = None
    """The server's API key. Default: the variable ASSENT_API_KEY, which no list of processes shows."""
    model: str | None = None
    """Name of the LLM. Default: the first that the server lists."""
    proxies: tuple[str, ...] = ()
    """Names of loaded proxies. The frozen LLM is always measured."""
    best_of: tuple[PositiveInt, ...] = (1, 2, 4, 8)
    """Numbers of samples N."""
    judge_kind: str | None = None
    """Which of the server's judges chooses the best of N. Default: the server's default."""
    num_prompts: PositiveInt = 200
    """Number of prompts to use, from the start of the file."""
    concurrency: PositiveInt = 1
    """Concurrent requests. Latencies are measured at this load."""
    max_completion_tokens: PositiveInt = 256
    """Limit of an answer."""
    grader: str | None = None
    """`module:function`, called with N prompts (lists of chat messages) and completions (texts), returning N numbers.
    Default: the server's judge."""
    grader_kind: str | None = None
    """Which of the server's judges grades. Default: the server's default."""
    seed: Seed = 0
    """Of the order and the samples."""


@dataclass(frozen=True)
class Strategy:
    """One way to answer."""

    proxy: str | None
    """None = the frozen LLM."""
    best_of: int

    @property
    def name(self) -> str:
        return f"{self.proxy or 'plain'}, best of {self.best_of}"


BASELINE = Strategy(None, 1)


@dataclass(frozen=True)
class Measured:
    """What a strategy wins and costs."""

    strategy: Strategy
    win_rate: float
    win_rate_se: float
    seconds: float
    """Mean latency of an answer."""
    seconds_95: float
    """95th percentile of the latency."""
    tokens: float
    """Mean over answers: prompt, samples and judgments together."""


@dataclass(frozen=True)
class _Answer:
    text: str
    seconds: float
    tokens: int


async def measure(options: MeasureOptions, prompts: Sequence[list[Message]]) -> list[Measured]:
    """All strategies on all prompts, the baseline first.

    Raises httpx.HTTPStatusError where the server refuses a request; its response says why.
    """
    headers = auth_headers(options.api_key)
    grid = [Strategy(proxy, n) for proxy in (None, *options.proxies) for n in options.best_of]
    strategies = [BASELINE, *(strategy for strategy in grid if strategy != BASELINE)]
    async with httpx.AsyncClient(
        base_url=options.base_url, headers=headers, timeout=None
    ) as client:
        answers = await _answer_all(options, client, prompts, strategies)
        baseline = [answer.text for answer in answers[BASELINE]]
        measured = []
        for strategy in strategies:
            texts = [answer.text for answer in answers[strategy]]
            wins = await _wins(options, client, prompts, texts, baseline)
            measured.append(_summarize(strategy, answers[strategy], wins))
    return measured


async def _answer_all(
    options: MeasureOptions,
    client: httpx.AsyncClient,
    prompts: Sequence[list[Message]],
    strategies: Sequence[Strategy],
) -> dict[Strategy, list[_Answer]]:
    """One answer for each strategy and prompt, sent in random order."""
    jobs = [(strategy, index) for strategy in strategies for index in range(len(prompts))]
    random.Random(options.seed).shuffle(jobs)
    answers: dict[tuple[Strategy, int], _Answer] = {}
    limit = asyncio.Semaphore(options.concurrency)
    model = options.model or (await _json(client.get("/v1/models")))["data"][0]["id"]
    with tqdm(total=len(jobs), unit="answer") as bar:

        async def answer(strategy: Strategy, index: int) -> None:
            body = _body(options, model, strategy, prompts[index], index)
            async with limit:
                start = time.monotonic()
                response = await _json(client.post("/v1/chat/completions", json=body))
                seconds = time.monotonic() - start
            text = response["choices"][0]["message"]["content"] or ""
            tokens = response["usage"]["total_tokens"]
            answers[strategy, index] = _Answer(text, seconds, tokens)
            bar.update()

        # Warm-up: the first answer of a strategy compiles kernels and fills caches. It is measured again below.
        for strategy in strategies:
            await answer(strategy, 0)
        bar.reset()
        await asyncio.gather(*(answer(*job) for job in jobs))
    return {
        strategy: [answers[strategy, index] for index in range(len(prompts))]
        for strategy in strategies
    }


def _body(
    options: MeasureOptions, model: str, strategy: Strategy, messages: list[Message], index: int
) -> dict[str, Any]:
    # Each strategy has seeds of its own: the first of eight samples must not be the baseline's answer.
    offset = 1000 * (strategy.best_of + 100 * (strategy.proxy is not None))
    alignment: dict[str, Any] = {"best_of": strategy.best_of}
    if strategy.proxy:
        alignment["proxy"] = strategy.proxy
    if strategy.best_of > 1 and options.judge_kind:
        alignment["judge"] = {"kind": options.judge_kind}
    return {
        "model": model,
        "messages": messages,
        "max_tokens": options.max_completion_tokens,
        "seed": options.seed + 1_000_000 * index + offset,
        "alignment": alignment,
    }


def _summarize(strategy: Strategy, answers: Sequence[_Answer], wins: Sequence[float]) -> Measured:
    mean, n = fmean(wins), len(wins)
    seconds = [answer.seconds for answer in answers]
    return Measured(
        strategy=strategy,
        win_rate=mean,
        win_rate_se=math.sqrt(sum((win - mean) ** 2 for win in wins) / max(1, n - 1) / n),
        seconds=fmean(seconds),
        seconds_95=quantiles(seconds, n=20)[-1] if n > 1 else seconds[0],
        tokens=fmean(answer.tokens for answer in answers),
    )


async def _wins(
    options: MeasureOptions,
    client: httpx.AsyncClient,
    prompts: Sequence[list[Message]],
    texts: Sequence[str],
    baseline: Sequence[str],
) -> list[float]:
    """For each prompt: 1 where the text is better than the baseline's, 0 where it is worse, 1/2 for a tie."""
    if options.grader is not None:
        grade = load_grader(options.grader)
        scores, baseline_scores = (
            grade(prompts=list(prompts), completions=list(completions))
            for completions in (texts, baseline)
        )
        return [(a > b) + 0.5 * (a == b) for a, b in zip(scores, baseline_scores, strict=True)]
    wins: list[float] = []
    kind = {"kind": options.grader_kind} if options.grader_kind else {}
    pairs = [
        {"messages": as_texts(prompt), "response_a": a, "response_b": b}
        for prompt, a, b in zip(prompts, texts, baseline, strict=True)
    ]
    for start in range(0, len(pairs), PAIRS_PER_REQUEST):
        body = {"pairs": pairs[start : start + PAIRS_PER_REQUEST]} | kind
        verdicts = (await _json(client.post("/judge", json=body)))["verdicts"]
        wins += [{"a": 1.0, "b": 0.0, "tie": 0.5}[verdict["winner"]] for verdict in verdicts]
    return wins


async def _json(request: Awaitable[httpx.Response]) -> Any:
    response = await request
    response.raise_for_status()
    return response.json()


def load_grader(name: str) -> Grader:
    """The function that `module:function` names. Raises ValueError where there is none."""
    try:
        return load_function(name)
    except Exception as error:  # whatever the module raises
        raise ValueError(f"--grader {name!r}: expected module:function ({error})") from None
