"""Requests of the routes that generate text: vLLM's, plus `alignment`.

`middleware.alignment` removes `alignment` before a body is parsed: the field is here for the API's docs.
"""

from typing import ClassVar

from pydantic import Field

from server.engine import (
    AnthropicMessagesRequest,
    ChatCompletionRequest,
    CompletionRequest,
    ResponsesRequest,
)
from server.schemas.alignment import AlignmentOptions

ALIGNMENT = "Which proxy aligns the response, and how; whether a judge chooses among samples."


class ChatRequest(ChatCompletionRequest):
    """vLLM's chat request, plus `alignment`."""

    field_names: ClassVar[set[str] | None] = None  # vLLM's cache must not be shared with the parent

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class TextRequest(CompletionRequest):
    """vLLM's completion request, plus `alignment`."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class ResponseRequest(ResponsesRequest):
    """vLLM's request of a response, plus `alignment`."""

    field_names: ClassVar[set[str] | None] = None

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)


class MessageRequest(AnthropicMessagesRequest):
    """vLLM's request in Anthropic's API, plus `alignment`."""

    alignment: AlignmentOptions | None = Field(None, description=ALIGNMENT)
