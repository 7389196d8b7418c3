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
    """The training's reward of each response, in transformers and float32."""
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
        # The training's coarser grid: 5e-4 of a probability, at a dozen tokens.
        assert verdict["probability"] == pytest.approx(expected, abs=0.01)
        assert verdict["orders"] == [verdict["probability"]] * 2
        assert {*verdict["principles"]} == {"proxy"}
    assert answer["usage"]["completion_tokens"] == len(RESPONSES)  # each is read once


def test_a_ranking_is_that_of_the_rewards(http: httpx.Client, rewards: list[float]) -> None:
    body = {"prompt": QUESTION, "responses": RESPONSES, "strategy": "round-robin", "seed": 1}
    record = http.post("/judge/rank", json=body | KIND).json()
    order = sorted(range(len(RESPONSES)), key=lambda i: -rewards[i])
    assert record["ranking"] == order


def test_the_best_of_several_by_a_proxy(http: httpx.Client) -> None:
    def complete(**fields: object) -> dict[str, object]:
        body = {"model": MODEL, "messages": TURNS, "max_tokens": 24, "seed": 1, **fields}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    best = complete(alignment={"best_of": 4, "judge": KIND})
    record = best["alignment"]["judge"]  # type: ignore[index]
    assert (record["kind"], record["principles"]) == ("proxy", [])
    samples = [choice["message"]["content"] for choice in complete(n=4)["choices"]]  # type: ignore[attr-defined]
    winner = best["choices"][0]["message"]["content"]  # type: ignore[index]
    assert winner == samples[record["ranking"][0]]
    # It is the best of all.
    body = {"prompt": QUESTION, "responses": samples, "strategy": "round-robin"}
    ranking = http.post("/judge/rank", json=body | KIND).json()["ranking"]
    assert winner == samples[ranking[0]]


@pytest.mark.parametrize(
    ("judge_fields", "status", "message"),
    [
        ({"kind": "proxy"}, 400, "go together"),
        ({"proxy": "aligned"}, 400, "go together"),
        ({"kind": "proxy", "proxy": "unknown"}, 404, "'unknown' is not loaded"),
        (KIND | {"principles": ["overall"]}, 400, "a proxy judge has none"),
        (KIND | {"rationale": True}, 400, "a proxy judge has only a score"),
    ],
)
def test_what_cannot_be(
    http: httpx.Client, judge_fields: dict[str, object], status: int, message: str
) -> None:
    pair = {"prompt": QUESTION, "response_a": "x", "response_b": "y"}
    answer = http.post("/judge", json=pair | judge_fields)
    assert answer.status_code == status and message in answer.text
    if "rationale" not in judge_fields:
        body = {
            "model": MODEL,
            "messages": TURNS,
            "alignment": {"best_of": 2, "judge": judge_fields},
        }
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == status and message in answer.text
