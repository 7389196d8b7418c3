"""Rollouts on servers: those of transformers, decision by decision, from two real ones that share a directory.

In float32, where rounding decides nothing here: the responses must be the same ones, whichever server
gave them. The last test kills both.
"""

import asyncio
import copy
import json
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, PreTrainedModel

import training.rollout_servers
import training.server_requests
import training.servers
from proxy.checkpoint import BaseModelId, identify, load
from proxy.network import ProxyNetwork
from tests.server.conftest import ADMIN_KEY, API_KEY, DEMO, WAIT_SECONDS, Server, metric, serving
from tests.training.conftest import run_command, run_on_two_processes
from tests.training.test_proxy_ppo import assert_trained_alike
from tests.training.test_rollout_vllm import (
    DECODING,
    ENDS,
    PROMPTS,
    assert_read_alike,
    assert_same,
    make_network,
)
from training.console import TrainingError
from training.policy import Decoding, Policy
from training.proxy_ppo import Options
from training.rollout import Rollout, generate
from training.rollout_backends import refuse_incomplete_servers
from training.rollout_servers import ServersBackend, name_of
from training.run_marker import settings_of

NAME = "learner"
TEACHING = "How do I look after my freezer?", "Can I open my kettle with a fork?", "Is my dog ill?"


@pytest.fixture(scope="module")
def frozen() -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def base() -> BaseModelId:
    return identify(str(DEMO / "model"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root")


@pytest.fixture(scope="module")
def server_pair(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """They need an API key, and an administrator's key for proxies."""
    logs = [tmp_path_factory.mktemp("server") / "log" for _ in range(2)]
    flags = ("--dtype", "float32", "--proxy-root", root, "--api-key", API_KEY)
    keys = {"ASSENT_ADMIN_KEYS": ADMIN_KEY}
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def start(log: Path) -> Server:
            return stack.enter_context(serving(log, *flags, environment=keys))

        yield list(pool.map(start, logs))


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(training.servers.API_KEY, ADMIN_KEY)


@pytest.fixture(scope="module")
def make_backend(frozen: PreTrainedModel, base: BaseModelId) -> Callable[..., ServersBackend]:
    def servers(urls: list[str], root: Path, base: BaseModelId = base) -> ServersBackend:
        return ServersBackend(
            frozen,
            urls,
            root,
            base,
            name=NAME,
            max_requests=4,
            batch_size=10,
            accelerator=Accelerator(cpu=True),
        )

    return servers


@pytest.fixture
def servers(
    make_backend: Callable[..., ServersBackend], server_pair: list[Server], root: Path
) -> Iterator[ServersBackend]:
    with closing(make_backend([server.url for server in server_pair], root)) as servers:
        yield servers


def roll_out_both(
    servers: ServersBackend, network: ProxyNetwork, decoding: Decoding = DECODING
) -> tuple[Rollout, Rollout]:
    """The rollouts from servers, and from transformers."""
    policy = Policy(servers._frozen, copy.deepcopy(network))
    rollouts = (
        run(PROMPTS, decoding, end_ids=ENDS, seeds=count(7 << 40))
        for run in (
            lambda *args, **kwargs: servers.generate(network, *args, **kwargs),
            lambda *args, **kwargs: generate(policy, *args, **kwargs),
        )
    )
    actual, expected = rollouts
    return actual, expected


HEADERS = {"Authorization": f"Bearer {ADMIN_KEY}"}
ANSWERED = "vllm:request_success_total{"


def loaded_on(server: Server) -> list[tuple[str, str]]:
    proxies = httpx.get(f"{server.url}/proxies", headers=HEADERS, timeout=WAIT_SECONDS).json()[
        "data"
    ]
    return [(proxy["name"], proxy["version"]) for proxy in proxies]


def test_given_responses_are_read_as_transformers_read_them(servers: ServersBackend) -> None:
    assert_read_alike(servers.read, servers._frozen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"responses": []}, "at least 1"),
        ({"responses": [{"prompt": [5], "response": []}]}, "at least 1"),
        ({"responses": [{"prompt": [5], "response": [10**6]}]}, "token 1000000, and the LLM has"),
        ({"responses": [{"prompt": [5] * 10**4, "response": [5]}]}, "10001 tokens, and at most"),
        ({"temperature": 0}, "greater than 0"),
        ({"max_candidates": 0}, "greater than 0"),
    ],
)
def test_what_cannot_be_read(
    server_pair: list[Server], change: dict[str, Any], message: str
) -> None:
    body = {"responses": [{"prompt": [5, 6], "response": [7]}]} | change
    url = f"{server_pair[0].url}/positions"
    answer = httpx.post(url, json=body, headers=HEADERS, timeout=WAIT_SECONDS)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]
    user_headers = {"Authorization": f"Bearer {API_KEY}"}
    assert httpx.post(url, json=body, headers=user_headers, timeout=WAIT_SECONDS).status_code == 403


@pytest.mark.parametrize(
    "decoding",
    [
        DECODING,
        replace(DECODING, temperature=1.5, top_k=0, top_p=1.0),
        replace(DECODING, temperature=0),
    ],
    ids=["default", "wide", "greedy"],
)
def test_a_rollout_is_that_of_transformers(
    servers: ServersBackend, server_pair: list[Server], frozen: PreTrainedModel, decoding: Decoding
) -> None:
    counts_before = [metric(server.url, ANSWERED) for server in server_pair]
    actual, expected = roll_out_both(servers, make_network(frozen, 0, max_rejections=4), decoding)
    assert_same(actual, expected)
    assert len({len(response) for response in actual.responses}) > 1
    is_greedy = decoding.temperature == 0  # takes the best candidate, which is mostly the first
    assert actual.counts.rejected > (10 if is_greedy else 50)
    assert actual.counts.forced > 5 or is_greedy
    shares = [
        metric(server.url, ANSWERED) - count_before
        for server, count_before in zip(server_pair, counts_before, strict=True)
    ]
    assert min(shares) >= 4 and sum(shares) == len(PROMPTS)


def test_every_rollout_has_the_weights_of_its_moment_and_nothing_is_left(
    make_backend: Callable[..., ServersBackend],
    server_pair: list[Server],
    root: Path,
    frozen: PreTrainedModel,
) -> None:
    network, responses = make_network(frozen, 1, max_rejections=2, max_candidates=6), []
    (root / NAME / "killed").mkdir(parents=True)  # of this run, before it went on
    with closing(make_backend([server.url + "/" for server in server_pair], root)) as servers:
        for step in range(4):
            if step in (1, 3):  # not in 2: the same version once more
                with torch.no_grad():
                    network.score.weight.add_(torch.randn_like(network.score.weight))
            actual, expected = roll_out_both(servers, network)
            assert_same(actual, expected)
            responses.append(actual.responses)
            (directory,) = (root / NAME).iterdir()
            version = load(directory, base=None).version
            assert [loaded_on(server) for server in server_pair] == [[(NAME, version)]] * 2
        assert responses[0] != responses[1] == responses[2] != responses[3]
    assert [loaded_on(server) for server in server_pair] == [[], []]
    assert json.loads((root / "proxies.json").read_text()) == {"proxies": {}}
    assert not (root / NAME).exists()


def test_training_in_two_processes_gives_what_transformers_give_in_one(
    server_pair: list[Server], root: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in TEACHING]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = [
        "training.proxy_ppo", "--model", DEMO / "model", "--reward", "tests.training.models:length",
        "--prompts", prompts, "--steps", "2", "--episodes", "7", "--decoding.max-new-tokens", "12",
        "--dtype", "float32", "--accept-bias", "0",
    ]  # fmt: skip
    run_command(*common, "--output", tmp_path / "one", "--rollout", "transformers")
    server_flags = ["--servers", *(server.url for server in server_pair), "--proxy-root", root]
    run_on_two_processes(
        *common, "--output", tmp_path / "two", "--rollout", "servers", *server_flags
    )
    assert_trained_alike(tmp_path / "two", tmp_path / "one")
    assert [loaded_on(server) for server in server_pair] == [[], []]
    assert not (root / name_of(tmp_path / "two")).exists()


def test_what_servers_refuse(
    make_backend: Callable[..., ServersBackend],
    server_pair: list[Server],
    root: Path,
    base: BaseModelId,
    frozen: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error has the server's message, and nothing stays behind."""
    urls, network = [server.url for server in server_pair], make_network(frozen, 0)

    def assert_refused(match: str, root: Path = root, base: BaseModelId = base) -> None:
        with (
            pytest.raises(TrainingError, match=match),
            closing(make_backend(urls, root, base)) as servers,
        ):
            servers.generate(network, PROMPTS, DECODING, end_ids=ENDS, seeds=count(0))
        assert not (root / NAME).exists()

    other_base = base.model_copy(update={"fingerprint": "0" * 64})
    assert_refused(f"{urls[0]} refuses: 400 .* fingerprint 0000", base=other_base)
    assert_refused(f"{urls[0]} refuses: 400 path '{NAME}/.*' does not exist below", root=tmp_path)
    monkeypatch.setenv(training.servers.API_KEY, API_KEY)
    assert_refused("refuses: 403 .* an administrator's key")
    monkeypatch.delenv(training.servers.API_KEY)
    assert_refused("refuses: 401 .* needs an API key")
    assert [loaded_on(server) for server in server_pair] == [[], []]


def test_what_is_refused_before_a_server_is_asked(
    make_backend: Callable[..., ServersBackend], frozen: PreTrainedModel, tmp_path: Path
) -> None:
    def options(**settings: Any) -> Options:
        return Options(model="m", prompts="p", reward="r", output=tmp_path, **settings)

    for settings, message in (
        ({"rollout": "servers", "proxy_root": tmp_path}, "--rollout servers needs --servers"),
        ({"rollout": "servers", "servers": ("http://a",)}, "--rollout servers needs --proxy-root"),
        ({"servers": ("http://a",)}, "--rollout is auto and has no use for --servers"),
    ):
        with pytest.raises(TrainingError, match=message):
            refuse_incomplete_servers(options(**settings))
    with pytest.raises(TrainingError, match="nowhere: there is no such directory"):
        make_backend(["http://a"], tmp_path / "nowhere")
    for url in ("one:8000", "localhost", "http://", "http://one:port"):
        with pytest.raises(TrainingError, match=f"--servers {url}: "):
            make_backend([url], tmp_path)
    long_decoding, network = replace(DECODING, max_new_tokens=5000), make_network(frozen, 0)
    # The port of `discard`, where nobody listens.
    servers = make_backend(["http://127.0.0.1:9"], tmp_path)
    with pytest.raises(TrainingError, match="--rollout servers: .* 5000 is over 4096"):
        servers.generate(network, PROMPTS, long_decoding, end_ids=ENDS, seeds=count(0))
    with pytest.raises(TrainingError, match="http://127.0.0.1:9: it cannot be reached"):
        servers.generate(network, PROMPTS, DECODING, end_ids=ENDS, seeds=count(0))


def test_a_run_may_go_on_with_other_servers(tmp_path: Path) -> None:
    common = {"model": "m", "prompts": "p", "reward": "r", "output": tmp_path, "rollout": "servers"}
    first, second = (
        Options(**common, servers=(url,), proxy_root=Path(url), server_requests=number)
        for number, url in enumerate(("http://one", "http://two"))
    )
    assert settings_of(first, ()) == settings_of(second, ())


class FakeServers:
    """Stands in for all servers, with given answers."""

    def __init__(self, root: Path, change: dict[str, Any]) -> None:
        self.root, self.change, self.num_requests = root, change, 0

    def __call__(self, request: httpx.Request) -> httpx.Response:
        change, body = dict(self.change), json.loads(request.content)
        if request.url.path == "/proxies":
            self.version = load(self.root / body["path"], base=None).version
            return httpx.Response(201, json={"version": change.get("loaded", self.version)})
        self.num_requests += 1
        failures = change.pop("failures", 0)
        if self.num_requests <= failures:
            return httpx.Response(500, json={"error": {"message": "out of order"}})
        if "status" in change:
            return httpx.Response(change["status"], text="no such page")
        entry = {"token_id": 1, "probability": 0.5, "accept_probability": 0.5}
        alignment = {
            "version": self.version,
            "trace": [[entry | {"forced": False, "rejected": []}]],
            "trace_truncated": False,
            **{"proposed": 1, "rejected": 0, "forced": 0},
        }
        choice = {"token_ids": change.pop("token_ids", [1])}
        return httpx.Response(200, json={"alignment": alignment | change, "choices": [choice]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"failures": 3}, None),
        ({"failures": 1000}, "no server is left: http://one: 500 out of order; http://two: 500"),
        ({"version": "0" * 12}, "no server is left: .* answers with version 000000000000, and not"),
        ({"loaded": "0" * 12}, "http://one has loaded version 000000000000, but .* must be the"),
        ({"status": 404}, "http://(one|two) refuses: 404 no such page"),
        ({"trace_truncated": True}, "has dropped part of a trace"),
        ({"token_ids": [2]}, "has dropped part of a trace"),
        ({"ends": {5}}, "has ended a response after 1 tokens: .* to allow 24 tokens"),
    ],
)
def test_what_is_made_of_odd_answers(
    make_backend: Callable[..., ServersBackend],
    frozen: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str | None,
) -> None:
    change = dict(change)
    ends = change.pop("ends", ENDS)
    fake_servers, client = FakeServers(tmp_path, change), httpx.AsyncClient
    transport = httpx.MockTransport(fake_servers)
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **kwargs: client(**kwargs, transport=transport)
    )
    for module in (training.rollout_servers, training.servers):
        monkeypatch.setattr(module, "PAUSES", (0.01, 0.01))
    servers, network = make_backend(["http://one", "http://two"], tmp_path), make_network(frozen, 0)
    arguments = {"end_ids": ends, "seeds": count(0)}
    if message is None:
        rollout = servers.generate(network, PROMPTS, DECODING, **arguments)
        assert rollout.responses == [[1]] * len(PROMPTS)
        assert fake_servers.num_requests == len(PROMPTS) + 3
        return
    with pytest.raises(TrainingError, match=message):
        servers.generate(network, PROMPTS, DECODING, **arguments)
    if change.get("failures"):  # four at once on each server, each tried three times
        assert fake_servers.num_requests == 2 * 4 * 3


def test_a_faster_server_gets_more(
    make_backend: Callable[..., ServersBackend],
    frozen: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_servers, client, shares = FakeServers(tmp_path, {}), httpx.AsyncClient, Counter[str]()

    async def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path != "/proxies":
            shares[request.url.host] += 1
            await asyncio.sleep(0.5 if request.url.host == "slow" else 0.001)
        return fake_servers(request)

    transport = httpx.MockTransport(answer)
    monkeypatch.setattr(
        httpx, "AsyncClient", lambda **kwargs: client(**kwargs, transport=transport)
    )
    servers = make_backend(["http://slow", "http://fast"], tmp_path)
    arguments = {"end_ids": ENDS, "seeds": count(0)}
    servers.generate(make_network(frozen, 0), PROMPTS, DECODING, **arguments)
    assert shares == {"slow": 4, "fast": 20}


def test_servers_that_die_are_done_without_until_none_is_left(
    servers: ServersBackend,
    server_pair: list[Server],
    root: Path,
    frozen: PreTrainedModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in (training.rollout_servers, training.servers):
        monkeypatch.setattr(module, "PAUSES", (0.1, 0.2))
    network, original = (
        make_network(frozen, 0, max_rejections=4),
        training.server_requests.ask_traced,
    )
    state = SimpleNamespace(victim=None, answers=0)

    async def ask_and_kill(*arguments: Any) -> Any:
        result = await original(*arguments)
        state.answers += 1
        if state.victim is not None and state.answers == 6:
            os.killpg(state.victim.process.pid, signal.SIGKILL)
            state.victim.process.wait()
        return result

    monkeypatch.setattr(training.rollout_servers, "ask_traced", ask_and_kill)
    state.victim, (first, second) = server_pair[0], server_pair
    assert_same(*roll_out_both(servers, network))
    assert first.process.returncode == -signal.SIGKILL
    state.victim, state.answers = None, 0
    with torch.no_grad():
        network.score.weight.add_(torch.randn_like(network.score.weight))
    assert_same(*roll_out_both(servers, network))
    assert f"left out of this rollout: {first.url}: it cannot be reached" in capsys.readouterr().err
    state.victim, state.answers = second, 0
    with pytest.raises(TrainingError, match=f"no server is left: {second.url}: it cannot be"):
        roll_out_both(servers, network)
    with pytest.raises(TrainingError, match=f"{first.url}: it cannot be .*; {second.url}: it"):
        roll_out_both(servers, network)
    servers.close()
    assert f"{second.url} still has the proxy 'learner'" in capsys.readouterr().err
    assert not (root / NAME).exists()
