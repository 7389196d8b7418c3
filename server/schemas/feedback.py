"""/feedback: what people chose."""

from typing import Any, Literal

from pydantic import Field, model_validator

from server.schemas.judge import PromptOrMessages
from server.schemas.report import ResponseBody


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


class FeedbackKept(ResponseBody):
    """The choice is on the disk."""

    kept: Literal[True]


class FeedbackCounts(ResponseBody):
    """The preferences kept of the caller."""

    enabled: bool = Field(description="Whether this server keeps feedback.")
    person: int = Field(description="A person's choices.")
    judge: int = Field(description="The judge's verdicts.")
    database: str | None = Field(
        None, description="Its address without the password; for administrators."
    )


class ForgottenRows(ResponseBody):
    """How much was deleted."""

    preferences: int
    answers: int
    versions: int = Field(description="Versions of proxies that were learned from them.")


class Forgotten(ResponseBody):
    """What was kept of the caller is deleted."""

    forgotten: ForgottenRows
