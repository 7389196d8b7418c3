"""The bodies of responses, for the OpenAPI document alone: no response passes through them. Tests compare both."""

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.engine import (
    AnthropicMessagesResponse,
    ChatCompletionResponse,
    CompletionResponse,
    ResponsesResponse,
)

Probability = float


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(_Body):
    """Tokens spent on judging."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


# --- alignment of a chat or completion ---


class TracedCandidate(_Body):
    """A candidate that the LLM proposed at a position."""

    token: str
    token_id: int
    probability: Probability = Field(
        description="The LLM's, within the nucleus, at the temperature of the proxy's training."
    )
    accept_probability: Probability | None = Field(
        description="After the strength; null where it was the only candidate, which no proxy is asked about."
    )


class TracedToken(TracedCandidate):
    """An emitted token, and what was rejected before it."""

    forced: bool = Field(
        description="Nothing was accepted: the most probable candidate was emitted."
    )
    rejected: list[TracedCandidate] = Field(description="In order of proposal.")


class Comparison(_Body):
    """One comparison of two samples."""

    pair: tuple[int, int] = Field(description="Indices of the samples.")
    orders: dict[str, tuple[Probability, Probability]] = Field(
        description="By principle: that the first one is better, when it was shown first, and when second."
    )
    probability: Probability = Field(description="Their mean.")
    winner: int = Field(description="Index of a sample.")
    truncated: bool = Field(description="A text was shortened to fit the judge's context.")


class Tournament(_Body):
    """Everything that happened in a ranking. `judge.tournament.replay` repeats it without a model."""

    strategy: Literal["knock-out", "final-four", "round-robin"]
    seed: int
    num: int = Field(description="Number of samples.")
    ranking: list[int] = Field(description="Indices of the samples, the best first.")
    rounds: list[list[Comparison]]
    winner: int
    usage: Usage


class JudgeRecord(Tournament):
    """The tournament of a best-of-N request, and who judged."""

    kind: str
    principles: list[str]


class DroppedSample(_Body):
    """A sample that took no part in the tournament."""

    index: int
    reason: str


class AlignmentStats(_Body):
    """What the proxy and the judge did. Counts are over all samples."""

    proxy: str | None = Field(description="null: the frozen LLM answered.")
    version: str | None = Field(description="Hash of the checkpoint's content.")
    proposed: int | None = Field(
        None,
        description="Candidates proposed to the proxy. Counts are there if the request has an "
        "`alignment` object, be it empty.",
    )
    accepted: int | None = None
    rejected: int | None = None
    forced: int | None = Field(
        None, description="Tokens emitted because no candidate was accepted."
    )
    trace: list[list[TracedToken]] | None = Field(
        None, description="Only with `trace`: one list of tokens for each choice."
    )
    trace_truncated: bool | None = Field(
        None, description="Only with `trace`: there were more tokens than are traced."
    )
    best_of: int | None = Field(None, description="Only with `best_of` above 1, as the next two.")
    dropped: list[DroppedSample] | None = None
    judge: JudgeRecord | None = None


class ChatResponse(ChatCompletionResponse):
    """vLLM's chat completion, with `alignment` if a proxy or a judge took part."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentStats | None = None


class TextResponse(CompletionResponse):
    """vLLM's completion, with `alignment` if a proxy took part."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentStats | None = None


class ResponseObject(ResponsesResponse):
    """vLLM's response, with `alignment` if a proxy took part."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentStats | None = None


class MessageResponse(AnthropicMessagesResponse):
    """vLLM's message in Anthropic's API, with `alignment` if a proxy took part."""

    alignment: AlignmentStats | None = None


# --- judge ---


class VerdictBody(_Body):
    """Which of two responses is better."""

    winner: Literal["a", "b", "tie"] = Field(
        description="`tie` where the two orders disagree, or within `tie_band`."
    )
    probability: Probability = Field(description="That `response_a` is better: mean of the orders.")
    orders: tuple[Probability, Probability] = Field(
        description="The same, when it was shown first, and when it was shown second."
    )
    consistent: bool = Field(description="Both orders prefer the same response.")


class PrincipleVerdict(VerdictBody):
    """The verdict by one principle."""

    rationale: str | None = Field(None, description="Only with `rationale`.")


class PairVerdict(VerdictBody):
    """The verdict by all principles: that of the majority."""

    truncated: bool = Field(description="A text was shortened to fit the judge's context.")
    principles: dict[str, PrincipleVerdict]


class PairResponse(PairVerdict):
    """The verdict on one pair."""

    usage: Usage


class PairsResponse(_Body):
    """The verdicts on `pairs`, in their order."""

    verdicts: list[PairVerdict]
    usage: Usage


# --- proxies ---


class ProxyDescription(_Body):
    """One version of a proxy."""

    object: Literal["proxy"]
    name: str
    version: str = Field(description="Hash of the checkpoint's content.")
    state: Literal["serving", "shadow", "draining", "unloaded"] = Field(
        description="`draining`: replaced or unloaded, and still used by requests."
    )
    in_flight: int = Field(description="Requests that use it now.")
    directory: str | None = Field(None, description="Where its files are; for administrators.")
    max_candidates: int
    max_rejections: int
    temperature: float = Field(description="T₀, the temperature of its training.")
    top_k: int
    top_p: float
    num_parameters: int
    num_bytes: int = Field(description="Memory of its tensors on each rank.")
    base: dict[str, Any] = Field(description="The LLM that it was trained for.")
    training: dict[str, Any] = Field(description="How it was trained, and its last metrics.")


class LoadedProxy(ProxyDescription):
    """A version that was just loaded."""

    remembered: bool = Field(
        description="A restart, and other servers of this root, will load it too."
    )


class ProxyList(_Body):
    """All loaded versions."""

    object: Literal["list"]
    data: list[ProxyDescription]


class LearningStatus(_Body):
    """What has been learned under a name."""

    object: Literal["proxy.learning"]
    name: str
    sources: list[Literal["person", "judge", "own"]] = Field(alias="from")
    live: str | None = Field(description="The version that serves; null: none.")
    last_pass: dict[str, Any] | None = Field(description="Outcome of the last pass.")
    versions: list[dict[str, Any]] = Field(
        description="The newest first: `version`, `path` below the root, and how it was trained."
    )


class LearningPasses(_Body):
    """The outcomes of the passes that a request started."""

    object: Literal["proxy.learning"]
    name: str
    passes: list[dict[str, Any]] = Field(
        description="`rows`, `verdicts`, `prompts`, `callers`, `left_out`; `accuracy` on held-out verdicts; `kl`, nats "
        "a token; the new `version`, null if none was better; the `reason`; `seconds`. Or an `error`."
    )


# --- feedback ---


class FeedbackKept(_Body):
    """The choice is on the disk."""

    kept: Literal[True]


class FeedbackCounts(_Body):
    """The preferences kept of the caller."""

    enabled: bool = Field(description="Whether this server keeps feedback.")
    person: int = Field(description="A person's choices.")
    judge: int = Field(description="The judge's verdicts.")
    database: str | None = Field(
        None, description="Its address without the password; for administrators."
    )


class ForgottenRows(_Body):
    """How much was deleted."""

    preferences: int
    answers: int
    versions: int = Field(description="Versions of proxies that were learned from them.")


class Forgotten(_Body):
    """What was kept of the caller is deleted."""

    forgotten: ForgottenRows
