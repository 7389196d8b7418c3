"""Keeps preferences and answers in the database behind the server's back."""

import asyncio
import json
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from judge.feedback import Feedback, Preference, Source
from judge.messages import Message, Unusable, read_messages, text_of
from judge.principles import Principle
from judge.prompts import Question
from judge.rows import PrefersNothing
from judge.verdict import Ruling
from server import metrics
from server.engine import ChatCompletionResponse
from server.streams import as_event

MAX_WAITING = 1000
"""Writes that may wait for the disk; verdicts beyond it are lost, and counted."""


class Keeper:
    """The database, in a thread of its own."""

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self.waiting = 0

    async def keep(self, rows: Sequence[Preference]) -> None:
        """Returns when all are on the disk, or none. Raises FeedbackError."""
        await self._run(self.feedback.add, rows)
        metrics.FEEDBACK.labels("person").inc(len(rows))

    async def answer(
        self, request_id: str, caller: str
    ) -> tuple[list[Message], list[Message]] | None:
        return await self._run(self.feedback.answer, request_id, caller)

    async def counts(self) -> dict[tuple[Source, str | None], int]:
        """How many preferences there are of each source and caller."""
        return await self._run(self.feedback.counts)

    async def last_id(self) -> int:
        """Of the newest preference."""
        return await self._run(self.feedback.last_id)

    async def forget(self, caller: str) -> dict[str, int]:
        """Returns what was deleted, when it is. Raises FeedbackError."""
        return await self._run(self.feedback.forget, caller)

    def remember(
        self, request_id: str, caller: str, prompt: Sequence[Message], responses: Any
    ) -> None:
        """Keep an answer with several choices, for its caller to choose from."""
        try:
            messages = read_messages(responses)
        except Unusable:  # not text: nothing to learn from
            return
        self._later(1, self.feedback.add_answer, request_id, caller, prompt, messages)

    def keep_verdicts(
        self,
        questions: Sequence[Question],
        rulings: Iterable[Ruling],
        principle: str | None,
        caller: str,
    ) -> None:
        """Keep what the judge decided; ties decide nothing."""
        rows = []
        for question, ruling in zip(questions, rulings, strict=True):
            if ruling.winner == "tie":
                continue
            chosen, rejected = question.first, question.second
            confidence = ruling.probability
            if ruling.winner == "b":
                chosen, rejected, confidence = rejected, chosen, 1 - confidence
            row = Preference(
                "judge", question.prompt, chosen, rejected, principle, confidence, caller=caller
            )
            with suppress(Unusable, PrefersNothing):  # nothing to learn from
                row.as_row()
                rows.append(row)
        if rows:
            self._later(len(rows), self.feedback.add, rows)

    async def _run(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, work, *arguments)

    def _later(self, count: int, work: Callable[..., Any], *arguments: Any) -> None:
        if self.waiting >= MAX_WAITING:
            metrics.FEEDBACK_LOST.inc(count)
            return
        self.waiting += 1

        def done(future: Future[None]) -> None:
            self.waiting -= 1
            if future.exception() is not None:
                metrics.FEEDBACK_LOST.inc(count)
            elif work == self.feedback.add:
                metrics.FEEDBACK.labels("judge").inc(count)

        self.thread.submit(work, *arguments).add_done_callback(done)


def principle_of(principles: Mapping[str, Principle], default: str) -> str | None:
    """What exported verdicts are by: a principle of its own, or None for the usual one and for several at once."""
    names = list(principles)
    return names[0] if len(names) == 1 and names[0] != default else None


def new_id() -> str:
    """Of an answer that is remembered. vLLM's own may be the client's choice, and so another answer's."""
    return f"chatcmpl-{secrets.token_hex(16)}"


def responses_of(answer: ChatCompletionResponse) -> list[dict[str, Any]]:
    """The choices' messages, by index."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [response_of(choice.message.model_dump()) for choice in choices]


def response_of(message: dict[str, Any]) -> dict[str, Any]:
    """What a message says. A call without its id, by which no two would be alike; one that was cut short is a text."""
    calls = [{"function": call["function"]} for call in message.get("tool_calls") or ()]
    response = {"role": "assistant", "content": message.get("content") or "", "tool_calls": calls}
    try:
        read_messages([response])
    except Unusable:
        return {"role": "assistant", "content": text_of(response)}
    return response


async def listen(
    chunks: AsyncGenerator[str, None],
    request_id: str,
    remember: Callable[[list[dict[str, Any]]], None],
) -> AsyncGenerator[str, None]:
    """A stream under another id; where all its choices came to an end, `remember` is told their messages."""
    choices: dict[int, _Choice] = {}
    async for chunk in chunks:
        if chunk.startswith("data: {"):
            data = json.loads(chunk.removeprefix("data: "))
            for choice in data.get("choices", ()):
                choices.setdefault(choice["index"], _Choice()).add(choice)
            if "id" in data:
                chunk = as_event(data | {"id": request_id})
        yield chunk
    if choices and all(choice.is_finished for choice in choices.values()):
        remember([choices[index].response() for index in sorted(choices)])


class _Choice:
    """A choice of a stream, put together again."""

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
