"""/judge and /judge/rank: which of several responses is best. The response of the latter is `report.Tournament`."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from judge.messages import Message
from judge.prompts import Question
from server.judge_adapters import JudgeKind
from server.schemas.alignment import JudgeOptions, JudgeSettings
from server.schemas.report import Probability, ResponseBody, Usage


class JudgeMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class PromptOrMessages(BaseModel):
    """The conversation to respond to, as `prompt` or `messages`."""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, description="A single user turn, instead of messages.")
    messages: list[Any] | None = None

    def _check_one(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, and not both")


class Conversation(PromptOrMessages):
    """The same with messages of text alone."""

    messages: list[JudgeMessage] | None = Field(None, min_length=1)

    def turns(self) -> list[Message]:
        """The conversation as messages."""
        if self.messages is None:
            return [Message(role="user", content=self.prompt or "")]
        return [Message(role=m.role, content=m.content) for m in self.messages]


class JudgePair(Conversation):
    """Two responses to the same conversation."""

    response_a: str
    response_b: str

    @model_validator(mode="after")
    def _one_conversation(self) -> "JudgePair":
        self._check_one()
        return self


class JudgeRequest(Conversation, JudgeSettings):
    """Which of two responses to the same conversation is better? One pair, or `pairs`."""

    response_a: str | None = None
    response_b: str | None = None
    pairs: list[JudgePair] | None = Field(
        None, min_length=1, max_length=256, description="Many pairs at once."
    )
    tie_band: float = Field(
        0.0, ge=0, le=0.5, description="A probability nearer to 0.5 than this is a tie."
    )
    rationale: bool = Field(False, description="Add the reasons, in words.")
    max_rationale_tokens: int = Field(128, ge=1, le=1024, description="Limit for each principle.")
    stream: bool = Field(False, description="The rationale as it is written; for one pair.")

    @model_validator(mode="after")
    def _one_pair_or_many(self) -> "JudgeRequest":
        if self.rationale and self.kind != "pairwise":
            has = "gives one letter" if self.kind == "endpoint" else "has only a score"
            raise ValueError(f"rationale: a {self.kind} judge {has}, and cannot say why")
        single = (self.prompt, self.messages, self.response_a, self.response_b)
        if self.pairs is not None:
            if any(value is not None for value in single):
                raise ValueError("give one pair or pairs, and not both")
            if self.stream:
                raise ValueError("stream is for one pair, not for pairs")
            return self
        self._check_one()
        if self.response_a is None or self.response_b is None:
            raise ValueError("response_a and response_b are both needed")
        if self.stream and not self.rationale:
            raise ValueError("stream needs rationale: a verdict comes whole")
        return self

    def questions(self) -> list[Question]:
        """The pairs, of either form of the request."""
        if self.pairs is not None:
            return [Question(pair.turns(), pair.response_a, pair.response_b) for pair in self.pairs]
        assert self.response_a is not None and self.response_b is not None
        return [Question(self.turns(), self.response_a, self.response_b)]


class RankRequest(Conversation, JudgeOptions):
    """Which of several responses to the same conversation is best?"""

    responses: list[str] = Field(min_length=1, max_length=64)

    @model_validator(mode="after")
    def _one_conversation(self) -> "RankRequest":
        self._check_one()
        if self.strategy == "adaptive":
            raise ValueError("strategy: adaptive decides what to draw, and these are drawn already")
        return self


class VerdictBody(ResponseBody):
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


class PairsResponse(ResponseBody):
    """The verdicts on `pairs`, in their order."""

    verdicts: list[PairVerdict]
    usage: Usage


class LoadedJudge(ResponseBody):
    """A judge of this server."""

    kind: JudgeKind = Field(description="What a request names as `kind`.")
    principles: list[str] = Field(
        description="What it can judge by; without `principles` in a request, the first. Of judges that score: none."
    )


class JudgeList(ResponseBody):
    """All judges of this server."""

    object: Literal["list"]
    data: list[LoadedJudge]
