"""The worker's counters."""

from uuid import uuid4

from prometheus_client import REGISTRY

from proxy.engine import metrics


def tokens(proxy: str, version: str) -> float | None:
    labels = {"proxy": proxy, "version": version}
    return REGISTRY.get_sample_value("assent_tokens_aligned_total", labels)


def test_ever_new_versions_do_not_fill_the_memory(monkeypatch) -> None:
    name = f"polite-{uuid4().hex}"  # other tests count in this process too
    monkeypatch.setattr(metrics, "MAX_VERSIONS", len(metrics._counted_versions()) + 2)
    num_before = tokens("other", "other") or 0
    for version in ("v1", "v2", "v3", "v4", "v1"):
        metrics.add(name, version, tokens=10, proposed=12, forced=0)
    assert (tokens(name, "v1"), tokens(name, "v2")) == (20, 10)
    assert tokens(name, "v3") is None
    assert tokens("other", "other") == num_before + 20


def test_own_proxies_are_counted_under_one_name() -> None:
    name = f"mine-{uuid4().hex}"
    for owner in ("a", "b"):
        metrics.add(f"{name}/{owner}", f"v-{owner}", tokens=1, proposed=1, forced=0)
    assert tokens(name, "own") == 2
