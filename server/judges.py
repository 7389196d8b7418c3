"""The judges as clients of the engine that answers. No proxy takes part in a judgment."""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from typing import Any, NoReturn, get_args

from judge.judge import Judge
from judge.likelihood import LikelihoodJudge, Reading
from judge.messages import Message, Unusable, read_messages, text_of
from judge.principles import Principle
from judge.prompts import Question
from judge.verdict import Ruling
from server import metrics
from server.access import Caller
from server.adapters import Adapter, JudgeKind
from server.calibration import Calibration
from server.engine import (
    EngineClient,
    LoRARequest,
    OpenAIServingChat,
    VLLMValidationError,
    Workers,
    read_labels,
    read_logprob,
    read_responses,
    read_text,
)
from server.keeper import Keeper, principle_of
from server.proxies import LoadedProxy
from server.schemas import JudgeSettings

DEFAULT_BETA = 0.3
"""Of a proxy whose checkpoint names none."""


class Judges:
    """What judges, and by what; `make` gives a request its own."""

    def __init__(
        self,
        engine: EngineClient,
        workers: Workers,
        chat: OpenAIServingChat | None,
        principles: Mapping[str, Principle],
        adapters: Mapping[JudgeKind, Adapter],
        keeper: Keeper | None,
    ) -> None:
        """
        Args:
            engine, workers: of the LLM that judges.
            chat: vLLM's handler, for the chat template that the server was told to use.
            principles: all that there are; the first is the one to judge by where none is named.
            adapters: LoRAs that judge in the place of the LLM itself.
            keeper: of the verdicts; None = they are not kept.
        """
        self.engine, self.workers = engine, workers
        self.principles, self.adapters = principles, adapters
        self.keeper = keeper
        self.tokenizer = _Tokenizer(engine, chat)
        self.context: int = engine.model_config.max_model_len
        self.loras = {
            kind: LoRARequest(f"judge-{kind}", adapter.lora_id, str(adapter.directory))
            for kind, adapter in adapters.items()
        }
        self.calibrations = {kind: Calibration(kind) for kind in get_args(JudgeKind)}

    def select(self, settings: JudgeSettings) -> dict[str, Principle]:
        """The principles that are asked for, or the first.

        Raises VLLMValidationError (400) for an unknown one, or a judge that there is not.
        """
        if settings.kind != "pairwise":
            if settings.kind == "likelihood" and settings.kind not in self.adapters:
                _refuse("kind", "this server has no likelihood judge: start it with --judge DIR")
            if settings.principles is not None:
                _refuse("principles", f"are for pairwise judges: a {settings.kind} judge has none")
            return {}
        for name in settings.principles or ():
            if name not in self.principles:
                known = ", ".join(self.principles)
                _refuse("principles", f"unknown principle {name!r}; known are: {known}")
        names = settings.principles or [next(iter(self.principles))]
        return {name: self.principles[name] for name in names}

    def make(
        self,
        kind: JudgeKind = "pairwise",
        proxy: LoadedProxy | None = None,
        *,
        tie_band: float = 0.0,
    ) -> Judge | LikelihoodJudge:
        """A judge for one request.

        Args:
            proxy: of kind `proxy`; to be kept loaded as long as it judges.
            tie_band: as in Verdict.
        """
        if proxy is not None:
            return self._make_proxy(proxy, tie_band)
        if kind == "likelihood":
            return self._make_likelihood(tie_band)
        return self.make_pairwise(tie_band=tie_band)

    def make_pairwise(self, *, tie_band: float = 0.0, room: int = 0) -> Judge:
        """A judge that can say why; `room` = tokens to leave for that, half of the context at most."""
        lora = self.loras.get("pairwise")

        async def labels(
            prompts: list[list[int]], labels: list[tuple[int, int]]
        ) -> list[tuple[float, float]]:
            return await read_labels(self.engine, prompts, labels, lora)

        def text(prompt: list[int], max_tokens: int) -> AsyncGenerator[tuple[str, int], None]:
            left = self.context - len(prompt)
            return read_text(self.engine, prompt, min(max_tokens, left), lora)

        most = self.context - 1 - min(room, self.context // 2)
        return Judge(self.tokenizer, labels, text, max_tokens=most, tie_band=tie_band)

    def _make_likelihood(self, tie_band: float) -> LikelihoodJudge:
        lora = self.loras["likelihood"]

        async def scores(readings: list[Reading]) -> list[float]:
            read = await asyncio.gather(
                *(
                    read_logprob(self.engine, *reading, each)
                    for reading in readings
                    for each in (lora, None)
                )
            )
            return [
                with_lora - plain for with_lora, plain in zip(read[::2], read[1::2], strict=True)
            ]

        return LikelihoodJudge(
            self.tokenizer,
            scores,
            beta=self.adapters["likelihood"].beta,
            max_tokens=self.context - 1,
            tie_band=tie_band,
        )

    def _make_proxy(self, proxy: LoadedProxy, tie_band: float) -> LikelihoodJudge:
        about = proxy.description
        decoding = {key: about[key] for key in ("temperature", "top_k", "top_p", "max_candidates")}
        beta = about["training"].get("beta") or DEFAULT_BETA
        version = proxy.name, proxy.version

        async def scores(readings: list[Reading]) -> list[float]:
            found = await read_responses(
                self.engine, self.workers, readings, decoding, "take_log_ratios", *version
            )
            if None in found:  # the workers keep so much and no more
                raise RuntimeError("too much is read at once: ask for fewer or shorter responses")
            return found

        return LikelihoodJudge(
            self.tokenizer,
            scores,
            beta=beta,
            max_tokens=self.context - 1,
            tie_band=tie_band,
            kind="proxy",
            readings=1,
        )

    async def compare(
        self,
        judge: Judge | LikelihoodJudge,
        questions: Sequence[Question],
        principles: Mapping[str, Principle],
        caller: Caller,
    ) -> list[Ruling]:
        """Its rulings on a caller's request, which are kept; what they say of the judge goes into the metrics."""
        rulings = await judge.compare(questions, principles)
        calibration = self.calibrations[judge.kind]
        for question, ruling in zip(questions, rulings, strict=True):
            for verdict in ruling.by_principle.values():
                metrics.VERDICTS.labels(verdict.winner).inc()
                calibration.add(question, verdict)
        if self.keeper is not None:
            usual = next(iter(self.principles))
            principle = principle_of(principles, usual)
            self.keeper.keep_verdicts(questions, rulings, principle, caller.identity)
        return rulings


def _refuse(parameter: str, message: str) -> NoReturn:
    raise VLLMValidationError(message, parameter=parameter)


def conversation(messages: Iterable[Mapping[str, Any]]) -> list[Message]:
    """Chat messages in any of OpenAI's forms as plain text, for the judge to read.

    Raises VLLMValidationError (400) for content that is not text.
    """
    return [Message(role=str(message["role"]), content=_as_text(message)) for message in messages]


def _as_text(message: Mapping[str, Any]) -> str:
    try:
        return text_of(*read_messages([message]))
    except Unusable:  # vLLM takes more than can be learned from
        return _text(message.get("content"))


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
