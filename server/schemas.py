"""What a request may say. Unknown keys inside our own objects are errors."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from judge.prompts import DEFAULT_PRINCIPLE, PRINCIPLES
from proxy.request import EXTRA_ARGS_KEY, Alignment
from server.engine import ChatCompletionRequest


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
    """The `alignment` object of a chat request."""

    best_of: int = Field(
        1,
        ge=1,
        le=64,
        description="Sample so many answers and return the one that wins a knock-out tournament.",
    )
    judge: JudgeOptions | None = Field(None, description="Only with best_of above 1.")

    @model_validator(mode="after")
    def _judge_needs_samples(self) -> "AlignmentOptions":
        if self.judge is not None and self.best_of == 1:
            raise ValueError("judge needs samples to choose from: set best_of to 2 or more")
        return self

    def for_proxy(self, name: str) -> Alignment:
        """What the worker is told."""
        return Alignment(proxy=name, strength=self.strength, max_rejections=self.max_rejections)


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, plus `alignment`."""

    field_names: ClassVar[set[str] | None] = None  # vLLM's cache must not be shared with the parent

    alignment: AlignmentOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _alignment_has_one_way_in(cls, data: Any) -> Any:
        xargs = data.get("vllm_xargs") if isinstance(data, dict) else None
        if isinstance(xargs, dict) and EXTRA_ARGS_KEY in xargs:
            raise ValueError(
                f"vllm_xargs.{EXTRA_ARGS_KEY} is reserved: "
                f"send the `{EXTRA_ARGS_KEY}` object instead"
            )
        return data


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
