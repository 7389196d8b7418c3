"""The engine's processes killed under load: whoever waits learns of it, and nothing is left behind."""

import signal
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import httpx
import psutil
import pytest

from tests.server.conftest import WAIT_SECONDS, proxy_flags, serving, wait_until

APART = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
"""The engine in processes of its own, as larger models have it."""


BODY = {
    "model": "assent-demo:aligned",
    "messages": [{"role": "user", "content": "Hi."}],
    "max_tokens": 900,
    "ignore_eos": True,
}


def whole(running):
    url = f"{running.url}/v1/chat/completions"
    return httpx.post(url, json=BODY, timeout=WAIT_SECONDS)


def streamed(running, begun):
    """All that came, `begun` told of the first of it; None where it was cut off without a word."""
    url, text = f"{running.url}/v1/chat/completions", ""
    try:
        with httpx.stream(
            "POST", url, json=BODY | {"stream": True}, timeout=WAIT_SECONDS
        ) as answer:
            for line in answer.iter_lines():
                text += line
                begun.set()
    except httpx.RemoteProtocolError:
        return None
    return text


def find(running, name):
    """The process of the server's that vLLM calls so."""
    family = psutil.Process(running.process.pid).children(recursive=True)
    (found,) = [each for each in family if name in " ".join(each.cmdline())]
    return family, found


def in_flight(running):
    found = httpx.get(f"{running.url}/proxies", timeout=WAIT_SECONDS).json()["data"]
    return sum(proxy["in_flight"] for proxy in found)


@pytest.mark.slow  # test_survival.py does the same to an engine that is one process
def test_the_server_is_killed_and_leaves_no_engine(tmp_path):
    """It alone, as the kernel does where memory runs out: its successor needs the device."""
    with serving(tmp_path / "log", *proxy_flags(), environment=APART, warm=False) as running:
        family = psutil.Process(running.process.pid).children(recursive=True)
        assert any("EngineCore" in " ".join(each.cmdline()) for each in family)
        running.process.send_signal(signal.SIGKILL)
        _, left = psutil.wait_procs(family, timeout=WAIT_SECONDS)
        assert left == []


@pytest.mark.parametrize("name", ["EngineCore", pytest.param("Worker", marks=pytest.mark.slow)])
def test_the_engine_is_killed(tmp_path, name):
    with serving(tmp_path / "log", *proxy_flags(), environment=APART, warm=False) as running:
        family, victim = find(running, name)
        begun = [Event() for _ in range(3)]
        with ThreadPoolExecutor(4) as pool:
            streams = [pool.submit(streamed, running, each) for each in begun]
            assert all(each.wait(WAIT_SECONDS) for each in begun)
            victim.send_signal(signal.SIGSTOP)  # from here on nobody's answer ends
            answer = pool.submit(whole, running)
            wait_until(lambda: in_flight(running) == 1 + sum(not each.done() for each in streams))
            victim.send_signal(signal.SIGKILL)
            refused = answer.result(WAIT_SECONDS)
            assert refused.status_code >= 500 and refused.json()["error"]["message"]
            for stream in streams:
                text = stream.result(WAIT_SECONDS)
                # Where the machine is busy, one may have come to its end before the engine was stopped.
                assert text is None or '"error"' in text or '"finish_reason":"length"' in text
        assert running.process.wait(WAIT_SECONDS) != 0  # so that a supervisor starts it again
        _, left = psutil.wait_procs(family, timeout=WAIT_SECONDS)
        assert left == []
    lines = (tmp_path / "log").read_text(errors="replace").splitlines()
    logged = [line for line in lines if line.startswith('{"time"') and "chat/completions" in line]
    assert len(logged) == 4
