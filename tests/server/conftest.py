"""One real server for the whole test run: the toy demo with both of its proxies, on a free port.

In float32: on many processors a kernel of bfloat16 rounds differently in another batch, and a text would depend on the
other requests. With float32 a decision depends on rounding with a probability of about 1e-6 a token.
"""

import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from proxy.checkpoint import load, save
from proxy.network import ProxyConfig, ProxyNetwork
from tests.warm import Command

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "deploy" / "demo"
MODEL = "assent-demo"
API_KEY = "sk-the-tests"
ADMIN_KEY = "sk-the-tests-admin"
LIMITED_KEY = "sk-the-tests-limited"
JUDGING_KEY = "sk-the-tests-judging"
SLOW_KEY = "sk-the-tests-slow"
ACCESS = f"""
[keys.admin]
env = "TESTS_ADMIN_KEY"
admin = true

[keys.limited]
sha256 = "{hashlib.sha256(LIMITED_KEY.encode()).hexdigest()}"
max_samples = 2
max_prompt_tokens = 40
trace = false

[keys.judging]
sha256 = "{hashlib.sha256(JUDGING_KEY.encode()).hexdigest()}"
max_judgments = 4

[keys.slow]
sha256 = "{hashlib.sha256(SLOW_KEY.encode()).hexdigest()}"
requests_per_minute = 1
"""

START_SECONDS = 900  # a busy machine that must compile the bytecode of all it imports first
STOP_SECONDS = 20
WAIT_SECONDS = 300  # for what a server does soon, on a machine that may be very busy
LOG_LINES = 60
ROUNDING = 1e-4  # of probabilities from float32 logits of size 10, in batches of other shapes


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    process: subprocess.Popen[bytes] | Command

    def log_tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_LINES:])


@pytest.fixture(scope="session")
def proxy_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Proxies that the server may load while it runs: versions of one, and some that it must refuse."""
    outside = tmp_path_factory.mktemp("outside")
    root = tmp_path_factory.mktemp("proxies")
    aligned = DEMO / "proxies" / "aligned"
    shutil.copytree(aligned, root / "v1")
    shutil.copytree(aligned, outside / "v1")
    checkpoint = load(aligned, base=None)

    def variant(name: str, bias: float) -> None:
        """The same network with another accept bias."""
        with torch.no_grad():
            checkpoint.network.score.bias.add_(bias)
        save(root / name, checkpoint.network, base=checkpoint.base, training=checkpoint.training)

    variant("v2", -2.0)
    variant("v3", -1.0)  # on top of the other
    checkpoint.network.config = checkpoint.config.model_copy(update={"temperature": 0.5})
    save(root / "cool", checkpoint.network, base=checkpoint.base, training=checkpoint.training)
    sizes = ProxyConfig(hidden_size=64, vocab_size=checkpoint.config.vocab_size)
    save(root / "other-sizes", ProxyNetwork(sizes), base=checkpoint.base, training={})
    other_base = checkpoint.base.model_copy(update={"fingerprint": "0" * 64})
    save(root / "other-llm", checkpoint.network, base=other_base, training={})
    shutil.copytree(aligned, root / "corrupt")
    weights = root / "corrupt" / "proxy.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    shutil.copytree(aligned, root / "pickled")
    (root / "pickled" / "proxy.safetensors").rename(root / "pickled" / "proxy.pt")
    (root / "empty").mkdir()
    (root / "file").write_text(json.dumps({}))
    (root / "link-in").symlink_to(root / "v1")
    (root / "link-out").symlink_to(outside / "v1")
    (root / "loop").symlink_to(root / "loop")
    (root / "linked-file").mkdir()
    for file in ("config.json", "proxy.safetensors"):
        (root / "linked-file" / file).symlink_to(outside / "v1" / file)
    return root


@contextmanager
def serving(
    log: Path,
    *flags: str | Path,
    model: Path = DEMO / "model",
    name: str = MODEL,
    environment: dict[str, str] | None = None,
    warm: bool = True,
) -> Iterator[Server]:
    """`python -m server`, with the toy demo's LLM if no other, from when it is healthy until it has stopped.

    With `warm` its libraries are imported already, and its engine is forked from it.
    """
    port = free_port()
    command = ["server", "--model", model, "--port", port, "--served-model-name", name, *flags]
    with running(command, log, port, environment, warm=warm) as server:
        yield server


@contextmanager
def running(
    command: Sequence[str | Path | int],
    log: Path,
    port: int,
    environment: dict[str, str] | None = None,
    *,
    warm: bool = True,
) -> Iterator[Server]:
    """A server of any module with `/health`, as `serving`."""
    process = _start([*map(str, command)], log, environment or {}, warm)
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        _wait_until_healthy(process, server)
        yield server
    finally:
        _stop(process)


def _start(
    command: list[str], log: Path, environment: dict[str, str], warm: bool
) -> subprocess.Popen[bytes] | Command:
    """Start it in a process group of its own: no child outlives the tests."""
    # Other tests set vLLM's variables for engines in this process; the server finds its own.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    if warm:
        return Command(*command, environment=inherited | environment, new_session=True, log=log)
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            cwd=REPOSITORY,
            env=inherited | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def proxy_flags() -> list[str]:
    """Both of the demo's proxies."""
    names = ("aligned", "polite")
    return [f"--proxy={name}={DEMO / 'proxies' / name}" for name in names]


@pytest.fixture(scope="session")
def server(proxy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("server")
    log, access = directory / "server.log", directory / "access.toml"
    access.write_text(ACCESS)
    flags = [
        *("--api-key", API_KEY, "--access", access, "--proxy-root", proxy_root),
        *("--dtype", "float32", "--enable-scale-out", *proxy_flags()),
    ]
    # As a user starts it.
    with serving(
        log, *flags, environment={"TESTS_ADMIN_KEY": ADMIN_KEY}, warm=False
    ) as session_server:
        yield session_server


@dataclass(frozen=True)
class FeedbackServer(Server):
    """A server that stores feedback."""

    feedback: Path


@pytest.fixture(scope="session")
def feedback_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FeedbackServer]:
    """Without proxies, for several callers: feedback goes into a database, texts go into the log."""
    directory = tmp_path_factory.mktemp("keeping")
    feedback, access = directory / "feedback.db", directory / "access.toml"
    access.write_text(ACCESS)
    flags = [
        *("--feedback", feedback, "--log-texts", "--api-key", API_KEY, "--access", access),
        *("--enable-auto-tool-choice", "--tool-call-parser", "hermes"),
    ]
    environment = {"TESTS_ADMIN_KEY": ADMIN_KEY}
    with serving(directory / "server.log", *flags, environment=environment) as base_server:
        yield FeedbackServer(base_server.url, base_server.log, base_server.process, feedback)


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=WAIT_SECONDS) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=WAIT_SECONDS
    ) as client:
        yield client


@pytest.fixture(scope="module")  # while it runs, no test can start an event loop of its own
def browser() -> Iterator[Any]:
    from tests.server.browser import running_browser

    with running_browser() as browser:
        yield browser


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    from tests.server.browser import opened_pages

    with opened_pages(browser) as open_page:
        yield open_page


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item):
    """Add the end of the server's log to the report of a failed test."""
    outcome = yield
    report = outcome.get_result()
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and server is not None:
        report.sections.append(("the server's log", server.log_tail()))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.05)


def metric(url: str, series: str) -> float:
    """The sum of all series of /metrics whose name and labels begin with `series`."""
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    lines = httpx.get(f"{url}/metrics", headers=headers, timeout=WAIT_SECONDS).text.splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(series)]
    assert values, f"{series} is not among the metrics"
    return sum(values)


def free_port() -> int:
    """A free port below those that the kernel gives to clients: no other test takes it before the server does."""
    while True:
        port = 10_000 + secrets.randbelow(20_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _wait_until_healthy(process: subprocess.Popen[bytes] | Command, server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    # One client for all attempts: making one takes a tenth of a second.
    with httpx.Client(base_url=server.url, timeout=5) as client:
        while time.monotonic() < deadline:
            if process.poll() is not None:
                pytest.fail(f"the server ended with {process.returncode}:\n{server.log_tail()}")
            try:
                if client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.2)
    pytest.fail(f"no answer within {START_SECONDS} s:\n{server.log_tail()}")


def _stop(process: subprocess.Popen[bytes] | Command) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):  # no process is left, as it should be
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
