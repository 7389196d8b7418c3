"""The server's judges: clients of the engine that also answers requests, or of another server.

No proxy takes part in a judgment.
"""

import asyncio
import copy
import threading
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn, get_args

from judge.likelihood import LikelihoodJudge
from judge.messages import Message, Unusable, read_messages, text_of
from judge.pairwise import PairwiseJudge
from judge.principles import Principle
from judge.prompts import Question
from judge.protocol import Judge
from judge.scoring import Reading
from judge.verdict import PairResult
from server import metrics
from server.access import Caller
from server.calibration import Calibration
from server.engine import (
    EngineClient,
    LoRARequest,
    OpenAIServingChat,
    VLLMValidationError,
    Workers,
    read_labels,
    read_logprob,
    read_probe_scores,
    read_responses,
    read_text,
    tokenizer_of,
)
from server.feedback_writer import FeedbackWriter, principle_of
from server.judge_adapters import Adapter, JudgeKind
from server.proxies import ServedVersion
from server.remote_client import EndpointClient, RewardClient, remote_judge
from server.remote_judges import RemoteKind
from server.schemas.alignment import JudgeSettings

DEFAULT_BETA = 0.3
"""β of a proxy whose checkpoint names none."""


class Judges:
    """Makes the judge of each request, and records what it decides."""

    def __init__(
        self,
        engine: EngineClient,
        workers: Workers,
        chat: OpenAIServingChat | None,
        principles: Mapping[str, Principle],
        adapters: Mapping[JudgeKind, Adapter],
        clients: Mapping[JudgeKind, RewardClient | EndpointClient],
        feedback_writer: FeedbackWriter | None,
    ) -> None:
        """
        Args:
            engine, workers: of the LLM that judges.
            chat: vLLM's handler, for the chat template that the server was told to use.
            principles: all of the server; the first is the default.
            adapters: LoRAs and a probe that judge in the place of the LLM itself.
            clients: of judges on other servers.
            feedback_writer: records the verdicts; None = they are not kept.
        """
        self.engine, self.workers = engine, workers
        self.principles, self.adapters, self.clients = principles, adapters, clients
        self.feedback_writer = feedback_writer
        self.tokenizer = _Tokenizer(engine, chat)
        self.context: int = engine.model_config.max_model_len
        self.loras = {
            kind: LoRARequest(f"judge-{kind}", adapter.lora_id, str(adapter.directory))
            for kind, adapter in adapters.items()
            if adapter.rank
        }
        self.calibrations: dict[str, Calibration] = {
            kind: Calibration(kind) for kind in get_args(JudgeKind)
        }

    @property
    def kinds(self) -> list[JudgeKind]:
        """The judges of this server, `pairwise` first."""
        return [*dict.fromkeys(("pairwise", "proxy", *self.adapters, *self.clients))]

    def principles_of(self, kind: JudgeKind) -> list[str]:
        """What a judge can judge by; [] for one that scores."""
        return [*self.principles] if kind in ("pairwise", "endpoint") else []

    def select(self, settings: JudgeSettings) -> dict[str, Principle]:
        """The principles that a request names, or the first; {} for a judge that uses none.

        Raises VLLMValidationError (400) for an unknown principle, or a judge that the server does not have.
        """
        if settings.kind not in self.kinds:
            source = "FILE.toml" if settings.kind in get_args(RemoteKind) else "DIR"
            _refuse(
                "kind", f"this server has no {settings.kind} judge: start it with --judge {source}"
            )
        if not self.principles_of(settings.kind):
            if settings.principles is not None:
                _refuse(
                    "principles",
                    f"are for judges that read both responses: a {settings.kind} judge has none",
                )
            return {}
        for name in settings.principles or ():
            if name not in self.principles:
                known = ", ".join(self.principles)
                _refuse("principles", f"unknown principle {name!r}; known are: {known}")
        names = settings.principles or [next(iter(self.principles))]
        return {name: self.principles[name] for name in names}

    def make(
        self,
        kind: JudgeKind,
        principles: Mapping[str, Principle],
        proxies: Mapping[ServedVersion, float] = MappingProxyType({}),
        *,
        tie_band: float = 0.0,
    ) -> Judge:
        """A judge for one request.

        Args:
            principles: as `select` returns them.
            proxies: the judges of kind `proxy`, with their strengths; must stay pinned while they judge.
            tie_band: as in Verdict.
        """
        if proxies:
            return self._make_proxies(proxies, tie_band)
        if kind == "likelihood":
            return self._make_likelihood(tie_band)
        if kind == "probe":
            return self._make_probe(tie_band)
        if kind in self.clients:
            client = self.clients[kind]
            return remote_judge(client, self.tokenizer, principles, self.context, tie_band)
        return self.make_pairwise(principles, tie_band=tie_band)

    def make_pairwise(
        self, principles: Mapping[str, Principle], *, tie_band: float = 0.0, room: int = 0
    ) -> PairwiseJudge:
        """A judge that can write rationales; `room` = tokens to reserve for one, at most half of the context."""
        lora = self.loras.get("pairwise")

        async def labels(
            prompts: list[list[int]], labels: list[tuple[int, ...]]
        ) -> list[tuple[float, ...]]:
            return await read_labels(self.engine, prompts, labels, lora)

        def text(prompt: list[int], max_tokens: int) -> AsyncGenerator[tuple[str, int], None]:
            left = self.context - len(prompt)
            return read_text(self.engine, prompt, min(max_tokens, left), lora)

        limit = self.context - 1 - min(room, self.context // 2)
        return PairwiseJudge(
            self.tokenizer, principles, labels, text, max_tokens=limit, tie_band=tie_band
        )

    def _make_likelihood(self, tie_band: float) -> LikelihoodJudge:
        lora = self.loras["likelihood"]

        async def scores(readings: list[Reading]) -> list[float]:
            logprobs = await asyncio.gather(
                *(
                    read_logprob(self.engine, *reading, adapter)
                    for reading in readings
                    for adapter in (lora, None)
                )
            )
            pairs = zip(logprobs[::2], logprobs[1::2], strict=True)
            return [with_lora - without for with_lora, without in pairs]

        return LikelihoodJudge(
            self.tokenizer,
            scores,
            beta=self.adapters["likelihood"].beta,
            max_tokens=self.context - 1,
            tie_band=tie_band,
        )

    def _make_proxies(
        self, proxies: Mapping[ServedVersion, float], tie_band: float
    ) -> LikelihoodJudge:
        """Rewards β log(π / p) add up, each times the proxy's strength: in units of the first proxy's β."""
        betas = [proxy.description["training"].get("beta") or DEFAULT_BETA for proxy in proxies]
        weights = [
            strength * beta / betas[0]
            for strength, beta in zip(proxies.values(), betas, strict=True)
        ]

        async def scores(readings: list[Reading]) -> list[float]:
            by_proxy = [await self._log_ratios(readings, proxy) for proxy in proxies]
            return [
                sum(weight * ratio for weight, ratio in zip(weights, ratios, strict=True))
                for ratios in zip(*by_proxy, strict=True)
            ]

        return LikelihoodJudge(
            self.tokenizer,
            scores,
            beta=betas[0],
            max_tokens=self.context - 1,
            tie_band=tie_band,
            kind="proxy",
            readings=len(proxies),
        )

    async def _log_ratios(self, readings: list[Reading], proxy: ServedVersion) -> list[float]:
        """How much likelier a proxy makes each response, in nats."""
        names = ("temperature", "top_k", "top_p", "max_candidates")
        decoding = {name: proxy.description[name] for name in names}
        version = proxy.name, proxy.version
        ratios = await read_responses(
            self.engine, self.workers, readings, decoding, "take_log_ratios", *version
        )
        if None in ratios:  # the workers have bounded room
            raise RuntimeError("too much is read at once: ask for fewer or shorter responses")
        return ratios

    def _make_probe(self, tie_band: float) -> LikelihoodJudge:
        async def scores(readings: list[Reading]) -> list[float]:
            return await read_probe_scores(self.engine, self.workers, readings)

        return LikelihoodJudge(
            self.tokenizer,
            scores,
            beta=self.adapters["probe"].beta,
            max_tokens=self.context - 1,
            tie_band=tie_band,
            kind="probe",
            readings=1,
            end_ids=self.adapters["probe"].end_ids,
        )

    async def compare(
        self,
        judge: Judge,
        questions: Sequence[Question],
        principles: Mapping[str, Principle],
        caller: Caller,
        *,
        whole: bool = True,
    ) -> list[PairResult]:
        """The judge's results on a caller's request, which are recorded.

        Args:
            whole: whether the responses are: such verdicts go to the calibration and the database, too.
        """
        results = await judge.compare(questions)
        calibration = self.calibrations[judge.kind]
        for question, result in zip(questions, results, strict=True):
            for verdict in result.by_principle.values():
                metrics.VERDICTS.labels(verdict.winner).inc()
                if whole:
                    calibration.add(question, verdict)
        if whole and self.feedback_writer is not None:
            principle = principle_of(principles, default=next(iter(self.principles)))
            self.feedback_writer.record_verdicts(questions, results, principle, caller.identity)
        return results


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
    except Unusable:  # vLLM accepts messages that training cannot use
        return _text(message.get("content"))


def _text(content: Any) -> str:
    if content is None:  # an assistant's turn that only called tools
        return ""
    if isinstance(content, str):
        return content
    parts: list[Any] = [part.get("text") if isinstance(part, Mapping) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise VLLMValidationError(
            "only text can be judged, but a message has another kind of content",
            parameter="messages",
        )
    return "\n".join(parts)


class _Tokenizer:
    """The LLM's tokenizer with the chat template that the server was told to use, for one thread at a time.

    A copy: a tokenizer must not be used by two threads, and vLLM uses its own.
    """

    def __init__(self, engine: EngineClient, chat: OpenAIServingChat | None) -> None:
        self.tokenizer = copy.deepcopy(tokenizer_of(engine))
        self.chat_template = chat.chat_template if chat is not None else None
        self._lock = threading.Lock()

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        # Mistral's own tokenizers have none: they write no control token that a text names.
        return getattr(self.tokenizer, "added_tokens_decoder", {})

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        with self._lock:
            return self.tokenizer.apply_chat_template(
                conversation, chat_template=self.chat_template, **options
            )

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: list[int]) -> str:
        with self._lock:
            text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
            return text
