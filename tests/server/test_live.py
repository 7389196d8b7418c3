"""Proxies loaded, replaced and unloaded while the server serves."""

import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event

import pytest

from proxy.checkpoint import load
from tests.server.conftest import wait_until
from tests.server.test_bad_requests import refused

QUESTION = [{"role": "user", "content": "How do I look after my freezer?"}]


@pytest.fixture
def live(http):
    """What a test has loaded is gone after it."""
    kept = names(http)
    yield http
    for proxy in http.get("/proxies").json()["data"]:
        if proxy["name"] not in kept and proxy["state"] != "draining":
            assert http.delete(f"/proxies/{proxy['name']}").status_code in (200, 202)
    wait_until(lambda: names(http) == kept)


def names(http):
    return {proxy["name"] for proxy in http.get("/proxies").json()["data"]}


def load_as(http, name, path, **more):
    return http.post("/proxies", json={"name": name, "path": path} | more)


def states(http, name):
    """[(version, state, in flight), ...] of every loaded version."""
    return [
        (proxy["version"], proxy["state"], proxy["in_flight"])
        for proxy in http.get("/proxies").json()["data"]
        if proxy["name"] == name
    ]


def long_chat(model="assent-demo:live", **more):
    return {
        "model": model,
        "messages": QUESTION,
        "seed": 3,
        "max_tokens": 800,
        "ignore_eos": True,
        "alignment": {},
    } | more


def say(http, model="assent-demo:live", **more):
    answer = http.post("/v1/chat/completions", json=long_chat(model, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


class Stream:
    """A long streamed answer, of which the first words have come."""

    def __init__(self, http, **more):
        self.context = http.stream(
            "POST", "/v1/chat/completions", json=long_chat(stream=True, **more)
        )
        self.answer = self.context.__enter__()
        self.events = (
            json.loads(line.removeprefix("data: "))
            for line in self.answer.iter_lines()
            if line.startswith("data: {")
        )
        self.chunks = [next(self.events) for _ in range(3)]

    def close(self):
        self.context.__exit__(None, None, None)

    def finish(self):
        """The whole text and the receipt."""
        self.chunks += self.events
        self.close()
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in self.chunks)
        return text, self.chunks[-1]["alignment"]


def test_load_use_unload(live, client, proxy_root):
    answer = load_as(live, "live", "v2")
    assert answer.status_code == 201
    loaded = answer.json()
    version = load(proxy_root / "v2", base=None).version
    assert (loaded["name"], loaded["version"]) == ("live", version)
    assert (loaded["state"], loaded["in_flight"]) == ("serving", 0)
    assert loaded["directory"] == str(proxy_root / "v2")
    assert loaded["num_bytes"] > 4 * loaded["num_parameters"] > 0
    assert loaded["training"]
    assert loaded.pop("remembered") is True
    assert loaded in live.get("/proxies").json()["data"]
    assert "assent-demo:live" in {model.id for model in client.models.list().data}

    said = live.post("/v1/chat/completions", json=long_chat(max_tokens=8))
    assert said.headers["assent-proxy"] == f"live@{version}"
    assert said.json()["alignment"]["version"] == version

    gone = live.delete("/proxies/live")
    assert (gone.status_code, gone.json()["state"]) == (200, "unloaded")
    refused(live.post("/v1/chat/completions", json=long_chat()), 404, "'live'", "aligned, polite")
    refused(live.delete("/proxies/live"), 404, "'live'")
    assert "assent-demo:live" not in {model.id for model in client.models.list().data}


def test_the_same_content_again_changes_nothing(live):
    assert load_as(live, "live", "v1").status_code == 201
    before = live.get("/proxies").json()
    for path in ("v1", "link-in", "./v1"):
        assert load_as(live, "live", path).status_code == 200
    assert live.get("/proxies").json() == before


def interleaved(attempt):
    """`attempt` says whether its stream was still under way when it did its work.

    If not, the machine was too busy with something else, and it is tried again.
    """
    assert any(attempt() for _ in range(5))


def test_a_stream_keeps_the_version_it_began_with(live):
    """Replaced under way, the old version finishes its answer as on a server that is left alone."""
    v1 = load_as(live, "live", "v1").json()["version"]
    quiet_v1 = text_of(say(live))
    v2 = load_as(live, "live", "v2").json()["version"]
    quiet_v2 = text_of(say(live))
    assert quiet_v1 != quiet_v2
    assert states(live, "live") == [(v2, "serving", 0)]

    def replace_under_way():
        load_as(live, "live", "v1")
        stream = Stream(live)
        assert stream.answer.headers["assent-proxy"] == f"live@{v1}"
        assert load_as(live, "live", "v2").status_code == 201
        found = states(live, "live")
        text, receipt = stream.finish()
        assert (text, receipt["version"]) == (quiet_v1, v1)
        assert receipt["accepted"] + receipt["forced"] == 800
        return found == [(v1, "draining", 1), (v2, "serving", 0)]

    interleaved(replace_under_way)
    wait_until(lambda: states(live, "live") == [(v2, "serving", 0)])
    assert text_of(say(live)) == quiet_v2


def test_a_stream_survives_the_unloading_of_its_proxy(live):
    v1 = load_as(live, "live", "v1").json()["version"]
    quiet = text_of(say(live))

    def unload_under_way():
        load_as(live, "live", "v1")
        stream = Stream(live)
        gone = live.delete("/proxies/live")
        refused(live.post("/v1/chat/completions", json=long_chat()), 404, "'live'")
        text, receipt = stream.finish()
        assert (text, receipt["version"]) == (quiet, v1)
        found = gone.json()
        return (gone.status_code, found["state"], found["in_flight"]) == (202, "draining", 1)

    interleaved(unload_under_way)
    wait_until(lambda: states(live, "live") == [])


def test_new_requests_get_the_new_version_at_once(live):
    v1 = load_as(live, "live", "v1").json()["version"]

    def ask_under_way():
        load_as(live, "live", "v1")
        stream = Stream(live, n=8)
        v2 = load_as(live, "live", "v2").json()["version"]
        assert say(live, max_tokens=4)["alignment"]["version"] == v2
        found = states(live, "live")
        stream.close()
        return found == [(v1, "draining", 1), (v2, "serving", 0)]

    interleaved(ask_under_way)


def test_a_rollback_takes_back_what_still_drains(live):
    v1 = load_as(live, "live", "v1").json()["version"]

    def roll_back_under_way():
        load_as(live, "live", "v1")
        stream = Stream(live, n=8)
        load_as(live, "live", "v2")
        back = load_as(live, "live", "v1")
        found = states(live, "live")
        stream.close()
        assert back.json()["version"] == v1
        return back.status_code == 200 and found == [(v1, "serving", 1)]

    interleaved(roll_back_under_way)
    wait_until(lambda: states(live, "live") == [(v1, "serving", 0)])


def test_best_of_keeps_its_version_too(live):
    v1 = load_as(live, "live", "v1").json()["version"]
    options = {"max_tokens": 200, "alignment": {"best_of": 8, "judge": {"seed": 1}}}

    def replace_under_way():
        load_as(live, "live", "v1")
        with ThreadPoolExecutor(1) as pool:
            under_way = pool.submit(say, live, **options)
            wait_until(lambda: states(live, "live") == [(v1, "serving", 1)] or under_way.done())
            v2 = load_as(live, "live", "v2").json()["version"]
            found = states(live, "live")
            receipt = under_way.result()["alignment"]
        assert receipt["version"] == v1
        assert receipt["accepted"] + receipt["forced"] == 8 * 200
        return found == [(v1, "draining", 1), (v2, "serving", 0)]

    interleaved(replace_under_way)
    wait_until(lambda: len(states(live, "live")) == 1)


def test_a_client_that_goes_away_frees_the_version(live):
    load_as(live, "live", "v1")
    Stream(live).close()
    wait_until(lambda: [in_flight for *_, in_flight in states(live, "live")] == [0])
    stream = Stream(live, n=8)
    live.delete("/proxies/live")
    stream.close()
    wait_until(lambda: states(live, "live") == [])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400),
        ({"messages": "Hi."}, 400),
        ({"temperature": -1}, 400),
        ({"alignment": {"best_of": 2}, "n": 3}, 400),
        ({"alignment": {"proxy": "polite"}}, 400),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_fails_holds_nothing(live, change, code, stream):
    load_as(live, "live", "v1")
    answer = live.post("/v1/chat/completions", json=long_chat(stream=stream) | change)
    assert answer.status_code == code
    assert [in_flight for *_, in_flight in states(live, "live")] == [0]


def test_loads_at_the_same_time_go_one_after_another(live):
    paths = ["v1", "v2", "v3"] * 4
    with ThreadPoolExecutor(len(paths)) as pool:
        codes = [
            answer.status_code for answer in pool.map(lambda p: load_as(live, "live", p), paths)
        ]
    assert set(codes) <= {200, 201}
    (left,) = states(live, "live")
    assert left[1:] == ("serving", 0)
    assert say(live, max_tokens=4)["alignment"]["version"] == left[0]


def test_traffic_while_versions_change(live):
    """Every answer is of the version that its receipt names, told by what its proxy says first.

    The versions' accept logits for the same candidate are 2 and 3 below the first one's.
    """

    def first_accept_logit(answer):
        entry = answer["alignment"]["trace"][0][0]
        p = entry["accept_probability"]
        return entry["token_id"], math.log(p / (1 - p))

    options = {
        "max_tokens": 30,
        "temperature": 0,
        "alignment": {"trace": True, "max_rejections": 9},
    }
    quiet = {}
    for path in ("v1", "v2", "v3"):
        version = load_as(live, "live", path).json()["version"]
        quiet[version] = first_accept_logit(say(live, **options))
    assert len(quiet) == 3

    answers = []
    all_loaded = Event()

    def ask():
        while not all_loaded.is_set():
            answers.append(say(live, **options))

    def num_answers(version):
        return sum(answer["alignment"]["version"] == version for answer in answers)

    def has_answered(version, times):
        return num_answers(version) >= times

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask) for _ in range(8)]
        try:
            for path in ["v1", "v2", "v3"] * 3:
                version = load_as(live, "live", path).json()["version"]
                before = num_answers(version)
                wait_until(partial(has_answered, version, before + 3))
        finally:
            all_loaded.set()
        for each in asking:
            each.result()
    for answer in answers:
        expected, logit = quiet[answer["alignment"]["version"]]
        token_id, found_logit = first_accept_logit(answer)
        assert token_id == expected
        assert found_logit == pytest.approx(logit, abs=0.3)
    wait_until(lambda: len(states(live, "live")) == 1)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/etc", "is absolute"),
        ("../outside", "'..'"),
        ("v1/../v1", "'..'"),
        ("nowhere", "does not exist"),
        ("file", "is not a directory"),
        ("link-out", "symbolic link"),
        ("linked-file", "symbolic link"),
        ("loop", "does not exist"),
        ("v1\0", "does not exist"),
        ("v" * 5000, "does not exist"),
        ("empty", "config.json cannot be read"),
        ("pickled", "proxy.safetensors cannot be read"),
        ("corrupt", "is corrupt"),
        ("other-llm", "0" * 64),
        ("other-sizes", "hidden size 64"),
    ],
)
def test_what_cannot_be_loaded(live, path, said):
    load_as(live, "live", "v1")
    before = live.get("/proxies").json()
    refused(load_as(live, "live", path), 400, said)
    assert live.get("/proxies").json() == before
    assert say(live, max_tokens=4)["alignment"]["proxy"] == "live"


@pytest.mark.parametrize(
    "body",
    [
        {"name": "a/b", "path": "v1"},
        {"name": "", "path": "v1"},
        {"name": "a:b", "path": "v1"},
        {"name": "a\n", "path": "v1"},
        {"name": "live"},
        {"path": "v1"},
        {"name": "live", "path": "v1", "shadw": True},
        {"name": "live", "path": 3},
        {"name": "live", "path": "v1", "shadow": "perhaps"},
    ],
)
def test_malformed_loads(live, body):
    refused(live.post("/proxies", json=body), 400)


def test_unloading_what_is_not_there(live):
    load_as(live, "live", "v1")
    refused(live.delete("/proxies/nobody"), 404, "'nobody'", "live")
    refused(live.delete("/proxies/live", params={"version": "0"}), 404, "'live' of version '0'")
    version = states(live, "live")[0][0]
    assert live.delete("/proxies/live", params={"version": version}).status_code == 200


# --- shadows ---


def shadow_counts(http):
    """{version: (scored, changed)}"""
    found = {}
    for line in http.get("/metrics").text.splitlines():
        for column, name in enumerate(("tokens", "changed")):
            if line.startswith(f"assent_shadow_{name}_total{{"):
                labels, value = line.split("{")[1].split("} ")
                version = labels.split('version="')[1].split('"')[0]
                found.setdefault(version, [0.0, 0.0])[column] = float(value)
    return found


def test_a_shadow_scores_and_does_not_act(live, client):
    quiet = text_of(say(live, "assent-demo:aligned", max_tokens=64))
    plain = text_of(say(live, "assent-demo", max_tokens=64))
    answer = load_as(live, "dark", "v3", shadow=True)
    assert (answer.status_code, answer.json()["state"]) == (201, "shadow")
    version = answer.json()["version"]
    before, _ = shadow_counts(live).get(version, (0.0, 0.0))
    assert text_of(say(live, "assent-demo:aligned", max_tokens=64)) == quiet
    assert text_of(say(live, "assent-demo", max_tokens=64)) == plain
    judged = live.post("/judge", json={"prompt": "Hi.", "response_a": "a", "response_b": "b"})
    assert judged.status_code == 200
    time.sleep(1.1)  # the worker brings its counters up to date once a second
    say(live, "assent-demo", max_tokens=1)
    wait_until(lambda: shadow_counts(live).get(version, (0.0, 0.0))[0] - before >= 128)
    scored, changed = shadow_counts(live)[version]
    assert scored - before <= 130  # the judge's tokens are not among them
    assert 0 < changed <= scored

    assert "assent-demo:dark" not in {model.id for model in client.models.list().data}
    for body in (
        long_chat("assent-demo:dark"),
        long_chat("assent-demo", alignment={"proxy": "dark"}),
    ):
        refused(live.post("/v1/chat/completions", json=body), 400, "'dark' is a shadow")
    refused(load_as(live, "dark", "v1"), 409, "unload it first")
    refused(load_as(live, "aligned", "v1", shadow=True), 409, "unload it first")
    assert live.delete("/proxies/dark").json()["state"] == "unloaded"
