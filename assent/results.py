"""What the client returns: dataclasses of what the server answers. `raw` has all of it, newer fields too."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]
JudgeKind = Literal["pairwise", "likelihood", "proxy", "probe", "reward", "endpoint"]


class AssentError(Exception):
    """A request failed: the server refused it, or cannot be reached. The text is the server's message."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        """The HTTP status; None = no answer came, or the stream broke."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """How `best_of` ranks. What is None is left to the server."""

    principles: list[str] | None = None
    kind: JudgeKind | None = None
    proxy: str | None = None
    proxies: Mapping[str, float] | None = None
    """Several, and the strength of each, in the place of `proxy`."""
    strategy: Literal["knock-out", "final-four", "round-robin", "adaptive", "one-call"] | None = (
        None
    )
    """`adaptive` draws more samples only while the next may win; `one-call` shows the judge all at once."""
    seed: int | None = None
    rotations: int | None = None
    """With `one-call`: in how many orders the judge is shown them."""
    prefix_tokens: int | None = None
    """Compare samples as soon as they have so many tokens, then twice as many, and stop those that lose."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The `alignment` of a request. What is None is left to the server."""

    proxy: str | None = None
    """Name of a loaded proxy; None = the frozen LLM, or the one in the model's name."""
    strength: float | None = None
    """0 = the frozen LLM, 1 = the proxy as trained, up to 16."""
    proxies: Mapping[str, float] | None = None
    """Several that decide together, and the strength of each, in the place of `proxy` and `strength`."""
    max_rejections: int | None = None
    """At one position, before the most probable token is taken."""
    trace: bool | None = None
    """Report every token's candidates; not with `best_of`."""
    best_of: int | None = None
    """Samples that the judge ranks; the best is returned."""
    judge: JudgeOptions | None = None
    sample_timeout: float | None = None
    """Seconds after which a sample drops out."""


@dataclass(frozen=True)
class Candidate:
    """A token that the LLM proposed."""

    token: str
    token_id: int
    probability: float
    """Within the nucleus, under the frozen LLM."""
    accept_probability: float | None
    """None = it was the only candidate, and nothing was decided."""
    by_proxy: Mapping[str, float] | None = field(default=None, kw_only=True)
    """Of several proxies, each one's factor of it."""


@dataclass(frozen=True)
class TraceEntry(Candidate):
    """A token of the answer."""

    forced: bool
    """Nothing was accepted, so the most probable candidate was taken."""
    rejected: tuple[Candidate, ...]
    """Candidates that were rejected before it, in order."""


@dataclass(frozen=True)
class Ranking:
    """A tournament: all comparisons, and the order that they lead to."""

    ranking: list[int]
    """Indices of the responses, the best first."""
    winner: int
    strategy: str
    seed: int
    rounds: list[list[Json]]
    readings: list[Json]
    """Of `one-call`, instead of rounds."""
    usage: Json
    raw: Json = field(repr=False)


@dataclass(frozen=True)
class AlignmentReport:
    """What the proxy and the judge did. Counts are over all choices."""

    proxy: str | None
    version: str | None
    proxies: Mapping[str, Json] | None
    """Version and strength of each of several, whose names and versions the above join with +."""
    proposed: int | None
    accepted: int | None
    rejected: int | None
    forced: int | None
    trace_truncated: bool
    best_of: int | None
    drawn: int | None
    """Samples that were drawn; fewer than `best_of` with the strategy `adaptive`."""
    ranking: Ranking | None
    """Of `best_of`."""
    dropped: list[Json]
    """Samples of `best_of` that dropped out, and why."""
    stopped: list[Json]
    """Samples of `best_of` that had lost before they were whole: after which round and how many tokens."""
    raw: Json = field(repr=False)


@dataclass(frozen=True)
class Choice:
    """One answer to a prompt."""

    text: str
    finish_reason: str | None
    trace: tuple[TraceEntry, ...]
    message: Json = field(repr=False)
    """The whole message: tool calls, reasoning."""


@dataclass(frozen=True)
class Answer:
    """A chat completion."""

    id: str
    """For `feedback`, where it has several choices."""
    model: str
    choices: tuple[Choice, ...]
    alignment: AlignmentReport | None
    """None = no proxy, and the request had no `alignment`."""
    usage: Json | None
    raw: Json = field(repr=False)

    @property
    def text(self) -> str:
        """The first choice's."""
        return self.choices[0].text


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer."""

    text: str
    index: int
    """Of the choice."""
    trace: tuple[TraceEntry, ...] = ()
    """Of the tokens that came with it."""
    progress: Json | None = None
    """Of `best_of`: how many samples are done, how many comparisons."""


@dataclass(frozen=True)
class Verdict:
    """Which of two responses is better, by one principle."""

    winner: Literal["a", "b", "tie"]
    probability: float
    """That response a is better: the mean of both orders."""
    orders: tuple[float, float]
    """That a is better, as shown first and as shown second."""
    consistent: bool
    """Whether both orders prefer the same one."""
    rationale: str | None = None


@dataclass(frozen=True)
class PairVerdict(Verdict):
    """Which of two responses is better, by all principles."""

    principles: Mapping[str, Verdict] = field(default_factory=dict)
    truncated: bool = False
    """A text was shortened to fit the judge's context."""
    usage: Json = field(default_factory=dict)


@dataclass(frozen=True)
class ProxyInfo:
    """A version of a proxy on the server."""

    name: str
    version: str
    state: Literal["serving", "shadow", "draining", "unloaded"]
    in_flight: int
    """Requests that use it."""
    raw: Json = field(repr=False)


def read_answer(raw: Json) -> Answer:
    report = raw.get("alignment")
    traces = (report or {}).get("trace") or []
    choices = tuple(
        Choice(
            choice["message"].get("content") or "",
            choice.get("finish_reason"),
            read_trace(traces[i]) if i < len(traces) else (),
            choice["message"],
        )
        for i, choice in enumerate(raw["choices"])
    )
    alignment = None if report is None else read_report(report)
    return Answer(raw["id"], raw["model"], choices, alignment, raw.get("usage"), raw)


def read_report(raw: Json) -> AlignmentReport:
    names = (
        "proxy", "version", "proxies", "proposed", "accepted", "rejected", "forced", "best_of", "drawn",
    )  # fmt: skip
    return AlignmentReport(
        **{name: raw.get(name) for name in names},
        trace_truncated=bool(raw.get("trace_truncated")),
        ranking=read_ranking(raw["judge"]) if "judge" in raw else None,
        dropped=raw.get("dropped", []),
        stopped=raw.get("stopped", []),
        raw=raw,
    )


def read_trace(entries: list[Json]) -> tuple[TraceEntry, ...]:
    return tuple(
        TraceEntry(
            *_candidate(entry),
            entry["forced"],
            tuple(
                Candidate(*_candidate(rejected), by_proxy=rejected.get("by_proxy"))
                for rejected in entry["rejected"]
            ),
            by_proxy=entry.get("by_proxy"),
        )
        for entry in entries
    )


def _candidate(entry: Json) -> tuple[str, int, float, float | None]:
    return entry["token"], entry["token_id"], entry["probability"], entry["accept_probability"]


def read_ranking(raw: Json) -> Ranking:
    names = ("ranking", "winner", "strategy", "seed", "rounds", "readings", "usage")
    return Ranking(**{name: raw[name] for name in names}, raw=raw)


def read_pair_verdict(raw: Json) -> PairVerdict:
    principles = {name: Verdict(**_verdict(each)) for name, each in raw["principles"].items()}
    extra = {"principles": principles, "truncated": raw["truncated"], "usage": raw.get("usage", {})}
    return PairVerdict(**_verdict(raw), **extra)


def _verdict(raw: Json) -> Json:
    names = ("winner", "probability", "consistent")
    found = {name: raw[name] for name in names}
    return found | {"orders": tuple(raw["orders"]), "rationale": raw.get("rationale")}


def read_proxy(raw: Json) -> ProxyInfo:
    return ProxyInfo(raw["name"], raw["version"], raw["state"], raw["in_flight"], raw)
