"""The engine's processes killed under load: waiting clients get an error, and no process is left behind."""

import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import psutil
import pytest

from tests.server.conftest import WAIT_SECONDS, proxy_flags, serving, wait_until

# test_survival.py does the same to a server and its engine in one process. These start three, as a user does.
pytestmark = pytest.mark.slow

SEPARATE_PROCESSES = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine in processes of its own, as larger models have it."""


BODY = {
    "model": "assent-demo:aligned",
    "messages": [{"role": "user", "content": "Hi."}],
    "max_tokens": 900,
    "ignore_eos": True,
}


def complete(server):
    url = f"{server.url}/v1/chat/completions"
    return httpx.post(url, json=BODY, timeout=WAIT_SECONDS)


def stream_text(server, started):
    """The text of a stream; `started` is set at its first line. None if the stream was cut off without an error."""
    url, text = f"{server.url}/v1/chat/completions", ""
    try:
        with httpx.stream(
            "POST", url, json=BODY | {"stream": True}, timeout=WAIT_SECONDS
        ) as answer:
            for line in answer.iter_lines():
                text += line
                started.set()
    except httpx.RemoteProtocolError:
        return None
    return text


def find_process(server, name):
    """The server's child processes, and the one that vLLM gives this name."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    (process,) = [child for child in children if name in " ".join(child.cmdline())]
    return children, process


def in_flight(server):
    proxies = httpx.get(f"{server.url}/proxies", timeout=WAIT_SECONDS).json()["data"]
    return sum(proxy["in_flight"] for proxy in proxies)


def status(server, route):
    return httpx.get(f"{server.url}/{route}", timeout=WAIT_SECONDS).status_code


def test_the_server_is_killed_and_leaves_no_engine(tmp_path):
    """Only the server is killed, as by the kernel when memory runs out: the next server needs the device."""
    with serving(
        tmp_path / "log", *proxy_flags(), environment=SEPARATE_PROCESSES, warm=False
    ) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(child.cmdline()) for child in children)
        server.process.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(children, timeout=WAIT_SECONDS)
        assert alive == []


@pytest.mark.parametrize("name", ["EngineCore", "Worker"])
def test_the_engine_is_killed(tmp_path, name):
    with serving(
        tmp_path / "log", *proxy_flags(), environment=SEPARATE_PROCESSES, warm=False
    ) as server:
        children, victim = find_process(server, name)
        events = [Event() for _ in range(3)]
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(stream_text, server, event) for event in events]
            assert all(event.wait(WAIT_SECONDS) for event in events)
            victim.send_signal(signal.SIGSTOP)  # from here on no answer ends
            answer = pool.submit(complete, server)
            wait_until(
                lambda: in_flight(server) == 1 + sum(not stream.done() for stream in streams)
            )
            wait_until(lambda: status(server, "ready") == 503)
            assert status(server, "health") == 200  # it may go on
            victim.send_signal(signal.SIGKILL)
            response = answer.result(WAIT_SECONDS)
            assert response.status_code >= 500 and response.json()["error"]["message"]
            for stream in streams:
                text = stream.result(WAIT_SECONDS)
                # On a busy machine one may have ended before the engine was stopped.
                assert text is None or '"error"' in text or '"finish_reason":"length"' in text
        assert server.process.wait(WAIT_SECONDS) != 0  # so that a supervisor starts it again
        _, alive = psutil.wait_procs(children, timeout=WAIT_SECONDS)
        assert alive == []
    lines = (tmp_path / "log").read_text(errors="replace").splitlines()
    logged = [line for line in lines if line.startswith('{"time"') and "chat/completions" in line]
    assert len(logged) == 4
