"""/proxies: the loaded proxies, and what is learned while serving."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from judge.feedback import Source
from server.proxies import NAME_RULE, PROXY_NAME
from server.schemas.report import ResponseBody


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


class ProxyDescription(ResponseBody):
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


class ProxyList(ResponseBody):
    """All loaded versions."""

    object: Literal["list"]
    data: list[ProxyDescription]


class LearningStatus(ResponseBody):
    """What has been learned under a name."""

    object: Literal["proxy.learning"]
    name: str
    sources: list[Literal["person", "judge", "own"]] = Field(alias="from")
    live: str | None = Field(description="The version that serves; null: none.")
    last_pass: dict[str, Any] | None = Field(description="Outcome of the last pass.")
    versions: list[dict[str, Any]] = Field(
        description="The newest first: `version`, `path` below the root, and how it was trained."
    )


class LearningPasses(ResponseBody):
    """The outcomes of the passes that a request started."""

    object: Literal["proxy.learning"]
    name: str
    passes: list[dict[str, Any]] = Field(
        description="`rows`, `verdicts`, `prompts`, `callers`, `left_out`; `accuracy` on held-out verdicts; `kl`, nats "
        "a token; the new `version`, null if none was better; the `reason`; `seconds`. Or an `error`."
    )
