"""The `alignment` object of a request, and how answers are judged."""

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from proxy.request import MAX_PROXIES, Alignment, Strength, WorkerAlignment
from server.judge_adapters import JudgeKind
from server.proxies import ServedVersion

Strategy = Literal["knock-out", "final-four", "round-robin", "adaptive", "one-call"]


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
        description="Who judges: the LLM (or its LoRA), or another server's LLM (`endpoint`), shown "
        "both responses; or a LoRA, a proxy, a probe or a reward model that scores each.",
    )
    proxy: str | None = Field(
        None,
        description="With kind `proxy`: the loaded proxy that makes the better response likelier.",
    )
    proxies: dict[str, Strength] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PROXIES,
        description="Several, in the place of `proxy`: their scores are added, each times its strength.",
    )

    @property
    def strengths(self) -> dict[str, float]:
        """The strength of each proxy that judges, by name."""
        if self.proxies is not None:
            return self.proxies
        return {} if self.proxy is None else {self.proxy: 1.0}

    @model_validator(mode="after")
    def _proxy_of_its_kind(self) -> Self:
        if self.proxy is not None and self.proxies is not None:
            raise ValueError("give either proxy or proxies, and not both")
        if (self.kind == "proxy") != bool(self.strengths):
            raise ValueError("kind `proxy` and the name of a proxy go together")
        return self


class JudgeOptions(JudgeSettings):
    """How samples are ranked."""

    strategy: Strategy = Field(
        "knock-out",
        description="Which pairs are compared; `adaptive` draws more samples only while the next may win, "
        "`one-call` shows the judge all at once.",
    )
    rotations: int | None = Field(
        None,
        ge=1,
        le=64,
        description="With `one-call`: how often it is shown them, in rotated orders. None: as often "
        "as there are samples, so that a favour for a position cancels.",
    )
    seed: int | None = Field(
        None,
        ge=0,
        lt=2**63,
        description="Seed of the tournament's draw; none = the request's seed, else a random one.",
    )

    @model_validator(mode="after")
    def _choice_of_a_reader(self) -> Self:
        if self.rotations is not None and self.strategy != "one-call":
            raise ValueError("rotations: only with the strategy one-call")
        if self.strategy == "one-call" and self.kind != "pairwise":
            raise ValueError(
                "strategy: only the pairwise judge makes a choice in one call; an endpoint compares pairs, and "
                "judges of other kinds read each response once, whatever the strategy"
            )
        return self


class SampleJudgeOptions(JudgeOptions):
    """How samples that are being drawn are ranked."""

    prefix_tokens: int | None = Field(
        None,
        ge=1,
        le=2**20,
        description="Compare samples in the first round as soon as they have this many tokens, in "
        "the next twice as many, and so on, and stop those that lose. None: compare whole samples. "
        "With knock-out or adaptive.",
    )

    @model_validator(mode="after")
    def _prefixes_of_rounds(self) -> Self:
        if self.prefix_tokens is not None and self.strategy not in ("knock-out", "adaptive"):
            raise ValueError(
                f"prefix_tokens: {self.strategy} compares samples again that have lost: use knock-out or adaptive"
            )
        return self


class AlignmentOptions(Alignment):
    """The `alignment` object of a request. Options that not every route takes say so."""

    best_of: int = Field(
        1,
        ge=1,
        le=64,
        description="Sample this many answers and return the one that the judge ranks first; with "
        "n, the best n in order. Chat only.",
    )
    judge: SampleJudgeOptions | None = Field(None, description="Only with best_of above 1.")
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

    @model_validator(mode="after")
    def _one_or_several(self) -> "AlignmentOptions":
        for option in ("proxy", "strength"):
            if self.proxies is not None and option in self.model_fields_set:
                raise ValueError(f"proxies has names and strengths: leave out {option}")
        return self

    def for_worker(self, chosen: Mapping[ServedVersion, float]) -> WorkerAlignment:
        """The options for the worker, with the versions and strengths of the proxies."""
        options = {"max_rejections": self.max_rejections, "trace": self.trace}
        if len(chosen) == 1:
            ((proxy, strength),) = chosen.items()
            return WorkerAlignment(
                proxy=proxy.name, version=proxy.version, strength=strength, **options
            )
        return WorkerAlignment(
            proxies={proxy.name: strength for proxy, strength in chosen.items()},
            versions={proxy.name: proxy.version for proxy in chosen},
            **options,
        )
