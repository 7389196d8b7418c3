"""Judges on other servers: the files of `--judge FILE.toml`.

    kind = "reward"                      # a reward model, such as one that `vllm serve --runner pooling` hosts
    url = "http://127.0.0.1:8001"        # /classify is below it
    model = "Skywork-Reward-V2"

    kind = "endpoint"                    # an LLM behind an OpenAI-compatible API
    url = "https://api.openai.com/v1"    # /chat/completions is below it
    model = "gpt-4.1-mini"
    api_key_env = "OPENAI_API_KEY"

The operator names the server; no request can.
"""

import tomllib
from collections.abc import Iterable, MutableMapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic import HttpUrl as _HttpUrl

from judge.options import Positive

SUFFIX = ".toml"

RemoteKind = Literal["reward", "endpoint"]


class RemoteJudgeError(ValueError):
    """A file cannot be used; the message names it and the field."""


def _check_url(url: _HttpUrl) -> _HttpUrl:
    if url.username or url.password or url.query or url.fragment:
        raise ValueError("must be an address alone: a key belongs into a variable, api_key_env")
    return url


class _RemoteJudge(BaseModel):
    """What both kinds have."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    url: Annotated[_HttpUrl, AfterValidator(_check_url)]
    model: str = Field(min_length=1)
    """The model's name on that server."""
    api_key_env: str | None = None
    """The variable that holds the key; None = the server needs none."""
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    """Limit of what the model reads, by the hosted LLM's tokenizer; None = the hosted LLM's context."""
    timeout: Positive = 60.0
    """Seconds for one judgment, a repeated one too."""
    concurrency: Annotated[int, Field(ge=1)] = 16
    """Judgments under way at once."""
    extra_body: dict[str, Any] = {}
    """More fields of every request, such as `chat_template_kwargs`."""


class RewardModel(_RemoteJudge):
    """A sequence-classification model with one label."""

    kind: Literal["reward"]
    api: Literal["classify", "score"] = "classify"
    """`classify` sends a chat, which that server renders by its template; `score` two texts, as rerankers read them."""
    beta: Positive = 1.0
    """A difference of rewards is multiplied by it; 1 for a Bradley–Terry model."""


class Endpoint(_RemoteJudge):
    """An LLM that answers A or B, with the log-probabilities of its likeliest tokens."""

    kind: Literal["endpoint"]
    top_logprobs: Annotated[int, Field(ge=2, le=100)] = 20
    """Likeliest tokens to ask for; many servers give 20 at most."""
    continue_final_message: bool = False
    """Whether the server continues an assistant's message, as vLLM and SGLang do: the judge prompt is then that of the
    pairwise judge. If not, its question asks for the letter."""


RemoteJudge = RewardModel | Endpoint
_ADAPTER: TypeAdapter[RemoteJudge] = TypeAdapter(
    Annotated[RewardModel | Endpoint, Field(discriminator="kind")]
)


def read_remote_judges(files: Sequence[Path]) -> dict[RemoteKind, RemoteJudge]:
    """The judges that these files describe, by kind.

    Raises:
        RemoteJudgeError: one cannot be read or has a wrong field, or there are two of a kind.
    """
    judges: dict[RemoteKind, RemoteJudge] = {}
    for file in files:
        judge = _read(file)
        if judge.kind in judges:
            raise RemoteJudgeError(f"{file}: there is another judge of kind {judge.kind}: name one")
        judges[judge.kind] = judge
    return judges


def take_keys(
    judges: Iterable[RemoteJudge], environment: MutableMapping[str, str]
) -> dict[str, str]:
    """Their API keys by variable; they are removed from the environment, which child processes inherit.

    Raises:
        RemoteJudgeError: a variable is not set.
    """
    names = {judge.api_key_env for judge in judges} - {None}
    keys = {name: environment.pop(name, "").strip() for name in names if name is not None}
    for name, key in keys.items():
        if not key:
            raise RemoteJudgeError(f"--judge: the environment variable {name} is not set")
    return keys


def _read(file: Path) -> RemoteJudge:
    try:
        return _ADAPTER.validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # Without the kind, by which pydantic names the alternatives.
        where = ".".join(map(str, first["loc"][1:])) or "kind"
        raise RemoteJudgeError(f"--judge {file}: {where}: {first['msg']}") from None
    except (OSError, ValueError) as error:
        raise RemoteJudgeError(f"--judge {file}: {error}") from None
