"""Writes preferences and answers to the database without delaying responses."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

from judge.feedback import Feedback, Preference, Source
from judge.messages import Message, Unusable, read_messages, text_of
from judge.principles import Principle
from judge.prompts import Question
from judge.rows import PrefersNothing
from judge.verdict import PairResult
from server import metrics
from server.engine import ChatCompletionResponse
from server.streams import Event, as_event

MAX_WAITING = 1000
"""Writes that may wait for the disk; verdicts beyond it are lost, and counted as lost."""

P = ParamSpec("P")
Result = TypeVar("Result")


class FeedbackWriter:
    """The database, in a thread of its own."""

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self.waiting = 0

    async def add(self, rows: Sequence[Preference]) -> None:
        """Returns when all of a person's preferences are on the disk, or none. Raises FeedbackError."""
        await self._run(self.feedback.add, rows)
        metrics.FEEDBACK.labels("person").inc(len(rows))

    async def answer(
        self, request_id: str, caller: str
    ) -> tuple[list[Message], list[Message]] | None:
        """The prompt and the responses of a recorded answer; None = this caller has none of this id."""
        return await self._run(self.feedback.answer, request_id, caller)

    async def counts(self) -> dict[tuple[Source, str | None], int]:
        """The number of preferences of each source and caller."""
        return await self._run(self.feedback.counts)

    async def last_id(self) -> int:
        """Id of the newest preference."""
        return await self._run(self.feedback.last_id)

    async def forget(self, caller: str) -> dict[str, int]:
        """Delete a caller's rows; returns their numbers when they are gone. Raises FeedbackError."""
        return await self._run(self.feedback.forget, caller)

    def record_answer(
        self, request_id: str, caller: str, prompt: Sequence[Message], responses: Any
    ) -> None:
        """Keep an answer with several choices, for its caller to choose from."""
        try:
            messages = read_messages(responses)
        except Unusable:  # not text: nothing to learn from
            return
        self._enqueue(1, None, self.feedback.add_answer, request_id, caller, prompt, messages)

    def record_verdicts(
        self,
        questions: Sequence[Question],
        results: Iterable[PairResult],
        principle: str | None,
        caller: str,
    ) -> None:
        """Keep the judge's preferences; a tie is none."""
        rows = []
        for question, result in zip(questions, results, strict=True):
            if result.winner == "tie":
                continue
            chosen, rejected = question.first, question.second
            confidence = result.probability
            if result.winner == "b":
                chosen, rejected, confidence = rejected, chosen, 1 - confidence
            row = Preference(
                "judge", question.prompt, chosen, rejected, principle, confidence, caller=caller
            )
            with suppress(Unusable, PrefersNothing):  # nothing to learn from
                row.as_row()
                rows.append(row)
        if rows:
            self._enqueue(len(rows), "judge", self.feedback.add, rows)

    async def _run(self, work: Callable[P, Result], *args: P.args, **kwargs: P.kwargs) -> Result:
        assert not kwargs, "an executor takes positional arguments only"
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *args)

    def _enqueue(
        self,
        count: int,
        source: Source | None,
        work: Callable[P, None],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> None:
        """Write `count` rows some time later. `source`: count them as kept preferences of this source."""
        if self.waiting >= MAX_WAITING:
            metrics.FEEDBACK_LOST.inc(count)
            return
        self.waiting += 1

        def done(future: Future[None]) -> None:
            self.waiting -= 1
            if future.exception() is not None:
                metrics.FEEDBACK_LOST.inc(count)
            elif source is not None:
                metrics.FEEDBACK.labels(source).inc(count)

        self.thread.submit(work, *args, **kwargs).add_done_callback(done)


def principle_of(principles: Mapping[str, Principle], default: str) -> str | None:
    """The principle that is exported with a verdict; None for the default one and for several at once."""
    names = list(principles)
    return names[0] if len(names) == 1 and names[0] != default else None


def new_id() -> str:
    """Id of a recorded answer. A client may choose vLLM's own id, and so repeat another answer's."""
    return f"chatcmpl-{secrets.token_hex(16)}"


def responses_of(answer: ChatCompletionResponse) -> list[dict[str, Any]]:
    """The choices' messages, by index."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [response_of(choice.message.model_dump()) for choice in choices]


def response_of(message: dict[str, Any]) -> dict[str, Any]:
    """The content of a message: tool calls lose their random id, and one that was cut short becomes a text."""
    calls = [{"function": call["function"]} for call in message.get("tool_calls") or ()]
    response = {"role": "assistant", "content": message.get("content") or "", "tool_calls": calls}
    try:
        read_messages([response])
    except Unusable:
        return {"role": "assistant", "content": text_of(response)}
    return response


async def record_stream(
    chunks: AsyncGenerator[str, None],
    request_id: str,
    record: Callable[[list[dict[str, Any]]], None],
) -> AsyncGenerator[str, None]:
    """The stream with another id. When all its choices have finished, calls `record` with their messages."""
    choices: dict[int, _Choice] = {}
    async for chunk in chunks:
        event = Event.parse(chunk)
        for choice in event.choices or ():
            choices.setdefault(choice["index"], _Choice()).add(choice)
        if event.data is not None and "id" in event.data:
            chunk = as_event(event.data | {"id": request_id})
        yield chunk
    if choices and all(choice.is_finished for choice in choices.values()):
        record([choices[index].response() for index in sorted(choices)])


class _Choice:
    """A choice of a stream, reassembled from its deltas."""

    def __init__(self) -> None:
        self.content, self.is_finished = "", False
        self.calls: dict[int, dict[str, str]] = {}

    def add(self, choice: dict[str, Any]) -> None:
        delta = choice.get("delta", {})
        self.content += delta.get("content") or ""
        for call in delta.get("tool_calls") or ():
            function = self.calls.setdefault(call["index"], {"name": "", "arguments": ""})
            for key in function:
                function[key] += call.get("function", {}).get(key) or ""
        self.is_finished |= choice.get("finish_reason") is not None

    def response(self) -> dict[str, Any]:
        calls = [{"function": self.calls[index]} for index in sorted(self.calls)]
        return response_of({"content": self.content, "tool_calls": calls})
