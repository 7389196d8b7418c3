"""The samples of a best-of-N request: each is drawn when it is first wanted, and can be stopped while it grows.

A sample that fails or takes too long drops out. All are requests to one engine, which aborts those that are stopped.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

from fastapi import Request

from judge.messages import text_of
from server.admission import Admission
from server.engine import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    EngineDeadError,
    ErrorResponse,
    OpenAIServingChat,
    create_error_response,
)
from server.feedback_writer import response_of
from server.growth import GROWTH, Growth
from server.schemas.generation import ChatRequest

FAILED = ("abort", "error")
"""Finish reasons of a sample that must not be shown."""

Report = Callable[[dict[str, Any]], None]
"""Called with the progress so far."""


@dataclass(frozen=True)
class DroppedSample:
    """A sample that takes no part in the tournament."""

    reason: str
    error: ErrorResponse | None = None
    """vLLM's error, where there is one."""


Result: TypeAlias = ChatCompletionResponse | DroppedSample


class Samples:
    """N samples or fewer. Sample i has the request's seed + i, as with n."""

    def __init__(
        self,
        request: ChatRequest,
        admission: Admission,
        handler: OpenAIServingChat,
        raw_request: Request,
        report: Report,
    ) -> None:
        self._request, self._admission = request, admission
        self._handler, self._raw_request, self._report = handler, raw_request, report
        self._tasks: dict[int, asyncio.Task[Result]] = {}
        self._growths: dict[int, Growth] = {}
        self._stopped: dict[int, int] = {}  # index -> round
        self._num_finished = 0

    @property
    def drawn(self) -> int:
        return len(self._tasks)

    @property
    def dropped(self) -> dict[int, DroppedSample]:
        """Those of the finished ones that dropped out, by index."""
        results = {i: self._tasks[i].result() for i in sorted(self._tasks) if self._has_ended(i)}
        return {i: result for i, result in results.items() if isinstance(result, DroppedSample)}

    @property
    def stopped(self) -> list[dict[str, int]]:
        """Those that were stopped: after which round (from 1), and after how many tokens."""
        return [
            {"index": index, "round": round_, "tokens": len(self._growths[index].token_ids)}
            for index, round_ in sorted(self._stopped.items())
        ]

    @property
    def completion_tokens(self) -> int:
        """Of all that are whole, and of those that were stopped."""
        whole = [t.result() for i, t in self._tasks.items() if self._has_ended(i)]
        tokens = sum(
            result.usage.completion_tokens or 0
            for result in whole
            if isinstance(result, ChatCompletionResponse)
        )
        return tokens + sum(sample["tokens"] for sample in self.stopped)

    def draw(self, index: int) -> None:
        """Begin it, unless that was done."""
        if index in self._tasks:
            return
        growth = self._growths[index] = Growth()

        async def draw() -> Result:
            if self._admission.judge.prefix_tokens is not None:  # it costs a few percent
                GROWTH.set(growth)  # the task's own
            result = await self._draw(index)
            if isinstance(result, ChatCompletionResponse):
                self._num_finished += 1
                of = self._admission.best_of
                progress = {"stage": "sampling", "done": self._num_finished, "of": of}
                self._report(progress | {"index": index, "text": text_of_answer(result)})
            return result

        self._tasks[index] = asyncio.create_task(draw())

    async def finish(self, index: int) -> Result:
        """The whole sample."""
        self.draw(index)
        return await asyncio.shield(self._tasks[index])

    async def read(self, index: int, num_tokens: int) -> list[int] | Result:
        """Its first tokens, as soon as there are so many; the result, if it has ended by then."""
        self.draw(index)
        task, growth = self._tasks[index], self._growths[index]
        reach = asyncio.create_task(growth.reach(num_tokens))
        try:
            await asyncio.wait((task, reach), return_when=asyncio.FIRST_COMPLETED)
        finally:
            reach.cancel()
        result = task.result() if task.done() else None
        if result is not None and (
            len(growth.token_ids) <= num_tokens or isinstance(result, DroppedSample)
        ):
            return result
        # Without what has come meanwhile: the same seeds must give the same answer.
        return list(growth.token_ids[:num_tokens])

    def stop(self, index: int, after_round: int) -> None:
        """Nobody wants the rest of it, if there is any."""
        task = self._tasks[index]
        if not task.done():
            self._stopped[index] = after_round
            task.cancel()
            progress = {"stage": "stopped", "done": len(self._stopped), "index": index}
            self._report(progress | {"tokens": len(self._growths[index].token_ids)})

    async def close(self) -> None:
        """Stop all that have not ended."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _has_ended(self, index: int) -> bool:
        task = self._tasks[index]
        return index not in self._stopped and task.done() and not task.cancelled()

    async def _draw(self, index: int) -> Result:
        update: dict[str, Any] = {"n": 1, "stream": False, "stream_options": None}
        if self._request.seed is not None:
            update["seed"] = self._request.seed + index
        single: ChatCompletionRequest = self._request.model_copy(update=update)
        limit = self._admission.sample_timeout
        answer: Any = None
        try:
            async with asyncio.timeout(limit) as timeout:
                answer = await self._handler.create_chat_completion(single, self._raw_request)
        except EngineDeadError:
            raise
        except Exception as error:  # the other samples may succeed
            answer = create_error_response(error)
        if timeout.expired():  # vLLM's handler may have answered that the client has disconnected
            return DroppedSample(f"was not finished after {limit or 0:g} seconds")
        if isinstance(answer, ErrorResponse):
            return DroppedSample(f"failed: {answer.error.message}", answer)
        assert isinstance(answer, ChatCompletionResponse), "the request asked for no stream"
        reason = answer.choices[0].finish_reason
        return DroppedSample(f"ended with {reason!r}") if reason in FAILED else answer


def text_of_answer(sample: ChatCompletionResponse) -> str:
    """What the judge reads: the content, and tool calls as text."""
    return text_of(response_of(sample.choices[0].message.model_dump()))
