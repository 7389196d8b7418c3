"""Keeps preferences and answers in the database behind the server's back."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from judge.feedback import Feedback, Preference
from judge.messages import Message
from judge.principles import Principle
from judge.prompts import Question
from judge.verdict import Ruling
from server import metrics
from server.engine import ChatCompletionResponse

MAX_WAITING = 1000
"""Writes that may wait for the disk; verdicts beyond it are lost, and counted."""


class Keeper:
    """The database, in a thread of its own."""

    def __init__(self, feedback: Feedback) -> None:
        self.feedback = feedback
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="feedback")
        self.waiting = 0

    async def keep(self, row: Preference) -> None:
        """Returns when it is on the disk. Raises FeedbackError."""
        await self._run(self.feedback.add, [row])
        metrics.FEEDBACK.labels(row.source).inc()

    async def answer(self, request_id: str) -> tuple[list[Message], list[str]] | None:
        return await self._run(self.feedback.answer, request_id)

    def remember(self, request_id: str, prompt: Sequence[Message], texts: Sequence[str]) -> None:
        """Keep an answer with several choices, for people to choose from."""
        self._later(1, self.feedback.add_answer, request_id, prompt, texts)

    def keep_verdicts(
        self, questions: Sequence[Question], rulings: Iterable[Ruling], principle: str | None
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
            rows.append(
                Preference("judge", question.prompt, chosen, rejected, principle, confidence)
            )
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


def texts_of(answer: ChatCompletionResponse) -> list[str]:
    """The choices' texts, by index."""
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    return [choice.message.content or "" for choice in choices]


async def listen(
    chunks: AsyncGenerator[str, None], remember: Callable[[str, list[str]], None]
) -> AsyncGenerator[str, None]:
    """A stream as it is; at its end `remember` is told its id and the choices' texts."""
    texts: dict[int, str] = {}
    request_id = ""
    async for chunk in chunks:
        if chunk.startswith("data: {"):
            data = json.loads(chunk.removeprefix("data: "))
            request_id = data.get("id", request_id)
            for choice in data.get("choices", ()):
                said = choice.get("delta", {}).get("content") or ""
                texts[choice["index"]] = texts.get(choice["index"], "") + said
        yield chunk
    remember(request_id, [texts[index] for index in sorted(texts)])
