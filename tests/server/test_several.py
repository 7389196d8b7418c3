"""Several proxies in one request, through the real server: `tests/proxy/test_exactness.py` tests the law."""

import math
from typing import Any

import httpx
import pytest

from assent import Alignment, Client, JudgeOptions
from tests.server.conftest import API_KEY, MODEL, ROUNDING, WAIT_SECONDS, Server
from tests.server.test_bad_requests import assert_refused
from tests.server.test_request_log import send
from tests.server.test_routes import ROUTES, STREAMING_ROUTES, events, version_of

PROMPT = "How do I look after my freezer?"
BOTH = {"aligned": 1.0, "polite": 0.5}


def ask(http: httpx.Client, alignment: Any = None, **fields: Any) -> Any:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "seed": 1, "n": 2}
    answer = http.post("/v1/chat/completions", json=body | {"alignment": alignment} | fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(answer: Any) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def test_the_order_does_not_matter(http: httpx.Client) -> None:
    first = ask(http, {"proxies": BOTH})
    second = ask(http, {"proxies": dict(reversed(BOTH.items()))})
    assert said(first) == said(second)
    assert first["alignment"] == second["alignment"]
    alone = [ask(http, {"proxy": name, "strength": strength}) for name, strength in BOTH.items()]
    assert said(first) not in map(said, alone)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0, "n": 1}, {"max_tokens": 8, "top_p": 0.8}]
)
def test_one_of_several_is_that_proxy(http: httpx.Client, options: dict[str, Any]) -> None:
    expected = ask(http, {"proxy": "polite", "strength": 0.5}, **options)
    actual = ask(http, {"proxies": {"polite": 0.5}}, **options)
    assert actual["choices"] == expected["choices"]
    assert actual["alignment"] == expected["alignment"]


def test_strength_0_takes_no_part(http: httpx.Client) -> None:
    frozen = ask(http)
    assert said(ask(http, {"proxies": {"aligned": 0, "polite": 0}})) == said(frozen)
    alone = ask(http, {"proxy": "aligned"})
    beside = ask(http, {"proxies": {"aligned": 1, "polite": 0}})
    assert said(beside) == said(alone) != said(frozen)
    assert beside["alignment"]["proxies"]["polite"]["strength"] == 0


def test_the_report_and_the_trace(http: httpx.Client) -> None:
    answer = ask(http, {"proxies": BOTH, "trace": True, "max_rejections": 3})
    report = answer["alignment"]
    versions = {name: version_of(http, name) for name in BOTH}
    assert report["proxy"] == "aligned+polite"
    assert report["version"] == "+".join(versions.values())
    assert report["proxies"] == {
        name: {"version": versions[name], "strength": strength} for name, strength in BOTH.items()
    }
    assert report["accepted"] + report["forced"] == answer["usage"]["completion_tokens"]
    entries = [entry for trace in report["trace"] for entry in trace]
    assert report["rejected"] == sum(len(entry["rejected"]) for entry in entries) > 0
    candidates = [c for entry in entries for c in (entry, *entry["rejected"])]
    scored = [c for c in candidates if c["accept_probability"] is not None]
    assert all(("by_proxy" in c) == (c in scored) for c in candidates)
    for candidate in scored:
        product = math.prod(candidate["by_proxy"].values())
        assert {*candidate["by_proxy"]} == {*BOTH}
        assert candidate["accept_probability"] == pytest.approx(product, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize("path", sorted(ROUTES))
def test_every_route_takes_them(http: httpx.Client, path: str) -> None:
    """By the model's name, where all have strength 1, and in the header."""
    versions = "+".join(version_of(http, name) for name in BOTH)
    by_name = http.post(path, json=ROUTES[path] | {"model": f"{MODEL}:aligned+polite", "seed": 1})
    assert by_name.status_code == 200, by_name.text
    assert by_name.headers["assent-proxy"] == f"aligned+polite@{versions}"
    assert by_name.json()["model"] == f"{MODEL}:aligned+polite"
    headers = {"Assent-Alignment": '{"proxies": {"polite": 0.5, "aligned": 1}}'}
    by_header = http.post(path, json=ROUTES[path] | {"model": MODEL}, headers=headers)
    assert by_header.status_code == 200, by_header.text
    assert by_header.headers["assent-proxy"] == by_name.headers["assent-proxy"]


@pytest.mark.parametrize("path", STREAMING_ROUTES)
def test_streams_take_them(http: httpx.Client, path: str) -> None:
    body = ROUTES[path] | {"model": MODEL, "stream": True, "alignment": {"proxies": BOTH}}
    answer = http.post(path, json=body)
    assert answer.headers["assent-proxy"].startswith("aligned+polite@")
    reports = [value for event in events(answer) for value in _values(event, "alignment")]
    if path in ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"):
        assert len(reports) >= 2  # in the first event and in the last
        assert {report["proxies"]["polite"]["strength"] for report in reports} == {0.5}


def _values(event: Any, name: str) -> list[Any]:
    """Of a field at any depth."""
    if not isinstance(event, dict):
        return []
    inner = [value for part in event.values() for value in _values(part, name)]
    return ([event[name]] if name in event else []) + inner


def test_a_strength_goes_with_several_in_the_models_name(http: httpx.Client) -> None:
    named = ask(http, {"strength": 0.5}, model=f"{MODEL}:polite+aligned")
    assert said(named) == said(ask(http, {"proxies": {"aligned": 0.5, "polite": 0.5}}))
    both = ask(http, {"proxies": BOTH}, model=f"{MODEL}:polite+aligned")
    assert said(both) == said(ask(http, {"proxies": BOTH}))


def test_the_log_names_them(server: Server) -> None:
    answer, line = send(server, {"model": MODEL, "alignment": {"proxies": BOTH}})
    assert line["proxy"] == answer.headers["Assent-Proxy"]
    report = answer.json()["alignment"]
    assert line["proxy_counts"] == {key: report[key] for key in line["proxy_counts"]}


def test_samples_of_several_judged_by_several(http: httpx.Client) -> None:
    judge = {"kind": "proxy", "proxies": BOTH, "strategy": "round-robin"}
    answer = ask(http, {"proxies": BOTH, "best_of": 3, "judge": judge}, max_tokens=24)
    record = answer["alignment"]["judge"]
    assert answer["alignment"]["proxy"] == "aligned+polite"
    assert sorted(record["ranking"]) == [0, 1, 2]
    assert (
        said(answer)[0] == said(ask(http, {"proxies": BOTH}, n=3, max_tokens=24))[record["winner"]]
    )


def test_the_rewards_of_judging_proxies_add_up(http: httpx.Client) -> None:
    pair = {"prompt": PROMPT, "response_a": "Go.", "response_b": "Clean it once a week."}

    def log_odds(**judge: Any) -> float:
        verdict = http.post("/judge", json=pair | {"kind": "proxy"} | judge).json()
        return math.log(verdict["probability"] / (1 - verdict["probability"]))

    expected = log_odds(proxy="aligned") + 0.5 * log_odds(proxy="polite")
    assert log_odds(proxies=BOTH) == pytest.approx(expected, abs=0.01)
    assert log_odds(proxies={"polite": 1}) == pytest.approx(log_odds(proxy="polite"), abs=ROUNDING)


def test_the_client(server: Server, http: httpx.Client) -> None:
    judge = JudgeOptions(kind="proxy", proxies=BOTH)
    with Client(server.url, api_key=API_KEY, timeout=WAIT_SECONDS) as client:
        answer = client.chat(PROMPT, alignment=Alignment(proxies=BOTH, trace=True), seed=1)
        assert answer.text == said(ask(http, {"proxies": BOTH}, n=1))[0]
        assert answer.alignment is not None and answer.alignment.proxies is not None
        assert answer.alignment.proxies["polite"]["strength"] == 0.5
        assert any(entry.by_proxy for entry in answer.choices[0].trace)
        best = client.chat(PROMPT, alignment=Alignment(best_of=2, judge=judge), max_tokens=8)
        assert best.alignment is not None and best.alignment.ranking is not None
        assert client.rank(PROMPT, ["Go.", "Go."], kind="proxy", proxies=BOTH).winner in (0, 1)


@pytest.mark.parametrize(
    ("alignment", "status", "message"),
    [
        ({"proxies": BOTH, "proxy": "aligned"}, 400, "leave out proxy"),
        ({"proxies": BOTH, "strength": 2}, 400, "leave out strength"),
        ({"proxies": {"aligned": 17}}, 400, "alignment.proxies.aligned"),
        ({"proxies": {}}, 400, "alignment.proxies"),
        ({"proxies": ["aligned", "polite"]}, 400, "alignment.proxies"),
        ({"proxies": {f"p{number}": 1 for number in range(9)}}, 400, "alignment.proxies"),
        ({"proxies": BOTH | {"stern": 1}}, 404, "'stern' is not loaded"),
        ({"proxies": {"aligned/x": 1}}, 404, "'aligned/x' is not loaded"),
        ({"best_of": 2, "judge": {"kind": "proxy", "proxies": BOTH, "proxy": "aligned"}}, 400, "not both"),
        ({"best_of": 2, "judge": {"proxies": BOTH}}, 400, "go together"),
    ],
)  # fmt: skip
def test_what_cannot_be(http: httpx.Client, alignment: Any, status: int, message: str) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}]}
    answer = http.post("/v1/chat/completions", json=body | {"alignment": alignment})
    assert_refused(answer, status, message)


@pytest.mark.parametrize(
    ("model", "alignment", "status", "message"),
    [
        ("aligned+stern", None, 404, "'stern' is not loaded"),
        ("aligned+", None, 404, "'' is not loaded"),
        ("aligned+aligned", None, 400, "names a proxy twice"),
        ("aligned+polite", {"proxy": "aligned"}, 400, "name one"),
        ("aligned", {"proxies": BOTH}, 400, "name one"),
    ],
)
def test_names_that_cannot_be(
    http: httpx.Client, model: str, alignment: Any, status: int, message: str
) -> None:
    body = {"model": f"{MODEL}:{model}", "messages": [{"role": "user", "content": PROMPT}]}
    answer = http.post("/v1/chat/completions", json=body | {"alignment": alignment})
    assert_refused(answer, status, message)


def test_proxies_of_different_temperatures_do_not_go_together(http: httpx.Client) -> None:
    assert http.post("/proxies", json={"name": "cool", "path": "cool"}).status_code == 201
    try:
        body = {"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 4}
        together = body | {"alignment": {"proxies": {"cool": 1, "aligned": 1}}}
        answer = http.post("/v1/chat/completions", json=together)
        assert_refused(answer, 400, "aligned at 1, cool at 0.5", "of one temperature")
        # A proxy of strength 0 takes no part.
        ask(http, {"proxies": {"cool": 1, "aligned": 0}}, max_tokens=4)
    finally:
        assert http.delete("/proxies/cool").status_code == 200
