"""A server that learns from its callers' choices: the real one, over HTTP."""

import json
import random
import runpy
import sqlite3
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from proxy.checkpoint import identify, load
from server.schemas.proxies import LearningPasses, LearningStatus
from tests.server.conftest import (
    ADMIN_KEY,
    DEMO,
    MODEL,
    REPOSITORY,
    WAIT_SECONDS,
    metric,
    serving,
    wait_until,
)
from training.toy_data import reference_scorer
from training.toy_data.files import draw_prompts, split_combinations, user
from training.toy_data.grammar import draw_answer

KEYS = {"alice": "sk-alice", "bob": "sk-bob", "carol": "sk-carol", "root": ADMIN_KEY}
ACCESS = """
[keys.alice]
env = "KEY_OF_ALICE"
[keys.bob]
env = "KEY_OF_BOB"
[keys.carol]
env = "KEY_OF_CAROL"
[keys.root]
env = "KEY_OF_ROOT"
admin = true
"""
ENVIRONMENT = {f"KEY_OF_{name.upper()}": key for name, key in KEYS.items()} | {
    "ASSENT_LEARNER_NICE": "0"  # other tests keep the machine busy
}

VERDICTS = 60


@dataclass
class LearningServer:
    url: str
    root: Path
    feedback: Path
    pid: int

    def ask(self, caller: str, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEYS[caller]}"}
        return httpx.request(
            method, f"{self.url}{path}", headers=headers, timeout=WAIT_SECONDS, **options
        )

    def choose(self, caller: str, count: int, seed: int) -> None:
        """Verdicts by the reference scorer, without its noise."""
        for prompt, better, worse in pairs(count, seed):
            body = {
                "messages": user(prompt),
                "response_a": better,
                "response_b": worse,
                "better": "a",
            }
            answer = self.ask(caller, "POST", "/feedback", json=body)
            assert answer.status_code == 201, answer.text

    def learning(self, caller: str, name: str) -> dict[str, Any]:
        answer = self.ask(caller, "GET", f"/proxies/{name}/learn")
        LearningStatus.model_validate_json(answer.text)  # as documented
        status: dict[str, Any] = answer.json()
        return status

    def has_passed(self, caller: str, name: str) -> bool:
        return self.learning(caller, name)["last_pass"] is not None

    def chat(self, caller: str, proxy: str) -> httpx.Response:
        body = {
            "model": MODEL,
            "messages": user("How do I look after my freezer?"),
            "max_tokens": 24,
            "seed": 1,
            "alignment": {"proxy": proxy},
        }
        return self.ask(caller, "POST", "/v1/chat/completions", json=body)


def pairs(count: int, seed: int) -> Iterator[tuple[str, str, str]]:
    """Prompts, each with a better and a worse answer."""
    rng = random.Random(seed)
    prompts = draw_prompts(split_combinations(0)[0], rng)
    while count:
        prompt = next(prompts)
        answers = [draw_answer(prompt, rng) for _ in range(2)]
        worse, better = sorted(
            answers, key=lambda answer: reference_scorer.score(prompt.text, answer)
        )
        if reference_scorer.score(prompt.text, worse) < reference_scorer.score(prompt.text, better):
            yield prompt.text, better, worse
            count -= 1


@pytest.fixture(scope="module")
def learning_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LearningServer]:
    directory = tmp_path_factory.mktemp("learning")
    root, feedback, access = (directory / name for name in ("root", "feedback.db", "access.toml"))
    root.mkdir()
    access.write_text(ACCESS)
    flags = [
        *("--feedback", feedback, "--proxy-root", root, "--access", access),
        *("--learn", "mine=own", "--learn", "ours=person"),
    ]
    log = directory / "server.log"
    with serving(log, *flags, environment=ENVIRONMENT) as server:
        yield LearningServer(server.url, root, feedback, server.process.pid)
        assert "Traceback" not in log.read_text()


def test_before_there_is_anything_to_learn_the_frozen_llm_answers(
    learning_server: LearningServer,
) -> None:
    for name in ("mine", "ours"):
        answer = learning_server.chat("alice", name)
        assert answer.status_code == 200, answer.text
        assert answer.json()["alignment"]["proxy"] is None
        assert "Assent-Proxy" not in answer.headers
        status = learning_server.learning("alice", name)
        assert (status["live"], status["last_pass"], status["versions"]) == (None, None, [])
    models = learning_server.ask("alice", "GET", "/v1/models").json()["data"]
    assert [model["id"] for model in models] == [MODEL, f"{MODEL}:mine", f"{MODEL}:ours"]


def test_ones_own_choices_become_ones_own_proxy_and_everybodys(
    learning_server: LearningServer,
) -> None:
    learning_server.choose("alice", 3, seed=1)  # the same choices below replace them
    learning_server.choose("alice", VERDICTS, seed=1)
    for name in ("mine", "ours"):
        wait_until(partial(learning_server.has_passed, "alice", name))
        # Its own pass may have run while they came in, with too few of them.
        learning_server.ask("root", "POST", f"/proxies/{name}/learn")
        status = learning_server.learning("alice", name)
        assert status["live"] is not None, status
        last_pass = status["last_pass"]
        assert (last_pass["rows"], last_pass["verdicts"]) == (VERDICTS + 3, VERDICTS)
        assert last_pass["left_out"] == {"that a later one replaces": 3}
        version, answer = status["live"], learning_server.chat("alice", name)
        assert (
            answer.json()["alignment"] | {"proxy": name, "version": version}
            == answer.json()["alignment"]
        )
        assert answer.headers["Assent-Proxy"] == f"{name}@{version}"
        newest = status["versions"][0]
        assert newest["version"] == version and newest["learned"] == name
        checkpoint = load(learning_server.root / newest["path"], base=identify(str(DEMO / "model")))
        assert (checkpoint.version, checkpoint.config.top_k) == (version, 16)
    by_name = learning_server.ask("alice", "POST", "/v1/chat/completions", json={
        "model": f"{MODEL}:mine", "messages": user("Hi"), "max_tokens": 4,
    }).json()  # fmt: skip
    assert by_name["model"] == f"{MODEL}:mine" and by_name["alignment"]["proxy"] == "mine"
    # Restarted and other servers find the proxies that all callers share.
    entries = json.loads((learning_server.root / "proxies.json").read_text())["proxies"]
    assert {*entries} == {"ours"}


def test_nobody_else_can_use_or_see_it(learning_server: LearningServer) -> None:
    status = learning_server.learning("bob", "mine")
    assert (status["live"], status["versions"]) == (None, [])
    assert learning_server.chat("bob", "mine").json()["alignment"]["proxy"] is None
    (owner,) = (path.name for path in (learning_server.root / ".learn" / "mine").iterdir())
    for name in (f"mine/{owner}", f"mine%2F{owner}", owner):
        assert learning_server.chat("bob", name).status_code == 404
    for path in ("/proxies", "/v1/models", "/metrics"):
        for caller in ("bob", "root"):
            assert owner not in learning_server.ask(caller, "GET", path).text
    proxies = learning_server.ask("bob", "GET", "/proxies").json()["data"]
    assert [proxy["name"] for proxy in proxies] == ["ours"]


def test_metrics_say_what_is_learned(learning_server: LearningServer) -> None:
    for name in ("mine", "ours"):
        assert metric(
            learning_server.url, f'assent_learning_passes_total{{proxy="{name}",result="live"}}'
        )
        assert metric(learning_server.url, f'assent_learning_verdicts{{proxy="{name}"}}') >= 10
        assert (
            0.5 < metric(learning_server.url, f'assent_learning_accuracy{{proxy="{name}"}}') <= 1.0
        )
        assert 0 < metric(learning_server.url, f'assent_learning_kl{{proxy="{name}"}}') <= 0.5
    wait_until(
        lambda: (
            metric(learning_server.url, 'assent_tokens_aligned_total{proxy="mine",version="own"}')
            > 0
        )
    )


def test_an_administrator_may_have_it_learn_at_once(learning_server: LearningServer) -> None:
    assert learning_server.ask("alice", "POST", "/proxies/ours/learn").status_code == 403
    answer = learning_server.ask("root", "POST", "/proxies/ours/learn")
    (result,) = LearningPasses.model_validate_json(answer.text).passes
    # Nothing is new, or a pass of its own ran while they came in, and what it made is still the best.
    assert result["verdicts"] == VERDICTS and result["version"] is None
    assert "the live version" in result["reason"]
    # Under any other name, too.
    (result,) = learning_server.ask(
        "root", "POST", "/proxies/other/learn", json={"from": ["person"]}
    ).json()["passes"]
    assert result["version"] is not None
    assert learning_server.chat("bob", "other").json()["alignment"]["proxy"] == "other"
    (result,) = learning_server.ask(
        "root", "POST", "/proxies/none/learn", json={"from": ["judge"]}
    ).json()["passes"]
    assert result["reason"].startswith("0 verdicts")
    paths_before = {*learning_server.root.iterdir()}
    for name in ("x!", "%2e%2e", ".lock", ".positions.db"):  # a name is a directory's
        for method in ("GET", "POST"):
            assert learning_server.ask("root", method, f"/proxies/{name}/learn").status_code == 400
    assert {*learning_server.root.iterdir()} == paths_before
    assert learning_server.ask("alice", "GET", "/proxies/unknown/learn").status_code == 404


def test_the_learners_process_may_die(learning_server: LearningServer) -> None:
    answered = threading.Event()

    def kill_learner() -> None:
        while not answered.wait(0.1):
            for process in psutil.Process(learning_server.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    if "training.learner" in process.cmdline():
                        process.kill()

    killer = threading.Thread(target=kill_learner)
    killer.start()
    answer = learning_server.ask("root", "POST", "/proxies/dying/learn", json={"from": ["person"]})
    answered.set()
    killer.join()
    (result,) = answer.json()["passes"]
    assert "process has ended" in result["error"]
    assert (
        metric(learning_server.url, 'assent_learning_passes_total{proxy="dying",result="error"}')
        == 1
    )
    (result,) = learning_server.ask("root", "POST", "/proxies/dying/learn").json()["passes"]
    assert result["version"] is not None
    assert learning_server.ask("root", "DELETE", "/proxies/dying").status_code == 200


def test_what_is_forgotten_is_gone_with_all_that_was_learned_of_it(
    learning_server: LearningServer,
) -> None:
    learning_server.choose("bob", 1, seed=2)
    assert learning_server.ask("bob", "DELETE", "/feedback?caller=alice").status_code == 403
    learn_directory = learning_server.root / ".learn"
    num_versions = len([*learn_directory.rglob("proxy.safetensors")])
    assert num_versions >= 3
    forgotten = learning_server.ask("alice", "DELETE", "/feedback").json()["forgotten"]
    assert forgotten == {"preferences": VERDICTS + 3, "answers": 0, "versions": num_versions}
    assert not [*learn_directory.rglob("proxy.safetensors")]
    with sqlite3.connect(learn_directory / ".positions.db") as positions_database:
        assert positions_database.execute("SELECT COUNT(*) FROM positions").fetchone() == (0,)
    with sqlite3.connect(learning_server.feedback) as feedback_database:
        assert feedback_database.execute("SELECT caller FROM preferences").fetchall() == [("bob",)]
    for name in ("mine", "ours"):
        assert learning_server.chat("alice", name).json()["alignment"]["proxy"] is None
    assert learning_server.chat("alice", "other").status_code == 404
    assert json.loads((learning_server.root / "proxies.json").read_text()) == {"proxies": {}}
    forgotten_again = learning_server.ask("root", "DELETE", "/feedback?caller=bob").json()[
        "forgotten"
    ]
    assert forgotten_again["preferences"] == 1


def test_the_simulated_user_of_the_examples(
    learning_server: LearningServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ASSENT_URL", learning_server.url)
    monkeypatch.setenv("ASSENT_API_KEY", KEYS["carol"])
    monkeypatch.setattr(sys, "argv", ["own_proxy.py", "--rounds", "1", "--prompts", "20"])
    runpy.run_path(str(REPOSITORY / "examples/own_proxy.py"), run_name="__main__")
    assert "characters an answer" in (output := capsys.readouterr().out)
    status = learning_server.learning("carol", "mine")
    # Two samples may be the same: of 20 pairs most are not.
    assert 10 <= status["last_pass"]["rows"] <= 20
    assert f"version {status['live']} serves" in output
