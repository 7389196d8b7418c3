"""A loaded proxy as the judge: by how much likelier it makes one response than another."""

import math

import httpx
import pytest
import torch

from judge.prompts import response_ids
from tests.server.conftest import DEMO, MODEL
from tests.training.models import frozen_of
from training.reward_loading import load_reward
from training.rewards import Sample

QUESTION = "How do I look after my freezer?"
TURNS = [{"role": "user", "content": QUESTION}]
RESPONSES = [
    "Go.",
    "To look after your freezer, pull the plug first.",
    "No idea. Clean it once a week.",
    "To look after your freezer, clean it once a week.",
]
BETA = 0.3
KIND = {"kind": "proxy", "proxy": "aligned"}


@pytest.fixture(scope="module")
def rewards() -> list[float]:
    """What training makes of the responses, in transformers and float32."""
    frozen = frozen_of(DEMO / "model")
    reward = load_reward(str(DEMO / "proxies" / "aligned"), frozen)
    samples = [Sample([], "", *response_ids(frozen.tokenizer, TURNS, text)) for text in RESPONSES]
    with torch.inference_mode():
        return reward(samples).tolist()


def test_verdicts_are_those_of_the_trainings_reward(
    http: httpx.Client, rewards: list[float]
) -> None:
    pairs = [(0, 1), (1, 2), (3, 0)]
    body = {"pairs": [
        {"prompt": QUESTION, "response_a": RESPONSES[a], "response_b": RESPONSES[b]}
        for a, b in pairs
    ]}  # fmt: skip
    answer = http.post("/judge", json=body | KIND).json()
    for (a, b), verdict in zip(pairs, answer["verdicts"], strict=True):
        expected = 1 / (1 + math.exp(-BETA * (rewards[a] - rewards[b])))
        # The coarser grid of the training's law: 5e-4 of a probability, at a dozen tokens.
        assert verdict["probability"] == pytest.approx(expected, abs=0.01)
        assert verdict["orders"] == [verdict["probability"]] * 2
        assert {*verdict["principles"]} == {"proxy"}
    assert answer["usage"]["completion_tokens"] == len(RESPONSES)  # each is read once


def test_a_ranking_is_that_of_the_rewards(http: httpx.Client, rewards: list[float]) -> None:
    body = {"prompt": QUESTION, "responses": RESPONSES, "strategy": "round-robin", "seed": 1}
    found = http.post("/judge/rank", json=body | KIND).json()
    order = sorted(range(len(RESPONSES)), key=lambda i: -rewards[i])
    assert found["ranking"] == order


def test_the_best_of_several_by_a_proxy(http: httpx.Client) -> None:
    def ask(**more: object) -> dict[str, object]:
        body = {"model": MODEL, "messages": TURNS, "max_tokens": 24, "seed": 1, **more}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    best = ask(alignment={"best_of": 4, "judge": KIND})
    judged = best["alignment"]["judge"]  # type: ignore[index]
    assert (judged["kind"], judged["principles"]) == ("proxy", [])
    samples = [choice["message"]["content"] for choice in ask(n=4)["choices"]]  # type: ignore[attr-defined]
    winner = best["choices"][0]["message"]["content"]  # type: ignore[index]
    assert winner == samples[judged["ranking"][0]]
    # Each the best of those that it met, and so of all.
    body = {"prompt": QUESTION, "responses": samples, "strategy": "round-robin"}
    ranking = http.post("/judge/rank", json=body | KIND).json()["ranking"]
    assert winner == samples[ranking[0]]


@pytest.mark.parametrize(
    ("more", "status", "said"),
    [
        ({"kind": "proxy"}, 400, "go together"),
        ({"proxy": "aligned"}, 400, "go together"),
        ({"kind": "proxy", "proxy": "unknown"}, 404, "'unknown' is not loaded"),
        (KIND | {"principles": ["overall"]}, 400, "a proxy judge has none"),
        (KIND | {"rationale": True}, 400, "a proxy judge has only a score"),
    ],
)
def test_what_cannot_be(
    http: httpx.Client, more: dict[str, object], status: int, said: str
) -> None:
    pair = {"prompt": QUESTION, "response_a": "x", "response_b": "y"}
    answer = http.post("/judge", json=pair | more)
    assert answer.status_code == status and said in answer.text
    if "rationale" not in more:
        body = {"model": MODEL, "messages": TURNS, "alignment": {"best_of": 2, "judge": more}}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status and said in answer.text
