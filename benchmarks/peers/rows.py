"""The rows of the tables. A new way to answer is a line here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from benchmarks.peers.args import args
from benchmarks.peers.cards import cards
from benchmarks.peers.decoders import Decode, Lab
from benchmarks.peers.engine import Open, assent, likeliest
from benchmarks.peers.genarm import genarm
from benchmarks.peers.its_hub import its_hub
from benchmarks.peers.optillm import optillm
from benchmarks.peers.reference import best_of, sampled
from benchmarks.peers.setting import N, PeerName, Setting, WorldName
from benchmarks.peers.worlds import World
from training.console import TrainingError


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A row over HTTP, on the one engine."""

    title: str
    open: Open
    peer: PeerName | None = None
    """The package that it needs."""
    only: WorldName | None = None
    needs_judge: bool = False
    """Whether `trained_judge` makes its judge."""
    is_costly: bool = False
    """Whether it reads or writes thousands of tokens for each prompt."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A row in transformers."""

    title: str
    make: Callable[[Lab, World], Decode]


RowT = TypeVar("RowT")
BEST_OF = "best-of"
"""What all serving rows are timed against."""
SERVING: dict[str, Serving] = {
    "plain": Serving(title="plain", open=assent()),
    "system": Serving(title="plain, system prompt", open=assent(with_wish=True), only="smollm2"),
    "likeliest": Serving(title=f"plain {N}, best mean log-probability", open=likeliest(N)),
    "proxy": Serving(title="**proxy**", open=assent(with_proxy=True)),
    BEST_OF: Serving(
        title=f"**best of {N}**, self-judge",
        open=assent(alignment=lambda world: {"best_of": N}),
        is_costly=True,
    ),
    "best-of-5": Serving(
        title="best of 5, self-judge",
        open=assent(alignment=lambda world: {"best_of": 5}),
        is_costly=True,
    ),
    "adaptive": Serving(
        title=f"best of {N}, adaptive",
        open=assent(alignment=lambda world: {"best_of": N, "judge": {"strategy": "adaptive"}}),
        is_costly=True,
    ),
    "prefixes": Serving(
        title=f"best of {N}, judged from 12 tokens on",
        open=assent(alignment=lambda world: {"best_of": N, "judge": {"prefix_tokens": 12}}),
        is_costly=True,
    ),
    "one-call": Serving(
        title=f"best of {N}, one call in {N} orders",
        open=assent(alignment=lambda world: {"best_of": N, "judge": {"strategy": "one-call"}}),
        is_costly=True,
    ),
    "best-of-by-proxy": Serving(
        title=f"**best of {N}**, the proxy as judge",
        open=assent(
            alignment=lambda world: {
                "best_of": N,
                "judge": {"kind": "proxy", "proxy": world.proxy_name},
            }
        ),
    ),
    "probe": Serving(
        title=f"**best of {N}**, a probe as judge",
        open=assent(alignment=lambda world: {"best_of": N, "judge": {"kind": "probe"}}),
        only="smollm2",
        needs_judge=True,
    ),
    "probe-adaptive": Serving(
        title=f"best of {N}, adaptive, a probe as judge",
        open=assent(
            alignment=lambda world: {
                "best_of": N,
                "judge": {"kind": "probe", "strategy": "adaptive"},
            }
        ),
        only="smollm2",
        needs_judge=True,
    ),
    "proxy-best-of": Serving(
        title=f"**proxy and best of {N}**, self-judge",
        open=assent(with_proxy=True, alignment=lambda world: {"best_of": N}),
        is_costly=True,
    ),
    "optillm-bon": Serving(
        title=f"optillm `bon`, {N}", open=optillm("bon"), peer="optillm", is_costly=True
    ),
    "optillm-moa": Serving(
        title="optillm `moa`", open=optillm("moa"), peer="optillm", is_costly=True
    ),
    "its-own": Serving(
        title=f"its_hub best of {N}, its judge", open=its_hub("own"), peer="its_hub", is_costly=True
    ),
    "its-rank": Serving(
        title=f"its_hub best of {N}, `/judge/rank` as its reward",
        open=its_hub("rank"),
        peer="its_hub",
        is_costly=True,
    ),
}
DECODING_BEST_OF = "reward-best-of"
"""What all rows in transformers are timed against."""
DECODING: dict[str, Decoding] = {
    "sampled": Decoding(title="plain", make=lambda lab, world: sampled(lab)),
    "sampled-proxy": Decoding(title="**proxy**", make=lambda lab, world: sampled(lab, world.proxy)),
    DECODING_BEST_OF: Decoding(
        title=f"best of {N} by the reward", make=lambda lab, world: best_of(lab)
    ),
    "args": Decoding(title="ARGS, k 10, w 1.5", make=lambda lab, world: args(lab)),
    "args-weak": Decoding(title="ARGS, k 10, w 0.3", make=lambda lab, world: args(lab, weight=0.3)),
    "cards": Decoding(title="CARDS", make=lambda lab, world: cards(lab)),
    "genarm": Decoding(title="GenARM, w 1", make=lambda lab, world: genarm(lab, weight=1.0)),
    "genarm-strong": Decoding(title="GenARM, w 2", make=lambda lab, world: genarm(lab, weight=2.0)),
    "genarm-accept": Decoding(
        title="GenARM, w 1, as accept probabilities",
        make=lambda lab, world: genarm(lab, weight=1.0, law="accept"),
    ),
}


def serving_rows(setting: Setting) -> dict[str, Serving]:
    """The chosen rows that this world and the installed peers allow.

    Raises:
        TrainingError: a name is unknown.
    """
    unknown = {*setting.rows} - {*SERVING, *DECODING}
    if unknown:
        known = ", ".join([*SERVING, *DECODING])
        raise TrainingError(f"--rows {' '.join(sorted(unknown))}: unknown; known are {known}")
    rows = {
        name: row
        for name, row in SERVING.items()
        if _chosen(setting, name, BEST_OF)
        and row.only in (None, setting.world)
        and (row.peer is None or row.peer in setting.environments)
    }
    return _unless_alone(rows, BEST_OF)


def decoding_rows(setting: Setting) -> dict[str, Decoding]:
    """The chosen rows in transformers."""
    rows = {n: row for n, row in DECODING.items() if _chosen(setting, n, DECODING_BEST_OF)}
    return _unless_alone(rows, DECODING_BEST_OF)


def _chosen(setting: Setting, name: str, reference: str) -> bool:
    return not setting.rows or name in setting.rows or name == reference


def _unless_alone(rows: dict[str, RowT], reference: str) -> dict[str, RowT]:
    """Without any other row there is nothing to time the reference against."""
    return rows if {*rows} - {reference} else {}
