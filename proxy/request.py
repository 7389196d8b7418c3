"""What a request may ask of the proxy, and how it travels to the worker.

The server validates `Alignment` at admission, pins the proxy's version, and puts `to_extra_args()`
into vLLM's `SamplingParams.extra_args`; the worker finds it there with `alignment_of`.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

EXTRA_ARGS_KEY = "alignment"


class Alignment(BaseModel):
    """Which proxy speaks in a request, and how strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxy: str | None = Field(None, description="Name of a loaded proxy; none = the frozen LLM.")
    strength: float = Field(
        1.0,
        ge=0.0,
        le=16.0,
        allow_inf_nan=False,
        description="Accept with probability a^strength: 0 = the frozen LLM, 1 = as trained.",
    )
    max_rejections: int | None = Field(
        None,
        ge=0,
        le=1024,
        description="Rejections at one position before the LLM's most probable token is taken; "
        "none = the proxy's own number.",
    )
    trace: bool = Field(
        False, description="Report every token's candidates: what was rejected, and how likely."
    )


class ReadRequest(BaseModel):
    """That a response at the end of the prompt is to be read, and which nucleus is meant."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=1, description="Where the response begins, in tokens.")
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_k: int = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_candidates: int = Field(gt=0, le=1024)


class WorkerAlignment(Alignment):
    """The same with what the server adds: the worker's part of a request."""

    version: str | None = Field(
        None, description="The proxy's content hash; none = what the name stands for just now."
    )
    read: ReadRequest | None = Field(None, description="What is to be read (`proxy.reading`).")
    shadow: bool = Field(True, description="Whether shadow proxies may score this request.")

    @property
    def acts(self) -> bool:
        """Whether a proxy decides; strength 0 is the frozen LLM's own draw."""
        return self.proxy is not None and self.strength > 0

    def to_extra_args(self) -> dict[str, Any]:
        """The entry for `SamplingParams.extra_args`: plain JSON values."""
        return {EXTRA_ARGS_KEY: self.model_dump()}


def alignment_of(extra_args: Mapping[str, Any] | None) -> WorkerAlignment:
    """The alignment found in `SamplingParams.extra_args`; plain sampling if there is none.

    Never raises: an exception in the worker would end the engine, and some routes take raw
    extra arguments from clients. What cannot be understood is plain sampling.
    """
    found = extra_args.get(EXTRA_ARGS_KEY) if isinstance(extra_args, Mapping) else None
    if found is None:
        return WorkerAlignment.model_construct()
    try:
        return WorkerAlignment.model_validate(found)
    except (ValidationError, RecursionError):
        return WorkerAlignment.model_construct()
