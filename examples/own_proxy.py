"""A user who prefers short answers, and a server that learns it.

    make serve DEMO=toy ARGS="--feedback runs/feedback.db --proxy-root runs/proxies --learn mine=own"
    .venv/bin/python examples/own_proxy.py

The user repeatedly requests two answers from its own proxy, if there is one yet, and sends which it prefers. To try
another taste, change `taste`; to try another LLM, change `PROMPTS`.
"""

import argparse
import os
import random
import time
from statistics import fmean
from typing import Any

import httpx
from openai import OpenAI

URL = os.environ.get("ASSENT_URL", "http://127.0.0.1:8000")
KEY = os.environ.get("ASSENT_API_KEY", "none")
THINGS = (
    "bike", "camera", "cat", "dog", "drill", "freezer", "guitar", "kettle", "lamp", "laptop", "piano", "rose", "sofa",
    "tent", "violin",
)  # fmt: skip
PROMPTS = [
    question.format(thing)
    for thing in THINGS
    for question in (
        "How do I look after my {}?",
        "Is my {} worth keeping?",
        "Can I lend out my {}?",
    )
]


def taste(text: str) -> float:
    """Higher is better."""
    return -len(text)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="in each round")
    options = parser.parse_args()
    headers = {"Authorization": f"Bearer {KEY}"}
    with (
        OpenAI(base_url=f"{URL}/v1", api_key=KEY) as client,
        httpx.Client(base_url=URL, headers=headers, timeout=600) as http,
    ):
        teach(client, http, options.rounds, options.prompts)


def teach(client: OpenAI, http: httpx.Client, num_rounds: int, num_prompts: int) -> None:
    """Prompts and choices, as a user sends them."""
    model = client.models.list().data[0].id
    alignment = {"alignment": {"proxy": "mine"}}
    sent = 0
    for round_number in range(num_rounds):
        lengths: list[int] = []
        for prompt in random.sample(PROMPTS, num_prompts):
            answer = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": prompt}],
                n=2,
                max_tokens=64,
                extra_body=alignment,
            )
            texts = [choice.message.content or "" for choice in answer.choices]
            lengths += map(len, texts)
            if taste(texts[0]) != taste(texts[1]):
                choice = max((0, 1), key=lambda i: taste(texts[i]))
                chosen = {"request_id": answer.id, "choice": choice}
                http.post("/feedback", json=chosen).raise_for_status()
                sent += 1
        print(f"round {round_number + 1}: {fmean(lengths):.0f} characters an answer")
        learned = wait_for_pass(http, sent)
        print(f"  {learned['last_pass']['reason']}; version {learned['live']} serves")


def wait_for_pass(http: httpx.Client, sent: int) -> Any:
    """Wait for a learning pass over most verdicts. The server starts one when their number has grown by half."""
    while True:
        learned = http.get("/proxies/mine/learn").raise_for_status().json()
        if learned["last_pass"] and learned["last_pass"].get("rows", 0) >= sent / 1.5:
            return learned
        time.sleep(1)


if __name__ == "__main__":
    main()
