"""Prometheus counters of the worker.

    assent_tokens_aligned_total{proxy,version}       tokens emitted under a proxy
    assent_candidates_proposed_total{proxy,version}  candidates put to it, the accepted ones included
    assent_candidates_rejected_total{proxy,version}  candidates it rejected
    assent_candidates_forced_total{proxy,version}    tokens emitted although it accepted none
    assent_shadow_tokens_total{proxy,version}        tokens that a shadow proxy scored
    assent_shadow_changed_total{proxy,version}       tokens that it would have replaced
    assent_hook_steps_total                          steps in which a proxy decided anything
    assent_hook_seconds_total                        host time that the hook took in them

A request of several proxies counts for each of them: tokens, candidates and rejections are those of all together.

After MAX_VERSIONS versions further ones are counted together, with `other` for both labels: the counters of a version
are kept until the process ends.

The worker is a process of its own: the server sets PROMETHEUS_MULTIPROC_DIR before anything
imports prometheus_client, and the numbers appear on its /metrics.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from prometheus_client import Counter

MAX_VERSIONS = 1000
_LABELS = ["proxy", "version"]


class _Counters(NamedTuple):
    tokens: Counter
    proposed: Counter
    rejected: Counter
    forced: Counter
    shadow_tokens: Counter
    shadow_changed: Counter
    hook_steps: Counter
    hook_seconds: Counter


@cache  # a name can be registered only once in a process, whatever number of engines it holds
def _counters() -> _Counters:
    def counter(name: str, documentation: str, labels: Sequence[str] = _LABELS) -> Counter:
        return Counter(f"assent_{name}", documentation, labels)

    return _Counters(
        counter("tokens_aligned", "Tokens emitted under a proxy."),
        counter("candidates_proposed", "Candidates put to a proxy."),
        counter("candidates_rejected", "Candidates that a proxy rejected."),
        counter("candidates_forced", "Tokens emitted because a proxy accepted no candidate."),
        counter("shadow_tokens", "Tokens that a shadow proxy scored."),
        counter("shadow_changed", "Tokens that a shadow proxy would have decided otherwise."),
        counter("hook_steps", "Steps in which a proxy decided anything.", ()),
        counter("hook_seconds", "Host's time that the hook took in these steps.", ()),
    )


@cache
def _counted_versions() -> set[tuple[str, str]]:
    return set()


def _labels_of(proxy: str, version: str) -> tuple[str, str]:
    """The own proxies of all API keys count as one per name."""
    name, owner, _ = proxy.partition("/")
    labels = (name, "own" if owner else version)
    counted = _counted_versions()
    if labels not in counted and len(counted) >= MAX_VERSIONS:
        return ("other", "other")
    counted.add(labels)
    return labels


def add(proxy: str, version: str, *, tokens: int, proposed: int, forced: int) -> None:
    """Add the counts of one proxy since the last call."""
    counters, labels = _counters(), _labels_of(proxy, version)
    counters.tokens.labels(*labels).inc(tokens)
    counters.proposed.labels(*labels).inc(proposed)
    counters.rejected.labels(*labels).inc(proposed - (tokens - forced))
    counters.forced.labels(*labels).inc(forced)


def add_steps(steps: int, seconds: float) -> None:
    """Add steps and host time of the hook since the last call."""
    _counters().hook_steps.inc(steps)
    _counters().hook_seconds.inc(seconds)


def add_shadow(proxy: str, version: str, *, tokens: int, changed: int) -> None:
    """Add the counts of one shadow proxy since the last call."""
    counters, labels = _counters(), _labels_of(proxy, version)
    counters.shadow_tokens.labels(*labels).inc(tokens)
    counters.shadow_changed.labels(*labels).inc(changed)
