"""Responses of the routes that generate text: vLLM's, with what the proxy and the judge did."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from server.engine import (
    AnthropicMessagesResponse,
    ChatCompletionResponse,
    CompletionResponse,
    ResponsesResponse,
)
from server.schemas.alignment import Strategy

Probability = float


class ResponseBody(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Usage(ResponseBody):
    """Tokens spent on judging."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TracedCandidate(ResponseBody):
    """A candidate that the LLM proposed at a position."""

    token: str
    token_id: int
    probability: Probability = Field(
        description="The LLM's, within the nucleus, at the temperature of the proxy's training."
    )
    accept_probability: Probability | None = Field(
        description="After the strength; null where it was the only candidate, which no proxy is asked about."
    )
    by_proxy: dict[str, Probability] | None = Field(
        None, description="Of several proxies: the factor of each."
    )


class TracedToken(TracedCandidate):
    """An emitted token, and what was rejected before it."""

    forced: bool = Field(
        description="Nothing was accepted: the most probable candidate was emitted."
    )
    rejected: list[TracedCandidate] = Field(description="In order of proposal.")


class Comparison(ResponseBody):
    """One comparison of two samples."""

    pair: tuple[int, int] = Field(description="Indices of the samples.")
    orders: dict[str, tuple[Probability, Probability]] = Field(
        description="By principle: that the first one is better, when it was shown first, and when second."
    )
    probability: Probability = Field(description="Their mean.")
    winner: int = Field(description="Index of a sample.")
    truncated: bool = Field(description="A text was shortened to fit the judge's context.")
    tokens: int | None = Field(
        description="How many tokens of each sample were read; null: all of it."
    )


class Reading(ResponseBody):
    """One choice among all samples."""

    order: list[int] = Field(description="Indices of the samples, as they were shown.")
    probabilities: dict[str, list[Probability]] = Field(
        description="By principle: that each is the best, in this order."
    )
    truncated: bool


class Tournament(ResponseBody):
    """Everything that happened in a ranking. `judge.tournament.replay` repeats it without a model."""

    strategy: Strategy
    seed: int
    num: int = Field(description="Number of samples.")
    ranking: list[int] = Field(
        description="Indices of the samples, the best first; without those that were never drawn."
    )
    rounds: list[list[Comparison]]
    readings: list[Reading] = Field(
        description="Of `one-call`: the choices among all samples, instead of rounds."
    )
    winner: int
    usage: Usage


class JudgeRecord(Tournament):
    """The tournament of a best-of-N request, and who judged."""

    kind: str
    principles: list[str]


class DroppedSample(ResponseBody):
    """A sample that took no part in the tournament."""

    index: int
    reason: str


class ProxyShare(ResponseBody):
    """One of several proxies that decided together."""

    version: str
    strength: float


class StoppedSample(ResponseBody):
    """A sample that had lost before it was whole. Its tokens are in `usage`."""

    index: int
    round: int = Field(description="The tournament's round, from 1, after which it was stopped.")
    tokens: int = Field(description="How many had been generated.")


class AlignmentStats(ResponseBody):
    """What the proxy and the judge did. Counts are over all samples."""

    proxy: str | None = Field(description="null: the frozen LLM answered.")
    version: str | None = Field(description="Hash of the checkpoint's content.")
    proxies: dict[str, ProxyShare] | None = Field(
        None,
        description="Only of several, whose names and versions `proxy` and `version` join with +.",
    )
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
    best_of: int | None = Field(None, description="Only with `best_of` above 1, as the next four.")
    drawn: int | None = Field(
        None, description="Samples that were drawn: fewer where the strategy is `adaptive`."
    )
    stopped: list[StoppedSample] | None = None
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
