"""The judge as a client of the engine that answers.

A judgment is one token's log-probabilities, read from the frozen LLM: no proxy takes part.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any

from judge.judge import Judge
from judge.principles import Principle
from judge.prompts import Message, Question
from judge.verdict import Ruling
from server import metrics
from server.calibration import Calibration
from server.engine import (
    EngineClient,
    OpenAIServingChat,
    VLLMValidationError,
    read_labels,
    read_text,
)

PAIRWISE = "pairwise"


class Judges:
    """What judges, and by what; `make` gives a request its own."""

    def __init__(
        self,
        engine: EngineClient,
        chat: OpenAIServingChat | None,
        principles: Mapping[str, Principle],
    ) -> None:
        """
        Args:
            engine: of the LLM that judges.
            chat: vLLM's handler, for the chat template that the server was told to use.
            principles: all that there are; the first is the one to judge by where none is named.
        """
        self.engine, self.principles = engine, principles
        self.tokenizer = _Tokenizer(engine, chat)
        self.calibration = Calibration(PAIRWISE)

    def select(self, names: Sequence[str] | None) -> dict[str, Principle]:
        """The principles of these names, or the first.

        Raises VLLMValidationError (400) for an unknown name.
        """
        for name in names or ():
            if name not in self.principles:
                raise VLLMValidationError(
                    f"unknown principle {name!r}; known are: {', '.join(self.principles)}",
                    parameter="principles",
                )
        return {name: self.principles[name] for name in names or [next(iter(self.principles))]}

    def make(self, *, tie_band: float = 0.0, room: int = 0) -> Judge:
        """A judge for one request.

        Args:
            tie_band: see Verdict.
            room: tokens to leave for a rationale; half of the context at most.
        """

        async def labels(
            prompts: list[list[int]], labels: list[tuple[int, int]]
        ) -> list[tuple[float, float]]:
            return await read_labels(self.engine, prompts, labels)

        def text(prompt: list[int], max_tokens: int) -> AsyncGenerator[tuple[str, int], None]:
            left = self.engine.model_config.max_model_len - len(prompt)
            return read_text(self.engine, prompt, min(max_tokens, left))

        context = self.engine.model_config.max_model_len
        most = context - 1 - min(room, context // 2)
        return Judge(self.tokenizer, labels, text, max_tokens=most, tie_band=tie_band)

    async def compare(
        self, judge: Judge, questions: Sequence[Question], principles: Mapping[str, Principle]
    ) -> list[Ruling]:
        """The judge's rulings; what they say of the judge goes into the metrics."""
        rulings = await judge.compare(questions, principles)
        for question, ruling in zip(questions, rulings, strict=True):
            for verdict in ruling.by_principle.values():
                metrics.VERDICTS.labels(verdict.winner).inc()
                self.calibration.add(question, verdict)
        return rulings


def conversation(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Chat messages in any of OpenAI's forms as plain text, for the judge to read.

    Raises VLLMValidationError (400) for content that is not text.
    """
    return [{"role": str(m["role"]), "content": _text(m.get("content"))} for m in messages]


def _text(content: Any) -> str:
    if content is None:  # an assistant's turn that only called tools
        return ""
    if isinstance(content, str):
        return content
    parts: list[Any] = [p.get("text") if isinstance(p, Mapping) else p for p in content]
    if not all(isinstance(part, str) for part in parts):
        raise VLLMValidationError(
            "only text can be judged, but a message has another kind of content",
            parameter="messages",
        )
    return "\n".join(parts)


class _Tokenizer:
    """The LLM's tokenizer with the chat template that the server was told to use."""

    def __init__(self, engine: EngineClient, chat: OpenAIServingChat | None) -> None:
        self.tokenizer: Any = engine.renderer.get_tokenizer()
        self.chat_template = chat.chat_template if chat is not None else None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            conversation, chat_template=self.chat_template, **options
        )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
