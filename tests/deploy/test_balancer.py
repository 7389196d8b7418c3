"""Our HAProxy configuration in front of two real servers: a rollout loses nothing, and a load reaches both."""

import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event

import httpx
import pytest

from tests.server.conftest import (
    DEMO,
    MODEL,
    WAIT_SECONDS,
    Server,
    free_port,
    proxy_flags,
    serving,
    wait_until,
)

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "haproxy" / "haproxy.cfg"
CLIENTS = 8


@pytest.fixture(scope="module")
def balanced_servers(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, Server, Server]]:
    """The balancer's address, and the servers behind it."""
    program = shutil.which("haproxy")
    if program is None:
        pytest.skip("there is no `haproxy` on the PATH (Debian: apt-get install haproxy)")
    directory = tmp_path_factory.mktemp("balancer")
    root = directory / "root"
    shutil.copytree(DEMO / "proxies", root)
    flags = ["--proxy-root", root, *proxy_flags()]
    with serving(directory / "a.log", *flags) as a, serving(directory / "b.log", *flags) as b:
        address, text = f"127.0.0.1:{free_port()}", CONFIGURATION.read_text()
        replacements = {"127.0.0.1:8080": address, "10.0.0.1:8000": a.url, "10.0.0.2:8000": b.url}
        for old, new in replacements.items():
            assert text.count(old) == 1
            text = text.replace(old, new.removeprefix("http://"))
        file = directory / "haproxy.cfg"
        file.write_text(text)
        with (directory / "haproxy.log").open("wb") as log:
            process = subprocess.Popen([program, "-f", file], stdout=log, stderr=log)
        try:
            wait_until(lambda: is_healthy(f"http://{address}"))
            yield f"http://{address}", a, b
        finally:
            process.terminate()
            process.wait(WAIT_SECONDS)


def is_healthy(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=WAIT_SECONDS).status_code == 200
    return False


def status_of(url: str, proxy: str, seed: int) -> int:
    body = {
        "model": f"{MODEL}:{proxy}",
        "messages": [{"role": "user", "content": "How do I look after my freezer?"}],
        "max_tokens": 100,
        "ignore_eos": True,
        "seed": seed,
    }
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=WAIT_SECONDS).status_code


def proxies_of(server: Server) -> set[str]:
    answer = httpx.get(f"{server.url}/proxies", timeout=WAIT_SECONDS).json()
    return {proxy["name"] for proxy in answer["data"]}


def num_requests(server: Server) -> int:
    return server.log.read_text(errors="replace").count('"path": "/v1/chat/completions"')


def test_a_load_through_the_balancer_reaches_both(
    balanced_servers: tuple[str, Server, Server],
) -> None:
    url, a, b = balanced_servers
    response = httpx.post(
        f"{url}/proxies", json={"name": "new", "path": "polite"}, timeout=WAIT_SECONDS
    )
    assert response.status_code == 201
    wait_until(lambda: all("new" in proxies_of(server) for server in (a, b)))
    with ThreadPoolExecutor(CLIENTS) as pool:
        assert set(pool.map(lambda seed: status_of(url, "new", seed), range(2 * CLIENTS))) == {200}
    assert min(num_requests(a), num_requests(b)) > 0


def test_a_server_that_stops_costs_nobody_an_answer(
    balanced_servers: tuple[str, Server, Server],
) -> None:
    url, a, b = balanced_servers
    finished = Event()

    def client(number: int) -> Counter[int]:
        counts: Counter[int] = Counter()
        while not finished.is_set():
            counts[status_of(url, "aligned", number)] += 1
        return counts

    with ThreadPoolExecutor(CLIENTS) as pool:
        futures = [pool.submit(client, number) for number in range(CLIENTS)]
        try:
            num_before = num_requests(b)
            wait_until(lambda: num_requests(b) > num_before)
            b.process.send_signal(signal.SIGTERM)
            exit_code = b.process.wait(WAIT_SECONDS)
            num_before = num_requests(a)
            wait_until(lambda: num_requests(a) > num_before + CLIENTS)
        finally:
            finished.set()
        statuses = sum((future.result(WAIT_SECONDS) for future in futures), Counter())
    assert exit_code == 0
    assert set(statuses) == {200}
