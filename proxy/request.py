"""What a request may ask of a proxy, and the contract between the server or trainer and the worker.

The server validates `Alignment` at admission, pins the proxy's version, and puts `to_extra_args()`
into vLLM's `SamplingParams.extra_args`; the worker finds it there with `alignment_of`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

EXTRA_ARGS_KEY = "alignment"
MAX_PROXIES = 8
"""Proxies that may decide one request together."""
TRACE_TOKENS = 4096
"""Tokens of a request that are traced; later ones are not."""
TRACED_REQUESTS = 1024
"""Requests whose traces wait to be taken; beyond it the oldest are dropped."""
READ_SAMPLING_PARAMS = {
    "max_tokens": 1,
    "temperature": 0.0,
    "detokenize": False,
    "skip_reading_prefix_cache": True,  # cached tokens have no hidden states
}
"""vLLM's sampling parameters of a request with `read`: a prefill whose token nobody wants."""

# vLLM's ids: the caller's id and 8 hex digits; the i-th of n samples has "i_" in front.
_CHILD_PREFIX = re.compile(r"^\d+_")
_RANDOM_SUFFIX = re.compile(r"-[0-9a-f]{8}$")


Strength = Annotated[float, Field(ge=0.0, le=16.0, allow_inf_nan=False)]


class Alignment(BaseModel):
    """Which proxies decide a request's tokens, and how strictly."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    proxy: str | None = Field(None, description="Name of a loaded proxy; none = the frozen LLM.")
    strength: Strength = Field(
        1.0, description="Accept with probability a^strength: 0 = the frozen LLM, 1 = as trained."
    )
    proxies: dict[str, Strength] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PROXIES,
        description="Several loaded proxies, each with its strength, in the place of `proxy` and "
        "`strength`: a token is accepted with the product of their probabilities.",
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

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each proxy, by name; {} = the frozen LLM."""
        if self.proxies is not None:
            return self.proxies
        return {} if self.proxy is None else {self.proxy: self.strength}


class ReadRequest(BaseModel):
    """Asks the worker to read the response at the end of the prompt, with this nucleus."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=1, description="Where the response begins, in tokens.")
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_k: int = Field(ge=0)
    top_p: float = Field(gt=0, le=1)
    max_candidates: int = Field(gt=0, le=1024)


class ScoreRequest(BaseModel):
    """Asks the worker to have the probe score the response at the end of the prompt."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: int = Field(ge=1, description="Where the response begins, in tokens.")


class WorkerAlignment(Alignment):
    """An `Alignment` with the server's additions, as the worker receives it."""

    version: str | None = Field(
        None, description="The proxy's content hash; none = the version that the name is bound to."
    )
    versions: dict[str, str] | None = Field(None, description="The same for each of `proxies`.")
    read: ReadRequest | ScoreRequest | None = Field(
        None, description="What is to be read (`proxy.engine.reading`)."
    )
    shadow: bool = Field(True, description="Whether shadow proxies may score this request.")

    @property
    def acts(self) -> bool:
        """Whether a proxy decides; strength 0 is the frozen LLM's own sampling."""
        return any(strength > 0 for strength in self.strengths.values())

    def version_of(self, name: str) -> str | None:
        """The version that a request wants of one of its proxies."""
        return self.version if self.proxies is None else (self.versions or {}).get(name)

    def to_extra_args(self) -> dict[str, Any]:
        """The entry for `SamplingParams.extra_args`: plain JSON values."""
        return {EXTRA_ARGS_KEY: self.model_dump()}


def alignment_of(extra_args: Mapping[str, Any] | None) -> WorkerAlignment:
    """The alignment in `SamplingParams.extra_args`; if there is none, one without a proxy.

    Never raises: an exception in the worker would end the engine, and some routes take raw
    extra arguments from clients. Invalid arguments mean sampling without a proxy.
    """
    fields = extra_args.get(EXTRA_ARGS_KEY) if isinstance(extra_args, Mapping) else None
    if fields is None:
        return WorkerAlignment.model_construct()
    try:
        return WorkerAlignment.model_validate(fields)
    except (ValidationError, RecursionError):
        return WorkerAlignment.model_construct()


def caller_id(engine_id: str) -> str:
    """The id that the caller gave to the engine, from the engine's own id."""
    return _RANDOM_SUFFIX.sub("", _CHILD_PREFIX.sub("", engine_id))


def sample_index(engine_id: str) -> int:
    """Which of the n samples of a request it is, from the engine's own id; 0 where n is 1."""
    prefix = _CHILD_PREFIX.match(engine_id)
    return int(prefix[0][:-1]) if prefix else 0
