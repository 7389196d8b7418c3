"""Prometheus counters of the worker: what the proxies did to the text.

    assent_tokens_aligned_total{proxy}        tokens emitted under a proxy
    assent_candidates_proposed_total{proxy}   candidates put to it, the accepted ones included
    assent_candidates_rejected_total{proxy}   candidates it threw away
    assent_candidates_forced_total{proxy}     tokens emitted because it accepted none

The worker is a process of its own: the server sets PROMETHEUS_MULTIPROC_DIR before anything
imports prometheus_client, and the numbers appear on its /metrics.
"""

from functools import cache
from typing import NamedTuple

from prometheus_client import Counter


class _Counters(NamedTuple):
    tokens: Counter
    proposed: Counter
    rejected: Counter
    forced: Counter


@cache  # a name can be registered only once in a process, whatever number of engines it holds
def _counters() -> _Counters:
    return _Counters(
        Counter("assent_tokens_aligned", "Tokens emitted under a proxy.", ["proxy"]),
        Counter("assent_candidates_proposed", "Candidates put to a proxy.", ["proxy"]),
        Counter("assent_candidates_rejected", "Candidates that a proxy rejected.", ["proxy"]),
        Counter(
            "assent_candidates_forced",
            "Tokens emitted because a proxy accepted no candidate.",
            ["proxy"],
        ),
    )


def add(proxy: str, *, tokens: int, proposed: int, forced: int) -> None:
    """Add what one proxy did since the last call."""
    counters = _counters()
    counters.tokens.labels(proxy).inc(tokens)
    counters.proposed.labels(proxy).inc(proposed)
    counters.rejected.labels(proxy).inc(proposed - (tokens - forced))
    counters.forced.labels(proxy).inc(forced)
