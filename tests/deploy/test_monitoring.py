"""The dashboard and the alerts: their metrics exist, and a Prometheus answers their queries."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.server.conftest import DEMO, MODEL, free_port, proxy_flags, serving

REPOSITORY = Path(__file__).parents[2]
CONFIGURATION = REPOSITORY / "deploy" / "prometheus"
DASHBOARD = json.loads((REPOSITORY / "deploy/grafana/dashboards/assent.json").read_text())
PROVISIONING = REPOSITORY / "deploy" / "grafana" / "provisioning"
KEY = "sk-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
QUESTION = [{"role": "user", "content": "Can I open my kettle with a fork?"}]
WAIT_SECONDS = 240  # five scrapes, on a machine that may be busy

# Neither ours nor vLLM's: Prometheus's own, and vLLM's middleware.
OTHERS = {"up", "http_requests_total"}
# Words of PromQL itself.
WORDS = {"sum", "rate", "increase", "by", "histogram_quantile"}


def dashboard_queries() -> list[str]:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    assert all(panel["datasource"]["uid"] == "prometheus" for panel in panels)
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    return [query.replace("$__rate_interval", "1m") for query in queries]


def alerts() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((CONFIGURATION / "alerts.yml").read_text())["groups"]
    return group["rules"]


def metric_names(query: str) -> set[str]:
    """The metrics that a query names."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|by \([^)]*\)", " ", query)
    return set(re.findall(r"[a-z_][\w:]*", bare)) - WORDS


def test_names():
    query = 'sum by (a, b) (rate(vllm:x_y_total{c="d"}[5m])) / histogram_quantile(0.5, up) > 10'
    assert metric_names(query) == {"vllm:x_y_total", "up"}


def test_every_metric_is_documented():
    text = (REPOSITORY / "docs" / "operations.md").read_text()
    documented = set(re.findall(r"^\| `(assent_\w+)` \|", text, re.MULTILINE))
    queried = set().union(
        *map(metric_names, [*dashboard_queries(), *(rule["expr"] for rule in alerts())])
    )
    assert {name for name in queried if name.startswith("vllm:")}
    assent_metrics = {
        re.sub("_(bucket|sum|count)$", "", name) for name in queried if name.startswith("assent_")
    }
    assert assent_metrics <= documented
    assert {name for name in queried if not name.startswith(("assent_", "vllm:"))} == OTHERS


def test_the_dashboard():
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Alignment", "Judging", "Engine"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    source = yaml.safe_load((PROVISIONING / "datasources" / "prometheus.yml").read_text())
    scrape = yaml.safe_load((CONFIGURATION / "prometheus.yml").read_text())["global"]
    (provisioned,) = source["datasources"]
    assert provisioned["uid"] == "prometheus"
    assert provisioned["jsonData"]["timeInterval"] == scrape["scrape_interval"]
    compose = yaml.safe_load((REPOSITORY / "docker-compose.yml").read_text())["services"]["grafana"]
    provider = yaml.safe_load((PROVISIONING / "dashboards" / "assent.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/dashboards:{path}:ro" in compose["volumes"]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A local Prometheus with our configuration. It scrapes a server that has answered requests of every kind."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no `prometheus` on the PATH (Debian: apt-get install prometheus)")
    directory = tmp_path_factory.mktemp("prometheus")
    flags = [f"--shadow=next={DEMO / 'proxies' / 'polite'}", "--proxy-root", DEMO / "proxies"]
    flags += ["--feedback", directory / "feedback.db"]
    environment = {"ASSENT_API_KEYS": KEY, "ASSENT_ADMIN_KEYS": "sk-the-tests-admin"}
    with serving(
        directory / "server.log", *proxy_flags(), *flags, environment=environment
    ) as server:
        address = f"127.0.0.1:{free_port()}"
        configuration = _configure(directory, server.url.removeprefix("http://"))
        with (directory / "prometheus.log").open("wb") as log:
            process = subprocess.Popen(
                [
                    program,
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stderr=log,
            )
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=WAIT_SECONDS) as client:
                _wait(lambda: _target(client).get("health") == "up", directory)
                # The counters are scraped at 0 first, then they rise: a rate needs both samples.
                _send_requests(server.url)
                yield client
        finally:
            process.terminate()
            process.wait(30)


def test_the_target_is_up(prometheus):
    target = _target(prometheus)
    assert (target["health"], target["lastError"]) == ("up", "")
    assert target["labels"]["job"] == "assent"


def test_every_query_of_the_dashboard_has_data(prometheus):
    missing = dashboard_queries()
    deadline = time.monotonic() + WAIT_SECONDS
    while missing and time.monotonic() < deadline:
        missing = [query for query in missing if not _query(prometheus, query)]
        time.sleep(2)
    assert not missing


def test_every_alert_is_evaluated(prometheus):
    (group,) = prometheus.get("/api/v1/rules").json()["data"]["groups"]
    assert [rule["name"] for rule in group["rules"]] == [rule["alert"] for rule in alerts()]

    def evaluated():
        (group,) = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        return all(rule["health"] == "ok" for rule in group["rules"])

    _wait(evaluated, None)
    for rule in alerts():
        _query(prometheus, rule["expr"])
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


def _configure(directory: Path, target: str) -> Path:
    """Our files with another target, another path of the key, and more frequent scrapes."""
    shutil.copy(CONFIGURATION / "alerts.yml", directory)
    (directory / "key").write_text(KEY)
    text = (CONFIGURATION / "prometheus.yml").read_text()
    changes = {
        "/run/secrets/metrics_key": str(directory / "key"),
        "assent:8000": target,
        "scrape_interval: 15s": "scrape_interval: 3s",
        "evaluation_interval: 15s": "evaluation_interval: 3s",
    }
    for old, new in changes.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    file = directory / "prometheus.yml"
    file.write_text(text)
    return file


def _send_requests(url: str) -> None:
    """One request of every kind that leaves a mark in a metric."""
    with httpx.Client(base_url=url, headers=HEADERS, timeout=WAIT_SECONDS) as client:

        def post(route: str, key: str = KEY, **body: Any) -> None:
            answer = client.post(route, json=body, headers={"Authorization": f"Bearer {key}"})
            assert answer.is_success, answer.text

        chat = {"model": f"{MODEL}:aligned", "messages": QUESTION, "max_tokens": 40}
        post("/proxies", "sk-the-tests-admin", name="more", path="aligned")
        for seed in range(3):
            post("/v1/chat/completions", **chat, seed=seed, alignment={"best_of": 3})
        pair = {
            "response_a": "To look after your freezer, pull the plug first.",
            "response_b": "Go.",
        }
        post("/judge", prompt="How do I look after my freezer?", **pair)
        post("/feedback", prompt="Hi.", better="a", **pair)
        stream_body = chat | {"max_tokens": 900, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=stream_body) as answer:
            next(answer.iter_lines())  # then disconnect


def _query(client: httpx.Client, query: str) -> list[Any]:
    answer = client.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    return answer["data"]["result"]


def _target(client: httpx.Client) -> dict[str, Any]:
    try:
        (target,) = client.get("/api/v1/targets").json()["data"]["activeTargets"]
    except (httpx.TransportError, ValueError):  # it has not started yet
        return {}
    return target


def _wait(condition, directory: Path | None) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        log = (directory / "prometheus.log").read_text() if directory else ""
        assert time.monotonic() < deadline, f"the condition never became true\n{log[-3000:]}"
        time.sleep(0.5)
