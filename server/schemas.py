"""What a request may say. Unknown keys inside our own objects are errors."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from judge.prompts import DEFAULT_PRINCIPLE, PRINCIPLES
from proxy.request import Alignment, WorkerAlignment
from server.engine import ChatCompletionRequest, CompletionRequest
from server.proxies import PROXY_NAME


def _known_principle(name: str) -> str:
    if name not in PRINCIPLES:
        raise ValueError(f"unknown principle {name!r}; known are {sorted(PRINCIPLES)}")
    return name


def _no_duplicates(names: list[str]) -> list[str]:
    if len(set(names)) != len(names):
        raise ValueError(f"a principle is named twice in {names}")
    return names


Principles = Annotated[
    list[Annotated[str, AfterValidator(_known_principle)]],
    AfterValidator(_no_duplicates),
    Field(min_length=1, description="The principles to judge by."),
]


class JudgeOptions(BaseModel):
    """How best-of-N samples are judged."""

    model_config = ConfigDict(extra="forbid")

    principles: Principles = [DEFAULT_PRINCIPLE]
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of the tournament's draw; none = the request's seed, else a random one.",
    )


class AlignmentOptions(Alignment):
    """The `alignment` object of a request; what is not for every route says so."""

    best_of: int = Field(
        1,
        ge=1,
        le=64,
        description="Sample so many answers and return the one that wins a knock-out tournament; "
        "chat only.",
    )
    judge: JudgeOptions | None = Field(None, description="Only with best_of above 1.")

    @model_validator(mode="after")
    def _judge_needs_samples(self) -> "AlignmentOptions":
        if self.judge is not None and self.best_of == 1:
            raise ValueError("judge needs samples to choose from: set best_of to 2 or more")
        return self

    def for_worker(self, name: str, version: str) -> WorkerAlignment:
        """What the worker is told once the proxy's version is settled."""
        return WorkerAlignment(
            proxy=name,
            version=version,
            strength=self.strength,
            max_rejections=self.max_rejections,
            trace=self.trace,
        )


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, plus `alignment`.

    The gate takes `alignment` out before this is filled: it stands here for the docs.
    """

    field_names: ClassVar[set[str] | None] = None  # vLLM's cache must not be shared with the parent

    alignment: AlignmentOptions | None = None


class TextRequest(CompletionRequest):
    """vLLM's completion request, plus `alignment`, as with ChatRequest."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentOptions | None = None


class LoadRequest(BaseModel):
    """Load a proxy's checkpoint while serving."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(
        pattern=f"^{PROXY_NAME.pattern}$",
        description="What requests will ask for: letters, digits and . _ -",
    )
    path: str = Field(description="The checkpoint's directory, relative to --proxy-root.")
    shadow: bool = Field(False, description="Let it score what is said, without acting.")


class JudgeMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str


class JudgeRequest(BaseModel):
    """Which of two responses to the same conversation is better?"""

    model_config = ConfigDict(extra="forbid")

    prompt: str | None = Field(None, description="A single user turn; or else messages.")
    messages: list[JudgeMessage] | None = Field(None, min_length=1)
    response_a: str
    response_b: str
    principles: Principles = [DEFAULT_PRINCIPLE]

    @model_validator(mode="after")
    def _one_conversation(self) -> "JudgeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages, and not both")
        return self
