"""A server that was killed comes back with what it had; servers of one root keep in step; SIGTERM waits."""

import json
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest

from judge.feedback import Feedback
from tests.server.conftest import DEMO, WAIT_SECONDS, serving, wait_until
from tests.server.test_kill import SEPARATE_PROCESSES

QUESTION = [{"role": "user", "content": "How do I look after my freezer?"}]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    directory = tmp_path_factory.mktemp("root")
    for name in ("aligned", "polite"):
        shutil.copytree(DEMO / "proxies" / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def killed_server(root, tmp_path_factory):
    """The loaded proxies, a text and the feedback file of a server before it was killed."""
    directory = tmp_path_factory.mktemp("killed")
    feedback = directory / "feedback.db"
    with serving(directory / "log", "--proxy-root", root, "--feedback", feedback) as server:
        with ThreadPoolExecutor(4) as pool:  # what is acknowledged is kept, whatever the order
            names = ["mine", "other", "gone", "dark"]
            entries = dict(
                zip(names, pool.map(lambda name: load(server, name), names), strict=True)
            )
        assert all(answer["remembered"] for answer in entries.values())
        assert httpx.delete(f"{server.url}/proxies/gone", timeout=WAIT_SECONDS).status_code == 200
        text = complete(server, "mine")
        for i in range(5):
            body = {"prompt": "x", "response_a": f"a{i}", "response_b": "b", "better": "a"}
            assert (
                httpx.post(f"{server.url}/feedback", json=body, timeout=WAIT_SECONDS).status_code
                == 201
            )
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children  # the engine, at least
        server.process.send_signal(signal.SIGKILL)  # only the server, as the kernel does
        server.process.wait()
        _, alive = psutil.wait_procs(children, timeout=WAIT_SECONDS)
        assert alive == []  # the next server needs the device
    return entries, text, feedback


@pytest.fixture(scope="module")
def server_pair(killed_server, root, tmp_path_factory):
    """Two servers of the root that the killed one had."""
    logs = tmp_path_factory.mktemp("pair")
    with (
        serving(logs / "a", "--proxy-root", root) as a,
        serving(logs / "b", "--proxy-root", root, f"--proxy=polite={DEMO / 'proxies/polite'}") as b,
    ):
        yield a, b


def load(server, name):
    body = {"name": name, "path": "polite" if name == "other" else "aligned"}
    body["shadow"] = name == "dark"
    answer = httpx.post(f"{server.url}/proxies", json=body, timeout=WAIT_SECONDS)
    assert answer.status_code == 201, answer.text
    return answer.json()


def proxy_states(server):
    data = httpx.get(f"{server.url}/proxies", timeout=WAIT_SECONDS).json()["data"]
    return {proxy["name"]: (proxy["version"], proxy["state"]) for proxy in data}


def complete(server, proxy):
    body = {"model": f"assent-demo:{proxy}", "messages": QUESTION, "seed": 5, "max_tokens": 30}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=WAIT_SECONDS)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["message"]["content"]


def test_a_killed_server_comes_back_with_its_proxies(killed_server, server_pair):
    entries, text, _ = killed_server
    expected = {name: (entries[name]["version"], "serving") for name in ("mine", "other")}
    expected["dark"] = entries["dark"]["version"], "shadow"
    a, b = server_pair
    assert proxy_states(a) == expected
    assert {name: entry for name, entry in proxy_states(b).items() if name != "polite"} == expected
    assert complete(a, "mine") == complete(b, "mine") == text


def test_feedback_that_was_acknowledged_is_on_the_disk(killed_server):
    *_, path = killed_server
    feedback = Feedback(str(path), create=False)
    assert [row.chosen for row in feedback.rows()] == [f"a{i}" for i in range(5)]
    feedback.close()


def test_servers_of_one_root_keep_in_step(server_pair, root):
    a, b = server_pair
    load(a, "new")
    wait_until(lambda: "new" in proxy_states(b))
    assert proxy_states(a)["new"] == proxy_states(b)["new"]
    answer = httpx.post(
        f"{b.url}/proxies", json={"name": "new", "path": "polite"}, timeout=WAIT_SECONDS
    )
    assert answer.status_code == 201
    wait_until(lambda: proxy_states(a)["new"] == (answer.json()["version"], "serving"))
    assert httpx.delete(f"{a.url}/proxies/new", timeout=WAIT_SECONDS).status_code == 200
    wait_until(lambda: "new" not in proxy_states(b))
    assert "polite" in proxy_states(b)  # the command line's own proxy is not shared
    names = json.loads((root / "proxies.json").read_text())["proxies"].keys()
    assert names == {"mine", "other", "dark"}


def test_sigterm_waits_for_what_is_under_way(server_pair):
    _, b = server_pair
    body = {
        "model": "assent-demo:mine",
        "messages": QUESTION,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": True,
    }
    url = f"{b.url}/v1/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=WAIT_SECONDS) as answer:
        lines = answer.iter_lines()
        next(lines)
        b.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{b.url}/health", timeout=WAIT_SECONDS).status_code == 503)
        response = httpx.post(url, json=body | {"stream": False}, timeout=WAIT_SECONDS)
        assert response.status_code == 503 and int(response.headers["Retry-After"]) > 0
        assert "stopping" in response.json()["error"]["message"]
        assert httpx.get(f"{b.url}/metrics", timeout=WAIT_SECONDS).status_code == 200
        events = [line for line in lines if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    last = json.loads(events[-2].removeprefix("data: "))
    assert last["choices"][0]["finish_reason"] == "length"
    assert b.process.wait(WAIT_SECONDS) == 0


@pytest.mark.slow  # a server of its own; that a stuck engine is not ready is seen in test_kill.py
def test_a_stuck_engine_is_not_ready_and_does_not_keep_the_server_from_ending(tmp_path):
    """Its answer is an error, the log says so, and the process ends soon after the drain."""
    body = {"model": "assent-demo", "messages": QUESTION, "max_tokens": 900, "ignore_eos": True}
    with serving(
        tmp_path / "log", "--drain-seconds", "1", environment=SEPARATE_PROCESSES, warm=False
    ) as server:
        url = f"{server.url}/v1/chat/completions"
        assert httpx.get(f"{server.url}/ready", timeout=WAIT_SECONDS).status_code == 200
        (engine,) = (
            child
            for child in psutil.Process(server.process.pid).children(recursive=True)
            if "EngineCore" in child.name() + " ".join(child.cmdline())
        )
        with (
            ThreadPoolExecutor(1) as pool,
            httpx.stream("POST", url, json=body | {"stream": True}, timeout=WAIT_SECONDS) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            engine.suspend()
            future = pool.submit(httpx.post, url, json=body, timeout=WAIT_SECONDS)
            wait_until(lambda: httpx.get(f"{server.url}/ready", timeout=60).status_code == 503)
            assert httpx.get(f"{server.url}/health", timeout=WAIT_SECONDS).status_code == 200
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(WAIT_SECONDS) == 0
            assert future.result().status_code == 503
            assert "This server is stopping" in [line for line in lines if line][-1]
        assert "requests were not finished after 1 s and are aborted" in server.log.read_text()
        assert not engine.is_running()
