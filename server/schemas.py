"""The bodies of requests. Unknown keys inside our own objects are errors."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from judge.feedback import Source
from judge.messages import Message
from judge.prompts import Question
from proxy.request import Alignment, WorkerAlignment
from server.engine import (
    AnthropicMessagesRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
)
from server.judge_adapters import JudgeKind
from server.proxies import NAME_RULE, PROXY_NAME


def _no_duplicates(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError(f"a principle is named twice in {names}")
    return names


class JudgeSettings(BaseModel):
    """How answers are judged."""

    model_config = ConfigDict(extra="forbid")

    principles: Annotated[list[str], Field(min_length=1), AfterValidator(_no_duplicates)] | None = (
        Field(
            None,
            description="The principles to judge by; the majority decides. Default: the first.",
        )
    )
    kind: JudgeKind = Field(
        "pairwise",
        description="Who judges: the LLM (or its LoRA), shown both responses; or a LoRA, a proxy or "
        "a probe that scores each.",
    )
    proxy: str | None = Field(
        None,
        description="With kind `proxy`: the loaded proxy that makes the better response likelier.",
    )

    @model_validator(mode="after")
    def _proxy_of_its_kind(self) -> Self:
        if (self.kind == "proxy") != (self.proxy is not None):
            raise ValueError("kind `proxy` and the name of a proxy go together")
        return self


class JudgeOptions(JudgeSettings):
    """How samples are ranked."""

    strategy: Literal["knock-out", "final-four", "round-robin"] = Field(
        "knock-out", description="Which pairs are compared."
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of the tournament's draw; none = the request's seed, else a random one.",
    )


class AlignmentOptions(Alignment):
    """The `alignment` object of a request. Options that not every route takes say so."""

    best_of: int = Field(
        1,
        ge=1,
        le=64,
        description="Sample this many answers and return the one that the judge ranks first; with "
        "n, the best n in order. Chat only.",
    )
    judge: JudgeOptions | None = Field(None, description="Only with best_of above 1.")
    sample_timeout: float | None = Field(
        None,
        gt=0,
        description="Seconds after which a sample that is not finished drops out; only with "
        "best_of above 1.",
    )

    @model_validator(mode="after")
    def _need_samples(self) -> "AlignmentOptions":
        for option in ("judge", "sample_timeout"):
            if getattr(self, option) is not None and self.best_of == 1:
                raise ValueError(f"{option} needs samples to choose from: set best_of to 2 or more")
        return self

    def for_worker(self, name: str, version: str) -> WorkerAlignment:
        """The options for the worker, with the version that the name stands for."""
        return WorkerAlignment(
            proxy=name,
            version=version,
            strength=self.strength,
            max_rejections=self.max_rejections,
            trace=self.trace,
        )


ALIGNMENT = "Which proxy aligns the response, and how; whether a judge chooses among samples."


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, plus `alignment`.

    `middleware.alignment` removes `alignment` before the body is parsed: the field is here for the API's docs.
    """

    field_names: ClassVar[set[str] | None] = None  # vLLM's cache must not be shared with the parent

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class TextRequest(CompletionRequest):
    """vLLM's completion request, plus `alignment`, as with ChatRequest."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class ResponseRequest(ResponsesRequest):
    """vLLM's request of a response, plus `alignment`, as with ChatRequest."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class MessageRequest(AnthropicMessagesRequest):
    """vLLM's request in Anthropic's API, plus `alignment`, as with ChatRequest."""

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class LoadRequest(BaseModel):
    """Load a proxy's checkpoint while serving."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        pattern=f"^{PROXY_NAME.pattern}$",
        description=f"The name that requests will use: {NAME_RULE}.",
    )
    path: str = Field(description="The checkpoint's directory, relative to --proxy-root.")
    shadow: bool = Field(False, description="Let it score tokens without acting.")


class LearnRequest(BaseModel):
    """Learn a proxy from the verdicts in the database."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    sources: list[Source] = Field(
        ["person"],
        alias="from",
        min_length=1,
        description="Whose verdicts; a name of --learn has its own setting.",
    )


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
            raise ValueError(f"rationale: a {self.kind} judge has only a score, and cannot say why")
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
        return self


class FeedbackRequest(PromptOrMessages):
    """Which response was better: of two to a conversation, or of the choices of an earlier answer."""

    messages: list[dict[str, Any]] | None = Field(
        None, description="As in a chat request, with tool calls and turns of developers and tools."
    )
    request_id: str | None = Field(
        None, description="The `id` of an answer with several choices; with `choice`."
    )
    choice: int | None = Field(None, ge=0, description="Index of the choice that was better.")
    response_a: str | None = None
    response_b: str | None = None
    better: Literal["a", "b"] | None = None

    @model_validator(mode="after")
    def _answer_or_pair(self) -> "FeedbackRequest":
        pair = (self.prompt, self.messages, self.response_a, self.response_b, self.better)
        if self.request_id is not None:
            if self.choice is None or any(value is not None for value in pair):
                raise ValueError("with request_id give choice, and nothing else")
            return self
        if self.choice is not None:
            raise ValueError("choice needs request_id")
        self._check_one()
        if self.response_a is None or self.response_b is None or self.better is None:
            raise ValueError("give response_a, response_b and better; or request_id and choice")
        return self

    def turns(self) -> list[dict[str, Any]]:
        """The conversation as messages."""
        if self.messages is None:
            return [{"role": "user", "content": self.prompt}]
        return self.messages
