"""Asks judges on other servers, over HTTP. What goes wrong there is an error 502, or 504 where it takes too long.

A client of this server sees which judge failed and how; the address, and what the other server says beyond a refused
question, go to the log, without the key.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple, NoReturn, TypeVar

import httpx

from judge.client import error_message
from judge.messages import text_of
from judge.principles import Principle
from judge.prompts import ChatTokenizer
from judge.protocol import Usage
from judge.remote import Chat, EndpointJudge, RewardJudge, label_logprobs
from server.engine import GracefulHTTPError
from server.remote_judges import Endpoint, RemoteJudge, RewardModel

ATTEMPTS = 3
FIRST_PAUSE = 0.5
"""Seconds before the second attempt; before the third, twice as long."""
_AGAIN = (429, 500, 502, 503, 504)
_QUESTIONS_FAULT = (400, 413, 422)

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


class Meter(NamedTuple):
    """What a caller spends here counts as what is spent on the engine: `server.engine_wrapper` has both functions."""

    begin: Callable[[Sequence[int]], None]
    """Called with the lengths of the prompts before they are sent; raises beyond a limit of the caller."""
    spend: Callable[[Usage], None]
    """Called with the tokens of each answer."""


class _RemoteClient:
    """Sends judgments to one server; its subclasses say what to send, and read the answers."""

    def __init__(self, judge: RemoteJudge, key: str | None, meter: Meter) -> None:
        """
        Args:
            key: the API key; None = none is sent.
        """
        self.meter = meter
        self.kind, self.seconds = judge.kind, judge.timeout
        self._model, self._extra = {"model": judge.model}, judge.extra_body
        self._key = key
        self._http = httpx.AsyncClient(
            base_url=str(judge.url),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # the whole judgment has a limit
            limits=httpx.Limits(max_connections=judge.concurrency),
        )
        self._limit = asyncio.Semaphore(judge.concurrency)

    async def ask(
        self, path: str, bodies: Sequence[dict[str, Any]], read: Callable[[Any], Value]
    ) -> list[tuple[Value, Usage]]:
        """Post all bodies, and read the answers. The first failure cancels the others.

        Raises GracefulHTTPError where one fails.
        """

        async def ask_one(body: dict[str, Any]) -> tuple[Value, Usage]:
            async with self._limit:
                answer = await self._post(path, self._model | body | self._extra)
            try:
                value, usage = read(answer), _usage(answer)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                self._fail(f"gave an answer that cannot be read: {error or type(error).__name__}")
            self.meter.spend(usage)
            return value, usage

        tasks = [asyncio.create_task(ask_one(body)) for body in bodies]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON of the answer, after a few attempts."""
        try:
            async with asyncio.timeout(self.seconds):
                response = await self._send(path, body)
        except TimeoutError:
            self._fail(f"did not answer within {self.seconds:g} s", HTTPStatus.GATEWAY_TIMEOUT)
        except httpx.RequestError as error:
            self._fail(f"cannot be reached: {type(error).__name__}", about=str(error))
        if not response.is_success:
            reason = error_message(response)
            shown = f": {self._hide(reason)}" if response.status_code in _QUESTIONS_FAULT else ""
            self._fail(f"answered with HTTP {response.status_code}{shown}", about=reason)
        try:
            return response.json()
        except ValueError:
            self._fail("gave an answer that is not JSON")

    async def _send(self, path: str, body: dict[str, Any]) -> httpx.Response:
        """The last attempt's response. Raises httpx.RequestError where that had none."""
        for attempt in range(ATTEMPTS):
            is_last, pause = attempt == ATTEMPTS - 1, FIRST_PAUSE * 2**attempt
            try:
                response = await self._http.post(path, json=body)
            except httpx.RequestError:
                if is_last:
                    raise
            else:
                if is_last or response.status_code not in _AGAIN:
                    break
                wanted = response.headers.get("Retry-After", "")
                pause = float(wanted) if wanted.isdecimal() else pause
            await asyncio.sleep(pause)
        return response

    def _fail(
        self, what: str, status: HTTPStatus = HTTPStatus.BAD_GATEWAY, about: str = ""
    ) -> NoReturn:
        url = self._http.base_url
        logger.warning("The %s judge at %s %s %s", self.kind, url, what, self._hide(about))
        raise GracefulHTTPError(f"the {self.kind} judge {what}", status)

    def _hide(self, text: str) -> str:
        return text.replace(self._key, "...") if self._key else text


class RewardClient(_RemoteClient):
    """Asks a sequence-classification model for its score of a chat."""

    def __init__(self, judge: RewardModel, key: str | None, meter: Meter) -> None:
        super().__init__(judge, key, meter)
        self.judge = judge

    async def __call__(self, chats: Sequence[Chat]) -> list[tuple[float, Usage]]:
        """The reward of each chat, and the tokens that the model read."""
        self.meter.begin([chat.num_tokens for chat in chats])
        if self.judge.api == "classify":
            bodies = [{"messages": chat.messages, "use_activation": False} for chat in chats]
            return await self.ask("classify", bodies, _class_score)
        return await self.ask("score", [_score_body(chat) for chat in chats], _pair_score)


class EndpointClient(_RemoteClient):
    """Asks an LLM for the first token of its answer."""

    def __init__(self, judge: Endpoint, key: str | None, meter: Meter) -> None:
        super().__init__(judge, key, meter)
        self.judge = judge
        self._options: dict[str, Any] = {
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": True,
            "top_logprobs": judge.top_logprobs,
        }
        if judge.continue_final_message:
            self._options |= {"continue_final_message": True, "add_generation_prompt": False}

    async def __call__(self, chats: Sequence[Chat]) -> list[tuple[tuple[float, float], Usage]]:
        """Both labels' log-probabilities after each chat, and the tokens read and written.

        A chat after which neither label is likely counts as even; if that is all of them, the model does not judge.
        """
        self.meter.begin([chat.num_tokens for chat in chats])
        bodies = [{"messages": chat.messages} | self._options for chat in chats]
        answers = await self.ask("chat/completions", bodies, _candidates)
        labels = [(label_logprobs(candidates), usage) for candidates, usage in answers]
        if all(max(pair) == -math.inf for pair, _ in labels):
            likeliest = answers[0][0][0][0]
            self._fail(
                f"does not judge: neither A nor B is among its likeliest tokens, the first of which is {likeliest!r}"
            )
        return labels


def _class_score(answer: Any) -> float:
    """Of the answer of vLLM's /classify, without an activation."""
    scores = answer["data"][0]["probs"]
    if len(scores) != 1:
        raise ValueError(f"it has {len(scores)} classes, and a reward model has one")
    return _finite(scores[0])


def _score_body(chat: Chat) -> dict[str, Any]:
    *turns, response = chat.messages
    texts = [text_of(turn) for turn in turns]
    if len(turns) > 1:
        pairs = zip(turns, texts, strict=True)
        texts = [f"{turn['role'].capitalize()}: {text}" for turn, text in pairs]
    return {"text_1": "\n".join(texts), "text_2": text_of(response), "use_activation": False}


def _pair_score(answer: Any) -> float:
    """Of the answer of /score."""
    return _finite(answer["data"][0]["score"])


def _finite(value: Any) -> float:
    score = float(value)
    if not math.isfinite(score):
        raise ValueError(f"the score is {score}")
    return score


def _candidates(answer: Any) -> list[tuple[str, float]]:
    """The likeliest first tokens of a chat completion."""
    logprobs = answer["choices"][0].get("logprobs")
    if not logprobs or not logprobs["content"]:
        raise ValueError("it has no logprobs, which a judge needs")
    return [(str(c["token"]), float(c["logprob"])) for c in logprobs["content"][0]["top_logprobs"]]


def _usage(answer: Any) -> Usage:
    usage = answer.get("usage") or {}
    return Usage(int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0))


def connect(judge: RemoteJudge, key: str | None, meter: Meter) -> RewardClient | EndpointClient:
    """The client of a judge; call it where an event loop runs."""
    if isinstance(judge, RewardModel):
        return RewardClient(judge, key, meter)
    return EndpointClient(judge, key, meter)


def remote_judge(
    client: RewardClient | EndpointClient,
    tokenizer: ChatTokenizer,
    principles: Mapping[str, Principle],
    context: int,
    tie_band: float = 0.0,
) -> RewardJudge | EndpointJudge:
    """The judge that asks a client.

    Args:
        tokenizer: the hosted LLM's
        principles: for a judge that reads both responses
        context: of the hosted LLM, in tokens: the limit where the judge's file sets none
        tie_band: as in Verdict
    """
    limit = (client.judge.max_tokens or context) - 1
    if isinstance(client, RewardClient):
        beta = client.judge.beta
        return RewardJudge(tokenizer, client, beta=beta, max_tokens=limit, tie_band=tie_band)
    continues = client.judge.continue_final_message
    return EndpointJudge(
        tokenizer, principles, client, continues=continues, max_tokens=limit, tie_band=tie_band
    )
